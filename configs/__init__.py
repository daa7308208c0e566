"""The recipes: one file each, deltas from default.py."""
