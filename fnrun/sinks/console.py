"""Lines for people."""

from __future__ import annotations

import logging
import math
import shutil
import sys
from collections.abc import Sequence
from typing import Any

from fnrun.core.state import LoopState
from fnrun.core.tables import clock_time, printable
from fnrun.sinks.base import Record, Sink, numbers

logger = logging.getLogger("fnrun")

INDENT = 4  # of a wrapped line


class StdoutHandler(logging.StreamHandler):
    """Writes to the current `sys.stdout`, so that lines appear above a live display and not in it.

    In a terminal a long line of metrics is wrapped between metrics; in a file it is one line.
    """

    @property
    def stream(self) -> Any:
        return sys.stdout

    @stream.setter
    def stream(self, value: Any) -> None:
        pass

    def format(self, record: logging.LogRecord) -> str:
        text = printable(super().format(record))  # names and reasons may come from a stranger's checkpoint
        return wrapped(text, shutil.get_terminal_size().columns) if getattr(record, "metrics", False) and self.stream.isatty() else text

    def emit(self, record: logging.LogRecord) -> None:
        if sys.stdout is not None:
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], BrokenPipeError):  # nobody reads any more, and training goes on
            super().handleError(record)


def wrapped(line: str, width: int) -> str:
    """`line` wrapped to `width` columns, at double spaces.

    >>> print(wrapped("epoch 1   step 50     loss 0.5123   accuracy 0.8812", 30))
    epoch 1   step 50
        loss 0.5123
        accuracy 0.8812
    """
    first, *rest = line.split("  ")
    lines = [first]
    for part in rest:
        if part and len(lines[-1]) + 2 + len(part) > width:
            lines.append(" " * INDENT + part.strip())
        else:
            lines[-1] += "  " + part
    return "\n".join(line.rstrip() for line in lines)


class _Console:
    def __init__(self, hide: Sequence[str], clock: Sequence[str]) -> None:
        self.hide, self.clock = tuple(hide), tuple(clock)

    def __str__(self) -> str:
        return "console"

    def open(self, state: LoopState) -> None:
        if not logger.hasHandlers():
            logger.addHandler(StdoutHandler())
        if logger.level == logging.NOTSET:  # else the root's level counts, which hides lines after a plain `logging.basicConfig()`
            logger.setLevel(logging.INFO)

    def write(self, record: Record) -> None:
        groups: dict[str, list[str]] = {}
        for name, value in numbers(record).items():
            group, _, short = name.rpartition("/")
            if short not in self.hide:
                groups.setdefault(group, []).append(f"{short} {shown(value)}")
        parts = [f"epoch {record.epoch}".ljust(8), f"step {record.step}".ljust(9)]
        parts += [record.of] if record.of else []
        for group, values in groups.items():
            parts += [f"{group}: {values[0]}" if group else values[0], *values[1:]]
        parts += [CLOCK[name](record.clock[name]) for name in self.clock if name in record.clock]
        logger.info("%s", "  ".join(parts).rstrip(), extra={"metrics": True})

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


#: The fields of a clock that can be shown, with their formats.
CLOCK = {
    "seconds_per_tick": lambda value: f"{1e3 * value:.1f} ms a step",
    "data_seconds_per_tick": lambda value: f"{1e3 * value:.1f} ms for data",
    "peak_mib": lambda value: f"{value:,.0f} MiB",
    "peak_cuda_mib": lambda value: f"{value:,.0f} MiB on the GPU",
    "elapsed": lambda value: f"after {clock_time(value)}",
    "eta": lambda value: f"{clock_time(value)} left",
}


def console(hide: Sequence[str] = ("grad_norm", "clipped"), clock: Sequence[str] = ("eta",)) -> Sink:
    """Lines for people, through the standard logger `fnrun` (to the standard output where nobody has configured logging).

    - `hide=("grad_norm", "clipped")`: the last names of metrics that are left out.
    - `clock=("eta",)`: the fields of the clock that are shown, any of "seconds_per_tick", "data_seconds_per_tick", "peak_mib",
      "peak_cuda_mib", "elapsed" and "eta". Raises ValueError for others.
    """
    if unknown := [name for name in clock if name not in CLOCK]:
        raise ValueError(f"console: clock has no {unknown}; there are {', '.join(CLOCK)}")
    return _Console(hide, clock)


def shown(value: float) -> str:
    """A number in six columns where that is enough, so that lines are aligned.

    >>> [shown(value) for value in (0.51234, 12.3456, 3e-4, 123456.0, 7, float("nan"))]
    ['0.5123', '12.346', '3.00e-4', '1.23e+5', '7     ', 'nan   ']
    """
    if isinstance(value, int) or not math.isfinite(value) or value == 0:
        text = f"{value:g}" if not isinstance(value, int) else str(value)
    elif 1e-2 <= abs(value) < 1e4:
        text = f"{value:.{4 - max(0, math.floor(math.log10(abs(value))))}f}"
    else:
        digits, _, exponent = f"{value:.2e}".partition("e")
        text = f"{digits}e{exponent[0]}{exponent[1:].lstrip('0')}"
    return text.ljust(6)
