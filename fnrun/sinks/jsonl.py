"""JSON lines, for programs."""

from __future__ import annotations

from pathlib import Path

from fnrun.core import files
from fnrun.core.documents import jsonable
from fnrun.core.state import LoopState
from fnrun.sinks.base import Record, Sink
from fnrun.sinks.lines import Lines, position_fields
from fnrun.sinks.media import Media


class _JsonLines(Lines):
    def open(self, state: LoopState) -> None:
        self.begin(state.position.order)

    def write(self, record: Record) -> None:
        values = {name: jsonable(value) for name, value in record.metrics.items() if not isinstance(value, Media)}
        self.append({**position_fields(record), **values, "clock": record.clock})


def jsonl(path: str | Path) -> Sink:
    """One JSON object for each line: `ticks`, `at`, `step`, `epoch`, metrics by name, and the object `clock`.

    `ticks` and `at` (the finished ticks of each open loop, outermost first) order the lines of a run. When a run is resumed, lines that are
    later than its state are cut off, and written again. NaN and infinities are the strings that `float` reads.
    """
    return _JsonLines(files.local_path(path))
