"""A step loop whose ticks are several compiled steps in one call."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from fnrun.core.position import Cursor, Frame
from fnrun.loops.data_loops import StepLoop, way_out
from fnrun.loops.program import LoopContext
from fnrun.loops.structure import AnyStep, title
from fnrun.steps import PureStep, TrainStep


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class FusedStepLoop(StepLoop):
    """`fused_steps` batches at a time, as one compiled call: hooks, observers and interrupts act between the calls."""

    fused_steps: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (isinstance(self.step, PureStep) and self.step.fuses):
            raise TypeError(
                f"fused_steps: {title(self.step)} is no compiled step; make_train_step(..., compile=True) makes one{way_out(self.step)}"
            )
        for part in (*self.hook_contracts, *self.observer_contracts):
            if (part.every or self.fused_steps) % self.fused_steps:
                raise ValueError(
                    f"fused_steps={self.fused_steps}: {part.name or part.title} acts every {part.every} steps, and {self.fused_steps} "
                    "at a time are one call that nothing looks into: let every= be a multiple"
                )

    def _at_a_time(self) -> str:
        return f", {self.fused_steps} at a time"

    def shortened(self, within: Callable[[str, AnyStep], AnyStep], **parts: Any) -> Any:
        return dataclasses.replace(self, steps=self.fused_steps, until_step=None, **parts)

    def take(self, state: Any, frame: Frame, at: LoopContext) -> tuple[Any, dict[str, Cursor] | None, str | None]:
        name, stream = self.stream(at)
        cursor, batches = self.cursor(state, frame, at), []
        for _ in range(min(self.fused_steps, self._left(state, frame))):
            batch, cursor = at.program.streams.next_batch(name, stream, state, cursor, replay=self.passing(at))
            batches.append(batch)
        return batches, {name: cursor}, None

    def stepped(self, state: Any, x: Any, at: LoopContext) -> Any:
        assert isinstance(self.step, TrainStep)
        return self.step.several(state, x, owner=at.owner if self._donates else None)

    def ticks_of(self, x: Any) -> int:
        return len(x)

    def examples_of(self, x: Any, result: Any) -> int:
        return sum(super(FusedStepLoop, self).examples_of(batch, result) for batch in x)  # whose metrics are folds

    def unobserved(self, state: Any, frame: Frame, at: LoopContext) -> int:
        return 0
