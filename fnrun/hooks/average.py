"""Averages of the weights over training."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import torch

from fnrun.core.counts import count
from fnrun.core.position import tick_number
from fnrun.core.state import TrainState, carried
from fnrun.optim import applied_updates

Buffers = Literal["copy", "average"]
Per = Literal["step", "update"]
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
    per: Per = "step"

    def __str__(self) -> str:
        decay = getattr(self.weight, "decay", None)
        words = [self.name + (f" {decay}" if decay is not None else "")]
        words += [f"every {self.every}"] if self.every > 1 else []
        words += [f"from {self.start}"] if self.start else []
        words += ["per update"] if self.per == "update" else []
        return ", ".join(words)

    def init(self, state: TrainState) -> dict[str, Any]:
        seen = {} if self.per == "step" else {"applied": self._applied(state)}
        return {**{field: _copies(values) for field, values in self._averaged(state).items()}, "updates": 0, **seen}

    def after(self, state: TrainState, metrics: dict[str, Any]) -> TrainState:
        memory = state.memory[self.name]
        updates, seen = memory["updates"], {}
        if self.per == "step":
            tick = tick_number(state)
            due = tick >= self.start and (tick - self.start) % self.every == 0
        else:
            tick = self._applied(state)
            due = tick >= self.start and (tick - self.start) // self.every != (memory["applied"] - self.start) // self.every
            seen = {"applied": tick if due else memory["applied"]}
        if not due and updates:
            return state
        if not updates:
            averages = {field: _copies(values) for field, values in self._averaged(state).items()}
        else:
            weight = self.weight(updates)
            averages = {field: _lerp(memory[field], values, weight, field) for field, values in self._averaged(state).items()}
        return carried(state, memory={**state.memory, self.name: {**averages, "updates": updates + due, **seen}})

    def _averaged(self, state: TrainState) -> dict[str, Tensors]:
        return {"params": state.params, **({"buffers": state.buffers} if self.buffers == "average" else {})}

    def _applied(self, state: TrainState) -> int:
        count = applied_updates(state.opt_state)
        if count is None:
            raise ValueError(f"{self.name}: per='update' counts the updates of an optimizer, and this one's state has no count of them")
        return count


#: An average of these would hardly move: an increment is less than half of their last digit.
_NARROW = {torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.complex32: torch.complex64}


def _copies(values: Tensors) -> Tensors:
    return {name: _wide(value) if value.dtype in _NARROW else value.clone() for name, value in values.items()}


def _wide(value: torch.Tensor) -> torch.Tensor:
    return value.to(_NARROW.get(value.dtype, value.dtype))


def _lerp(averages: Tensors, values: Tensors, weight: float, field: str) -> Tensors:
    averaged = {name: value for name, value in values.items() if value.is_floating_point() or value.is_complex()}
    if field == "buffers":
        averaged = {name: value for name, value in averaged.items() if not _turns(name, values)}
    moved: Any = ()
    if averaged:
        old, new = [averages[name] for name in averaged], list(averaged.values())
        if any(value.dtype in _NARROW for value in new):
            old, new = list(map(_wide, old)), list(map(_wide, new))  # the old ones too: in saved runs they may be narrow
        moved = torch._foreach_lerp(old, new, weight)  # pyright: ignore[reportPrivateImportUsage]
    found = dict(zip(averaged, moved, strict=True))
    # Integers have no average, and a mean of unit vectors is shorter than each of them: these are the newest values.
    return {name: found[name] if name in found else value.clone() for name, value in values.items()}


def _turns(name: str, buffers: Tensors) -> bool:
    """Whether this is one of the two unit vectors of a spectral norm: `weight_u` and `weight_v`, `_u` and `_v`."""
    return name.endswith(("_u", "_v")) and buffers[name].ndim == 1 and f"{name[:-1]}u" in buffers and f"{name[:-1]}v" in buffers


def ema(
    decay: float,
    *,
    every: int = 1,
    warmup: float | None = None,
    start: int = 0,
    buffers: Buffers = "copy",
    per: Per = "step",
    name: str = "ema",
) -> Any:
    """The exponential moving average of the parameters: `average <- decay * average + (1 - decay) * params`.

    The average is `state.memory[name]["params"]`. Until the first update, which copies, it is the newest parameters. Evaluate with it by
    `make_eval_step(..., weights=name)`.

    - `decay`: in [0, 1).
    - `every=1`: steps from update to update; rounds outside of a loop of steps.
    - `warmup=None`: with `warmup=w` the decay of the n-th update after the first is min(decay, (1 + n) / (w + n)); 10 is usual.
    - `start=0`: the first step, or round, with an update.
    - `buffers="copy"`: an evaluation has the newest buffers of the state. `"average"` averages them too (batch statistics), element by
      element, in `state.memory[name]["buffers"]`; integers and the unit vectors of spectral norm are the newest all the same.
    - `per="step"`: the unit of `every`, `start` and the decay. `"update"` counts updates of the optimizer: under `optim.accumulate(n)`,
      where n - 1 of n steps change nothing, the decay then means what it means without.
    - `name="ema"`: the key in `state.memory`.

    Averages keep shape and device. Those of float16 and bfloat16 are float32; an evaluation gets them in the dtype of the parameters.
    Raises ValueError for a decay outside [0, 1) and other options out of range.

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
    if warmup is not None and not 1 <= warmup < math.inf:
        raise ValueError(f"ema: warmup is at least 1, not {warmup!r}")
    return _average("ema", _Exponential(decay, warmup), every, start, buffers, per, name)


def annealed_ema(
    decay: float,
    *,
    gamma: float = 100.0,
    every: int = 1,
    start: int = 0,
    buffers: Buffers = "copy",
    per: Per = "step",
    name: str = "annealed_ema",
) -> Any:
    """`ema` with the weight `max(1 - decay, gamma / (gamma + steps))` of the newest value, for the steps since the first update.

    Everything else is as for `ema`. Raises ValueError for a decay outside [0, 1), a gamma not above 0, and other options out of range.

    Source: MMEngine's MomentumAnnealingEMA, whose momentum is `1 - decay`.
    """
    _check_decay("annealed_ema", decay)
    if not 0 < gamma < math.inf:
        raise ValueError(f"annealed_ema: gamma is above 0, not {gamma!r}")
    return _average("annealed_ema", _Annealed(decay, gamma, every), every, start, buffers, per, name)


def swa(start: int = 0, *, every: int = 1, buffers: Buffers = "copy", per: Per = "step", name: str = "swa") -> Any:
    """Stochastic weight averaging: the mean of the parameters after step `start` and each n-th (`every`) from there, or rounds.

    The mean is `state.memory[name]["params"]`; until step `start` that is the newest parameters. `buffers`, `per` and `name` are as for
    `ema`. No network ran with the averaged weights, so no batch statistics are exactly theirs: `buffers="average"` comes close.
    Raises ValueError for options out of range.

    Source: Izmailov et al. 2018, arXiv:1803.05407; `torch.optim.swa_utils.AveragedModel`; MMEngine's StochasticWeightAverage.
    """
    return _average("swa", _mean, every, start, buffers, per, name)


def _average(who: str, weight: Callable[[int], float], every: int, start: int, buffers: str, per: str, name: str) -> _Average:
    every, start = count(f"{who}: every", every), count(f"{who}: start", start, 0)
    if buffers != "copy" and buffers != "average":
        raise ValueError(f"{who}: buffers is 'copy' or 'average', not {buffers!r}")
    if per != "step" and per != "update":
        raise ValueError(f"{who}: per is 'step' or 'update', not {per!r}")
    return _Average(weight, every, start, buffers, name, per)


def _check_decay(who: str, decay: float) -> None:
    if not 0 <= decay < 1:
        raise ValueError(f"{who}: decay is in [0, 1), not {decay!r}")
