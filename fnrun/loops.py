"""Loops: a loop is a step over a bigger `x`, so loops nest without limit.

Each open loop has a frame in `state.position.frames`, pushed where it begins and popped where it ends. Which frame is a loop's own follows
from the depth of the call, which travels in a context around it: a function of the type of a step may wrap a loop and need not know.
A stop or an interrupt unwinds every open loop and leaves the frames standing; called again, the program goes on to the same end.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import cycle
from types import CellType, FunctionType, MethodType
from typing import Any, ClassVar, NamedTuple

from fnrun import metrics as folds
from fnrun.data import Batches
from fnrun.donation import Lease, fate, given_lease, husk
from fnrun.dry import DryRun, dry_run
from fnrun.program import ASIDE, Here, Hook, Observer, Program, ProgramError, Unwind, here, spy
from fnrun.reports import collecting
from fnrun.state import Cursor, Frame, Position, S
from fnrun.steps import donates, fusing, is_step, looks_at_step_only

Metrics = dict[str, Any]
AnyHook = Hook | Callable[[Any, Metrics], Any]
AnyStep = Callable[[Any, Any], Any]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Loop:
    """What all loops have in common: frames, stops, hooks and observers. `(state, data) -> (state, metrics)`, as a step.

    Called from outside, `interrupt` is asked between ticks at every depth; text from it ends the call and leaves no trace in the state.
    Raises ProgramError for a state that stands in another program or in other data. `print(loop)` draws the program.
    """

    hooks: Sequence[AnyHook] = ()
    observers: Sequence[Observer] = ()

    kind: ClassVar[str]
    over_data: ClassVar[bool] = False  # whether x is a stream of batches
    donate = False  # whether its step may write the new state over the old one

    def __post_init__(self) -> None:
        for what, parts in (("hooks", self.hooks), ("observers", self.observers)):
            if not isinstance(parts, (list, tuple)):
                raise TypeError(f"{what}= takes a list, not {parts!r}")
        hooks = tuple(_flatten(self.hooks))
        for part, what in [*((hook, "hook") for hook in hooks), *((observer, "observer") for observer in self.observers)]:
            if isinstance(part, Loop) or (not callable(part) and not isinstance(part, Hook)):
                raise TypeError(
                    f"{part!r} is no {what}: a {what} is a function of (state, metrics), or has the methods of fnrun.{what.title()}"
                )
        names = [getattr(observer, "name", None) for observer in self.observers if hasattr(observer, "fold")]
        if None in names or len(set(names)) < len(names):
            raise ValueError(f"observers of one loop that fold need names of their own, to keep what they gather: {names}")
        prefixes = _prefixes(self)
        for who, metric in _monitored((*hooks, *self.observers)):
            if not metric.startswith(tuple(prefixes)):
                members = ", ".join(repr(prefix.rstrip("/")) for prefix in prefixes)
                raise ValueError(f"{who}: no step reports {metric!r}: the members here are {members}")
        object.__setattr__(self, "hooks", hooks)
        object.__setattr__(self, "observers", tuple(sorted(self.observers, key=_saves)))

    def __call__(self, state: S, data: Any, *, interrupt: Callable[[], str | None] | None = None) -> tuple[S, Metrics]:
        at = here.get()
        if at is None:
            return _outermost(self, state, data, interrupt)
        if at is ASIDE or at.program.reports is not collecting() or len(state.position.frames) < at.depth:
            return _aside(self, state, data, interrupt)
        return self._run(at.program.begin(_loops(self), state), data, at)

    # What a combinator says of itself: steps within, where it ends, and what a tick is.

    def inner(self) -> Iterable[tuple[str, AnyStep]]:
        """The steps within, each with the name that it adds to the path ('' for none)."""
        raise NotImplementedError

    def title(self) -> str:
        return self.kind

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

    def _examples(self, x: Any) -> int:
        return 1

    def _next_member(self, frame: Frame) -> str | None:
        return None

    def _result(self, totals: Any) -> Any:
        return totals or {}

    # The same for all.

    def _run(self, state: Any, data: Any, at: Here) -> tuple[Any, Any]:
        if at.lease is None and any(loop.donate for loop in _loops(self)):
            with Lease() as lease:
                return self._ticks(state, data, at._replace(lease=lease))
        return self._ticks(state, data, at)

    def _ticks(self, state: Any, data: Any, at: Here) -> tuple[Any, Any]:
        depth, program = at.depth, at.program
        name = f"{self.kind} {at.path or '/'}"
        if at.opened is not None:
            at.opened.append(name)
            name += f" #{len(at.opened)}" if len(at.opened) > 1 else ""
        frames = state.position.frames
        if len(frames) == depth:
            state = _framed(state, (*frames, Frame(name)))
        elif frames[depth].loop != name or (self.over_data and len(frames) > depth + 1 and all(is_step(s) for _, s in self.inner())):
            raise elsewhere(state, program)
        at = self._entered(data, at)
        program.lengths[name] = self._length(state, data, at)
        befores = [getattr(hook, "before") for hook in self.hooks if hasattr(hook, "before")]  # noqa: B009
        afters = [hook.after if isinstance(hook, Hook) else hook for hook in self.hooks]
        gatherers: list[Any] = [observer for observer in self.observers if hasattr(observer, "fold")]
        begun = False  # the first tick of a call is always one by itself: what is wrong shows there
        watching = [(observer, _saves(observer)) for observer in self.observers]
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
                x, streams, member = self._take(state, frame, data, at)
                if member != frame.member:
                    frame = dataclasses.replace(frame, member=member)
                    state = _framed(state, (*state.position.frames[:depth], frame, *state.position.frames[depth + 1 :]))
                for hook in befores if between else ():
                    state = hook(state, x)
                if self.over_data:
                    program.open()
                if gatherers and at.lease is not None:
                    before = husk(before)
                state, metrics = self._turn(state, x, frame, at)
                if len(state.position.frames) != depth + 1:
                    raise elsewhere(state, program)
                taken = self._taken(x)
                examples = self._examples(x)
                program.examples += examples
                plain = self._plain(metrics) if afters or self.observers else {}
                gathered = {o.name: o.fold(frame.folds.get(o.name), before, plain, examples) for o in gatherers}
                totals = self._total(frame.totals, metrics, examples)
                frame = Frame(name, frame.ticks + taken, totals, gathered, self._next_member(frame))
                position = state.position
                moved = position.streams if streams is None else {**position.streams, **streams}
                state = state.replace(position=Position((*position.frames[:depth], frame), moved, position.ticks + self.over_data * taken))
                if afters or self.observers:
                    program.open()
                    values = self._values(plain, metrics)
                    for hook in afters:
                        state = hook(state, values)
                    for observer, saves in watching:
                        if saves:
                            program.flush()
                        observer(state, values)
                program.seen(state)
        finally:
            here.reset(token)
        frames = state.position.frames
        return self._close(_framed(state, frames[:depth]), data, at), self._result(frames[depth].totals)

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

    def _call(self, step: AnyStep, state: Any, x: Any, at: Here) -> Any:
        """The step within, told where it is called. A wrapper gets no lease on the state: it may want to look at the old one."""
        token = here.set(at._replace(opened=[], lease=at.lease if _open(step) else None))
        try:
            return step(state, x)
        finally:
            here.reset(token)

    def __str__(self) -> str:
        first, *rest = _drawn("", self, 0)
        total = _total_steps(self)
        return "\n".join([first + (f", {total:,} steps in all" if total else ""), *rest])

    def dry_run(self, state: Any, data: Any) -> DryRun:
        """One tick of every loop, with its hooks and no observer: nothing is written, the state stays. `print` draws what ran, and how long it took.

        Raises what the program raises. Loops that a wrapper function hides are not cut short.
        """
        return dry_run(self, state, data, step_loop)


#: So many ticks at most go straight on.
STRAIGHT = 64


class Before(NamedTuple):
    """The state before a tick, for observers that fold and look at no more."""

    step: int
    position: Position
    memory: Any


# --- loops over data ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _OverData(Loop):
    step: AnyStep

    over_data = True

    def inner(self) -> Iterable[tuple[str, AnyStep]]:
        return [("", self.step)]

    def _passing(self, at: Here) -> bool:
        """Whether each call begins the stream anew and leaves no position behind, as a loop over the batch of another loop does."""
        return at.over_batch

    def _entered(self, data: Any, at: Here) -> Here:
        return at._replace(source=self._stream(data, at))

    def _stream(self, data: Any, at: Here) -> tuple[str, Batches]:
        if at.source is not None:
            return at.source
        name, stream = at.program.stream(data, at)
        return (f"{self.kind} {name}" if self._passing(at) else name), stream

    def _cursor(self, state: Any, frame: Frame, data: Any, at: Here) -> Cursor:
        name, stream = self._stream(data, at)
        return Cursor(source=stream.source) if not frame.ticks and self._passing(at) else at.program.cursor(state, name, stream)

    def _take(self, state: Any, frame: Frame, data: Any, at: Here) -> tuple[Any, dict[str, Cursor] | None, str | None]:
        name, stream = self._stream(data, at)
        batch, after = at.program.next_batch(name, stream, state, self._cursor(state, frame, data, at), replay=self._passing(at))
        return batch, {name: after}, None

    def _close(self, state: Any, data: Any, at: Here) -> Any:
        return state.replace(position=state.position.forget(self._stream(data, at)[0])) if self._passing(at) else state

    def _turn(self, state: Any, x: Any, frame: Frame, at: Here) -> tuple[Any, Any]:
        result = self._stepped(state, x, at)
        if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[1], Mapping):
            raise TypeError(
                f"{_title(self.step)} returned {type(result).__name__}, and a step in {self.kind} returns (state, metrics). "
                "Is it an evaluation step? Those belong in eval_loop"
            )
        return result

    @functools.cached_property
    def _lawful(self) -> bool:
        """Whether the step is known to be one, in which no loop of this program can stand."""
        return is_step(self.step)

    def _stepped(self, state: Any, x: Any, at: Here) -> Any:
        if self._lawful:
            return self.step(state, x)
        return self._call(self.step, state, x, at._replace(depth=at.depth + 1, over_batch=True, source=None))

    def _plain(self, metrics: Any) -> dict[str, Any]:
        return metrics

    def _examples(self, x: Any) -> int:
        return folds.examples(x)

    def _total(self, totals: Any, metrics: Any, examples: int) -> Any:
        return folds.fold(totals, metrics, examples)

    def _result(self, totals: Any) -> Any:
        return folds.compute(totals) if totals else {}

    def _left_in_pass(self, state: Any, frame: Frame, data: Any, at: Here) -> int | None:
        batch = self._cursor(state, frame, data, at).batch
        try:
            batches = len(self._stream(data, at)[1])  # pyright: ignore[reportArgumentType]
        except TypeError:
            return None
        return 0 if frame.ticks and not batch else batches - batch


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Training(_OverData):
    donate: bool = False

    ends_with_pass: ClassVar[bool] = False

    @functools.cached_property
    def _donates(self) -> bool:
        return self.donate and donates(self.step)

    def _stepped(self, state: Any, x: Any, at: Here) -> Any:
        step: Any = self.step
        return step(state, x, lease=at.lease) if self._donates else super()._stepped(state, x, at)

    @functools.cached_property
    def _every(self) -> int:
        """How many ticks may follow each other in one go: none where a hook acts, or an observer that may look at each state."""
        if self.hooks or not looks_at_step_only(self.step) or not all(getattr(o, "idle_between", False) for o in self.observers):
            return 0
        return math.gcd(*(getattr(o, "every") for o in self.observers)) if self.observers else STRAIGHT  # noqa: B009

    def _unwatched(self, state: Any, frame: Frame, at: Here) -> int:
        every = self._every
        return min(STRAIGHT, every - 1 - state.step % every) if every > 1 and at.program.unspied else 0

    def _straight(self, state: Any, frame: Frame, at: Here, ticks: int, gatherers: list[Any]) -> Any:
        """So many ticks, or as many as the pass has, with what loops do around a tick done once at their end.

        The state afterwards is that of tick by tick, bit for bit. An interrupt or an exception ends the run of ticks early.
        """
        program, (name, stream) = at.program, self._stream(None, at)
        position, replay, cursor = state.position, self._passing(at), self._cursor(state, frame, None, at)
        before, done = Before(state.step, position, state.memory), list[tuple[Any, int]]()

        def finished(state: Any) -> Any:
            gathered = {o.name: o.fold_each(frame.folds.get(o.name), before, done) for o in gatherers} if done else frame.folds
            totals = folds.fold_each(frame.totals, done)
            program.examples += sum(examples for _, examples in done)
            new = Frame(frame.loop, frame.ticks + len(done), totals, gathered, frame.member)
            streams = {**position.streams, name: cursor}
            state = state.replace(position=Position((*position.frames[: at.depth], new), streams, position.ticks + len(done)))
            program.seen(state)
            return state

        try:
            while len(done) < ticks and (not done or cursor.batch or not self.ends_with_pass):
                if done and program.interrupt is not None and (reason := program.interrupt()):  # before the first it was asked already
                    raise Unwind(finished(state), reason)
                batch, after = program.next_batch(name, stream, state, cursor, replay=replay)
                state, metrics = self._stepped(state, batch, at)
                done.append((metrics, folds.examples(batch)))
                cursor = after
        except Unwind:
            raise
        except BaseException:
            if done and fate(state) is None:
                finished(state)
            raise
        return finished(state)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.donate and not donates(self.step):
            warnings.warn(
                f"donate=True: {_title(self.step)} cannot write the new state over the old one, so it goes on in new memory. Steps of "
                "make_train_step can, with an optimizer of fnrun.optim; what wraps a step may need the old state",
                stacklevel=4,
            )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _EpochLoop(_Training):
    kind = "epoch_loop"
    ends_with_pass = True

    def _length(self, state: Any, data: Any, at: Here) -> int | None:
        frame = state.position.frames[at.depth]
        left = self._left_in_pass(state, frame, data, at)
        return None if left is None else frame.ticks + left

    def _done(self, state: Any, frame: Frame, data: Any, at: Here) -> bool:
        return frame.ticks > 0 and self._cursor(state, frame, data, at).batch == 0


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _StepLoop(_Training):
    steps: int
    until_step: int | None = None
    fused_steps: int = 1

    kind = "step_loop"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fused_steps == 1:
            return
        if fusing(self.step) is None:
            raise TypeError(f"fused_steps: {_title(self.step)} is no compiled step; make_train_step(..., compile=True) makes one")
        for part in (*self.hooks, *self.observers):
            every = getattr(part, "every", self.fused_steps)
            if every % self.fused_steps:
                raise ValueError(
                    f"fused_steps={self.fused_steps}: {getattr(part, 'name', _named(part))} acts every {every} steps, and {self.fused_steps} at a time are "
                    "one call that nothing looks into: let every= be a multiple"
                )

    def title(self) -> str:
        fused = f", {self.fused_steps} at a time" if self.fused_steps > 1 else ""
        return f"step_loop, {self.steps} steps{fused}" + (f", until step {self.until_step}" if self.until_step is not None else "")

    def _stepped(self, state: Any, x: Any, at: Here) -> Any:
        if self.fused_steps == 1:
            return super()._stepped(state, x, at)
        several = fusing(self.step)
        assert several is not None
        return several(state, x, lease=at.lease if self._donates else None)

    def _unwatched(self, state: Any, frame: Frame, at: Here) -> int:
        if self.fused_steps > 1:
            return 0
        left = self.steps - frame.ticks if self.until_step is None else min(self.steps - frame.ticks, self.until_step - state.step)
        return min(super()._unwatched(state, frame, at), left)

    def _taken(self, x: Any) -> int:
        return 1 if self.fused_steps == 1 else len(x)

    def _examples(self, x: Any) -> int:
        return folds.examples(x) if self.fused_steps == 1 else sum(map(folds.examples, x))

    def _take(self, state: Any, frame: Frame, data: Any, at: Here) -> tuple[Any, dict[str, Cursor] | None, str | None]:
        if self.fused_steps == 1:
            return super()._take(state, frame, data, at)
        left = self.steps - frame.ticks if self.until_step is None else min(self.steps - frame.ticks, self.until_step - state.step)
        name, stream = self._stream(data, at)
        cursor, batches = self._cursor(state, frame, data, at), []
        for _ in range(min(self.fused_steps, left)):
            batch, cursor = at.program.next_batch(name, stream, state, cursor, replay=self._passing(at))
            batches.append(batch)
        return batches, {name: cursor}, None

    def _length(self, state: Any, data: Any, at: Here) -> int | None:
        self._cursor(state, state.position.frames[at.depth], data, at)
        if self.until_step is None:
            return self.steps
        return min(self.steps, state.position.frames[at.depth].ticks + max(0, self.until_step - state.step))

    def _done(self, state: Any, frame: Frame, data: Any, at: Here) -> bool:
        return frame.ticks >= self.steps or (self.until_step is not None and state.step >= self.until_step)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _EvalLoop(_OverData):
    steps: int | None = None

    kind = "eval_loop"

    def title(self) -> str:
        return "eval_loop" + (f", {self.steps} batches" if self.steps is not None else "")

    def _length(self, state: Any, data: Any, at: Here) -> int | None:
        frame = state.position.frames[at.depth]
        left = self._left_in_pass(state, frame, data, at)
        return self.steps if self.steps is not None or left is None else frame.ticks + left

    def _passing(self, at: Here) -> bool:
        return self.steps is None or at.over_batch

    def _done(self, state: Any, frame: Frame, data: Any, at: Here) -> bool:
        if self.steps is not None:
            return frame.ticks >= self.steps
        return frame.ticks > 0 and self._cursor(state, frame, data, at).batch == 0

    def _turn(self, state: Any, x: Any, frame: Frame, at: Here) -> tuple[Any, Any]:
        metrics = self._stepped(state, x, at)
        if not isinstance(metrics, Mapping):
            raise TypeError(f"{_title(self.step)} returned {type(metrics).__name__}, and a step in eval_loop returns metrics, a dict")
        return state, dict(metrics)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _PredictLoop(_EvalLoop):
    keep: bool = True

    kind = "predict_loop"

    def _turn(self, state: Any, x: Any, frame: Frame, at: Here) -> tuple[Any, Any]:
        return state, self._stepped(state, x, at)

    def _plain(self, metrics: Any) -> dict[str, Any]:
        return {}

    def _values(self, plain: dict[str, Any], metrics: Any) -> dict[str, Any]:
        return {"outputs": metrics}

    def _total(self, totals: Any, metrics: Any, examples: int) -> Any:
        return (*(totals or ()), metrics) if self.keep else None

    def _result(self, totals: Any) -> Any:
        return list(totals or ())


# --- loops over loops --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Repeat(Loop):
    step: AnyStep
    times: int | None
    until: Callable[[Any], bool] | None = None

    kind = "repeat"

    def inner(self) -> Iterable[tuple[str, AnyStep]]:
        return [("", self.step)]

    def title(self) -> str:
        return "repeat" + (f" {self.times} times" if self.times is not None else "") + (" until" if self.until else "")

    def _length(self, state: Any, data: Any, at: Here) -> int | None:
        return self.times if self.until is None else None

    def _done(self, state: Any, frame: Frame, data: Any, at: Here) -> bool:
        return (self.times is not None and frame.ticks >= self.times) or (self.until is not None and self.until(state))

    def _turn(self, state: Any, x: Any, frame: Frame, at: Here) -> tuple[Any, Any]:
        known = self.times if self.until is None else None
        return self._call(self.step, state, x, at._replace(depth=at.depth + 1, round=(frame.ticks, known)))

    def _values(self, plain: dict[str, Any], metrics: Any) -> dict[str, Any]:
        values = super()._values(plain, metrics)
        if values and _prefixes(self) == [""]:  # no member that may come in another round
            for who, metric in _monitored((*self.hooks, *self.observers)):
                if metric not in values and "skipped" not in values:
                    raise ValueError(f"{who}: no step reports {metric!r}; reported: {', '.join(map(repr, values))}")
        return values


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Members(Loop):
    """Loops with named members, each over its own entry of the data."""

    steps: Mapping[str, AnyStep]

    def inner(self) -> Iterable[tuple[str, AnyStep]]:
        return self.steps.items()

    def _length(self, state: Any, data: Any, at: Here) -> int | None:
        place = f"data at {at.path}" if at.path else "the data"
        if not isinstance(data, Mapping):
            raise TypeError(f"{place} mirrors the {self.kind}: a mapping with the keys {list(self.steps)}, not a {type(data).__name__}")
        if missing := [name for name in self.steps if name not in data]:
            raise ProgramError(f"{place} has nothing for {missing}; the {self.kind} has {list(self.steps)}, the data {list(data)}")
        return self._count()

    def _count(self) -> int:
        raise NotImplementedError

    def _member(self, frame: Frame) -> str:
        raise NotImplementedError

    def _take(self, state: Any, frame: Frame, data: Any, at: Here) -> tuple[Any, dict[str, Cursor] | None, str | None]:
        member = self._member(frame)
        return data[member], None, member

    def _turn(self, state: Any, x: Any, frame: Frame, at: Here) -> tuple[Any, Any]:
        name = str(frame.member)
        state, metrics = self._call(self.steps[name], state, x, at._replace(depth=at.depth + 1, path=f"{at.path}/{name}"))
        return state, {f"{name}/{k}": v for k, v in metrics.items()} if isinstance(metrics, Mapping) else {name: metrics}

    def _total(self, totals: Any, metrics: Any, examples: int) -> Any:
        return {**(totals or {}), **metrics}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Sequence(_Members):
    kind = "sequence"
    end = "(end)"

    def _count(self) -> int:
        return len(self.steps)

    def _done(self, state: Any, frame: Frame, data: Any, at: Here) -> bool:
        if frame.member is not None and frame.member != self.end and frame.member not in self.steps:
            raise elsewhere(state, at.program)
        return frame.member == self.end or not self.steps

    def _member(self, frame: Frame) -> str:
        return frame.member or next(iter(self.steps))

    def _next_member(self, frame: Frame) -> str | None:
        names = [*self.steps, self.end]
        return names[names.index(str(frame.member)) + 1]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Workflow(_Members):
    phases: Sequence[tuple[str, int]]
    times: int

    kind = "workflow"

    def title(self) -> str:
        return f"workflow {' '.join(f'{name}*{n}' for name, n in self.phases)}, {self.times} times"

    def _order(self) -> list[str]:
        """The member of each tick: the phases in turn, until the first has run `times` times; what is behind it still has its turn."""
        order: list[str] = []
        first = self.phases[0][0]
        for name, n in cycle(self.phases):
            left = self.times - order.count(first)
            if name == first and not left:
                return order
            order += [name] * (min(n, left) if name == first else n)
        return order

    def _count(self) -> int:
        return len(self._order())

    def _done(self, state: Any, frame: Frame, data: Any, at: Here) -> bool:
        return frame.ticks >= self._count()

    def _member(self, frame: Frame) -> str:
        return self._order()[frame.ticks]


@dataclasses.dataclass(frozen=True, eq=False)
class _Every:
    """Not a loop: it has no frame, and lets the rounds of the nearest repeat through to its step or not."""

    intervals: tuple[tuple[int, int], ...]
    step: AnyStep
    begin: int
    last: bool

    def __call__(self, state: Any, x: Any) -> tuple[Any, Any]:
        at = here.get()
        inside = at is not None and len(state.position.frames) > at.depth  # a loop within is open: whatever the round, it goes on
        if at is None or at.round is None or inside or self._works(*at.round):
            return self.step(state, x)
        return state, {}

    def _works(self, index: int, times: int | None) -> bool:
        number = index + 1
        n = next((n for start, n in reversed(self.intervals) if number >= start), None)
        return (number >= self.begin and n is not None and number % n == 0) or (self.last and number == times)

    def inner(self) -> Iterable[tuple[str, AnyStep]]:
        return [("", self.step)]

    def title(self) -> str:
        plain = len(self.intervals) == 1
        when = f"each {self.intervals[0][1]}" if plain else ", ".join(f"each {n} from {start}" for start, n in self.intervals)
        return f"every round, {when}" + (f", from {self.begin}" if self.begin > 1 else "") + (", and the last" if self.last else "")


# --- the public combinators --------------------------------------------------------------------------------------------


def epoch_loop(step: AnyStep, *, hooks: Sequence[AnyHook] = (), observers: Sequence[Observer] = (), donate: bool = False) -> Loop:
    """`step` over the batches of a stream, from where it stands to the end of its pass.

    The metrics are the folds of its ticks: a plain tensor is a mean, weighted by the batch's number of examples.

    With `donate` each new state is written over the one before: parameters and moments are updated in place, with the same bits and the
    memory of an in-place loop. The caller's state is not touched (the first update copies; `state.donate()` gives it away), and states
    that the program made are dead once the next one is written over them: a hook or an observer that keeps one keeps `snapshot(state)`.

    >>> import torch
    >>> from fnrun import TrainState, step
    >>> @step
    ... def count(state, batch):
    ...     return state, {"mean": batch.mean()}
    >>> state, metrics = epoch_loop(count)(TrainState.create(torch.nn.Linear(1, 1)), [torch.tensor([1.0, 2.0]), torch.tensor([6.0])])
    >>> state.step, metrics["mean"].item()
    (2, 3.0)
    """
    return _EpochLoop(step=step, hooks=hooks, observers=observers, donate=donate)


def step_loop(
    step: AnyStep,
    steps: int,
    *,
    until_step: int | None = None,
    hooks: Sequence[AnyHook] = (),
    observers: Sequence[Observer] = (),
    donate: bool = False,
    fused_steps: int = 1,
) -> Loop:
    """`step` over so many batches, going over into the stream's next pass; not beyond `state.step == until_step`.

    `donate` as in `epoch_loop`. With `fused_steps=k` a step of `make_train_step(..., compile=True)` does k steps in one compiled call: hooks,
    observers and interrupts act between the calls. Their randomness is keyed by the first of the k, so with dropout the bits are not those of
    single steps. Raises TypeError for another step, ValueError for a hook or an observer that would act in between.
    """
    return _StepLoop(
        step=step,
        steps=_count(steps, "steps"),
        until_step=until_step,
        hooks=hooks,
        observers=observers,
        donate=donate,
        fused_steps=_count(fused_steps, "fused_steps", least=1),
    )


def eval_loop(eval_step: AnyStep, *, steps: int | None = None, observers: Sequence[Observer] = ()) -> Loop:
    """`eval_step` (`(state, batch) -> metrics`) over one pass from the beginning: the state as it came, the metrics folded.

    With `steps=n` it takes n batches, going on through its own stream from call to call.
    """
    return _EvalLoop(step=eval_step, steps=None if steps is None else _count(steps, "steps"), observers=observers)


def predict_loop(predict_step: AnyStep, *, steps: int | None = None, observers: Sequence[Observer] = (), keep: bool = True) -> Loop:
    """`predict_step` (`(state, batch) -> outputs`) over one pass: the state as it came, and a list with each batch's outputs, in order.

    With `keep=False` the list is empty: for outputs that an observer writes as they come (`observers.predictions`), and that would not fit.
    """
    return _PredictLoop(step=predict_step, steps=None if steps is None else _count(steps, "steps"), observers=observers, keep=keep)


def repeat(
    step: AnyStep,
    times: int | None = None,
    *,
    until: Callable[[Any], bool] | None = None,
    hooks: Sequence[AnyHook] = (),
    observers: Sequence[Observer] = (),
) -> Loop:
    """`step` (a loop, as a rule) so many times over the same data, or until `until(state)` holds; the metrics are the last round's.

    `repeat(step, 1)` is `step`. A state saved at the end of a `repeat(step, 10)` and given to `repeat(step, 15)` does five more.
    """
    if times is None and until is None:
        raise ValueError("repeat: say how often (times=) or how long (until=)")
    return _Repeat(step=step, times=None if times is None else _count(times, "times"), until=until, hooks=hooks, observers=observers)


def sequence(*, hooks: Sequence[AnyHook] = (), observers: Sequence[Observer] = (), **steps: AnyStep) -> Loop:
    """`steps` one after the other: their names pick the data (`data["train"]`) and prefix the metrics (`train/loss`)."""
    return _Sequence(steps=_members(steps), hooks=hooks, observers=observers)


def workflow(
    phases: Sequence[tuple[str, int]], *, times: int, hooks: Sequence[AnyHook] = (), observers: Sequence[Observer] = (), **steps: AnyStep
) -> Loop:
    """mmcv's workflow: each phase so many times in a row, in turn, until the first has run `times` times in all.

    `workflow([("train", 2), ("val", 1)], times=3, train=..., val=...)` runs train, train, val, train, val.
    """
    unknown = [name for name, _ in phases if name not in steps]
    if not phases or unknown:
        raise ValueError(f"workflow: phases {unknown or 'are missing'}; there are steps for {list(steps)}")
    phases = tuple((name, _count(n, f"the count of {name!r}", least=1)) for name, n in phases)
    return _Workflow(steps=_members(steps), phases=phases, times=_count(times, "times"), hooks=hooks, observers=observers)


def every(n: int | Sequence[tuple[int, int]], step: AnyStep, *, begin: int = 1, last: bool = True) -> AnyStep:
    """`step` on each n-th round of the nearest `repeat`, from round `begin`, and on its last; on other rounds nothing, without metrics.

    `n` may change: `[(0, 5), (20, 1)]` is each 5th, and from round 20 each. Outside a repeat it always works; where the repeat's end is not
    known (`until`) there is no last round.
    """
    intervals = ((0, n),) if isinstance(n, int) else tuple(sorted(n)) if isinstance(n, (list, tuple)) else ()
    if not intervals or any(interval < 1 for _, interval in intervals):
        raise ValueError(f"every: an interval is at least 1 round, not {n!r}")
    return _Every(intervals, step, begin, last)


def _count(value: int, name: str, least: int = 0) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} is a whole number of at least {least}, not {value!r}")
    return value


def _members(steps: Mapping[str, AnyStep]) -> dict[str, AnyStep]:
    if not steps:
        raise ValueError("name at least one step: sequence(train=..., val=...)")
    for name, step in steps.items():
        if not callable(step):
            raise TypeError(f"{name} is no step: {step!r} is not callable")
    return dict(steps)


def _monitored(parts: Iterable[Any]) -> Iterator[tuple[str, str]]:
    """The metrics that hooks and observers wait for, each with who does; one says `monitor`, a name, or `monitors`, several."""
    for part in parts:
        one = getattr(part, "monitor", None)
        for metric in getattr(part, "monitors", () if one is None else (one,)):
            yield getattr(part, "name", None) or str(part), metric


def _prefixes(step: Any) -> list[str]:
    """What the names of the metrics of `step` may begin with: the paths of members; '' where any name may come."""
    if isinstance(step, _Members):
        return [f"{name}/{rest}" for name, inner in step.steps.items() for rest in _prefixes(inner)]
    return _prefixes(step.step) if isinstance(step, (_Repeat, _Every)) else [""]


def _flatten(hooks: Iterable[Any]) -> Iterator[Any]:
    for hook in hooks:
        if isinstance(inner := getattr(hook, "composed_hooks", None), tuple):
            yield from _flatten(inner)
        else:
            yield hook


def _open(step: Any) -> bool:
    """Whether a loop stands there openly, with no wrapper around it."""
    return isinstance(step, Loop) or (isinstance(step, _Every) and _open(step.step))


def _saves(observer: Any) -> bool:
    return getattr(observer, "saves", False)


# --- a program, whole --------------------------------------------------------------------------------------------------


def _outermost(loop: Loop, state: S, data: Any, interrupt: Callable[[], str | None] | None) -> tuple[S, Any]:
    program = Program(loop, state, interrupt)
    loops = _loops(loop)
    given = given_lease(state) if any(each.donate for each in loops) else None
    with given or nullcontext():
        return _through(loop, loops, program, state, data, given)


def _through(loop: Loop, loops: list[Loop], program: Program, state: Any, data: Any, lease: Lease | None) -> tuple[Any, Any]:
    token = here.set(ASIDE)
    try:
        program.latest = state = program.begin(_hidden(loop), program.begin(loops, state), hidden=True)
        if any(isinstance(each, (_EpochLoop, _StepLoop)) for each in loops):  # an evaluation has no hooks, and reads what they remember
            program.unclaimed(state)
        result = loop._run(state, data, Here(program, lease=lease))
    except Unwind as unwound:
        program.close(program.latest, unwound.reason)
        return unwound.state, loop._result(unwound.state.position.frames[0].totals)
    except BaseException as error:
        program.close(program.latest, error)
        raise
    finally:
        here.reset(token)
    program.close(program.latest, None)
    return result


def _aside(loop: Loop, state: Any, data: Any, interrupt: Callable[[], str | None] | None) -> tuple[Any, Any]:
    """A program of its own, run by a hook, an observer or a step of another, whose position is not its own and comes back with its result."""
    around = state.position
    watching = spy.set(None)
    try:
        end, metrics = _outermost(loop, state.replace(position=Position()) if around.frames else state, data, interrupt)
    finally:
        spy.reset(watching)
    return (end.replace(position=around) if around.frames else end), metrics


def _loops(step: Any) -> list[Loop]:
    """The loops of a program that stand in it openly, outermost first."""
    if not isinstance(step, (Loop, _Every)):
        return []
    inner = [loop for _, each in step.inner() for loop in _loops(each)]
    return [step, *inner] if isinstance(step, Loop) else inner


def with_observers(step: Any, change: Callable[[tuple[Any, ...]], tuple[Any, ...]]) -> Any:
    """`step` with the observers of each loop that stands in it openly changed; its hooks and steps are the same objects."""
    if not dataclasses.is_dataclass(step) or isinstance(step, type):
        return step
    fields = {field.name: getattr(step, field.name) for field in dataclasses.fields(step)}
    inner: dict[str, Any] = {}
    if "step" in fields:
        inner["step"] = with_observers(fields["step"], change)
    if isinstance(fields.get("steps"), dict):
        inner["steps"] = {name: with_observers(member, change) for name, member in fields["steps"].items()}
    if isinstance(step, Loop):
        inner["observers"] = change(tuple(step.observers))
    return dataclasses.replace(step, **inner)


def _hidden(step: Any, seen: frozenset[int] = frozenset()) -> list[Loop]:
    """The loops that wrappers hold: in what they close over, were given, belong to or name.

    Their hooks begin with the program, so that a state remembers them from the start. What is hidden better begins when it is called.
    """
    if id(step) in seen or is_step(step):
        return []
    seen = seen | {id(step)}
    if isinstance(step, (Loop, _Every)):
        return [loop for _, each in step.inner() for loop in _hidden(each, seen)]
    found: list[Loop] = []
    for each in _held(step):
        if isinstance(each, (Loop, _Every)):
            found += [*_loops(each), *_hidden(each, seen)]
        elif isinstance(each, (FunctionType, MethodType, functools.partial)):
            found += _hidden(each, seen)
    return found


def _held(step: Any) -> Iterable[Any]:
    if isinstance(step, functools.partial):
        return [step.func, *step.args, *step.keywords.values()]
    if isinstance(step, MethodType):
        return [step.__func__, *getattr(step.__self__, "__dict__", {}).values()]
    if isinstance(step, FunctionType):
        cells = [cell.cell_contents for cell in step.__closure__ or () if cell != CellType()]
        named = [step.__globals__.get(name) for name in step.__code__.co_names]
        return [*cells, *(step.__defaults__ or ()), *(each for each in named if isinstance(each, (Loop, _Every)))]
    return getattr(step, "__dict__", {}).values()


def elsewhere(state: Any, program: Program) -> ProgramError:
    """The error for a state that stands in another program: both are shown."""
    stands = "\n".join(f"  {'  ' * i}{f.loop}, tick {f.ticks}" for i, f in enumerate(state.position.frames))
    drawn = "\n".join(f"  {line}" for line in str(program.loop).splitlines())
    return ProgramError(
        f"the state stands in another program:\n{stands}\nand this one is:\n{drawn}\nTo begin this one anew: state.rewind()"
    )


def _framed(state: Any, frames: tuple[Frame, ...]) -> Any:
    position = state.position
    return state.replace(position=Position(frames, position.streams, position.ticks))


def _title(step: Any) -> str:
    return step.title() if isinstance(step, (Loop, _Every)) else getattr(step, "__qualname__", repr(step))


def _drawn(name: str, step: Any, depth: int) -> Iterator[str]:
    indent = "  " * depth
    yield f"{indent}{name + ': ' if name else ''}{_title(step)}"
    if isinstance(step, (Loop, _Every)):
        for inner_name, inner in step.inner():
            yield from _drawn(inner_name, inner, depth + 1)
    if isinstance(step, Loop):
        for what, parts in (("hook", step.hooks), ("observer", step.observers)):
            for part in parts:
                yield f"{indent}  {what} {_named(part)}"


def _total_steps(step: Any) -> int | None:
    """How many training steps a program will have taken, where that follows from the program alone."""
    if isinstance(step, (_EvalLoop, _PredictLoop)):
        return 0
    if isinstance(step, _StepLoop):
        return step.steps if step.until_step is None else None
    if isinstance(step, _Repeat):
        inner = _total_steps(step.step)
        return None if inner is None or step.times is None or step.until is not None else step.times * inner
    if isinstance(step, _Sequence):
        return _sum(map(_total_steps, step.steps.values()))
    if isinstance(step, _Workflow):
        return _sum(_total_steps(step.steps[name]) for name in step._order())
    return 0 if isinstance(step, _Every) and _total_steps(step.step) == 0 else None


def _sum(counts: Iterable[int | None]) -> int | None:
    known = list(counts)
    return None if None in known else sum(count for count in known if count is not None)


def _named(part: Any) -> str:
    if hasattr(part, "hook"):  # one that acts now and then: it goes by the name of what it holds back
        return f"{_named(part.hook)}, now and then"
    if not isinstance(part, type) and type(part).__str__ is not object.__str__:
        return str(part)
    return getattr(part, "name", None) or getattr(part, "__qualname__", type(part).__name__)
