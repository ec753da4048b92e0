"""Adafactor: second moments of matrices in two vectors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fnrun.optim.base import Optimizer
from fnrun.optim.hyper import Hyper, Settings, constant
from fnrun.optim.lists import is_zero, read
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
    `eps[0]` is the least v may be, squared; None means the dtype's epsilon.
    """
    if beta2_decay > 0 or d < 1:
        raise ValueError(f"adafactor: beta2_decay is at most 0 and d at least 1, not {beta2_decay!r} and {d!r}")
    for name, value in (("lr", lr), ("weight_decay", weight_decay), ("eps[0]", eps[0] or 0.0), ("eps[1]", eps[1])):
        constant(name, value)

    def update(ops: Any, p: Any, g: Any, slots: Any, h: Any, t: Any) -> Any:
        fresh = t**beta2_decay
        rate = _least(h["lr"], 1 / t**0.5)
        new, rows, columns, variances = [], [], [], []
        for x, grad, row, column, variance in zip(p, g, slots["row_var"], slots["col_var"], slots["variance"], strict=True):
            floor = torch.finfo(x.dtype).eps if eps[0] is None else eps[0]
            size = _most(read(x.norm()) / x.numel() ** 0.5, eps[1]) * rate
            if grad.ndim > 1:
                row = _mix(row, grad.norm(dim=-1, keepdim=True).square() / grad.shape[-1], fresh)
                column = _mix(column, grad.norm(dim=-2, keepdim=True).square() / grad.shape[-2], fresh)
                estimate = row @ column / row.mean(dim=-2, keepdim=True).clamp(min=floor)
            else:
                estimate = variance = _mix(variance, grad * grad, fresh)
            step = estimate.clamp(min=floor * floor).rsqrt() * grad
            size = size / _most(read(step.norm()) / (step.numel() ** 0.5 * d), 1.0)
            if not is_zero(h["weight_decay"]):
                x = x * (1 - h["lr"] * h["weight_decay"])
            new.append(x - size * step if isinstance(size, Tensor) else torch.add(x, step, alpha=-size))
            rows.append(row)
            columns.append(column)
            variances.append(variance)
        return new, {"row_var": rows, "col_var": columns, "variance": variances}

    slots = {"row_var": _row, "col_var": _column, "variance": _whole}
    return optimizer(Rule(slots, update), Settings(lr=lr, weight_decay=weight_decay))


def _row(p: Tensor) -> Tensor | None:
    if p.is_complex():
        raise ValueError("adafactor takes no complex parameters: give them another optimizer with partition")
    return p.new_zeros((*p.shape[:-1], 1)) if p.ndim > 1 else None


def _column(p: Tensor) -> Tensor | None:
    return p.new_zeros((*p.shape[:-2], 1, p.shape[-1])) if p.ndim > 1 else None


def _whole(p: Tensor) -> Tensor | None:
    return torch.zeros_like(p) if p.ndim < 2 else None


def _mix(old: Tensor, new: Tensor, weight: Any) -> Tensor:
    return old + weight * (new - old) if isinstance(weight, Tensor) else torch.lerp(old, new, weight)


def _most(a: Any, b: float) -> Any:
    return a.clamp(min=b) if isinstance(a, Tensor) else max(a, b)


def _least(a: Any, b: Any) -> Any:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return torch.minimum(torch.as_tensor(a), torch.as_tensor(b).to(torch.float64))
    return min(a, b)
