"""The sinks of an observer that writes records of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fnrun.core.state import LoopState
from fnrun.observers.ranks import rank
from fnrun.sinks import Sink, record


class Writing:
    """Opened, flushed and closed with the observer. Where several processes train together, the first one writes.

    A log may have been given the same sinks: a sink that is open is opened again to no effect.
    """

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._all, self._sinks = tuple(sinks), ()

    def open(self, state: LoopState) -> None:
        self._sinks = self._all if rank() == 0 else ()
        for sink in self._sinks:
            sink.open(state)

    def write(self, state: LoopState, metrics: Mapping[str, Any], clock: Mapping[str, float] | None = None) -> None:
        if self._sinks:
            line = record(state, metrics, clock)
            for sink in self._sinks:
                sink.write(line)

    def flush(self) -> None:
        for sink in self._sinks:
            sink.flush()

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()
