"""Observers: functions of a state and its metrics that watch a training and change nothing. One concept a file.

An observer sees the finished state of each tick of its loop, and the computed metrics. What it folds is in the state.
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
