"""Sinks of records. One that is opened at a state must then have what an uninterrupted run would have written up to it."""

from fnrun.sinks.base import Record, Sink, record
from fnrun.sinks.console import StdoutHandler, console
from fnrun.sinks.csv import csv
from fnrun.sinks.jsonl import jsonl
from fnrun.sinks.mlflow import mlflow
from fnrun.sinks.tensorboard import tensorboard
from fnrun.sinks.trackio import trackio
from fnrun.sinks.wandb import wandb

__all__ = ["Record", "Sink", "StdoutHandler", "console", "csv", "jsonl", "mlflow", "record", "tensorboard", "trackio", "wandb"]
