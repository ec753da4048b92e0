"""Where a call happens: which loop of which program is around it.

A function of the type of a step may wrap a loop and need not know: the place travels in a context around it. Whoever calls what is no part of the
program, a step, a hook or an observer, sets `OUTSIDE`: a loop called there is a program of its own.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any, Final


class Outside:
    """Within a program, and no part of it."""

    def __repr__(self) -> str:
        return "OUTSIDE"


OUTSIDE: Final = Outside()

#: None outside of every program, `OUTSIDE`, or the `fnrun.loops.context.LoopContext` of the loop around.
loop_context: ContextVar[Any] = ContextVar("loop_context", default=None)
