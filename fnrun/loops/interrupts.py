"""Interrupts: what ends a call between two ticks from outside, `() -> str | None`, and leaves no trace in the state.

`fit(state, data, interrupt=...)` asks between ticks at every depth; text ends the call, and says why. Called again, the program goes on.
"""

from __future__ import annotations

import _thread
import contextlib
import math
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from fnrun.core.waiting import asked
from fnrun.loops.streams import Streams

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

    The time is in numbers, or a text such as `2h30m`; `spent` seconds of it are over. `clock()` is in seconds. Leave time for the last step
    and checkpoint. Raises ValueError where there is no time from the beginning.

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


#: So long after a signal a batch may still be waited for, where only another signal can end the wait, in seconds.
GRACE = 3.0


class Signals:
    """SIGINT (Ctrl-C), SIGTERM, SIGHUP, SIGUSR1, SIGUSR2 and SIGXCPU as an interrupt, while it listens: the name of the first to come.

    Ctrl-C a second time ends the process at once. The others are a scheduler's, which repeats them and has SIGKILL for that: however many
    come, the step under way and the save have the time that it gives. A batch that the main thread still waits for 3 seconds after the
    signal is waited for no longer. Only a main thread can listen. What ignores SIGHUP (`nohup`), SIGUSR2 or SIGXCPU goes on ignoring it,
    and a handler that is not Python's (`faulthandler.register`) stays.
    """

    #: Where the platform has them.
    LISTENED = tuple(
        signal.Signals[name]
        for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
        if name in signal.Signals.__members__
    )

    def __init__(self) -> None:
        self.first: signal.Signals | None = None
        self._listening = False

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
            _thread.start_new_thread(self._watch, ())  # and not `threading`, which takes locks that the main thread may hold here

    def _watch(self) -> None:
        """In a thread of its own: a read that blocks the main thread goes on after a signal's handler, unless that raises."""
        while True:
            time.sleep(GRACE)
            if not self._listening:
                return
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGURG)  # which does nothing where nobody listens any more

    def _overdue(self, number: int, frame: Any) -> None:
        """In the main thread, long after the signal: where it waits for a batch, the wait ends."""
        while frame is not None and frame.f_code is not Streams.next_batch.__code__:
            frame = frame.f_back
        if self._listening and frame is not None and (interrupted := asked()) is not None:
            self._listening = False  # once: what closes the data is not to be disturbed
            raise interrupted

    @contextlib.contextmanager
    def listening(self) -> Iterator[Signals]:
        """Within it signals come here; then they go where they went before."""
        handlers: dict[signal.Signals, Any] = {number: self._handle for number in self.LISTENED if not _stays(number)}
        if signal.getsignal(signal.SIGURG) is not None:
            handlers[signal.SIGURG] = self._overdue
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        self._listening = True
        try:
            yield self
        finally:
            self._listening = False
            for number, handler in before.items():
                signal.signal(number, handler)


def _stays(number: signal.Signals) -> bool:
    """Whether what a signal does in this process stays: it is ignored on purpose, or Python could not put the handler back."""
    handler = signal.getsignal(number)
    return handler is None or (handler == signal.SIG_IGN and number.name in ("SIGHUP", "SIGUSR2", "SIGXCPU"))
