"""Metrics, averaged over a window of ticks, to one or several sinks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from fnrun import metrics as folds
from fnrun.observers.sinks import Record, Sink, console
from fnrun.state import LoopState, due


class _Log:
    def __init__(self, every: int, to: Sequence[Sink], name: str) -> None:
        self.every, self.sinks, self.name = every, tuple(to), name
        self._began = self._last = 0.0
        self._ticks = 0

    def open(self, program: Any, state: LoopState) -> None:
        self._began = self._last = time.perf_counter()
        self._ticks = 0
        for sink in self.sinks:
            sink.open(state)

    def fold(self, folded: Any, before: LoopState, metrics: Any, examples: int) -> Any:
        if not isinstance(metrics, dict):
            return None
        return folds.fold(None if due(before, self.every) else folded, metrics, examples)

    def __call__(self, state: LoopState, metrics: dict[str, Any]) -> None:
        self._ticks += 1
        if not due(state, self.every):
            return
        frame = state.position.frames[-1]
        window = frame.folds.get(self.name)
        now = time.perf_counter()
        clock = {"time": time.time(), "elapsed": now - self._began, "seconds_per_tick": (now - self._last) / self._ticks}
        self._last, self._ticks = now, 0
        if window:
            record = self._record(state, frame.loop.partition(" ")[2], folds.compute(window), clock)
            for sink in self.sinks:
                sink.write(record)

    def _record(self, state: LoopState, path: str, values: dict[str, Any], clock: dict[str, float]) -> Record:
        prefix = path.strip("/") + "/" if path.strip("/") else ""
        streams = state.position.streams
        cursors = [streams[prefix[:-1]]] if prefix[:-1] in streams else streams.values()
        epochs = [cursor.epoch + (cursor.batch > 0) for cursor in cursors]  # the pass that the tick belongs to, from 1
        named = {prefix + name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in values.items()}
        return Record(state.position.order, state.step, max(epochs, default=0), named, clock)

    def flush(self) -> None:
        for sink in self.sinks:
            sink.flush()

    def close(self, state: LoopState, reason: str | BaseException | None) -> None:
        for sink in self.sinks:
            sink.close()


def log(every: int = 1, *, to: Sequence[Sink] | None = None, name: str = "log") -> Any:
    """A line of metrics on each n-th step (in a loop of training steps) or round (elsewhere), to the sinks `to`: by default the console.

    A line holds the means over the ticks since the line before, or since the loop began. The window is in the state: after a resume the next
    line is the one that an uninterrupted run writes. Names carry the loop's place: `loss` in the sequence's member `train` is `train/loss`.
    Values are read, and the device waited for, only when a line is due.
    """
    if every < 1:
        raise ValueError(f"log: every is at least 1, not {every!r}")
    return _Log(every, [console()] if to is None else to, name)
