"""What comes up through all open loops: a stop or an interrupt on its way, and states that do not belong."""

from __future__ import annotations

from typing import Any


class ProgramExit(BaseException):
    """A stop or an interrupt on its way through the open loops. Not an Exception: a user's `except Exception` is not meant for it."""

    def __init__(self, state: Any, reason: str) -> None:
        super().__init__(reason)
        self.state, self.reason = state, reason


class ProgramError(ValueError):
    """The state and the program, or the state and the data, do not belong together."""


def other_program(state: Any, loop: Any) -> ProgramError:
    """The error for a state that stands in another program than that of `loop`: both are shown."""
    stands = "\n".join(f"  {'  ' * i}{f.name}, tick {f.ticks}" for i, f in enumerate(state.position.frames))
    drawn = "\n".join(f"  {line}" for line in str(loop).splitlines())
    return ProgramError(
        f"the state stands in another program:\n{stands}\nand this one is:\n{drawn}\nTo begin this one anew: state.rewind()"
    )
