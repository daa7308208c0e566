"""Recipes: one file each, with the settings that differ from default.py."""
