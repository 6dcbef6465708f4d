"""Where the time of a training step goes: `mae-fast profile`."""
