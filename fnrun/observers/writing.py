"""An observer that writes records to sinks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fnrun.core.environment import rank
from fnrun.core.state import LoopState
from fnrun.sinks import Record, Sink, record


class Writer:
    """Opens, flushes and closes its sinks with itself. Where several processes train together, the first one writes.

    Two observers may have the same sinks: a sink that is open is opened again to no effect.
    """

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self.sinks = tuple(sinks)
        self.writes = False

    def open(self, program: Any, state: LoopState) -> None:
        self.writes = rank() == 0
        for sink in self._opened():
            sink.open(state)

    def write(self, state: LoopState, metrics: Mapping[str, Any], clock: Mapping[str, float] | None = None) -> Record | None:
        """Write a record and return it; None where this process does not write."""
        line = record(state, metrics, clock) if self.writes else None
        for sink in self._opened():
            sink.write(line)
        return line

    def flush(self) -> None:
        for sink in self._opened():
            sink.flush()

    def close(self, state: LoopState, reason: str | BaseException | None) -> None:
        for sink in self._opened():
            sink.close()

    def _opened(self) -> Sequence[Any]:
        return self.sinks if self.writes else ()
