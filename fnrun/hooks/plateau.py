"""A lower learning rate where a metric no longer improves."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import torch

from fnrun.checkpoint.manifest import Mode
from fnrun.core.counts import count
from fnrun.core.state import TrainState
from fnrun.hooks import hyperparams
from fnrun.hooks.monitor import check_mode, reported

ThresholdMode = Literal["rel", "abs"]


@dataclasses.dataclass(frozen=True)
class _ReduceOnPlateau:
    monitor: str
    mode: str
    factor: float
    patience: int
    threshold: float
    threshold_mode: str
    cooldown: int
    min_value: float
    hyperparam: str
    name: str

    def __str__(self) -> str:
        return f"{self.name} on {self.monitor} ({self.mode}), patience {self.patience}, factor {self.factor}"

    def init(self, state: TrainState) -> dict[str, torch.Tensor]:
        hyperparams.check(self.name, state.opt_state, self.hyperparam)
        like = next(iter(hyperparams.named(state.opt_state, self.hyperparam).values()))
        worst = math.inf if self.mode == "min" else -math.inf
        zero = torch.zeros_like(like, dtype=torch.int64)
        return {"best": torch.full_like(like, worst, dtype=torch.float64), "bad": zero, "cooling": zero.clone()}

    def after(self, state: TrainState, metrics: dict[str, Any]) -> TrainState:
        if not reported(self.name, self.monitor, state, metrics):
            return state
        memory = state.memory[self.name]
        value = torch.as_tensor(metrics[self.monitor], dtype=torch.float64, device=memory["best"].device)
        improved = self._improved(value, memory["best"])
        cooling = memory["cooling"] > 0
        bad = torch.where(improved | cooling, 0, memory["bad"] + 1)
        reduce = bad > self.patience
        memory = {
            "best": torch.where(improved, value, memory["best"]),
            "bad": torch.where(reduce, 0, bad),
            "cooling": torch.where(reduce, self.cooldown, memory["cooling"] - cooling.long()),
        }
        values = hyperparams.named(state.opt_state, self.hyperparam)
        lower = {name: torch.where(reduce.to(old.device), self._lower(old), old) for name, old in values.items()}
        return state.replace(opt_state=hyperparams.put(state.opt_state, lower), memory={**state.memory, self.name: memory})

    def _improved(self, value: torch.Tensor, best: torch.Tensor) -> torch.Tensor:
        if self.threshold_mode == "rel":
            part = self.threshold * best.sign()  # of its size: the other way for a best below 0
            bound = torch.where(best.isfinite(), best * (1.0 - part if self.mode == "min" else 1.0 + part), best)
        else:
            bound = best - self.threshold if self.mode == "min" else best + self.threshold
        return value < bound if self.mode == "min" else value > bound

    def _lower(self, value: torch.Tensor) -> torch.Tensor:
        return torch.minimum(value, (value * self.factor).clamp_min(self.min_value))  # what is below the least already is not raised to it


def reduce_on_plateau(
    monitor: str,
    *,
    mode: Mode = "min",
    factor: float = 0.1,
    patience: int = 10,
    threshold: float = 1e-4,
    threshold_mode: ThresholdMode = "rel",
    cooldown: int = 0,
    min_value: float = 0.0,
    hyperparam: str = "lr_scale",
    name: str = "reduce_on_plateau",
) -> Any:
    """Multiply a hyperparameter by `factor`, down to `min_value`, when `monitor` has not improved for more than `patience` rounds in a row.

    - `mode="min"`: whether less (`"min"`) or more (`"max"`) is better. A NaN is no improvement.
    - `factor=0.1`: between 0 and 1.
    - `patience=10`: the number of rounds without an improvement before a reduction.
    - `threshold=1e-4`: an improvement is larger than this: relative to the magnitude of the best value, or absolute.
    - `threshold_mode="rel"`: or `"abs"`.
    - `cooldown=0`: rounds after a reduction that do not count as bad.
    - `min_value=0.0`: the lower bound of the hyperparameter.
    - `hyperparam="lr_scale"`: in the optimizer's state, in each group of a partition. Every optimizer multiplies its rate by `lr_scale`;
      `optim.in_state` makes others.

    Rounds in which the metric is not computed (validation each n-th epoch) don't count at all.

    No Python code branches on the metric: it waits for the device only if the hyperparameter is on another one (`lr_scale` is on the CPU).
    With a hyperparameter and a metric that have a value for each member of a sweep, each member has its plateau.

    Raises ValueError for options out of range, for a hyperparameter that the state does not have, and, with the names that exist, where the
    monitored step reports no such metric.

    Source: `torch.optim.lr_scheduler.ReduceLROnPlateau`, without its `eps`, and with the size of the best value where torch takes the value
    itself, by which below 0 every round is an improvement; MMEngine's ReduceOnPlateauLR and ReduceOnPlateauMomentum.
    """
    check_mode("reduce_on_plateau", mode)
    if threshold_mode not in ("rel", "abs"):
        raise ValueError(f"reduce_on_plateau: threshold_mode is 'rel' or 'abs', not {threshold_mode!r}")
    if not 0 < factor < 1:
        raise ValueError(f"reduce_on_plateau: factor is between 0 and 1, not {factor!r}")
    patience, cooldown = count("reduce_on_plateau: patience", patience, 0), count("reduce_on_plateau: cooldown", cooldown, 0)
    for option, value in (("threshold", threshold), ("min_value", min_value)):
        if not value >= 0:
            raise ValueError(f"reduce_on_plateau: {option} is at least 0, not {value!r}")
    return _ReduceOnPlateau(monitor, mode, factor, patience, threshold, threshold_mode, cooldown, min_value, hyperparam, name)
