"""Measuring: `mae-fast bench`."""
