"""Loops over data: their ticks are the calls of a step on the batches of a stream."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import numpy as np
import torch

from fnrun.core import examples as rows, tree
from fnrun.core.position import TRAINING, Cursor, Frame
from fnrun.core.words import kind
from fnrun.data import Batches
from fnrun.loops import totals as running
from fnrun.loops.base import Loop
from fnrun.loops.contracts import ours
from fnrun.loops.program import LoopContext
from fnrun.loops.structure import AnyStep, title
from fnrun.loops.unobserved import LONGEST, interval
from fnrun.metrics.by_name import rates_last, weight
from fnrun.steps import PureStep


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class OverData(Loop):
    step: AnyStep

    over_data = True

    def inner(self) -> Iterable[tuple[str, AnyStep]]:
        return [("", self.step)]

    def passing(self, at: LoopContext) -> bool:
        """Whether each call begins the stream anew and leaves no position behind, as a loop over the batch of another loop does."""
        return at.over_batch

    def enter(self, at: LoopContext) -> LoopContext:
        return at._replace(source=self.stream(at))

    def stream(self, at: LoopContext) -> tuple[str, Batches]:
        if at.source is not None:
            return at.source
        name, stream = at.program.streams.stream(at.data, at.path, at.depth)
        return (f"{self.kind} {name}" if self.passing(at) else name), stream

    def cursor(self, state: Any, frame: Frame, at: LoopContext) -> Cursor:
        name, stream = self.stream(at)
        return Cursor(source=stream.source) if not frame.ticks and self.passing(at) else at.program.streams.cursor(state, name, stream)

    def take(self, state: Any, frame: Frame, at: LoopContext) -> tuple[Any, dict[str, Cursor] | None, str | None]:
        name, stream = self.stream(at)
        batch, after = at.program.streams.next_batch(name, stream, state, self.cursor(state, frame, at), replay=self.passing(at))
        return batch, {name: after}, None

    def leave(self, state: Any, at: LoopContext) -> Any:
        return state.replace(position=state.position.forget(self.stream(at)[0])) if self.passing(at) else state

    def turn(self, state: Any, x: Any, frame: Frame, at: LoopContext) -> tuple[Any, Any]:
        result = self.stepped(state, x, at)
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

    def stepped(self, state: Any, x: Any, at: LoopContext) -> Any:
        if self._lawful:
            return self.step(state, x)
        cursor = state.position.streams.get(self.stream(at)[0], Cursor())  # moves when the tick is over
        place = (cursor.epoch, cursor.batch) if self.trains else (cursor.epoch, cursor.batch, state.step)
        return self.call_step(self.step, state, x, at._replace(depth=at.depth + 1, over_batch=True, source=None), place)

    def metrics_of(self, result: Any) -> dict[str, Any]:
        return result

    @functools.cached_property
    def _known(self) -> Callable[[Any], int | None]:
        return self.step.examples if isinstance(self.step, PureStep) else rows.example_count

    def examples_of(self, x: Any, result: Any) -> int:
        known = self._known(x)
        return weight(known, x, result) if known is None else known

    def total(self, totals: Any, result: Any, examples: int) -> Any:
        return running.fold(totals, rates_last(result), examples)

    def result(self, totals: Any) -> Any:
        return running.compute(totals) if totals else {}

    def _left_in_pass(self, state: Any, frame: Frame, at: LoopContext) -> int | None:
        batch = self.cursor(state, frame, at).batch
        try:
            batches = len(self.stream(at)[1])  # pyright: ignore[reportArgumentType]
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

    def stepped(self, state: Any, x: Any, at: LoopContext) -> Any:
        step: Any = self.step
        return step(state, x, owner=at.owner) if self._donates else super().stepped(state, x, at)

    @functools.cached_property
    def _interval(self) -> int:
        return interval(self) if ours(self) else 1  # another kind of loop may take and turn otherwise

    def unobserved(self, state: Any, frame: Frame, at: LoopContext) -> int:
        every = self._interval
        return min(LONGEST, every - 1 - state.step % every) if every > 1 and not at.program.listened_to else 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind not in TRAINING:
            raise TypeError(
                f"{type(self).__name__}: kind={self.kind!r}: frames know a loop of training steps by its kind, "
                f"{' or '.join(map(repr, TRAINING))}. Keep that, and say what else it is in title()"
            )
        if self.donate and not self._donates:
            warnings.warn(
                f"donate=True: {title(self.step)} cannot write the new state over the old one, so it goes on in new memory. Steps of "
                f"make_train_step can, with an optimizer of fnrun.optim; what wraps a step may need the old state{way_out(self.step)}",
                stacklevel=4,
            )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class EpochLoop(Training):
    kind = "epoch_loop"
    ends_with_pass = True

    def shortened(self, within: Callable[[str, AnyStep], AnyStep], **parts: Any) -> Any:
        return StepLoop(step=self.step, steps=1, donate=self.donate, **parts)

    def length(self, state: Any, at: LoopContext) -> int | None:
        frame = state.position.frames[at.depth]
        left = self._left_in_pass(state, frame, at)
        return None if left is None else frame.ticks + left

    def done(self, state: Any, frame: Frame, at: LoopContext) -> bool:
        return frame.ticks > 0 and self.cursor(state, frame, at).batch == 0


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class StepLoop(Training):
    steps: int
    until_step: int | None = None

    kind = "step_loop"

    def title(self) -> str:
        until = f", until step {self.until_step}" if self.until_step is not None else ""
        return f"step_loop, {self.steps} steps{self._at_a_time()}{until}"

    def _at_a_time(self) -> str:
        return ""

    def shortened(self, within: Callable[[str, AnyStep], AnyStep], **parts: Any) -> Any:
        return dataclasses.replace(self, steps=1, until_step=None, **parts)

    def total_steps(self) -> int | None:
        return self.steps if self.until_step is None else None

    def _left(self, state: Any, frame: Frame) -> int:
        left = self.steps - frame.ticks
        return left if self.until_step is None else min(left, self.until_step - state.step)

    def unobserved(self, state: Any, frame: Frame, at: LoopContext) -> int:
        return min(super().unobserved(state, frame, at), self._left(state, frame))

    def length(self, state: Any, at: LoopContext) -> int | None:
        self.cursor(state, state.position.frames[at.depth], at)
        if self.until_step is None:
            return self.steps
        return min(self.steps, state.position.frames[at.depth].ticks + max(0, self.until_step - state.step))

    def done(self, state: Any, frame: Frame, at: LoopContext) -> bool:
        return self._left(state, frame) <= 0


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
                f"{self.kind}: again=True is for steps=n, the same n batches each time; without steps= each call is one whole pass"
            )

    def title(self) -> str:
        return self.kind + (f", {'the first ' * self.again}{self.steps} batches" if self.steps is not None else "")

    def shortened(self, within: Callable[[str, AnyStep], AnyStep], **parts: Any) -> Any:
        return dataclasses.replace(self, steps=1, observers=parts["observers"])  # it has no hooks

    def total_steps(self) -> int | None:
        return 0

    def length(self, state: Any, at: LoopContext) -> int | None:
        frame = state.position.frames[at.depth]
        left = self._left_in_pass(state, frame, at)
        if self.steps is not None and (left is None or not self.again):
            return self.steps
        return None if left is None else frame.ticks + left if self.steps is None else min(frame.ticks + left, self.steps)

    def passing(self, at: LoopContext) -> bool:
        return self.steps is None or self.again or at.over_batch

    def done(self, state: Any, frame: Frame, at: LoopContext) -> bool:
        if self.steps is not None and (frame.ticks >= self.steps or not self.again):
            return frame.ticks >= self.steps
        return frame.ticks > 0 and self.cursor(state, frame, at).batch == 0

    def turn(self, state: Any, x: Any, frame: Frame, at: LoopContext) -> tuple[Any, Any]:
        metrics = self.stepped(state, x, at)
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

    def turn(self, state: Any, x: Any, frame: Frame, at: LoopContext) -> tuple[Any, Any]:
        return state, self.stepped(state, x, at)

    def metrics_of(self, result: Any) -> dict[str, Any]:
        return {}

    def examples_of(self, x: Any, result: Any) -> int:
        return self._known(x) or 1  # nothing is averaged

    def shown(self, metrics: dict[str, Any], result: Any) -> dict[str, Any]:
        return {"outputs": result}

    def total(self, totals: Any, result: Any, examples: int) -> Any:
        return (*(totals or ()), tree.map(_unshared, result)) if self.keep else None

    def result(self, totals: Any) -> Any:
        return list(totals or ())


def way_out(step: Any) -> str:
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
