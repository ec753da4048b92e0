"""What loops tell each other on the way down, what comes up through all of them, and what does not belong together."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple

from fnrun.core.donation import Owner

if TYPE_CHECKING:
    from fnrun.data import Batches
    from fnrun.loops.program import Program


class LoopContext(NamedTuple):
    """Where in a program a loop is called."""

    program: Program
    data: Any = None  # what the loop was called with
    depth: int = 0  # the number of open loops around
    path: str = ""  # the names of the sequences' members around, "/train"
    round: tuple[int, int | None] | None = None  # of the nearest repeat: its index, and how many there are where that is known
    over_batch: bool = False  # within a loop over data: what comes down is one of its batches
    source: tuple[str, Batches] | None = None  # of a loop over data: the name and the stream
    owner: Owner | None = (
        None  # of the states down to here: None where no loop donates, and behind a function, which may want the old state
    )
    opened: list[str] | None = None  # the loops that the function around has opened so far: it may open several, one after the other


#: Called with the finished state of every tick, at every depth: for `fnrun.testing`, which must see loops that it was not given.
tick_listener: ContextVar[Callable[[Any], None] | None] = ContextVar("tick_listener", default=None)


class ProgramExit(BaseException):
    """A stop or an interrupt on its way through the open loops. Not an Exception: a user's `except Exception` is not meant for it."""

    def __init__(self, state: Any, reason: str) -> None:
        super().__init__(reason)
        self.state, self.reason = state, reason


class ProgramError(ValueError):
    """The state and the program, or the state and the data, do not belong together."""


def other_program(state: Any, program: Program) -> ProgramError:
    """The error for a state that stands in another program: both are shown."""
    stands = "\n".join(f"  {'  ' * i}{f.name}, tick {f.ticks}" for i, f in enumerate(state.position.frames))
    drawn = "\n".join(f"  {line}" for line in str(program.loop).splitlines())
    return ProgramError(
        f"the state stands in another program:\n{stands}\nand this one is:\n{drawn}\nTo begin this one anew: state.rewind()"
    )
