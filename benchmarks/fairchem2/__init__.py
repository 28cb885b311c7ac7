"""Measurements on fairchem 2.x."""
