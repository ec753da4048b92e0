"""Schedules: pure functions `step -> value`, where steps count optimizer updates from 0.

Every schedule is closed form: its value depends on its argument alone. An int gives a float, a tensor of steps a float64 tensor of values.
After its end a schedule stays at its last value.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from numbers import Real
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fnrun.core.counts import count
from fnrun.core.words import called, kind, uncalled

Schedule = Callable[[Any], Any]
Value = float | Schedule


class Curve:
    """A schedule that prints as the call that made it: `cosine(0.1, steps=100)`."""

    __slots__ = ("_text", "_value")

    def __init__(self, value: Schedule) -> None:
        self._value, self._text = value, called("fnrun.schedules")

    def __call__(self, step: Any) -> Any:
        return self._value(step)

    def __repr__(self) -> str:
        return self._text


_NUMBERS = SimpleNamespace(
    cos=math.cos,
    floor=math.floor,
    sqrt=math.sqrt,
    least=max,
    most=min,
    where=lambda condition, a, b: a if condition else b,
    count=lambda boundaries, t: bisect.bisect_right(boundaries, t),
    pick=lambda values, i: values[i],
    fill=lambda value, t: value,
)


def _pick(values: Sequence[float], i: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=i.device)[i.long()]


_TENSORS = SimpleNamespace(
    cos=torch.cos,
    floor=torch.floor,
    sqrt=torch.sqrt,
    least=lambda t, bound: t.clamp(min=bound),
    most=lambda t, bound: t.clamp(max=bound),
    where=torch.where,
    count=lambda boundaries, t: sum(((t >= b).to(torch.float64) for b in boundaries), torch.zeros_like(t)),
    pick=_pick,
    fill=lambda value, t: torch.full_like(t, value),
)


def _schedule(value: Callable[[Any, SimpleNamespace], Any]) -> Schedule:
    """The schedule that computes `value(step, x)`, where `x` is the same functions for numbers or for tensors."""

    def schedule(step: Any) -> Any:
        if isinstance(step, Tensor):
            return value(step.to(torch.float64), _TENSORS)
        try:
            return float(value(step, _NUMBERS))
        except OverflowError:  # a power beyond all floats: tensors say infinity, and so do we
            return value(torch.tensor(step, dtype=torch.float64), _TENSORS).item()

    return Curve(schedule)


def _values(value: Any, t: Tensor) -> Tensor:
    """The value of any callable for a tensor of steps, as that of our schedules: a float64 tensor with an entry for each step."""
    return torch.as_tensor(value, dtype=torch.float64, device=t.device).expand(t.shape)


def _done(t: Any, x: SimpleNamespace, steps: float) -> Any:
    """The share of `steps` that is done at `t`, from 0 to 1."""
    return x.fill(1.0, t) if steps <= 0 else x.most(x.least(t / steps, 0.0), 1.0)


def _cosine(t: Any, x: SimpleNamespace, start: float, end: float, steps: float) -> Any:
    return end + (start - end) * 0.5 * (1.0 + x.cos(math.pi * _done(t, x, steps)))


def _length(name: str, value: float, least: float = 0) -> None:
    if isinstance(value, bool) or not isinstance(value, Real) or not least <= value < math.inf:
        raise ValueError(f"{name} is a number of steps, at least {least:g}, not {value!r}")


# --- shapes -------------------------------------------------------------------------------------------------------------


def constant(value: float) -> Schedule:
    """Always `value`.

    >>> constant(0.1)(1_000)
    0.1
    """
    return _schedule(lambda t, x: x.fill(value, t))


def linear(start: float, end: float, steps: int) -> Schedule:
    """A straight line from `start` at step 0 to `end` at step `steps`.

    >>> [linear(1.0, 0.0, 4)(step) for step in (0, 1, 4, 9)]
    [1.0, 0.75, 0.0, 0.0]
    """
    _length("steps", steps)
    return _schedule(lambda t, x: start + (end - start) * _done(t, x, steps))


def polynomial(start: float, end: float, steps: int, power: float) -> Schedule:
    """end + (start − end)(1 − step/steps)^power: fast at first for a power above 1."""
    _length("steps", steps)
    return _schedule(lambda t, x: end + (start - end) * (1.0 - _done(t, x, steps)) ** power)


def exponential(init: float, gamma: float, every: float = 1) -> Schedule:
    """init · gamma^(step/every): a factor `gamma` each `every` steps, smoothly and without end."""
    _length("every", every, 1)
    return _schedule(lambda t, x: init * gamma ** (t / every))


def step(init: float, every: int, gamma: float) -> Schedule:
    """init · gamma^⌊step/every⌋: a factor `gamma` each `every` steps, at once.

    >>> [step(1.0, every=30, gamma=0.5)(t) for t in (0, 29, 30, 60)]
    [1.0, 1.0, 0.5, 0.25]
    """
    _length("every", every, 1)
    return _schedule(lambda t, x: init * gamma ** x.floor(t / every))


def multistep(init: float, milestones: Sequence[int], gamma: float) -> Schedule:
    """A factor `gamma` at each milestone. `milestones` are in any order; a repeated one counts each time."""
    for mark in milestones:
        _length("each milestone", mark)
    marks = sorted(milestones)
    return _schedule(lambda t, x: init * gamma ** x.count(marks, t))


def inverse_sqrt(peak: float, warmup: int) -> Schedule:
    """From 0 to `peak` in `warmup` steps, then peak · √(warmup/step): the transformer's schedule."""
    _length("warmup", warmup, 1)
    return _schedule(lambda t, x: x.where(t < warmup, peak * t / warmup, peak * x.sqrt(warmup / x.least(t, warmup))))


def inverse_time(init: float, rate: float, every: float = 1, power: float = 1.0) -> Schedule:
    """init / (1 + rate · step/every)^power."""
    _length("every", every, 1)
    return _schedule(lambda t, x: init / (1.0 + rate * t / every) ** power)


def cosine(init: float, steps: int, floor: float = 0.0) -> Schedule:
    """Half a cosine from `init` to `floor` in `steps`; it stays there, where torch's CosineAnnealingLR climbs again.

    >>> [round(cosine(1.0, 10)(step), 4) for step in (0, 5, 10, 15)]
    [1.0, 0.5, 0.0, 0.0]
    """
    _length("steps", steps)
    return _schedule(lambda t, x: _cosine(t, x, init, floor, steps))


def cosine_restarts(init: float, periods: Sequence[int], weights: Sequence[float] | None = None, floor: float = 0.0) -> Schedule:
    """A cosine to `floor` in each period, from floor + weight · (init − floor); without `weights` all are 1.

    Raises ValueError where periods and weights are not as many.
    """
    weights = [1.0] * len(periods) if weights is None else list(weights)
    if len(weights) != len(periods) or not periods:
        raise ValueError(f"cosine_restarts: as many weights as periods, at least one; got {len(weights)} and {len(periods)}")
    for period in periods:
        _length("a period", period, 1)
    heights = [floor + weight * (init - floor) for weight in weights]
    return join([cosine(height, period, floor) for height, period in zip(heights, periods, strict=True)], list(accumulate(periods))[:-1])


def flat_cosine(init: float, flat: int, total: int, floor: float = 0.0) -> Schedule:
    """`init` for `flat` steps, then a cosine to `floor` at step `total`."""
    _ordered("flat_cosine", flat=flat, total=total)
    return _schedule(lambda t, x: _cosine(t - flat, x, init, floor, total - flat))


def cyclic(low: float, high: float, up: int, down: int | None = None, mode: str = "triangular", gamma: float = 1.0) -> Schedule:
    """Up from `low` to `high` in `up` steps and back in `down`, for ever.

    - `low`, `high`: the values.
    - `up`: steps up.
    - `down=None`: steps down, by default as many.
    - `mode="triangular"`: the same height in each cycle; `"triangular2"`: half the height in each next one; `"exp_range"`: the height is
      scaled by `gamma`^step.
    - `gamma=1.0`: of `"exp_range"`.
    """
    _length("up", up, 1)
    fall = up if down is None else down
    _length("down", fall, 1)
    scales = {
        "triangular": lambda cycle, t: 1.0,
        "triangular2": lambda cycle, t: 0.5**cycle,
        "exp_range": lambda cycle, t: gamma**t,
    }
    if mode not in scales:
        raise ValueError(f"cyclic: mode is one of {', '.join(scales)}, not {mode!r}")

    def value(t: Any, x: SimpleNamespace) -> Any:
        cycle = x.floor(t / (up + fall))
        place = t - cycle * (up + fall)
        height = x.where(place <= up, place / up, (up + fall - place) / fall)
        return low + (high - low) * height * scales[mode](cycle, t)

    return _schedule(value)


def one_cycle(
    peak: float,
    total: int,
    rise: float = 0.3,
    start_factor: float = 1 / 25,
    end_factor: float = 1e-4,
    kind: str = "cosine",
    three_phase: bool = False,
) -> Schedule:
    """Smith's one cycle, as torch's OneCycleLR: from peak · start_factor up to `peak`, then down to peak · start_factor · end_factor.

    - `peak`: the highest value.
    - `total`: steps; the end is at step `total` − 1.
    - `rise=0.3`: the share of the steps that go up.
    - `start_factor=1/25`, `end_factor=1e-4`: see above.
    - `kind="cosine"`: or `"linear"`.
    - `three_phase=False`: whether it comes down to the start in as many steps as it rose, and only then to the end.
    """
    _length("total", total, 2)
    if not 0.0 < rise <= 1.0 or kind not in ("cosine", "linear"):
        raise ValueError(f"one_cycle: rise is a share of the steps in (0, 1] and kind 'cosine' or 'linear'; got {rise!r} and {kind!r}")
    start, top, last = peak * start_factor, rise * total - 1, total - 1
    end = start * end_factor
    knots = [(0.0, start), (top, peak), (last, end)]
    if three_phase:
        knots = [(0.0, start), (top, peak), (2 * rise * total - 2, start), (last, end)]

    def value(t: Any, x: SimpleNamespace) -> Any:
        result: Any = None
        for (a, low), (b, high) in reversed(list(pairwise(knots))):
            done = _done(t - a, x, b - a)
            line = low + (high - low) * done if kind == "linear" else high + (low - high) * 0.5 * (1.0 + x.cos(math.pi * done))
            result = line if result is None else x.where(t <= b, line, result)
        return result

    return _schedule(value)


def trapezoid(peak: float, warmup: int, total: int, decay: int, floor: float = 0.0, start: float = 0.0) -> Schedule:
    """Warmup, stable, decay: a line from `start` to `peak`, `peak`, and in the last `decay` steps before `total` a line to `floor`."""
    _length("decay", decay)
    _ordered("trapezoid", warmup=warmup, **{"total - decay": total - decay}, total=total)

    def value(t: Any, x: SimpleNamespace) -> Any:
        rising = start + (peak - start) * _done(t, x, warmup)
        return x.where(t < warmup, rising, peak + (floor - peak) * _done(t - (total - decay), x, decay))

    return _schedule(value)


def warmup_cosine(peak: float, warmup: int, total: int, floor: float = 0.0, start: float = 0.0) -> Schedule:
    """A line from `start` to `peak` in `warmup` steps, then a cosine to `floor` at step `total`.

    >>> schedule = warmup_cosine(peak=1.0, warmup=10, total=110)
    >>> [round(schedule(step), 4) for step in (0, 5, 10, 60, 110, 999)]
    [0.0, 0.5, 1.0, 0.5, 0.0, 0.0]
    """
    _ordered("warmup_cosine", warmup=warmup, total=total)

    def value(t: Any, x: SimpleNamespace) -> Any:
        rising = start + (peak - start) * _done(t, x, warmup)
        return x.where(t < warmup, rising, _cosine(t - warmup, x, peak, floor, total - warmup))

    return _schedule(value)


def piecewise(values: Sequence[float], boundaries: Sequence[int]) -> Schedule:
    """`values[0]` before the first boundary, `values[1]` from it on, and so on: one more value than boundaries.

    >>> [piecewise([0.1, 0.01, 0.001], [100, 200])(step) for step in (99, 100, 500)]
    [0.1, 0.01, 0.001]
    """
    _boundaries("piecewise", values, boundaries)
    pieces, marks = list(values), list(boundaries)
    return _schedule(lambda t, x: x.pick(pieces, x.count(marks, t)) if marks else x.fill(pieces[0], t))


# --- made of schedules --------------------------------------------------------------------------------------------------


def join(schedules: Sequence[Schedule], boundaries: Sequence[int]) -> Schedule:
    """One schedule after the other: at each boundary the next one begins with its step 0.

    >>> schedule = join([linear(0.0, 1.0, 10), constant(1.0)], [10])
    >>> schedule(5), schedule(50)
    (0.5, 1.0)
    """
    for member in schedules if isinstance(schedules, (list, tuple)) else [None]:
        _member("join", member, "a list of schedules, [linear(...), cosine(...)]", callable(member))
    _boundaries("join", schedules, boundaries)
    members, starts = list(schedules), [0, *boundaries]

    def schedule(t: Any) -> Any:
        if not isinstance(t, Tensor):
            place = bisect.bisect_right(starts, t, lo=1) - 1
            return members[place](t - starts[place])
        value = _values(members[0](t), t)
        for member, start in zip(members[1:], starts[1:], strict=True):
            value = torch.where(t >= start, _values(member((t - start).clamp(min=0)), t), value)
        return value

    return Curve(schedule)


def multiply(*schedules: Value) -> Schedule:
    """The product of schedules (or numbers).

    >>> multiply(linear(0.0, 1.0, 10), 4.0)(5)
    2.0
    """
    if not schedules:
        raise ValueError("multiply: at least one schedule")
    for member in schedules:
        _member("multiply", member, "schedules and numbers", callable(member) or isinstance(member, (Real, Tensor)))

    def schedule(t: Any) -> Any:
        product = math.prod(s(t) if callable(s) else s for s in schedules)
        return _values(product, t) if isinstance(t, Tensor) else product

    return Curve(schedule)


def warmup(schedule: Value, steps: int, kind: str = "linear", ratio: float = 0.1) -> Schedule:
    """`schedule` times a factor that grows from `ratio` to 1 in the first `steps`. The schedule is not shifted.

    - `schedule`: a schedule or a number.
    - `steps`: steps of the warmup.
    - `kind="linear"`: the factor grows linearly; `"constant"`: it is `ratio`, then 1; `"exponential"`: it grows by the same ratio a step.
    - `ratio=0.1`: the first factor.

    >>> [round(warmup(1.0, 10, "linear", ratio=0.0)(step), 4) for step in (0, 5, 10)]
    [0.0, 0.5, 1.0]
    """
    _length("steps", steps)
    factors: dict[str, Callable[[Any, SimpleNamespace], Any]] = {
        "linear": lambda t, x: 1.0 - (1.0 - _done(t, x, steps)) * (1.0 - ratio),
        "constant": lambda t, x: x.where(t < steps, x.fill(ratio, t), x.fill(1.0, t)),
        "exponential": lambda t, x: ratio ** (1.0 - _done(t, x, steps)),
    }
    if kind not in factors:
        raise ValueError(f"warmup: kind is one of {', '.join(factors)}, not {kind!r}")
    if kind == "exponential" and ratio <= 0:
        raise ValueError(f"warmup: an exponential one begins above 0, not at ratio={ratio!r}")
    return multiply(schedule, _schedule(factors[kind]))


# --- units --------------------------------------------------------------------------------------------------------------


def epochs(n: float, steps_per_epoch: int) -> int:
    """`n` epochs in steps, rounded to the nearest.

    >>> epochs(5, steps_per_epoch=391)
    1955
    """
    _length("epochs: n", n)
    _length("epochs: steps_per_epoch", steps_per_epoch, 1)
    return round(n * steps_per_epoch)


def scale_by_batch_size(lr: Value, batch: int, base: int = 256) -> Any:
    """`lr` (a number or a schedule) that was found at batch size `base`, scaled linearly to `batch` (Goyal et al., 2017).

    >>> scale_by_batch_size(0.1, batch=1024)
    0.4
    """
    factor = count("scale_by_batch_size: batch", batch) / count("scale_by_batch_size: base", base)
    return multiply(lr, factor) if callable(lr) else lr * factor


def _member(name: str, member: Any, takes: str, good: bool) -> None:
    if not good or isinstance(member, type) or uncalled(member):
        hint = f": call it, {uncalled(member)}(...)" if uncalled(member) else ""
        raise TypeError(f"{name} takes {takes}, and not {kind(member)}{hint}")


def _ordered(name: str, **marks: float) -> None:
    values = list(marks.values())
    if bool in map(type, values) or not all(a <= b for a, b in pairwise([0, *values])) or values[-1] == math.inf:
        raise ValueError(f"{name}: 0 <= {' <= '.join(marks)}; got {', '.join(f'{k}={v!r}' for k, v in marks.items())}")


def _boundaries(name: str, members: Sequence[Any], boundaries: Sequence[int]) -> None:
    for boundary in boundaries:
        _length(f"{name}: a boundary", boundary)
    if len(members) != len(boundaries) + 1 or not all(a < b for a, b in pairwise(boundaries)):
        raise ValueError(f"{name}: one member more than boundaries, and boundaries that rise; got {len(members)} and {list(boundaries)}")
