"""Interrupts: what ends a call between two ticks from outside, `() -> str | None`, and leaves no trace in the state.

`fit(state, data, interrupt=...)` asks between ticks at every depth; text ends the call, and says why. Called again, the program goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable

Interrupt = Callable[[], str | None]


def deadline(*, hours: float = 0.0, minutes: float = 0.0, seconds: float = 0.0, clock: Callable[[], float] = time.monotonic) -> Interrupt:
    """An interrupt so much time from now: the step under way is finished, and the state that the call returns can go on later.

    `clock()` is in seconds. Leave time for the last step and checkpoint. Raises ValueError where no time is left from the beginning.

    >>> now = [0.0]
    >>> interrupt = deadline(minutes=50, clock=lambda: now[0])
    >>> interrupt()
    >>> now[0] = 3000.0
    >>> interrupt()
    'the deadline of 50 minutes has passed'
    """
    limit = 3600 * hours + 60 * minutes + seconds
    if not limit > 0:
        raise ValueError("deadline: how long? Give hours, minutes or seconds above 0")
    end = clock() + limit
    parts = [f"{value:g} {unit}" for value, unit in ((hours, "hours"), (minutes, "minutes"), (seconds, "seconds")) if value]
    text = f"the deadline of {' '.join(parts)} has passed"
    return lambda: text if clock() >= end else None


def any_of(*interrupts: Interrupt) -> Interrupt:
    """Several interrupts as one: the text of the first that has any; those behind it are not asked then.

    >>> any_of(lambda: None, lambda: "the queue is empty", lambda: "never asked")()
    'the queue is empty'
    """
    return lambda: next((text for interrupt in interrupts if (text := interrupt()) is not None), None)
