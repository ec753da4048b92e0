"""Observers: what watches a training and changes nothing. One concept a file.

They see the finished state of each tick of the loop that they are given to, and its computed metrics.
"""

from fnrun.observers.log import log
from fnrun.observers.memory import memory
from fnrun.observers.nonfinite import debug_nonfinite
from fnrun.observers.predicting import predictions
from fnrun.observers.profiling import profile
from fnrun.observers.progress import progress
from fnrun.observers.saving import checkpoint
from fnrun.observers.watching import watch, watch_gradients
from fnrun.sinks import Record, Sink, console, csv, jsonl, mlflow, record, tensorboard, trackio, wandb
from fnrun.sinks.media import Histogram, Image, Text, histogram

__all__ = [
    "Histogram",
    "Image",
    "Record",
    "Sink",
    "Text",
    "checkpoint",
    "console",
    "csv",
    "debug_nonfinite",
    "histogram",
    "jsonl",
    "log",
    "memory",
    "mlflow",
    "predictions",
    "profile",
    "progress",
    "record",
    "tensorboard",
    "trackio",
    "wandb",
    "watch",
    "watch_gradients",
]
