"""Waiting for data: an interrupt is heard there too, for a batch that never comes would keep a program from its end for ever."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar

#: What may end the programs under way, the outermost first.
interrupts: ContextVar[tuple[Callable[[], str | None], ...]] = ContextVar("interrupts", default=())


class Interrupted(BaseException):
    """An interrupt that came while a batch was waited for: `by` says `text`. No Exception, lest a data set's `except` catches it."""

    def __init__(self, text: str, by: Callable[[], str | None]) -> None:
        super().__init__(text)
        self.text, self.by = text, by


def asked() -> Interrupted | None:
    """The interrupt that was asked for, if one was: that of the innermost program first."""
    for interrupt in reversed(interrupts.get()):
        if (text := interrupt()) is not None:
            return Interrupted(text, interrupt)
    return None
