"""One file a stage: its `items(setting)` are run in order, the most valuable first."""
