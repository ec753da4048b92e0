"""Observers: what watches a training and changes nothing. One concept a file.

They see the finished state of each tick of the loop that they are given to, and its computed metrics.
"""

from fnrun.observers.log import log
from fnrun.observers.progress import progress
from fnrun.observers.saving import checkpoint
from fnrun.observers.sinks import console, jsonl

__all__ = ["checkpoint", "console", "jsonl", "log", "progress"]
