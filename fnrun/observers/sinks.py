"""Where records go. A sink opens at a state and must then hold what a run that was never interrupted would have written up to it."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

from fnrun.state import LoopState

logger = logging.getLogger("fnrun")


class Record(NamedTuple):
    """One line: when in the run (`Position.order`, step, and the epoch at work, from 1), metrics by name, and what was timed."""

    order: tuple[int, ...]
    step: int
    epoch: int
    metrics: dict[str, Any]
    clock: dict[str, float]


class Sink(Protocol):
    """A place for records. `flush` returns when what was written is on disk."""

    def open(self, state: LoopState, /) -> None: ...
    def write(self, record: Record, /) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


class StdoutHandler(logging.StreamHandler):
    """Writes to what `sys.stdout` is at the time, so that lines appear above a live progress bar and not in it."""

    @property
    def stream(self) -> Any:
        return sys.stdout

    @stream.setter
    def stream(self, value: Any) -> None:
        pass

    def emit(self, record: logging.LogRecord) -> None:
        if sys.stdout is not None:
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], BrokenPipeError):  # nobody reads any more, and training goes on
            super().handleError(record)


class _Console:
    def __init__(self, hide: Sequence[str]) -> None:
        self.hide = tuple(hide)

    def open(self, state: LoopState) -> None:
        if not logger.hasHandlers():
            logger.addHandler(StdoutHandler())
            logger.setLevel(logging.INFO)

    def write(self, record: Record) -> None:
        groups: dict[str, list[str]] = {}
        for name, value in record.metrics.items():
            group, _, short = name.rpartition("/")
            if isinstance(value, (int, float)) and short not in self.hide:
                groups.setdefault(group, []).append(f"{short} {_short(value)}")
        parts = [f"{group}: {' '.join(values)}" if group else " ".join(values) for group, values in groups.items()]
        logger.info("epoch %d  step %d  %s", record.epoch, record.step, "  ".join(parts))

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


def console(hide: Sequence[str] = ("grad_norm", "clipped")) -> Sink:
    """Lines for people, through the standard logger `fnrun` (to the standard output where nobody has configured logging), without `hide`."""
    return _Console(hide)


def _short(value: float) -> str:
    if isinstance(value, int) or not math.isfinite(value) or value == 0:
        return f"{value:g}"
    return f"{value:.4f}" if 1e-2 <= abs(value) < 1e4 else f"{value:.2e}"


class _JsonLines:
    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[str] | None = None

    def open(self, state: LoopState) -> None:
        if self._file is None:
            with _naming(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._cut(state.position.order)
                self._file = self.path.open("a", encoding="utf-8")

    def _cut(self, order: tuple[int, ...]) -> None:
        """Keep the lines up to `order`: what a killed run wrote after its last checkpoint comes again."""
        if not self.path.exists():
            return
        with self.path.open("r+b") as file:
            file.truncate(sum(_kept(file, order)))
            os.fsync(file.fileno())

    def write(self, record: Record) -> None:
        assert self._file is not None, "open the sink first"
        ticks, *own = record.order
        place = {"ticks": ticks, "at": ".".join(map(str, own)), "step": record.step, "epoch": record.epoch}
        taken = sorted({*place, "clock"} & set(record.metrics))
        if taken:
            raise ValueError(f"{self.path.name}: metrics cannot be named {taken}: the line has fields of these names")
        line = {**place, **{name: _plain(value) for name, value in record.metrics.items()}, "clock": record.clock}
        with _naming(self.path):
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()  # a killed process loses nothing; a power cut nothing that came before a checkpoint (`flush`)

    def flush(self) -> None:
        if self._file is not None:
            with _naming(self.path):
                os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self.flush()
            self._file.close()
            self._file = None


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """A full disk does not say which file it is about."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def _kept(file: IO[bytes], order: tuple[int, ...]) -> Iterator[int]:
    for line in file:
        try:
            record = json.loads(line)
            at = (record["ticks"], *(int(n) for n in record["at"].split(".") if n))
        except (ValueError, KeyError, TypeError, AttributeError):
            return  # the line that was being written when the power went
        if not line.endswith(b"\n") or at > order:
            return
        yield len(line)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"  # what `float` reads back; JSON has no such numbers
    return value


def jsonl(path: str | Path) -> Sink:
    """One JSON object a line: `ticks`, `at`, `step`, `epoch`, metrics by name, and an object `clock` with everything that was timed.

    `ticks` and `at` (the finished ticks of each open loop, outermost first) order the lines of a run. When a run is resumed, lines that are
    later than its state are cut off, for they will be written again. NaN and infinities are the strings that `float` reads.
    """
    return _JsonLines(Path(path))
