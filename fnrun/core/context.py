"""Where a call happens: which loop of which program is around it.

A function of the type of a step may wrap a loop and need not know: the place travels in a context around it. Steps, hooks and observers are
no part of the program: whoever calls one sets `OUTSIDE`, and a loop called there is a program by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, Final


class Outside:
    """Within a program, and no part of it."""

    def __repr__(self) -> str:
        return "OUTSIDE"


OUTSIDE: Final = Outside()

#: None outside of every program, `OUTSIDE`, or the `fnrun.loops.program.LoopContext` of the loop around.
loop_context: ContextVar[Any] = ContextVar("loop_context", default=None)

#: Called with the finished state of every tick, at every depth: for `fnrun.testing`, which must see loops that it was not given.
tick_listener: ContextVar[Callable[[Any], None] | None] = ContextVar("tick_listener", default=None)
