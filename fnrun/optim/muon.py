"""Muon: orthogonalized momentum for matrices."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fnrun.core.counts import count
from fnrun.optim.base import Optimizer
from fnrun.optim.hyper import Hyper, Settings, check
from fnrun.optim.rule import Rule, optimizer

_ADJUST = {
    "original": lambda rows, columns: math.sqrt(max(1, rows / columns)),
    "match_rms_adamw": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
}


def muon(
    lr: Hyper = 1e-3,
    weight_decay: Hyper = 0.1,
    momentum: Hyper = 0.95,
    *,
    nesterov: bool = True,
    ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
    eps: float = 1e-7,
    ns_steps: int = 5,
    adjust_lr_fn: str = "original",
) -> Optimizer:
    """Muon (Jordan et al., 2024), torch's rule, for matrices: the hidden layers of a network.

    - b ← momentum · b + (1 − momentum) · g; u = b, with nesterov momentum · b + (1 − momentum) · g;
    - o = `ns_steps` Newton-Schulz iterations of u in bfloat16, nearly the closest orthogonal matrix;
    - p ← (1 − lr · weight_decay) p − lr · adjust · o, where adjust is √max(1, rows/columns) (`original`) or 0.2 √max(rows, columns)
      (`match_rms_adamw`).

    `init` raises ValueError for a leaf that is no matrix: give those another optimizer with `partition`.
    """
    ns_steps = count("muon: ns_steps", ns_steps)
    if adjust_lr_fn not in _ADJUST:
        raise ValueError(f"muon: adjust_lr_fn is one of {', '.join(_ADJUST)}, not {adjust_lr_fn!r}")
    adjust = _ADJUST[adjust_lr_fn]

    def update(ops: Any, p: Any, g: Any, slots: Any, h: Any, t: Any) -> Any:
        b = ops.lerp(slots["momentum_buffer"], g, 1 - h["momentum"])
        directions = ops.lerp(g, b, h["momentum"]) if nesterov else b
        directions = [orthogonal(u, ns_coefficients, ns_steps, eps) for u in directions]
        rates = [-(h["lr"] * adjust(*x.shape)) for x in p]
        kept = ops.mul(p, 1 - h["lr"] * h["weight_decay"])
        new = [x + r * u if isinstance(r, Tensor) else torch.add(x, u, alpha=r) for x, u, r in zip(kept, directions, rates, strict=True)]
        return new, {"momentum_buffer": list(b)}

    settings = Settings(**check({"lr": lr, "weight_decay": weight_decay, "momentum": momentum}))
    return optimizer(Rule({"momentum_buffer": _begin}, update), settings)


def _begin(p: Tensor) -> Tensor:
    if p.ndim != 2 or p.is_complex():
        raise ValueError(
            f"muon is for real matrices, and here is a {p.dtype} leaf of shape {tuple(p.shape)}: "
            "optim.partition(lambda path, p: 'muon' if p.ndim == 2 else 'rest', {'muon': optim.muon(...), 'rest': optim.adamw(...)})"
        )
    return torch.zeros_like(p)


def orthogonal(matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Nearly U Vᵀ of a matrix U S Vᵀ: Newton-Schulz with a quintic that moves the singular values towards 1; bfloat16."""
    a, b, c = coefficients
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.bfloat16()
    x = x.mT if tall else x
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
