"""A record, which is a line of metrics, and the protocol of a sink."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch

from fnrun.core.position import Frame
from fnrun.core.state import LoopState
from fnrun.sinks.media import Media

#: The names of a line's fields besides metrics, in each sink.
FIELDS = frozenset({"ticks", "at", "step", "epoch", "clock"})


class Record(NamedTuple):
    """One line of metrics.

    - `order`: `Position.order`.
    - `step`, `epoch`: `state.step`, and the running epoch, from 1.
    - `metrics`: numbers, lists, and images, histograms and texts, by name.
    - `clock`: times in seconds and memory in MiB, which differ from run to run.
    - `of=""`: "round 3" for a line of a repeat, "whole loop" for one of a sequence or a workflow.
    """

    order: tuple[int, ...]
    step: int
    epoch: int
    metrics: dict[str, Any]
    clock: dict[str, float]
    of: str = ""


class Sink(Protocol):
    """A place for records.

    - `open(state)`: afterwards it has what an uninterrupted run would have written up to that state. While it is open, this does nothing.
    - `write(record)`: adds a line.
    - `flush()`: returns when all lines are on disk.
    - `close()`: may be called twice. A closed sink may be opened again.
    """

    def open(self, state: LoopState, /) -> None: ...
    def write(self, record: Record, /) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


def record(state: LoopState, metrics: Mapping[str, Any], clock: Mapping[str, float] | None = None) -> Record:
    """The line of `metrics` at `state`: names get the loop's path, tensors become numbers and lists. Waits for the device.

    Raises ValueError for a metric that has the name of another field.
    """
    path = state.position.frames[-1].path
    streams = state.position.streams
    cursors = [streams[path]] if path in streams else streams.values()
    epochs = [cursor.epoch + (cursor.batch > 0) for cursor in cursors]  # the pass that the tick belongs to, from 1
    prefix = f"{path}/" if path else ""
    named = {prefix + name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in metrics.items()}
    check_names(named)
    return Record(state.position.order, state.step, max(epochs, default=0), named, dict(clock or {}), _of(state.position.frames[-1]))


def _of(frame: Frame) -> str:
    return f"round {frame.ticks}" if frame.kind == "repeat" else "whole loop" if frame.kind in ("sequence", "workflow") else ""


def check_names(metrics: Mapping[str, Any]) -> None:
    """Raise ValueError for a metric that has the name of another field."""
    taken = sorted(name for name in metrics if name in FIELDS or name.startswith("clock/"))
    if taken:
        raise ValueError(f"log: metrics cannot be named {taken}: the line has fields of these names; call them something else")


def require(sink: str, module: str, extra: str) -> None:
    """Raise ModuleNotFoundError, with the extra to install, where `module` is missing: before the first line."""
    if importlib.util.find_spec(module) is None:
        raise ModuleNotFoundError(f"observers.{sink} needs {module}: pip install 'fnrun[{extra}]'", name=module)


def numbers(record: Record) -> dict[str, float]:
    """The metrics that are single numbers."""
    return {name: value for name, value in record.metrics.items() if isinstance(value, (int, float))}


def media(record: Record) -> dict[str, Media]:
    """The metrics that are images, histograms and texts."""
    return {name: value for name, value in record.metrics.items() if isinstance(value, Media)}
