"""Functions from step to step."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch

from fnrun.optim.lists import all_finite
from fnrun.steps.checks import check_function
from fnrun.steps.kinds import Function, Metrics, PureStep
from fnrun.steps.train import Combine, TrainStep, each


def skip_nonfinite(step: Any) -> Any:
    """`step` without the updates after which the loss or a parameter is not finite: those change `state.step` alone.

    The metrics of a skipped update are `{"skipped": 1.0}` alone, so that no NaN reaches a mean. Each step waits for the device, fused steps
    are checked one by one, and nothing is donated, since the old state may be needed.

    Raises TypeError around a loop, whose position cannot be taken back: it goes around the step, inside the loop.
    """
    check_function("skip_nonfinite", step, 2, "step(state, batch)", "(state, metrics)")
    if isinstance(step, TrainStep):
        return dataclasses.replace(step, combine=_Finite(step.combine))
    wrapped = functools.partial(_finite, step)
    return Function(wrapped, like=step) if isinstance(step, PureStep) else wrapped


class _Finite:
    """Another `combine`, whose results are checked."""

    donates = False

    def __init__(self, combine: Combine) -> None:
        self.combine, self.fuses, self.text = combine, combine.fuses, combine.text

    def __call__(self, step: TrainStep, state: Any, batches: list[Any], owner: Any, /) -> tuple[Any, Metrics]:
        one = functools.partial(_finite, lambda state, batch: self.combine(step, state, [batch], None))
        return each(one, state, batches, step.examples)


def _finite(step: Callable[[Any, Any], tuple[Any, Metrics]], state: Any, batch: Any) -> tuple[Any, Metrics]:
    new, metrics = step(state, batch)
    if new.position is not state.position:
        raise TypeError("skip_nonfinite goes around a step, inside the loop: epoch_loop(skip_nonfinite(step))")
    loss = metrics["loss"]
    loss = loss if isinstance(loss, torch.Tensor) or not hasattr(loss, "compute") else loss.compute()
    if all_finite([loss, *new.params.values()]):
        return new, {**metrics, "skipped": metrics.get("skipped", 0.0)}
    return state.replace(step=new.step), {"skipped": 1.0}
