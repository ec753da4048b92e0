"""Averages of the weights over training."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from fnrun.state import TrainState, due


@dataclasses.dataclass(frozen=True)
class _EMA:
    decay: float
    every: int
    name: str

    def init(self, state: TrainState) -> dict[str, Any]:
        return {"params": {name: p.clone() for name, p in state.params.items()}, "updates": 0}

    def after(self, state: TrainState, metrics: dict[str, Any]) -> TrainState:
        if not due(state, self.every):
            return state
        memory = state.memory[self.name]
        names = list(memory["params"])
        averages = [memory["params"][name] for name in names]
        values = [state.params[name] for name in names]
        weight = 1.0 if memory["updates"] == 0 else 1.0 - self.decay
        averages = _lerp(averages, values, weight)
        return state.replace(
            memory={**state.memory, self.name: {"params": dict(zip(names, averages, strict=True)), "updates": memory["updates"] + 1}}
        )


def _lerp(averages: list[torch.Tensor], values: list[torch.Tensor], weight: float) -> list[torch.Tensor]:
    if all(v.is_floating_point() or v.is_complex() for v in values):
        return list(torch._foreach_lerp(averages, values, weight))  # pyright: ignore[reportPrivateImportUsage]
    # What has no fractions has no average: it is the newest value.
    return [a.lerp(v, weight) if v.is_floating_point() or v.is_complex() else v.clone() for a, v in zip(averages, values, strict=True)]


def ema(decay: float, *, every: int = 1, name: str = "ema") -> Any:
    """The exponential moving average of the parameters, `average <- decay * average + (1 - decay) * params`, in `state.memory[name]["params"]`.

    The first update copies. It acts on each n-th step (`every`). Evaluate with it by `make_eval_step(..., weights=name)`.
    Raises ValueError for a decay outside [0, 1).

    Source: Polyak and Juditsky 1992; the recursion is that of `torch.optim.swa_utils.AveragedModel` with `get_ema_avg_fn(decay)`.
    """
    if not 0 <= decay < 1:
        raise ValueError(f"ema: decay is in [0, 1), not {decay!r}")
    if every < 1:
        raise ValueError(f"ema: every is at least 1, not {every!r}")
    return _EMA(decay, every, name)
