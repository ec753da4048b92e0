"""Wrappers: functions from optimizer to optimizer that decide whether and when an update happens.

If the host knows the decision, it is a branch. If only a device knows it, both outcomes are computed and the device selects.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import optree
import torch
from torch import Tensor

from fnrun.core.counts import count
from fnrun.core.donation import keeping
from fnrun.core.tree import struct
from fnrun.optim.base import Optimizer, Wrapper, of_inner
from fnrun.optim.lists import all_finite, host_value, ops_for, report_as, tree_map
from fnrun.optim.rule import Misses


def choose(condition: Any, then: Callable[[], Any], otherwise: Callable[[], Any]) -> Any:
    """`then()` or `otherwise()`; for a condition that is a tensor both, selected leaf by leaf without waiting for it."""
    if not isinstance(condition, Tensor):
        return then() if condition else otherwise()
    with keeping():
        return tree_map(lambda a, b: _select(condition, a, b), then(), otherwise())


def _select(condition: Tensor, a: Any, b: Any) -> Any:
    if a is b or (not isinstance(a, Tensor) and type(a) is type(b) and a == b):
        return a
    if not isinstance(a, Tensor) and not isinstance(b, Tensor):
        return torch.where(condition, a, b)
    like = a if isinstance(a, Tensor) else b
    a, b = (x.to(like) if isinstance(x, Tensor) else torch.full_like(like, x) for x in (a, b))
    return torch.where(condition.to(like.device), a, b)


def counts_on(device: torch.device | None, state: Any) -> Any:
    """`state` with its Python numbers as tensors, for counts whose increments only a device knows."""
    dtypes = {int: torch.int64, float: torch.float64}

    def convert(leaf: Any) -> Any:
        return torch.full((), leaf, dtype=dtypes[type(leaf)], device=device) if type(leaf) in dtypes else leaf

    return optree.tree_map(convert, state, is_leaf=lambda leaf: isinstance(leaf, Misses))  # the host knows those


def device_of(tree: Any) -> torch.device | None:
    return next((leaf.device for leaf in optree.tree_leaves(tree) if isinstance(leaf, Tensor)), None)


def wrapper(wrap: Callable[[Optimizer], Optimizer], optimizer: Optimizer | None) -> Any:
    """The wrapped optimizer, or without one the wrapper, for a chain."""
    return Wrapper(wrap) if optimizer is None else Wrapper(wrap)(optimizer)


def around(inner: Optimizer, init: Any, update: Any) -> Optimizer:
    """An optimizer whose state has that of `inner` in the field `inner`."""
    loss_scale, eval_params = (of_inner(fn, lambda state: state.inner) for fn in (inner.loss_scale, inner.eval_params))
    return Optimizer(init, update, loss_scale, eval_params, donatable=inner.donatable, keyed=inner.keyed)


# --- accumulate ---------------------------------------------------------------------------------------------------------


@struct(name="fnrun.optim.AccumulateState")
class AccumulateState:
    """The sum of the gradients, the number of batches in it (`micro`), the leaves without a gradient in them; the inner state."""

    sums: Any
    micro: Any
    misses: Misses
    inner: Any

    #: As in RuleState.
    numbered: ClassVar = ("misses",)
    named: ClassVar = ("sums",)

    def fitted(self, fresh: AccumulateState, places: Sequence[int | None]) -> AccumulateState:
        """For other parameters: a new one was missing in all batches."""
        return dataclasses.replace(self, misses=self.misses.fitted(places, self.micro))


def accumulate(n: int, optimizer: Optimizer | None = None) -> Any:
    """Update once in `n` batches, with the mean of their gradients; the steps between change no parameter.

    Each batch is a training step with its own randomness. The partial sum is in the state, and in checkpoints. A program that ends between
    two updates warns: a next call goes on with the partial sum. Members after it in a chain see the updates alone: schedules count these.

    `accumulate(n)` is for a chain, `accumulate(n, optimizer)` is the optimizer. (`make_train_step(microbatches=n)` cuts one batch instead.)

    >>> from fnrun import optim
    >>> optimizer = optim.chain(optim.accumulate(2), optim.sgd(1.0))
    >>> params = {"x": torch.tensor([0.0])}
    >>> state = optimizer.init(params)
    >>> for g in (1.0, 3.0):
    ...     params, state = optimizer.update({"x": torch.tensor([g])}, state, params)
    ...     print(params["x"])
    tensor([0.])
    tensor([-2.])
    """
    n = count("accumulate: n", n)

    def wrap(inner: Optimizer) -> Optimizer:
        def init(params: Any, /) -> AccumulateState:
            zeros = optree.tree_map(torch.zeros_like, params)
            return AccumulateState(zeros, 0, Misses.none(len(optree.tree_leaves(params, none_is_leaf=True))), inner.init(params))

        def update(grads: Any, state: AccumulateState, params: Any, /, *, key: Any = None, step: int | None = None) -> Any:
            leaves, spec = optree.tree_flatten(grads, none_is_leaf=True)
            sums: list[Any] = spec.flatten_up_to(state.sums)
            misses = state.misses
            if any(g is None for g in leaves):
                misses = misses.record(leaves)
            places = [i for i, g in enumerate(leaves) if g is not None]
            if places:
                g, before = [leaves[i] for i in places], [sums[i] for i in places]
                for i, total in zip(places, ops_for(g, before).add(before, g), strict=True):
                    sums[i] = total
            micro = host_value(state.micro)

            def apply() -> Any:
                mean = [None if missed else total / n for total, missed in zip(sums, misses.always(n), strict=True)]
                new, after = inner.update(spec.unflatten(mean), state.inner, params, key=key, step=step)
                zeros = [None if x is None else torch.zeros_like(x) for x in sums]
                return new, AccumulateState(spec.unflatten(zeros), state.micro * 0, Misses.none(len(leaves)), after)

            def hold() -> Any:
                return params, AccumulateState(spec.unflatten(sums), state.micro + 1, misses, state.inner)

            return choose(micro + 1 == n, apply, hold)

        return around(inner, init, update)

    return wrapper(wrap, optimizer)


def waiting(opt_state: Any) -> int:
    """The number of batches in `accumulate` that are in no update yet, the largest of its parts'. Waits for a count on a device."""
    parts = optree.tree_leaves(opt_state, is_leaf=lambda part: isinstance(part, AccumulateState))
    return max((int(torch.as_tensor(part.micro).max()) for part in parts if isinstance(part, AccumulateState)), default=0)


# --- apply_if_finite ----------------------------------------------------------------------------------------------------


@struct(name="fnrun.optim.SkipState")
class SkipState:
    """The number of skipped updates, and the inner state."""

    skipped: Any
    inner: Any


def apply_if_finite(optimizer: Optimizer | None = None) -> Any:
    """Skip an update whose gradient has a NaN or an infinity: parameters, optimizer state and counts keep their bits.

    Reports `skipped`, 1.0 or 0.0. Never waits for a device. For fp16 see `dynamic_loss_scale`.
    """

    def wrap(inner: Optimizer) -> Optimizer:
        if inner.loss_scale is not None:
            raise ValueError(
                "dynamic_loss_scale skips what is not finite by itself: apply_if_finite around it would keep its scale from falling"
            )

        def init(params: Any, /) -> SkipState:
            return counts_on(device_of(params), SkipState(0, inner.init(params)))

        def update(grads: Any, state: SkipState, params: Any, /, *, key: Any = None, step: int | None = None) -> Any:
            finite = all_finite(optree.tree_leaves(grads, none_is_leaf=True))
            report_as("skipped", _skipped(finite))
            new, after = choose(
                finite,
                lambda: inner.update(grads, state.inner, params, key=key, step=step),
                lambda: (params, state.inner),
            )
            return new, SkipState(state.skipped + _skipped(finite, torch.int64, int), after)

        return around(inner, init, update)

    return wrapper(wrap, optimizer)


def _skipped(finite: Any, dtype: torch.dtype = torch.float32, number: type = float) -> Any:
    return (~finite).to(dtype) if isinstance(finite, Tensor) else number(not finite)


# --- lookahead ----------------------------------------------------------------------------------------------------------


@struct(name="fnrun.optim.LookaheadState")
class LookaheadState:
    """The slow weights, the count of updates since they moved, the inner state."""

    slow: Any
    count: Any
    inner: Any


def lookahead(optimizer: Optimizer | None = None, *, sync_period: int = 6, slow_step_size: float = 0.5) -> Any:
    """Lookahead (Zhang et al., 2019): every `sync_period` updates the slow weights move towards the fast ones, by `slow_step_size`.

    The parameters are the fast weights, which then restart from the slow ones.

    - `sync_period=6`: updates between two moves, at least 1.
    - `slow_step_size=0.5`: the share of the way, from 0 to 1.
    """
    sync_period = count("lookahead: sync_period", sync_period)
    if not 0.0 <= slow_step_size <= 1.0:
        raise ValueError(f"lookahead: slow_step_size is from 0 to 1, not {slow_step_size!r}")

    def wrap(inner: Optimizer) -> Optimizer:
        def init(params: Any, /) -> LookaheadState:
            return LookaheadState(optree.tree_map(torch.clone, params), 0, inner.init(params))

        def update(grads: Any, state: LookaheadState, params: Any, /, *, key: Any = None, step: int | None = None) -> Any:
            fast, after = inner.update(grads, state.inner, params, key=key, step=step)

            def meet() -> Any:
                slow = tree_map(lambda s, f: s if s is None else s + slow_step_size * (f - s), state.slow, fast)
                again = tree_map(lambda s: s if s is None else s.clone(), slow)  # parameters may be donated
                return again, LookaheadState(slow, state.count * 0, after)

            return choose(
                host_value(state.count) + 1 == sync_period,
                meet,
                lambda: (fast, LookaheadState(state.slow, state.count + 1, after)),
            )

        return around(inner, init, update)

    return wrapper(wrap, optimizer)


# --- freeze -------------------------------------------------------------------------------------------------------------


def freeze() -> Optimizer:
    """The optimizer without updates and state, for the frozen part of a `partition`."""

    def update(grads: Any, state: Any, params: Any, /, *, key: Any = None, step: int | None = None) -> Any:
        return params, state

    return Optimizer(lambda params, /: (), update, donatable=True, keyed=False)


@struct(name="fnrun.optim.FreezeState")
class FreezeState:
    """The count of updates, and the inner state."""

    count: Any
    inner: Any


def freeze_until(step: int, optimizer: Optimizer | None = None) -> Any:
    """No updates for the first `step` steps, as if the loss did not reach the parameters.

    Their moments begin at `step`, while schedules count from the start: as unfreezing a backbone does in torch.
    """
    begin = count("freeze_until: step", step, 0)

    def wrap(inner: Optimizer) -> Optimizer:
        def init(params: Any, /) -> FreezeState:
            return FreezeState(0, inner.init(params))

        def update(grads: Any, state: FreezeState, params: Any, /, *, key: Any = None, step: int | None = None) -> Any:
            nothing = tree_map(lambda _: None, grads)
            new, after = choose(
                host_value(state.count) >= begin,
                lambda: inner.update(grads, state.inner, params, key=key, step=step),
                lambda: inner.update(nothing, state.inner, params, key=key, step=step),
            )
            return new, FreezeState(state.count + 1, after)

        return around(inner, init, update)

    return wrapper(wrap, optimizer)


# --- loss scaling -------------------------------------------------------------------------------------------------------


@struct(name="fnrun.optim.ScaleState")
class ScaleState:
    """The factor on the loss, the number of finite updates since it changed, and the inner state."""

    scale: Tensor
    good: Tensor
    inner: Any


def dynamic_loss_scale(
    optimizer: Optimizer | None = None,
    *,
    init_scale: float = 2.0**16,
    growth_factor: float = 2.0,
    backoff_factor: float = 0.5,
    growth_interval: int = 2_000,
) -> Any:
    """Loss scaling for fp16, by the rule of torch's GradScaler, without waiting for the device.

    `make_train_step` multiplies the loss by the scale, and divides the gradients by it; a hand-written step does so with
    `optimizer.loss_scale(state.opt_state)`. An update whose gradients overflow is skipped, as by `apply_if_finite`. It comes first in a
    chain: the members after it see unscaled gradients. Reports `loss_scale` and `skipped`.

    - `init_scale=2.0**16`: the first scale.
    - `growth_factor=2.0`: the factor on the scale after `growth_interval=2_000` updates without an overflow.
    - `backoff_factor=0.5`: the factor on the scale after an overflow.
    """
    growth_interval = count("dynamic_loss_scale: growth_interval", growth_interval)
    if not (math.inf > init_scale > 0 and math.inf > growth_factor > 1.0 > backoff_factor > 0.0):
        raise ValueError("dynamic_loss_scale: init_scale > 0, growth_factor > 1, both finite, and backoff_factor between 0 and 1")

    def wrap(inner: Optimizer) -> Optimizer:
        if inner.loss_scale is not None:
            raise ValueError("dynamic_loss_scale: the optimizer scales the loss already")

        def init(params: Any, /) -> ScaleState:
            device = device_of(params)
            scale = torch.full((), init_scale, dtype=torch.float32, device=device)
            return ScaleState(scale, torch.zeros((), dtype=torch.int64, device=device), counts_on(device, inner.init(params)))

        def update(grads: Any, state: ScaleState, params: Any, /, *, key: Any = None, step: int | None = None) -> Any:
            leaves, spec = optree.tree_flatten(grads, none_is_leaf=True)
            finite = all_finite(leaves)
            report_as("loss_scale", state.scale)
            report_as("skipped", _skipped(finite))
            new, after = choose(
                finite,
                lambda: inner.update(spec.unflatten(leaves), state.inner, params, key=key, step=step),
                lambda: (params, state.inner),
            )
            return new, ScaleState(*_adapt(state, finite), after)

        def _adapt(state: ScaleState, finite: Any) -> tuple[Tensor, Tensor]:
            well = torch.as_tensor(finite, device=state.scale.device)
            good = torch.where(well, state.good + 1, 0)
            grown = state.scale * growth_factor
            grows = (good >= growth_interval) & torch.isfinite(grown)
            least = torch.finfo(state.scale.dtype).tiny
            scale = torch.where(well, torch.where(grows, grown, state.scale), (state.scale * backoff_factor).clamp(min=least))
            return scale, torch.where(good >= growth_interval, 0, good)

        return dataclasses.replace(around(inner, init, update), loss_scale=lambda state: state.scale)

    return dataclasses.replace(Wrapper(wrap), scales_loss=True) if optimizer is None else wrap(optimizer)
