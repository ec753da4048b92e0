"""Transforms of gradients, for a chain that ends in an optimizer."""

from __future__ import annotations

from typing import Any

import optree
import torch
from torch import Tensor

from fnrun.core.tree import struct
from fnrun.optim.base import Transform
from fnrun.optim.hyper import Hyper, Settings, check
from fnrun.optim.lists import Flat, Ops, is_none, ops_for, report_as
from fnrun.schedules import Schedule


def _with_settings(settings: Settings, apply: Any, keyed: bool = False) -> Transform:
    """The transform by `apply(ops, grads, params, values, key) -> grads`, over lists of the leaves that have a gradient, if any."""

    flatten = Flat()

    def init(params: Any, /) -> Any:
        return () if settings.fixed else settings.init()

    def update(grads: Any, state: Any, params: Any, /, *, key: Any = None, step: int | None = None) -> Any:
        values, state = settings.now(state)
        leaves, spec = flatten(grads)
        g, p = leaves, spec.flatten_up_to(params)
        places = None
        if any(map(is_none, leaves)):
            places = [i for i, x in enumerate(leaves) if x is not None]
            g, p = [g[i] for i in places], [p[i] for i in places]
        new = apply(ops_for(g, p, values=values), g, p, values, key) if g else g
        if places is None:
            return spec.unflatten(new), state
        for i, x in zip(places, new, strict=True):
            leaves[i] = x
        return spec.unflatten(leaves), state

    return Transform(init, update, keyed=keyed, donatable=True)


def global_norm(ops: Ops, tensors: list[Tensor]) -> Tensor:
    """The Euclidean norm of all elements of all tensors: the norm of the norms, in the order of the list."""
    norms = ops.norm(tensors)
    device, dtype = norms[0].device, norms[0].dtype
    if any(n.dtype != dtype or n.device != device for n in norms):
        norms = [n.to(device, torch.promote_types(n.dtype, torch.float32)) for n in norms]
    return torch.linalg.vector_norm(torch.stack(norms))


def clip_by_global_norm(max_norm: Hyper) -> Transform:
    """Scale all gradients together so that their norm is at most `max_norm`: g ← g · min(1, max_norm / ‖g‖), optax's rule.

    torch's `clip_grad_norm_` divides by ‖g‖ + 1e-6. Reports `grad_norm` (before) and `clipped` (1.0 where it acted).

    >>> grads, _ = clip_by_global_norm(1.0).update({"x": torch.tensor([3.0, 4.0])}, (), {"x": torch.zeros(2)})
    >>> grads
    {'x': tensor([0.6000, 0.8000])}
    """

    def apply(ops: Ops, grads: list[Tensor], params: list[Tensor], h: dict[str, Any], key: Any) -> Any:
        norm = global_norm(ops, grads)
        report_as("grad_norm", norm)
        report_as("clipped", (norm > h["max_norm"]).to(norm.dtype))
        return _times(ops, grads, (h["max_norm"] / norm).clamp(max=1.0))

    return _with_settings(Settings(**check({"max_norm": max_norm})), apply)


def clip_by_norm(max_norm: Hyper) -> Transform:
    """Scale each leaf's gradient so that its norm is at most `max_norm`. Reports `clipped`, the share of leaves that were scaled."""

    def apply(ops: Ops, grads: list[Tensor], params: list[Tensor], h: dict[str, Any], key: Any) -> Any:
        factors = [(h["max_norm"] / norm).clamp(max=1.0) for norm in ops.norm(grads)]
        report_as("clipped", _share(factors))
        return _times(ops, grads, factors)

    return _with_settings(Settings(**check({"max_norm": max_norm})), apply)


def clip_by_value(max_value: Hyper) -> Transform:
    """Clamp each element of the gradient to ±`max_value`.

    >>> clip_by_value(1.0).update({"x": torch.tensor([-3.0, 0.5])}, (), {"x": torch.zeros(2)})[0]
    {'x': tensor([-1.0000,  0.5000])}
    """

    def apply(ops: Ops, grads: list[Tensor], params: list[Tensor], h: dict[str, Any], key: Any) -> Any:
        return [g.clamp(-h["max_value"], h["max_value"]).to(g.dtype) for g in grads]

    return _with_settings(Settings(**check({"max_value": max_value})), apply)


def adaptive_clip(clipping: Hyper = 0.01, eps: Hyper = 1e-3) -> Transform:
    """Clip each unit's gradient to `clipping` times the norm of its weights, at least `eps` (Brock et al., 2021).

    A unit is a row: all dimensions but the first; a leaf of at most one dimension is one unit. (optax's units are columns, as JAX stores
    matrices.) Reports `clipped`, the share of the leaves in which a unit was.
    """

    def apply(ops: Ops, grads: list[Tensor], params: list[Tensor], h: dict[str, Any], key: Any) -> Any:
        limits = [_unit_norm(p).clamp(min=h["eps"]) * h["clipping"] for p in params]
        factors = [(limit / _unit_norm(g).clamp(min=1e-6)).clamp(max=1.0) for limit, g in zip(limits, grads, strict=True)]
        report_as("clipped", _share([torch.where((factor < 1.0).any(), 0.0, 1.0) for factor in factors]))
        return [(g * factor).to(g.dtype) for g, factor in zip(grads, factors, strict=True)]

    return _with_settings(Settings(eps=eps, **check({"clipping": clipping})), apply)


def _unit_norm(x: Tensor) -> Tensor:
    # in float32 or wider: the norm of a float16 row easily overflows
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.linalg.vector_norm(x, dim=tuple(range(1, x.ndim)) if x.ndim > 1 else None, keepdim=True, dtype=dtype)


def _share(factors: list[Tensor]) -> Tensor:
    return torch.stack([(factor < 1.0).to(torch.float32) for factor in factors]).mean()


def _times(ops: Ops, grads: list[Tensor], factor: Any) -> list[Tensor]:
    scaled = ops.mul(grads, factor)
    return [x if x.dtype == g.dtype else x.to(g.dtype) for x, g in zip(scaled, grads, strict=True)]


def add_decayed_weights(weight_decay: Hyper) -> Transform:
    """g ← g + weight_decay · p: L2 regularization, as `weight_decay` of `sgd` and `adam`."""

    def apply(ops: Ops, grads: list[Tensor], params: list[Tensor], h: dict[str, Any], key: Any) -> Any:
        return list(ops.add(grads, params, alpha=h["weight_decay"]))

    return _with_settings(Settings(weight_decay=weight_decay), apply)


def scale(factor: Hyper) -> Transform:
    """g ← factor · g.

    >>> scale(-1.0).update({"x": torch.tensor([2.0])}, (), {"x": torch.zeros(1)})[0]
    {'x': tensor([-2.])}
    """

    def apply(ops: Ops, grads: list[Tensor], params: list[Tensor], h: dict[str, Any], key: Any) -> Any:
        return _times(ops, grads, h["factor"])

    return _with_settings(Settings(factor=factor), apply)


def scale_by_schedule(schedule: Schedule) -> Transform:
    """g ← schedule(n) · g, where n counts the updates of this transform."""
    return scale(schedule)


def centralize() -> Transform:
    """Subtract from each row of the gradient its mean over all dimensions but the first, of leaves with two or more (Yong et al., 2020)."""

    def apply(ops: Ops, grads: list[Tensor], params: list[Tensor], h: dict[str, Any], key: Any) -> Any:
        return [g - g.mean(tuple(range(1, g.ndim)), keepdim=True) if g.ndim > 1 else g for g in grads]

    return _with_settings(Settings(), apply)


def zero_nonfinite() -> Transform:
    """Replace each NaN and infinity of the gradient by 0. Reports `nonfinite`, their number. See also `apply_if_finite`."""

    def apply(ops: Ops, grads: list[Tensor], params: list[Tensor], h: dict[str, Any], key: Any) -> Any:
        finite = [torch.isfinite(g) for g in grads]
        counts = [(~there).sum() for there in finite]
        report_as("nonfinite", torch.stack([count.to(counts[0].device) for count in counts]).sum().to(torch.float32))
        return [torch.where(there, g, 0.0) for there, g in zip(finite, grads, strict=True)]

    return _with_settings(Settings(), apply)


def add_noise(eta: Hyper, gamma: float = 0.55) -> Transform:
    """Add Gaussian noise of variance eta / (1 + n)^gamma to the gradient (Neelakantan et al., 2015), where n counts the updates.

    The noise is a function of the step's key alone: `update` raises ValueError without one.
    """

    def apply(ops: Ops, grads: list[Tensor], params: list[Tensor], h: dict[str, Any], key: Any) -> Any:
        if key is None:
            raise ValueError("add_noise draws random numbers: give optimizer.update the step's key (key=state.rng.fold_in(...))")
        generators: dict[Any, torch.Generator] = {}
        noisy = []
        for g in grads:
            generator = generators.setdefault(g.device, key.fold_in("noise").generator(g.device))
            noise = torch.randn(g.shape, dtype=g.dtype, device=g.device, generator=generator)
            noisy.append((g + noise * (h["eta"] * h["shrink"]) ** 0.5).to(g.dtype))
        return noisy

    return _with_settings(Settings(**check({"eta": eta}), shrink=lambda count: (1.0 + count) ** -gamma), apply, keyed=True)


@struct(name="fnrun.optim.TraceState")
class TraceState:
    """The running sum, with the structure of the parameters, and the state of the decay if it is no plain number."""

    hyper: Any
    trace: Any


def trace(decay: Hyper, nesterov: bool = False) -> Transform:
    """Momentum as a transform (optax's): b ← g + decay · b replaces g; with nesterov g + decay · b does.

    `chain(trace(0.9), sgd(lr))` is `sgd(lr, momentum=0.9)` while lr is constant.
    """
    settings, flatten = Settings(**check({"decay": decay})), Flat()

    def init(params: Any, /) -> TraceState:
        return TraceState(() if settings.fixed else settings.init(), optree.tree_map(torch.zeros_like, params))

    def update(grads: Any, state: TraceState, params: Any, /, *, key: Any = None, step: int | None = None) -> Any:
        values, hyper = settings.now(state.hyper)
        leaves, spec = flatten(grads)
        sums: list[Any] = spec.flatten_up_to(state.trace)
        places = [i for i, g in enumerate(leaves) if g is not None]
        if places:
            g, b = [leaves[i] for i in places], [sums[i] for i in places]
            ops = ops_for(g, b, values=values)
            b = ops.add_(ops.mul(b, values["decay"]), g)
            passed = ops.add(g, ops.mul(b, values["decay"])) if nesterov else b
            for i, total, new in zip(places, b, passed, strict=True):
                sums[i], leaves[i] = total.to(sums[i].dtype), new.to(sums[i].dtype)
        return spec.unflatten(leaves), TraceState(hyper, spec.unflatten(sums))

    return Transform(init, update, donatable=True)
