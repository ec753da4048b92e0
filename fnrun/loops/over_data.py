"""Loops over data: their ticks are the calls of a step on the batches of a stream."""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch

from fnrun import rows, tree
from fnrun.data import Batches
from fnrun.donation import why_dead
from fnrun.loops import totals as running
from fnrun.loops.base import Loop
from fnrun.loops.composed import AnyStep, named, title
from fnrun.metrics.by_name import rates_last, weight
from fnrun.program import Here, Unwind
from fnrun.state import Cursor, Frame, Position
from fnrun.steps import PureStep, TrainStep
from fnrun.waiting import Interrupted
from fnrun.words import kind

#: So many ticks at most go straight on.
STRAIGHT = 64


class Before(NamedTuple):
    """The state before a tick, for observers that fold and look at no more."""

    step: int
    position: Position
    memory: Any


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class OverData(Loop):
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
                f"{title(self.step)} returned {type(result).__name__}, and a step in {self.kind} returns (state, metrics). "
                "Is it an evaluation step? Those belong in eval_loop"
            )
        return result

    @functools.cached_property
    def _lawful(self) -> bool:
        """Whether the step is known to be one, in which no loop of this program can stand."""
        return isinstance(self.step, PureStep)

    def _stepped(self, state: Any, x: Any, at: Here) -> Any:
        if self._lawful:
            return self.step(state, x)
        cursor = state.position.streams.get(self._stream(None, at)[0], Cursor())  # moves when the tick is over
        place = (cursor.epoch, cursor.batch) if self.trains else (cursor.epoch, cursor.batch, state.step)
        return self._call(self.step, state, x, at._replace(depth=at.depth + 1, over_batch=True, source=None), place)

    def _plain(self, metrics: Any) -> dict[str, Any]:
        return metrics

    @functools.cached_property
    def _known(self) -> Callable[[Any], int | None]:
        return self.step.examples if isinstance(self.step, PureStep) else rows.known

    def _examples(self, x: Any, metrics: Any) -> int:
        known = self._known(x)
        return weight(known, x, metrics) if known is None else known

    def _total(self, totals: Any, metrics: Any, examples: int) -> Any:
        return running.fold(totals, rates_last(metrics), examples)

    def _result(self, totals: Any) -> Any:
        return running.compute(totals) if totals else {}

    def _left_in_pass(self, state: Any, frame: Frame, data: Any, at: Here) -> int | None:
        batch = self._cursor(state, frame, data, at).batch
        try:
            batches = len(self._stream(data, at)[1])  # pyright: ignore[reportArgumentType]
        except TypeError:
            return None
        return 0 if frame.ticks and not batch else batches - batch


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Training(OverData):
    donate: bool = False

    trains = True
    ends_with_pass: ClassVar[bool] = False

    @functools.cached_property
    def _donates(self) -> bool:
        return self.donate and isinstance(self.step, PureStep) and self.step.donates

    def _stepped(self, state: Any, x: Any, at: Here) -> Any:
        step: Any = self.step
        return step(state, x, owner=at.owner) if self._donates else super()._stepped(state, x, at)

    @functools.cached_property
    def _every(self) -> int:
        """How many ticks may follow each other in one go: none where a hook acts, or an observer that may look at each state."""
        if (
            self.hooks
            or not (isinstance(self.step, PureStep) and self.step.looks_at_step_only)
            or not all(getattr(o, "idle_between", False) for o in self.observers)
        ):
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
            totals = running.fold_each(frame.totals, [(rates_last(metrics), n) for metrics, n in done])
            program.examples += sum(examples for _, examples in done)
            new = Frame(frame.kind, frame.path, frame.nth, frame.ticks + len(done), totals, gathered, frame.member)
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
                done.append((metrics, self._examples(batch, metrics)))
                cursor = after
        except Unwind:
            raise
        except Interrupted as interrupted:
            raise program.ended(interrupted, finished(state) if done and why_dead(state) is None else state) from interrupted.__cause__
        except BaseException:
            if done and why_dead(state) is None:
                finished(state)
            raise
        return finished(state)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.donate and not self._donates:
            warnings.warn(
                f"donate=True: {title(self.step)} cannot write the new state over the old one, so it goes on in new memory. Steps of "
                f"make_train_step can, with an optimizer of fnrun.optim; what wraps a step may need the old state{_way_out(self.step)}",
                stacklevel=4,
            )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class EpochLoop(Training):
    kind = "epoch_loop"
    ends_with_pass = True

    def cut(self, within: Callable[[str, AnyStep], AnyStep], **parts: Any) -> Any:
        return StepLoop(step=self.step, steps=1, donate=self.donate, **parts)

    def _length(self, state: Any, data: Any, at: Here) -> int | None:
        frame = state.position.frames[at.depth]
        left = self._left_in_pass(state, frame, data, at)
        return None if left is None else frame.ticks + left

    def _done(self, state: Any, frame: Frame, data: Any, at: Here) -> bool:
        return frame.ticks > 0 and self._cursor(state, frame, data, at).batch == 0


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class StepLoop(Training):
    steps: int
    until_step: int | None = None
    fused_steps: int = 1

    kind = "step_loop"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fused_steps == 1:
            return
        if not (isinstance(self.step, PureStep) and self.step.fuses):
            raise TypeError(
                f"fused_steps: {title(self.step)} is no compiled step; make_train_step(..., compile=True) makes one{_way_out(self.step)}"
            )
        for part in (*self.hooks, *self.observers):
            every = getattr(part, "every", self.fused_steps)
            if every % self.fused_steps:
                raise ValueError(
                    f"fused_steps={self.fused_steps}: {getattr(part, 'name', named(part))} acts every {every} steps, and {self.fused_steps} at a time are "
                    "one call that nothing looks into: let every= be a multiple"
                )

    def title(self) -> str:
        fused = f", {self.fused_steps} at a time" if self.fused_steps > 1 else ""
        return f"step_loop, {self.steps} steps{fused}" + (f", until step {self.until_step}" if self.until_step is not None else "")

    def cut(self, within: Callable[[str, AnyStep], AnyStep], **parts: Any) -> Any:
        return dataclasses.replace(self, steps=self.fused_steps, until_step=None, **parts)

    def total_steps(self) -> int | None:
        return self.steps if self.until_step is None else None

    def _stepped(self, state: Any, x: Any, at: Here) -> Any:
        if self.fused_steps == 1:
            return super()._stepped(state, x, at)
        assert isinstance(self.step, TrainStep)
        return self.step.several(state, x, owner=at.owner if self._donates else None)

    def _unwatched(self, state: Any, frame: Frame, at: Here) -> int:
        if self.fused_steps > 1:
            return 0
        left = self.steps - frame.ticks if self.until_step is None else min(self.steps - frame.ticks, self.until_step - state.step)
        return min(super()._unwatched(state, frame, at), left)

    def _taken(self, x: Any) -> int:
        return 1 if self.fused_steps == 1 else len(x)

    def _examples(self, x: Any, metrics: Any) -> int:
        if self.fused_steps == 1:
            return super()._examples(x, metrics)
        return sum(super(StepLoop, self)._examples(batch, metrics) for batch in x)  # whose metrics are folds

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
class EvalLoop(OverData):
    steps: int | None = None
    again: bool = False

    kind = "eval_loop"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.again, bool):
            raise TypeError(f"{self.kind}: again= is True or False, and not {kind(self.again)}")
        if self.again and self.steps is None:
            raise ValueError(
                f"{self.kind}: again=True is for steps=n, the same n batches each time; without steps= a call is one pass from the beginning"
            )

    def title(self) -> str:
        return self.kind + (f", {'the first ' * self.again}{self.steps} batches" if self.steps is not None else "")

    def cut(self, within: Callable[[str, AnyStep], AnyStep], **parts: Any) -> Any:
        return dataclasses.replace(self, steps=1, observers=parts["observers"])  # it has no hooks

    def total_steps(self) -> int | None:
        return 0

    def _length(self, state: Any, data: Any, at: Here) -> int | None:
        frame = state.position.frames[at.depth]
        left = self._left_in_pass(state, frame, data, at)
        if self.steps is not None and (left is None or not self.again):
            return self.steps
        return None if left is None else frame.ticks + left if self.steps is None else min(frame.ticks + left, self.steps)

    def _passing(self, at: Here) -> bool:
        return self.steps is None or self.again or at.over_batch

    def _done(self, state: Any, frame: Frame, data: Any, at: Here) -> bool:
        if self.steps is not None and (frame.ticks >= self.steps or not self.again):
            return frame.ticks >= self.steps
        return frame.ticks > 0 and self._cursor(state, frame, data, at).batch == 0

    def _turn(self, state: Any, x: Any, frame: Frame, at: Here) -> tuple[Any, Any]:
        metrics = self._stepped(state, x, at)
        if not isinstance(metrics, Mapping):
            raise TypeError(
                f"{title(self.step)} returned {type(metrics).__name__}, and a step in eval_loop returns metrics, a dict. "
                "Is it a training step? Those belong in epoch_loop or step_loop; make_eval_step(model, metric_fn) makes one for here"
            )
        return state, dict(metrics)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PredictLoop(EvalLoop):
    keep: bool = True

    kind = "predict_loop"

    def _turn(self, state: Any, x: Any, frame: Frame, at: Here) -> tuple[Any, Any]:
        return state, self._stepped(state, x, at)

    def _plain(self, metrics: Any) -> dict[str, Any]:
        return {}

    def _examples(self, x: Any, metrics: Any) -> int:
        return self._known(x) or 1  # nothing is averaged

    def _values(self, plain: dict[str, Any], metrics: Any) -> dict[str, Any]:
        return {"outputs": metrics}

    def _total(self, totals: Any, metrics: Any, examples: int) -> Any:
        return (*(totals or ()), tree.map(_unshared, metrics)) if self.keep else None

    def _result(self, totals: Any) -> Any:
        return list(totals or ())


def _way_out(step: Any) -> str:
    """What to write instead of a function around a step."""
    if isinstance(step, PureStep):
        return ""
    return ". A function around a step is not known to be one: put what it does into a part, dataclasses.replace(step, gradients=...)"


def _unshared(leaf: Any) -> Any:
    """What is kept of a worker's batch is a copy: each tensor in shared memory holds a file open, and a process may have so many."""
    owner = leaf
    while isinstance(owner, np.ndarray):
        owner = owner.base
    if not isinstance(owner, torch.Tensor) or (owner.layout is torch.strided and not (owner.is_cpu and owner.is_shared())):
        return leaf
    # Of a sparse tensor it cannot be told whose memory it has.
    return leaf.copy() if isinstance(leaf, np.ndarray) else leaf.detach().clone()
