"""What all loops have in common.

Each open loop has a frame in `state.position.frames`, pushed where it begins and popped where it ends. Which frame is a loop's own follows
from the depth of the call, which travels in a context around it: a function of the type of a step may wrap a loop and need not know.
A stop or an interrupt unwinds every open loop and leaves the frames standing; called again, the program goes on to the same end.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar

from torch.utils.data import DataLoader, Dataset

from fnrun import metrics as folds
from fnrun.data import Batches
from fnrun.donation import Owner, surviving
from fnrun.dry import DryRun, dry_run
from fnrun.loops import parts
from fnrun.loops.composed import AnyStep, Composed, check_step, donates, functions, loops_of, stands_openly, title
from fnrun.loops.parts import check_part
from fnrun.loops.whole import aside, elsewhere, outermost
from fnrun.program import ASIDE, Here, Hook, Observer, Unwind, here
from fnrun.reports import collecting
from fnrun.state import Cursor, Frame, Position, S, is_state, no_state
from fnrun.steps import PureStep
from fnrun.waiting import Interrupted
from fnrun.words import kind

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
        hooks = tuple(flattened(self.hooks))
        for hook in hooks:
            check_part(hook, "hook")
        for observer in self.observers:
            check_part(observer, "observer")
        names = [getattr(observer, "name", None) for observer in self.observers if hasattr(observer, "fold")]
        if None in names or len(set(names)) < len(names):
            raise ValueError(f"observers of one loop that fold need names of their own, to keep what they gather: {names}")
        prefixes = self.prefixes()
        for who, metric in monitored((*hooks, *self.observers)):
            if not metric.startswith(tuple(prefixes)):
                members = ", ".join(repr(prefix.rstrip("/")) for prefix in prefixes)
                raise ValueError(f"{who}: no step reports {metric!r}: the members here are {members}")
        object.__setattr__(self, "hooks", hooks)
        object.__setattr__(self, "observers", tuple(sorted(self.observers, key=saves_last)))

    def __call__(self, state: S, data: Any, *, interrupt: Callable[[], str | None] | None = None) -> tuple[S, Metrics]:
        if not is_state(state):
            raise no_state(self.kind, state, data)
        at = here.get()
        if at is None:
            return outermost(self, state, data, interrupt)
        if at is ASIDE or at.program.reports is not collecting() or len(state.position.frames) < at.depth:
            return aside(self, state, data, interrupt)
        at.program.unknown.update((id(each), each) for each in functions(self) if not isinstance(each, PureStep))
        return self._run(at.program.begin(loops_of(self), state), data, at)

    # What a combinator says of itself: steps within, where it ends, and what a tick is.

    def title(self) -> str:
        return self.kind

    def own(self) -> list[Any]:
        return [self]

    def _length(self, state: Any, data: Any, at: Here) -> int | None:
        """How many ticks this loop will have had at its end, where that is known. Raises where `data` is not what the loop needs."""
        raise NotImplementedError

    def _done(self, state: Any, frame: Frame, data: Any, at: Here) -> bool:
        raise NotImplementedError

    def _take(self, state: Any, frame: Frame, data: Any, at: Here) -> tuple[Any, dict[str, Cursor] | None, str | None]:
        """What the next tick is given: its x, the streams' cursors after it where they move, and the member at work."""
        return data, None, None

    def _turn(self, state: Any, x: Any, frame: Frame, at: Here) -> tuple[Any, Any]:
        """The tick itself: state and metrics. `frame` is the loop's own, as it is during the tick."""
        raise NotImplementedError

    def _total(self, totals: Any, metrics: Any, examples: int) -> Any:
        return metrics

    def _taken(self, x: Any) -> int:
        """How many ticks this one counts as: of several batches at a time, so many."""
        return 1

    def _examples(self, x: Any, metrics: Any) -> int:
        return 1

    def _next_member(self, frame: Frame) -> str | None:
        return None

    def _result(self, totals: Any) -> Any:
        return totals or {}

    # The same for all.

    def _run(self, state: Any, data: Any, at: Here) -> tuple[Any, Any]:
        if at.owner is None and donates(self):
            with Owner() as owner:
                return self._ticks(state, data, at._replace(owner=owner))
        return self._ticks(state, data, at)

    def _ticks(self, state: Any, data: Any, at: Here) -> tuple[Any, Any]:
        depth, program = at.depth, at.program
        opening = Frame(self.kind, at.path.removeprefix("/"), len(at.opened or ()))
        name = opening.name
        if at.opened is not None:
            at.opened.append(name)
        frames = state.position.frames
        if len(frames) == depth:
            begun_with = frames[0].folds.get(_carried(name), {}) if depth and self.trains else {}
            state = framed(state, (*frames, dataclasses.replace(opening, folds=begun_with)))
        elif frames[depth].name != name or (
            self.over_data and len(frames) > depth + 1 and all(isinstance(s, PureStep) for _, s in self.inner())
        ):
            raise elsewhere(state, program)
        at = self._entered(data, at)
        program.lengths[name] = self._length(state, data, at)
        befores, afters = parts.befores(program, self.hooks, name), parts.afters(program, self.hooks, name)
        gatherers: list[Any] = [observer for observer in self.observers if hasattr(observer, "fold")]
        folding, theirs = parts.folding(program, gatherers), parts.theirs(self.hooks, self.observers)
        begun = False  # the first tick of a call is always one by itself: what is wrong shows there
        watching = [*zip(parts.observing(program, self.observers, name), map(saves_last, self.observers), strict=True)]
        token = here.set(ASIDE)  # a loop that a hook or an observer calls is no part of this program
        try:
            while True:
                if reason := state.stop or (program.interrupt() if program.interrupt is not None else None):
                    raise Unwind(state, reason)
                before, frame = state, state.position.frames[depth]
                between = len(state.position.frames) == depth + 1  # else a loop within is open: this tick began before the state was saved
                if between and self._done(state, frame, data, at):
                    break
                if begun and (ahead := self._unwatched(state, frame, at)):
                    state = self._straight(state, frame, at, ahead, gatherers)
                    continue
                begun = True
                try:
                    x, streams, member = self._take(state, frame, data, at)
                except Interrupted as interrupted:
                    raise program.ended(interrupted, state) from interrupted.__cause__
                if member != frame.member:
                    frame = dataclasses.replace(frame, member=member)
                    state = framed(state, (*state.position.frames[:depth], frame, *state.position.frames[depth + 1 :]))
                for hook in befores if between else ():
                    kept, state = type(state), hook(state, x)
                    if type(state) is not kept:
                        parts.check_returned(hook, state)
                if self.over_data:
                    program.open()
                if gatherers and not between:  # a fold reads its own loop's frame, whatever was open within when the state was saved
                    before = framed(before, before.position.frames[: depth + 1])
                if gatherers and at.owner is not None:
                    before = surviving(before)
                state, metrics = self._turn(state, x, frame, at)
                if len(state.position.frames) != depth + 1:
                    raise elsewhere(state, program)
                taken = self._taken(x)
                examples = self._examples(x, metrics)
                program.examples += examples
                plain = self._plain(metrics) if afters or self.observers else {}
                gathered = {
                    o.name: fold(state, frame.folds.get(o.name), before, plain, examples)
                    for o, fold in zip(gatherers, folding, strict=True)
                }
                if depth == 0 and (carried := state.position.frames[0].folds):
                    gathered = {**carried, **gathered}
                totals = self._total(frame.totals, metrics, examples)
                frame = Frame(frame.kind, frame.path, frame.nth, frame.ticks + taken, totals, gathered, self._next_member(frame))
                position = state.position
                moved = position.streams if streams is None else {**position.streams, **streams}
                state = state.replace(position=Position((*position.frames[:depth], frame), moved, position.ticks + self.over_data * taken))
                if afters or self.observers:
                    program.open()
                    values = self._values(plain, metrics)
                    probe = parts.Probe(state) if theirs else None
                    for hook in afters:
                        kept, state = type(state), hook(state, values)
                        if type(state) is not kept:
                            parts.check_returned(hook, state)
                    for observer, saves in watching:
                        if saves:
                            program.flush()
                        observer(state, values)
                    if probe is not None:
                        probe.check(theirs)
                program.seen(state)
        finally:
            here.reset(token)
        frames = state.position.frames
        closed = framed(state, _carrying(frames[:depth], frames[depth], gatherers) if self.trains else frames[:depth])
        return self._close(closed, data, at), self._result(frames[depth].totals)

    def _entered(self, data: Any, at: Here) -> Here:
        """`at`, with what stays the same in this call."""
        return at

    def _unwatched(self, state: Any, frame: Frame, at: Here) -> int:
        """How many ticks come now whose states nobody would see."""
        return 0

    def _straight(self, state: Any, frame: Frame, at: Here, ticks: int, gatherers: list[Any]) -> Any:
        raise NotImplementedError

    def _close(self, state: Any, data: Any, at: Here) -> Any:
        return state

    def _plain(self, metrics: Any) -> dict[str, Any]:
        """The metrics without what predicting loops within have put out."""
        return {name: value for name, value in metrics.items() if not isinstance(value, list)}

    def _values(self, plain: dict[str, Any], metrics: Any) -> dict[str, Any]:
        """What hooks and observers are given."""
        return folds.values(plain)

    def _call(self, step: AnyStep, state: Any, x: Any, at: Here, place: tuple[int, ...] = ()) -> Any:
        """The step within, told where it is called. A wrapper gets no owner on the state: it may want to look at the old one.

        `place` tells ticks apart besides the ticks of the open loops; it stays the same while a loop within is open.
        """
        at.program.asked.add(id(step))
        if not self.over_data and isinstance(step, PureStep):
            return self._at_once(step, state, x, at)
        openly = stands_openly(step)
        token = here.set(at._replace(opened=[], owner=at.owner if openly else None))
        try:
            if openly:
                return step(state, x)
            frames = state.position.frames[: at.depth]
            place = (frames[-1].name, *(frame.ticks for frame in frames), *place)
            return parts.function(at.program, step, state, x, place, alone=self.over_data)
        finally:
            here.reset(token)

    def _at_once(self, step: AnyStep, state: Any, x: Any, at: Here) -> Any:
        """A step where a loop is usual: it is given the data as they are, which must be one batch."""
        where = f"{self.kind}{f': {at.path}' if at.path else ''}: {title(step)} is a step and takes one batch"
        hint = "a loop over them takes the stream, epoch_loop(step) or eval_loop(step)"
        if isinstance(x, (Batches, DataLoader, Dataset, Iterator)) or callable(x):
            raise TypeError(f"{where}; its data is {kind(x)}: {hint}")
        token = here.set(ASIDE)
        try:
            return step(state, x)
        except (TypeError, AttributeError, IndexError, KeyError) as error:
            if not isinstance(x, (list, tuple)):
                raise
            raise TypeError(
                f"{where}; it was given {kind(x)}. If that is a list of batches, {hint}. It raised {type(error).__name__}: {error}"
            ) from error
        finally:
            here.reset(token)

    def dry_run(self, state: Any, data: Any) -> DryRun:
        """One tick of every loop, with its hooks and no observer: nothing is written, the state stays. `print` draws what ran, and how long it took.

        Raises what the program raises. Loops within a function are not cut short.
        """
        return dry_run(self, state, data)


def monitored(parts: Iterable[Any]) -> Iterator[tuple[str, str]]:
    """The metrics that hooks and observers wait for, each with who does; one says `monitor`, a name, or `monitors`, several."""
    for part in parts:
        one = getattr(part, "monitor", None)
        for metric in getattr(part, "monitors", () if one is None else (one,)):
            yield getattr(part, "name", None) or str(part), metric


def flattened(hooks: Iterable[Any]) -> Iterator[Any]:
    for hook in hooks:
        if isinstance(inner := getattr(hook, "composed_hooks", None), tuple):
            yield from flattened(inner)
        else:
            yield hook


def _carried(loop: str) -> str:
    return f"carried by {loop}"


def _carrying(around: tuple[Frame, ...], ended: Frame, gatherers: list[Any]) -> tuple[Frame, ...]:
    """The frames around a loop that ends, the outermost with what its observers carry to its next round."""
    carries = [observer for observer in gatherers if hasattr(observer, "carry")]
    if not around or not carries:
        return around
    carried = {observer.name: observer.carry(ended.folds.get(observer.name)) for observer in carries}
    outermost = dataclasses.replace(around[0], folds={**around[0].folds, _carried(ended.name): carried})
    return (outermost, *around[1:])


def saves_last(observer: Any) -> bool:
    return getattr(observer, "saves", False)


def framed(state: Any, frames: tuple[Frame, ...]) -> Any:
    position = state.position
    return state.replace(position=Position(frames, position.streams, position.ticks))
