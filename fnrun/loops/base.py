"""What all loops have in common.

Each open loop has a frame in `state.position.frames`, pushed where it begins and popped where it ends. Which frame is a loop's own follows
from the depth of the call, which travels in a context around it: a function of the type of a step may wrap a loop and need not know.
A stop or an interrupt unwinds every open loop and leaves the frames standing; called again, the program goes on to the same end.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

from torch.utils.data import DataLoader, Dataset

from fnrun.core.context import OUTSIDE, loop_context
from fnrun.core.donation import Owner
from fnrun.core.position import Cursor, Frame
from fnrun.core.state import S, is_state, no_state
from fnrun.core.words import kind
from fnrun.data import Batches
from fnrun.loops import guarded
from fnrun.loops.context import LoopContext
from fnrun.loops.contracts import Hook, HookContract, Observer, ObserverContract, hook_contracts, observer_contracts
from fnrun.loops.dry_run import DryRun, dry_run
from fnrun.loops.entry import aside, outermost
from fnrun.loops.structure import AnyStep, Composed, check_step, donates, functions, loops_of, stands_openly, title
from fnrun.loops.tick import OpenLoop
from fnrun.metrics import values
from fnrun.steps import PureStep

Metrics = dict[str, Any]
AnyHook = Hook | Callable[[Any, Metrics], Any]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Loop(Composed):
    """What all loops have in common: frames, stops, hooks and observers. `(state, data) -> (state, metrics)`, as a step.

    Called from outside, `interrupt` is asked between ticks at every depth; text from it ends the call and leaves no trace in the state.
    Raises ProgramError for a state that stands in another program or in other data. `print(loop)` draws the program.
    """

    hooks: Sequence[AnyHook] = ()
    observers: Sequence[Observer] = ()
    hook_contracts: tuple[HookContract, ...] = dataclasses.field(init=False)
    observer_contracts: tuple[ObserverContract, ...] = dataclasses.field(init=False)  # in the order in which they act

    kind: ClassVar[str]
    over_data: ClassVar[bool] = False  # whether x is a stream of batches
    trains: ClassVar[bool] = False  # whether its ticks are training steps
    donate = False  # whether its step may write the new state over the old one

    def __post_init__(self) -> None:
        for what, given in (("hooks", self.hooks), ("observers", self.observers)):
            if not isinstance(given, (list, tuple)):
                raise TypeError(f"{what}= takes a list, {what}=[...], and not {kind(given)}")
        for name, step in self.inner():
            check_step(f"{self.kind}: {name}=" if name else self.kind, step)
        hooks, observers = hook_contracts(self.hooks), observer_contracts(self.observers)
        for name, value in (
            ("hook_contracts", hooks),
            ("observer_contracts", observers),
            ("hooks", tuple(hook.given for hook in hooks)),
            ("observers", tuple(observer.given for observer in observers)),
        ):
            object.__setattr__(self, name, value)
        prefixes = self.prefixes()
        for who, metric in self.monitored():
            if not metric.startswith(tuple(prefixes)):
                members = ", ".join(repr(prefix.rstrip("/")) for prefix in prefixes)
                raise ValueError(f"{who}: no step reports {metric!r}: the members here are {members}")

    def __call__(self, state: S, data: Any, *, interrupt: Callable[[], str | None] | None = None) -> tuple[S, Metrics]:
        if not is_state(state):
            raise no_state(self.kind, state, data)
        at = loop_context.get()
        if at is None:
            return outermost(self, state, data, interrupt)
        if at is OUTSIDE or len(state.position.frames) < at.depth:
            return aside(self, state, data, interrupt)
        at.program.functions.update((id(each), each) for each in functions(self) if not isinstance(each, PureStep))
        return self.run(at.program.begin(loops_of(self), state), at._replace(data=data))

    def monitored(self) -> Iterator[tuple[str, str]]:
        """The metrics that its hooks and observers wait for, each with who does."""
        for part in (*self.hook_contracts, *self.observer_contracts):
            for metric in part.monitors:
                yield part.name or str(part.given), metric

    # What a combinator says of itself, in the order of a tick (`fnrun.loops.tick`). `frame` is the loop's own, as it is during the tick.

    def title(self) -> str:
        return self.kind

    def own_loops(self) -> list[Any]:
        return [self]

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
        """How many ticks come now at which nobody looks."""
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

    # The same for all.

    def run(self, state: Any, at: LoopContext) -> tuple[Any, Any]:
        if at.owner is None and donates(self):
            with Owner() as owner:
                return OpenLoop(self, at._replace(owner=owner)).run(state)
        return OpenLoop(self, at).run(state)

    def _call(self, step: AnyStep, state: Any, x: Any, at: LoopContext, place: tuple[int, ...] = ()) -> Any:
        """The step within, told where it is called. A wrapper gets no owner on the state: it may want to look at the old one.

        `place` tells ticks apart besides the ticks of the open loops; it stays the same while a loop within is open.
        """
        at.program.called.add(id(step))
        if not self.over_data and isinstance(step, PureStep):
            return self._at_once(step, state, x, at)
        openly = stands_openly(step)
        token = loop_context.set(at._replace(opened=[], owner=at.owner if openly else None))
        try:
            if openly:
                return step(state, x)
            frames = state.position.frames[: at.depth]
            place = (frames[-1].name, *(frame.ticks for frame in frames), *place)
            return guarded.function(at.program, step, state, x, place, alone=self.over_data)
        finally:
            loop_context.reset(token)

    def _at_once(self, step: AnyStep, state: Any, x: Any, at: LoopContext) -> Any:
        """A step where a loop is usual: it is given the data as they are, which must be one batch."""
        where = f"{self.kind}{f': {at.path}' if at.path else ''}: {title(step)} is a step and takes one batch"
        hint = "a loop over them takes the stream, epoch_loop(step) or eval_loop(step)"
        if isinstance(x, (Batches, DataLoader, Dataset, Iterator)) or callable(x):
            raise TypeError(f"{where}; its data is {kind(x)}: {hint}")
        token = loop_context.set(OUTSIDE)
        try:
            return step(state, x)
        except (TypeError, AttributeError, IndexError, KeyError) as error:
            if not isinstance(x, (list, tuple)):
                raise
            raise TypeError(
                f"{where}; it was given {kind(x)}. If that is a list of batches, {hint}. It raised {type(error).__name__}: {error}"
            ) from error
        finally:
            loop_context.reset(token)

    def dry_run(self, state: Any, data: Any) -> DryRun:
        """One tick of every loop, with its hooks and no observer: nothing is written, the state stays. `print` draws what ran, and how long it took.

        Raises what the program raises. Loops within a function are not cut short.
        """
        return dry_run(self, state, data)
