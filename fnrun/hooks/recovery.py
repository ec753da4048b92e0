"""Going back to the last good state where the loss explodes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from fnrun.core.counts import count
from fnrun.core.position import in_training
from fnrun.core.state import TrainState
from fnrun.hooks import hyperparams
from fnrun.hooks.monitor import monitored_value
from fnrun.optim.lists import all_finite


@dataclasses.dataclass(frozen=True)
class _Rollback:
    monitor: str
    when: Callable[[float, float], bool] | None
    max_retries: int
    lr_factor: float
    name: str

    def __str__(self) -> str:
        return f"{self.name} on {self.monitor}"

    def init(self, state: TrainState) -> dict[str, Any]:
        if self.lr_factor != 1:
            hyperparams.check(self.name, state.opt_state, "lr_scale")
        return {"good": None, "newest": None, "value": None, "retries": 0}

    def before(self, state: TrainState, batch: Any) -> TrainState:
        memory = state.memory[self.name]
        if memory["good"] is not None and memory["newest"]["step"] != state.step:
            return state  # `every` skipped this hook since: what it saw last is as old as that
        kept = self._kept(state)  # with what others changed after this hook's tick, and with the memory of hooks that come later
        return self._remembering(state, {**memory, "good": memory["good"] or kept, "newest": kept})

    def after(self, state: TrainState, metrics: dict[str, Any]) -> TrainState:
        value = monitored_value(self.name, self.monitor, state, metrics)
        if value is None:
            return state
        memory = state.memory[self.name]
        if self._exploded(value, memory["value"]) or not (in_training(state) or all_finite(state.params.values())):
            return self._back(state, value)
        kept = self._kept(state)
        # A training step's loss is that of the weights before the step; a round's metrics are those of the weights at its end.
        good = memory["newest"] if in_training(state) else kept
        return self._remembering(state, {**memory, "good": good, "newest": kept, "value": value})

    def _exploded(self, value: float, good: float | None) -> bool:
        return not math.isfinite(value) or (self.when is not None and good is not None and bool(self.when(value, good)))

    def _back(self, state: TrainState, value: float) -> TrainState:
        memory = state.memory[self.name]
        good, retries = memory["good"], memory["retries"]
        if retries >= self.max_retries:
            raise RuntimeError(
                f"{self.name}: {self.monitor} is {value:.6g} at step {state.step}, and all retries ({retries}) are used up; the "
                f"last good state is that of step {good['step']}. Try a lower learning rate, gradient clipping "
                "(optim.clip_by_global_norm) or lr_factor="
            )
        scales = hyperparams.named(state.opt_state, "lr_scale")  # not those of the good state: what lowered them since has gone on
        opt_state = hyperparams.put(good["opt_state"], {name: scale * self.lr_factor for name, scale in scales.items()})
        state = state.replace(
            params=good["params"], buffers=good["buffers"], opt_state=opt_state, memory={**state.memory, **good["averages"]}
        )
        kept = {**good, "opt_state": opt_state}
        return self._remembering(state, {**memory, "good": kept, "newest": kept, "retries": retries + 1})

    def _kept(self, state: TrainState) -> dict[str, Any]:
        """The parts of a state that go back, by reference: its tensors are never written to. Averages of bad weights go back too."""
        averages = {name: memory for name, memory in state.memory.items() if isinstance(memory, dict) and "params" in memory}
        return {"params": state.params, "buffers": state.buffers, "opt_state": state.opt_state, "averages": averages, "step": state.step}

    def _remembering(self, state: TrainState, memory: dict[str, Any]) -> TrainState:
        return state.replace(memory={**state.memory, self.name: memory})


def rollback(
    monitor: str,
    *,
    when: Callable[[float, float], bool] | None = None,
    max_retries: int = 3,
    lr_factor: float = 1.0,
    name: str = "rollback",
) -> Any:
    """Go back to the last good state where `monitor` is not finite or has exploded.

    Parameters, buffers, optimizer state and averaged weights go back. The step, the position in the data and so the randomness go on: the
    retry meets other batches.

    - `monitor`: the name of a metric, such as `"val/loss"`.
    - `when=None`: a function `(value, good) -> bool`, whether `value` has exploded, where `good` is the last value that had not:
      `lambda value, good: value > 10 * good`. Without it only infinities and NaN count.
    - `max_retries=3`: the retries of the whole run; the next explosion is a RuntimeError.
    - `lr_factor=1.0`: above 0, at most 1. Each retry multiplies `lr_scale` by it.
    - `name="rollback"`: the key in `state.memory`.

    In a loop of training steps the last good state is the one before the last step with a good loss, since that is the loss of the weights
    before the step. `every(n, rollback(...))` looks, and goes back, in strides of n. In rounds it is the state at the end of the last good
    round, whose parameters must be finite too; monitor a metric of the validation. Rounds without the metric don't count.

    Reading the value waits for the device; in a loop of steps that is at each step. The good state is in `state.memory[name]` by reference,
    and so in checkpoints; `state.memory[name]["retries"]` counts. The mean of an epoch includes the metrics of the step that went wrong.

    Raises ValueError for options out of range, for `lr_factor` where no optimizer state has an `lr_scale`, and, with the names that exist,
    where the monitored step reports no such metric.

    Source: the restart from an earlier checkpoint with other batches of PaLM (Chowdhery et al. 2022, section 5.1), without the disk.
    """
    max_retries = count("rollback: max_retries", max_retries)
    if not 0 < lr_factor <= 1:
        raise ValueError(f"rollback: lr_factor is above 0 and at most 1, not {lr_factor!r}")
    return _Rollback(monitor, when, max_retries, lr_factor, name)
