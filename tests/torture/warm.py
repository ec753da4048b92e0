"""Imported by the fork server: what takes a second to import, and starts no thread before it is used."""

import fnrun.checkpoint  # noqa: F401
