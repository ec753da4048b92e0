"""Averages of the weights over training."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import torch

from fnrun.state import TrainState, counted

Buffers = Literal["copy", "average"]
Tensors = dict[str, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class _Exponential:
    decay: float
    warmup: float | None

    def __call__(self, n: int) -> float:
        return 1.0 - (self.decay if self.warmup is None else min(self.decay, (1 + n) / (self.warmup + n)))


@dataclasses.dataclass(frozen=True)
class _Annealed:
    decay: float
    gamma: float
    every: int

    def __call__(self, n: int) -> float:
        return max(1.0 - self.decay, self.gamma / (self.gamma + n * self.every))


def _mean(n: int) -> float:
    return 1.0 / (n + 1)


@dataclasses.dataclass(frozen=True)
class _Average:
    """`average <- average + weight(n) * (value - average)` at the n-th update after the first, which copies."""

    weight: Callable[[int], float]
    every: int
    start: int
    buffers: Buffers
    name: str

    def __str__(self) -> str:
        decay = getattr(self.weight, "decay", None)
        words = [self.name + (f" {decay}" if decay is not None else "")]
        words += [f"every {self.every}"] if self.every > 1 else []
        words += [f"from {self.start}"] if self.start else []
        return ", ".join(words)

    def init(self, state: TrainState) -> dict[str, Any]:
        return {**{field: _copies(values) for field, values in self._averaged(state).items()}, "updates": 0}

    def after(self, state: TrainState, metrics: dict[str, Any]) -> TrainState:
        tick = counted(state)
        due = tick >= self.start and (tick - self.start) % self.every == 0
        memory = state.memory[self.name]
        updates = memory["updates"]
        if not due and updates:
            return state
        if not updates:
            averages = {field: _copies(values) for field, values in self._averaged(state).items()}
        else:
            weight = self.weight(updates)
            averages = {field: _lerp(memory[field], values, weight) for field, values in self._averaged(state).items()}
        return state.replace(memory={**state.memory, self.name: {**averages, "updates": updates + due}})

    def _averaged(self, state: TrainState) -> dict[str, Tensors]:
        return {"params": state.params, **({"buffers": state.buffers} if self.buffers == "average" else {})}


def _copies(values: Tensors) -> Tensors:
    return {name: value.clone() for name, value in values.items()}


def _lerp(averages: Tensors, values: Tensors, weight: float) -> Tensors:
    fractional = {name: value for name, value in values.items() if value.is_floating_point() or value.is_complex()}
    moved: Any = ()
    if fractional:
        moved = torch._foreach_lerp([averages[name] for name in fractional], list(fractional.values()), weight)  # pyright: ignore[reportPrivateImportUsage]
    new = dict(zip(fractional, moved, strict=True))
    # What has no fractions has no average: it is the newest value.
    return {name: new[name] if name in new else value.clone() for name, value in values.items()}


def ema(decay: float, *, every: int = 1, warmup: float | None = None, start: int = 0, buffers: Buffers = "copy", name: str = "ema") -> Any:
    """The exponential moving average of the parameters, `average <- decay * average + (1 - decay) * params`, in `state.memory[name]["params"]`.

    It acts on each n-th step (`every`), or round outside of a loop of steps, from `start` on. The first update copies, and until then
    the newest parameters stand there. Evaluate with it by `make_eval_step(..., weights=name)`.

    - `warmup=w` begins with a shorter memory: the decay of the n-th further update is min(decay, (1 + n) / (w + n)); 10 is usual.
    - `buffers="average"` averages the buffers too (batch statistics; whole numbers are the newest), in `state.memory[name]["buffers"]`;
      with `"copy"` an evaluation has the newest ones of the state.

    Parameters keep shape, dtype and device. Raises ValueError for a decay outside [0, 1) and other options out of range.

    >>> from fnrun import Key
    >>> hook = ema(0.75)
    >>> state = TrainState({"x": torch.tensor(0.0)}, {}, None, Key(0))
    >>> state = state.replace(memory={hook.name: hook.init(state)})
    >>> for step, x in enumerate([1.0, 2.0], start=1):
    ...     state = hook.after(state.replace(params={"x": torch.tensor(x)}, step=step), {})
    >>> state.memory["ema"]["params"]["x"]
    tensor(1.2500)

    Source: Polyak and Juditsky 1992; `torch.optim.swa_utils.AveragedModel` with `get_ema_avg_fn(decay)` and `use_buffers`; MMEngine's
    ExponentialMovingAverage, whose momentum is `1 - decay`; the warm-up is that of TensorFlow's `num_updates` and diffusers' `EMAModel`.
    """
    _check_decay("ema", decay)
    if warmup is not None and not warmup >= 1:
        raise ValueError(f"ema: warmup is at least 1, not {warmup!r}")
    return _average("ema", _Exponential(decay, warmup), every, start, buffers, name)


def annealed_ema(
    decay: float, *, gamma: float = 100.0, every: int = 1, start: int = 0, buffers: Buffers = "copy", name: str = "annealed_ema"
) -> Any:
    """`ema` whose newest value weighs `max(1 - decay, gamma / (gamma + steps))`, with the steps since the first update: much at first.

    Everything else is as for `ema`. Raises ValueError for a decay outside [0, 1), a gamma that is not above 0, and other options out of range.

    Source: MMEngine's MomentumAnnealingEMA, whose momentum is `1 - decay`.
    """
    _check_decay("annealed_ema", decay)
    if not gamma > 0:
        raise ValueError(f"annealed_ema: gamma is above 0, not {gamma!r}")
    return _average("annealed_ema", _Annealed(decay, gamma, every), every, start, buffers, name)


def swa(start: int = 0, *, every: int = 1, buffers: Buffers = "copy", name: str = "swa") -> Any:
    """Stochastic weight averaging: the mean of the parameters after step `start` and each n-th (`every`) from there, or rounds.

    It is in `state.memory[name]["params"]`; until then the newest parameters stand there. `buffers` as for `ema`: batch statistics of
    averaged weights are those of no network that ran; `"average"` comes close. Raises ValueError for options out of range.

    Source: Izmailov et al. 2018, arXiv:1803.05407; `torch.optim.swa_utils.AveragedModel`; MMEngine's StochasticWeightAverage.
    """
    return _average("swa", _mean, every, start, buffers, name)


def _average(who: str, weight: Callable[[int], float], every: int, start: int, buffers: str, name: str) -> _Average:
    if every < 1:
        raise ValueError(f"{who}: every is at least 1, not {every!r}")
    if start < 0:
        raise ValueError(f"{who}: start is at least 0, not {start!r}")
    if buffers != "copy" and buffers != "average":
        raise ValueError(f"{who}: buffers is 'copy' or 'average', not {buffers!r}")
    return _Average(weight, every, start, buffers, name)


def _check_decay(who: str, decay: float) -> None:
    if not 0 <= decay < 1:
        raise ValueError(f"{who}: decay is in [0, 1), not {decay!r}")
