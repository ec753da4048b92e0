"""What a kind of loop says of itself."""

from __future__ import annotations

from typing import Any, ClassVar

from fnrun.core.position import Cursor, Frame
from fnrun.loops.program import LoopContext
from fnrun.loops.structure import Composed
from fnrun.metrics import values


class Ticking(Composed):
    """A kind of loop: how many ticks it has, and what one is.

    The methods stand in the order in which `fnrun.loops.tick` calls them. `at` is where in the program the loop is called, `frame` the
    loop's frame as it is during the tick.
    """

    is_loop = True
    kind: ClassVar[str]
    over_data: ClassVar[bool] = False  # whether x is a stream of batches
    trains: ClassVar[bool] = False  # whether its ticks are training steps
    donate = False  # whether its step may write the new state over the old one

    def title(self) -> str:
        return self.kind

    def enter(self, at: LoopContext) -> LoopContext:
        """`at`, with what stays the same in this call."""
        return at

    def length(self, state: Any, at: LoopContext) -> int | None:
        """How many ticks this loop will have had at its end, where that is known. Raises where `at.data` is not what the loop needs."""
        raise NotImplementedError

    def done(self, state: Any, frame: Frame, at: LoopContext) -> bool:
        """Whether it has come to its end."""
        raise NotImplementedError

    def unobserved(self, state: Any, frame: Frame, at: LoopContext) -> int:
        """How many ticks come now in which no hook acts and no observer is due: `unobserved.py` does them without `take` and `turn`."""
        return 0

    def take(self, state: Any, frame: Frame, at: LoopContext) -> tuple[Any, dict[str, Cursor] | None, str | None]:
        """What the next tick is given: its x, the streams' cursors after it where they move, and the member at work."""
        return at.data, None, None

    def turn(self, state: Any, x: Any, frame: Frame, at: LoopContext) -> tuple[Any, Any]:
        """The tick itself: the state, and the result of the step within."""
        raise NotImplementedError

    def ticks_of(self, x: Any) -> int:
        """How many ticks this one counts as: of several batches at a time, so many."""
        return 1

    def examples_of(self, x: Any, result: Any) -> int:
        """How many examples went into it."""
        return 1

    def total(self, totals: Any, result: Any, examples: int) -> Any:
        """The totals of the ticks so far, None before the first, with this one's result."""
        return result

    def next_member(self, frame: Frame) -> str | None:
        """Of a loop over members: whose turn it is after this tick."""
        return None

    def metrics_of(self, result: Any) -> dict[str, Any]:
        """The metrics in a tick's result, uncomputed, without what predicting loops within have put out."""
        return {name: value for name, value in result.items() if not isinstance(value, list)}

    def shown(self, metrics: dict[str, Any], result: Any) -> dict[str, Any]:
        """What hooks and observers are given."""
        return values(metrics)

    def leave(self, state: Any, at: LoopContext) -> Any:
        """The state at the loop's end, whose frame is popped."""
        return state

    def result(self, totals: Any) -> Any:
        """What the loop returns beside the state, of its totals."""
        return totals or {}
