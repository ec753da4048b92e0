"""Adam and AdamW."""

from __future__ import annotations

from typing import Any

import torch

from fnrun.optim.base import Optimizer
from fnrun.optim.hyper import Hyper, Settings, check
from fnrun.optim.lists import is_zero, kernels
from fnrun.optim.rule import Rule, optimizer, steps


def adam(
    lr: Hyper = 1e-3,
    betas: tuple[Hyper, Hyper] = (0.9, 0.999),
    eps: Hyper = 1e-8,
    weight_decay: Hyper = 0.0,
    *,
    amsgrad: bool = False,
) -> Optimizer:
    """Adam (Kingma and Ba, 2015), torch's rule (bit for bit that of `torch.optim.Adam(fused=True)`).

    With g the gradient plus `weight_decay` times the parameter, and t the parameter's count of updates:
    m ← β₁m + (1 − β₁)g; v ← β₂v + (1 − β₂)g²; p ← p − lr/(1 − β₁ᵗ) · m / (√(v/(1 − β₂ᵗ)) + eps).
    With amsgrad the largest v so far replaces v in the last formula. (optax takes the largest after the bias correction.)

    >>> optimizer = adam(0.1)
    >>> params = {"x": torch.tensor([1.0])}
    >>> params, state = optimizer.update({"x": torch.tensor([2.0])}, optimizer.init(params), params)
    >>> params
    {'x': tensor([0.9000])}
    """
    return _adam(lr, betas, eps, weight_decay, amsgrad, decoupled=False)


def adamw(
    lr: Hyper = 1e-3,
    betas: tuple[Hyper, Hyper] = (0.9, 0.999),
    eps: Hyper = 1e-8,
    weight_decay: Hyper = 1e-2,
    *,
    amsgrad: bool = False,
) -> Optimizer:
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2019), torch's rule (bit for bit that of `torch.optim.AdamW(fused=True)`).

    `adam`, but p ← (1 − lr · weight_decay) · p before the update instead of a term in the gradient.
    """
    return _adam(lr, betas, eps, weight_decay, amsgrad, decoupled=True)


def adam_settings(lr: Hyper, betas: tuple[Hyper, Hyper], eps: Hyper, weight_decay: Hyper, **others: Hyper) -> Settings:
    """The hyperparameters of the Adam family, checked; `betas` become `beta1` and `beta2`."""
    beta1, beta2 = betas
    rates = check({"lr": lr, "eps": eps, "weight_decay": weight_decay, **others})
    return Settings(**rates, **check({"beta1": beta1, "beta2": beta2}, below=1.0))


def moments(ops: Any, g: Any, slots: Any, h: Any) -> tuple[Any, Any]:
    """The running means of the gradient and of its square."""
    m = ops.lerp(slots["exp_avg"], g, 1 - h["beta1"])
    v = ops.addcmul_(ops.mul(slots["exp_avg_sq"], h["beta2"]), g, g, 1 - h["beta2"])
    return m, v


def _adam(lr: Hyper, betas: tuple[Hyper, Hyper], eps: Hyper, weight_decay: Hyper, amsgrad: bool, decoupled: bool) -> Optimizer:
    settings = adam_settings(lr, betas, eps, weight_decay)

    def update(ops: Any, p: Any, g: Any, slots: Any, h: Any, t: Any) -> Any:
        beta1, beta2 = h["beta1"], h["beta2"]
        decays = not is_zero(h["weight_decay"])
        if decays and not decoupled:
            g = ops.add(g, p, alpha=h["weight_decay"])
        m, v = moments(ops, g, slots, h)
        new = {"exp_avg": list(m), "exp_avg_sq": list(v)}
        if amsgrad:
            v = ops.maximum(slots["max_exp_avg_sq"], v)
            new["max_exp_avg_sq"] = list(v)
        denominator = ops.add_(ops.div_(ops.sqrt(v), (1 - beta2**t) ** 0.5), h["eps"])
        size = -(h["lr"] / (1 - beta1**t))
        if decays and decoupled:
            return ops.addcdiv_(ops.mul(p, 1 - h["lr"] * h["weight_decay"]), m, denominator, size), new
        return ops.addcdiv(p, m, denominator, size), new

    kernel = kernels._fused_adamw_ if decoupled else kernels._fused_adam_

    def fused(p: Any, g: Any, slots: Any, h: Any, t: Any) -> None:
        largest = slots["max_exp_avg_sq"] if amsgrad else []
        kernel(p, g, slots["exp_avg"], slots["exp_avg_sq"], largest, steps(p, t), amsgrad=amsgrad, maximize=False, **h)

    names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if amsgrad else ("exp_avg", "exp_avg_sq")
    return optimizer(Rule(dict.fromkeys(names, torch.zeros_like), update, fused), settings)
