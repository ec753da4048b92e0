"""Transforms: what happens to gradients on their way to the optimizer."""

from __future__ import annotations

from typing import Any

import optree
import torch
from torch import Tensor

from fnrun.optim.base import Transform
from fnrun.optim.hyper import Hyper, Settings, constant
from fnrun.optim.lists import eager, ops_for
from fnrun.reports import report


def _with_settings(settings: Settings, apply: Any, keyed: bool = False) -> Transform:
    """The transform that does `apply(grads, params, values, key)` to the lists of leaves that have a gradient."""

    def init(params: Any, /) -> Any:
        return () if settings.fixed else settings.init()

    def update(grads: Any, state: Any, params: Any, /, *, key: Any = None, step: int | None = None) -> Any:
        values, state = settings.now(state)
        leaves, spec = optree.tree_flatten(grads, none_is_leaf=True)
        if any(g is None for g in leaves):
            there = [i for i, g in enumerate(leaves) if g is not None]
            weights = spec.flatten_up_to(params)
            for i, g in zip(there, apply([leaves[i] for i in there], [weights[i] for i in there], values, key), strict=True):
                leaves[i] = g
            return spec.unflatten(leaves), state
        return spec.unflatten(apply(leaves, spec.flatten_up_to(params), values, key)), state

    return Transform(init, update, keyed=keyed)


def global_norm(tensors: list[Tensor]) -> Tensor:
    """The Euclidean norm of all elements of all tensors: the norm of the norms, in the order of the list."""
    norms = ops_for(tensors).norm(tensors)
    device, dtype = norms[0].device, norms[0].dtype
    if eager() and any(n.dtype != dtype or n.device != device for n in norms):
        norms = [n.to(device, torch.promote_types(n.dtype, torch.float32)) for n in norms]
    return torch.linalg.vector_norm(torch.stack(norms))


def clip_by_global_norm(max_norm: Hyper) -> Transform:
    """Scale all gradients together so that their norm is at most `max_norm`: g ← g · min(1, max_norm / ‖g‖), optax's rule.

    torch's `clip_grad_norm_` divides by ‖g‖ + 1e-6. Reports `grad_norm` (before) and `clipped` (1.0 where it acted).

    >>> grads, _ = clip_by_global_norm(1.0).update({"x": torch.tensor([3.0, 4.0])}, (), {"x": torch.zeros(2)})
    >>> grads
    {'x': tensor([0.6000, 0.8000])}
    """
    constant("max_norm", max_norm)

    def apply(grads: list[Tensor], params: list[Tensor], h: dict[str, Any], key: Any) -> Any:
        if not grads:
            return grads
        norm = global_norm(grads)
        report("grad_norm", norm)
        report("clipped", (norm > h["max_norm"]).to(norm.dtype))
        factor = (h["max_norm"] / norm).clamp(max=1.0)
        return ops_for(grads).mul(grads, factor)

    return _with_settings(Settings(max_norm=max_norm), apply)
