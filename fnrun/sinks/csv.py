"""A table for spreadsheets and data frames."""

from __future__ import annotations

import csv as table
import io
import json
from pathlib import Path
from typing import Any

from fnrun.core import files
from fnrun.core.documents import jsonable
from fnrun.core.state import LoopState
from fnrun.sinks.base import Record, Sink
from fnrun.sinks.lines import OnDisk, naming, order_of, position_fields
from fnrun.sinks.media import Media

PLACE = ("ticks", "at", "step", "epoch")


class _Csv(OnDisk):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._columns: list[str] = []

    def open(self, state: LoopState) -> None:
        if self._file is None:
            with naming(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                rows = self._rows(state.position.order)
                # A column that only cut rows have comes again in its order.
                used = {name for row in rows for name, value in row.items() if value != "" or name in PLACE}
                self._rewrite(rows, [name for name in rows[0] if name in used] if rows else [])

    def _rows(self, order: tuple[int, ...] | None = None) -> list[dict[str, str]]:
        """The rows up to `order`. Later ones are written again, and so is one that a power cut left half written."""
        rows: list[dict[str, str]] = []
        if self.path.exists():
            with self.path.open(newline="", encoding="utf-8") as file:
                text = file.read()
            for row in table.DictReader(io.StringIO(text[: text.rfind("\n") + 1], newline="")):
                try:
                    late = order is not None and order_of(row) > order
                except (ValueError, KeyError, TypeError, AttributeError):
                    break
                if late or None in row.values():
                    break
                rows.append(row)
        return rows

    def _rewrite(self, rows: list[dict[str, str]], columns: list[str]) -> None:
        """Replace the file as a whole."""
        if self._file is not None:
            self._file.close()
        self._columns = columns
        lines = io.StringIO(newline="")
        if self._columns:
            writer = table.DictWriter(lines, self._columns, extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        files.write(self.path, lines.getvalue().encode())
        self._file = files.opened(self.path, "a", newline="", encoding="utf-8")

    def write(self, record: Record) -> None:
        assert self._file is not None, "open the sink first"
        row = position_fields(record)
        row.update((name, _cell(value)) for name, value in record.metrics.items() if not isinstance(value, Media))
        row.update((f"clock/{name}", value) for name, value in record.clock.items())
        with naming(self.path):
            if fresh := [name for name in row if name not in self._columns]:
                self._rewrite(self._rows(), [*self._columns, *fresh])
            table.DictWriter(self._file, self._columns, lineterminator="\n").writerow(row)
            self._file.flush()


def _cell(value: Any) -> Any:
    if isinstance(value, (int, float)):
        return repr(value)
    return json.dumps(jsonable(value)) if isinstance(value, (list, tuple, dict)) else value


def csv(path: str | Path) -> Sink:
    """A row for each line, with a column for each metric and each field of the clock (`clock/eta`). A vector is a JSON list.

    A new metric gets a column after the others. When a run is resumed, rows that are later than its state are cut off.
    """
    return _Csv(files.local_path(path))
