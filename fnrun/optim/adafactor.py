"""Adafactor: second moments of matrices in two vectors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fnrun.optim.base import Optimizer
from fnrun.optim.hyper import Hyper, Settings, check
from fnrun.optim.lists import host_value, is_zero
from fnrun.optim.rule import Rule, optimizer


def adafactor(
    lr: Hyper = 1e-2,
    beta2_decay: float = -0.8,
    eps: tuple[float | None, float] = (None, 1e-3),
    d: float = 1.0,
    weight_decay: Hyper = 0.0,
) -> Optimizer:
    """Adafactor (Shazeer and Stern, 2018), torch's rule.

    With β = 1 − t^beta2_decay, the running means r of g² over columns and c over rows: v = r c / mean(r) (leaves of one dimension keep v
    itself); u = g/√v; p ← (1 − lr · weight_decay) p − max(eps[1], rms(p)) · min(lr, 1/√t) · u / max(1, rms(u)/d).
    v is at least `eps[0]` squared; None is the dtype's epsilon.
    """
    if beta2_decay > 0 or d < 1:
        raise ValueError(f"adafactor: beta2_decay is at most 0 and d at least 1, not {beta2_decay!r} and {d!r}")
    check({"eps[0]": eps[0] or 0.0, "eps[1]": eps[1]})

    def update(ops: Any, p: Any, g: Any, slots: Any, h: Any, t: Any) -> Any:
        fresh = t**beta2_decay
        rate = _least(h["lr"], 1 / t**0.5)
        floors = [torch.finfo(x.dtype).eps if eps[0] is None else eps[0] for x in p]
        sizes = [_most(host_value(norm) / max(x.numel(), 1) ** 0.5, eps[1]) * rate for norm, x in zip(ops.norm(p), p, strict=True)]
        estimates, new = _variances(ops, g, slots, floors, fresh)
        step = ops.mul_(ops.rsqrt_(ops.clamp_min_(estimates, [floor * floor for floor in floors])), g)
        norms = [host_value(norm) / (max(x.numel(), 1) ** 0.5 * d) for norm, x in zip(ops.norm(step), step, strict=True)]
        step = ops.mul_(step, [-size / _most(norm, 1.0) for size, norm in zip(sizes, norms, strict=True)])
        if is_zero(h["weight_decay"]):
            return ops.add(p, step), new
        return ops.add_(ops.mul(p, 1 - h["lr"] * h["weight_decay"]), step), new

    slots = {"row_var": _row, "col_var": _column, "variance": _whole}
    return optimizer(Rule(slots, update), Settings(**check({"lr": lr, "weight_decay": weight_decay})))


def _row(p: Tensor) -> Tensor | None:
    if p.is_complex():
        raise ValueError("adafactor takes no complex parameters: give them another optimizer with partition")
    return p.new_zeros((*p.shape[:-1], 1)) if p.ndim > 1 else None


def _column(p: Tensor) -> Tensor | None:
    return p.new_zeros((*p.shape[:-2], 1, p.shape[-1])) if p.ndim > 1 else None


def _whole(p: Tensor) -> Tensor | None:
    return torch.zeros_like(p) if p.ndim < 2 else None


def _variances(ops: Any, g: Any, slots: Any, floors: list[float], fresh: Any) -> tuple[list[Tensor], Any]:
    """An estimate of g² for each leaf, which may be written over, and the new slots."""
    new = {name: list(slot) for name, slot in slots.items()}
    estimates: list[Any] = [None] * len(g)
    wide, flat = ([i for i, x in enumerate(g) if (x.ndim > 1) == many] for many in (True, False))
    if wide:
        for name, dim in (("row_var", -1), ("col_var", -2)):
            means = [g[i].norm(dim=dim, keepdim=True) for i in wide]
            means = ops.div_(ops.mul_(means, means), [g[i].shape[dim] for i in wide])
            _put(new[name], wide, ops.lerp([slots[name][i] for i in wide], means, fresh))
        totals = ops.clamp_min_([new["row_var"][i].mean(dim=-2, keepdim=True) for i in wide], [floors[i] for i in wide])
        _put(estimates, wide, ops.div_([new["row_var"][i] @ new["col_var"][i] for i in wide], totals))
    if flat:
        squares = [g[i] * g[i] for i in flat]
        _put(new["variance"], flat, ops.lerp([slots["variance"][i] for i in flat], squares, fresh))
        _put(estimates, flat, ops.clone([new["variance"][i] for i in flat]))
    return estimates, new


def _put(into: list[Any], places: list[int], values: Any) -> None:
    for i, value in zip(places, values, strict=True):
        into[i] = value


def _most(a: Any, b: float) -> Any:
    return a.clamp(min=b) if isinstance(a, Tensor) else max(a, b)


def _least(a: Any, b: Any) -> Any:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return torch.minimum(torch.as_tensor(a), torch.as_tensor(b).to(torch.float64))
    return min(a, b)
