"""What all loops have in common.

Each open loop has a frame in `state.position.frames`, pushed where it begins and popped where it ends. Which frame is a loop's own follows
from the depth of the call, which travels in a context around it: a function of the type of a step may wrap a loop and need not know.
A stop or an interrupt unwinds every open loop and leaves the frames standing; called again, the program goes on to the same end.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch.utils.data import DataLoader, Dataset

from fnrun.core.context import OUTSIDE, loop_context
from fnrun.core.donation import Owner
from fnrun.core.state import S, is_state, no_state
from fnrun.core.words import kind
from fnrun.data import Batches
from fnrun.loops import guarded
from fnrun.loops.contracts import Hook, HookContract, Observer, ObserverContract, check_hooks, hook_contracts, observer_contracts
from fnrun.loops.dry_run import DryRun, dry_run
from fnrun.loops.entry import aside, outermost
from fnrun.loops.program import LoopContext
from fnrun.loops.structure import AnyStep, check_step, donates, loops_of, opaque_steps, stands_openly, title
from fnrun.loops.tick import OpenLoop
from fnrun.loops.ticking import Ticking
from fnrun.steps import PureStep

Metrics = dict[str, Any]
AnyHook = Hook | Callable[[Any, Metrics], Any]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Loop(Ticking):
    """What all loops have in common: frames, stops, hooks and observers. `(state, data) -> (state, metrics)`, as a step.

    Where no program is under way, `interrupt` is asked between ticks at every depth: text from it ends the call, without a trace in the
    state. Raises ProgramError for a state that stands in another program or in other data. `print(loop)` draws the program.
    """

    hooks: Sequence[AnyHook] = ()
    observers: Sequence[Observer] = ()
    hook_contracts: tuple[HookContract, ...] = dataclasses.field(init=False)
    observer_contracts: tuple[ObserverContract, ...] = dataclasses.field(init=False)  # in the order in which they act

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
        check_hooks(hooks, observers)
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
        at.program.opaque.update((id(each), each) for each in opaque_steps(self) if not isinstance(each, PureStep))
        return self.run(at.program.begin(loops_of(self), state), at._replace(data=data))

    def monitored(self) -> Iterator[tuple[str, str]]:
        """The metrics that its hooks and observers wait for, each with who does."""
        for part in (*self.hook_contracts, *self.observer_contracts):
            for metric in part.monitors:
                yield part.name or str(part.given), metric

    def run(self, state: Any, at: LoopContext) -> tuple[Any, Any]:
        if at.owner is None and donates(self):
            with Owner() as owner:
                return OpenLoop(self, at._replace(owner=owner)).run(state)
        return OpenLoop(self, at).run(state)

    def call_step(self, step: AnyStep, state: Any, x: Any, at: LoopContext, place: tuple[int, ...] = ()) -> Any:
        """The step within, told where it is called. A wrapper gets no owner on the state: it may want to look at the old one.

        `place` tells ticks apart besides the ticks of the open loops; it stays the same while a loop within is open.
        """
        at.program.called.add(id(step))
        if not self.over_data and isinstance(step, PureStep):
            return self.call_on_data(step, state, x, at)
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

    def call_on_data(self, step: AnyStep, state: Any, x: Any, at: LoopContext) -> Any:
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
        """One tick of every loop, with its hooks and no observer: nothing is written. `print` draws what ran, and how long it took.

        Raises what the program raises. Loops within a function run whole.
        """
        return dry_run(self, state, data)
