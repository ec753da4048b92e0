"""Interrupts: what ends a call between two ticks from outside, `() -> str | None`, and leaves no trace in the state.

`fit(state, data, interrupt=...)` asks between ticks at every depth; text ends the call, and says why. Called again, the program goes on.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

Interrupt = Callable[[], str | None]

#: `2h30m`: in this order, each at most once.
_DURATION = re.compile("".join(rf"(?:(\d+(?:\.\d+)?){unit})?" for unit in "dhms"))


def seconds(duration: str) -> float:
    """The seconds of a duration in days, hours, minutes and seconds. Raises ValueError for what is none, or none above 0.

    >>> seconds("50m"), seconds("2h30m"), seconds("90s"), seconds("1d"), seconds("1.5h")
    (3000.0, 9000.0, 90.0, 86400.0, 5400.0)
    """
    found = _DURATION.fullmatch(duration)
    total = sum(float(number or 0) * unit for number, unit in zip(found.groups(), (86400, 3600, 60, 1), strict=True)) if found else 0.0
    if not total > 0:
        raise ValueError(f"{duration!r} is no time: write it as 50m, 2h30m, 90s or 1d")
    return total


def deadline(
    duration: str | None = None,
    *,
    hours: float = 0.0,
    minutes: float = 0.0,
    seconds: float = 0.0,
    spent: float = 0.0,
    clock: Callable[[], float] = time.monotonic,
) -> Interrupt:
    """An interrupt so much time from now: the step under way is finished, and the state that the call returns can go on later.

    The time is in numbers, or a text such as `2h30m`; `spent` seconds of it are over. `clock()` is in seconds. Leave time for the last step and
    checkpoint. Raises ValueError where there is no time from the beginning.

    >>> now = [0.0]
    >>> interrupt = deadline(minutes=50, clock=lambda: now[0])
    >>> interrupt()
    >>> now[0] = 3000.0
    >>> interrupt()
    'the deadline of 50 minutes has passed'
    """
    limit = 3600 * hours + 60 * minutes + seconds + (0.0 if duration is None else _seconds(duration))
    if not limit > 0:
        raise ValueError("deadline: how long? Give hours, minutes or seconds above 0")
    if math.isnan(spent):
        raise ValueError("deadline: spent is a number of seconds, not NaN, which never passes")
    end = clock() + limit - spent
    parts = [f"{value:g} {unit}" for value, unit in ((hours, "hours"), (minutes, "minutes"), (seconds, "seconds")) if value]
    text = f"the deadline of {' '.join(parts if duration is None else [duration])} has passed"
    return lambda: text if clock() >= end else None


_seconds = seconds  # in `deadline` the name is a parameter's


def any_of(*interrupts: Interrupt) -> Interrupt:
    """Several interrupts as one: the text of the first that has any; those behind it are not asked then.

    >>> any_of(lambda: None, lambda: "the queue is empty", lambda: "never asked")()
    'the queue is empty'
    """
    return lambda: next((text for interrupt in interrupts if (text := interrupt()) is not None), None)


class Signals:
    """SIGINT (Ctrl-C), SIGTERM and SIGUSR1 as an interrupt, while it is listening: the name of the first that came.

    Ctrl-C a second time ends the process at once. The others are a scheduler's, which repeats them and has SIGKILL for that: however many come,
    the step under way and the save have the time that it gives. Only a main thread can listen.
    """

    #: Where the platform has it: Slurm's early warning.
    LISTENED = tuple(signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGUSR1") if name in signal.Signals.__members__)

    def __init__(self) -> None:
        self.first: signal.Signals | None = None

    def __call__(self) -> str | None:
        return self.first.name if self.first is not None else None

    def _handle(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        if self.first is None:
            self.first = signal.Signals(number)
            again = "; Ctrl-C once more to stop at once" if number == signal.SIGINT else ""
            with contextlib.suppress(OSError):  # not through logging: a handler may hold its lock where the signal arrives
                os.write(2, f"\n{self.first.name}: finishing what is under way and saving{again}\n".encode())

    @contextlib.contextmanager
    def listening(self) -> Iterator[Signals]:
        """Within it signals come here; then they go where they went before."""
        before = {number: signal.signal(number, self._handle) for number in self.LISTENED}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
