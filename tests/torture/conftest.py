"""Modules that do something when they are imported."""

collect_ignore = ["warm.py"]
