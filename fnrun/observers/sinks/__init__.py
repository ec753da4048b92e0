"""Where records go. A sink opens at a state and must then hold what a run that was never interrupted would have written up to it."""

from fnrun.observers.sinks.base import Record, Sink, record
from fnrun.observers.sinks.console import StdoutHandler, console
from fnrun.observers.sinks.csv import csv
from fnrun.observers.sinks.jsonl import jsonl
from fnrun.observers.sinks.mlflow import mlflow
from fnrun.observers.sinks.tensorboard import tensorboard
from fnrun.observers.sinks.trackio import trackio
from fnrun.observers.sinks.wandb import wandb

__all__ = ["Record", "Sink", "StdoutHandler", "console", "csv", "jsonl", "mlflow", "record", "tensorboard", "trackio", "wandb"]
