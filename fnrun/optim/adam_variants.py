"""Relatives of Adam: nadam, radam, adamax, lamb, lion."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fnrun.optim.adam import adam_settings, moments
from fnrun.optim.base import Optimizer
from fnrun.optim.hyper import Hyper
from fnrun.optim.lists import host_values, is_zero
from fnrun.optim.rule import Rule, optimizer

Betas = tuple[Hyper, Hyper]


def decay(ops: Any, p: Any, g: Any, h: Any, decoupled: bool) -> tuple[Any, Any]:
    """Parameters and gradients after weight decay: a term in the gradients, or a factor on the parameters if `decoupled`."""
    if is_zero(h["weight_decay"]):
        return p, g
    if decoupled:
        return ops.mul(p, 1 - h["lr"] * h["weight_decay"]), g
    return p, ops.add(g, p, alpha=h["weight_decay"])


def _ones(leaves: list[Tensor]) -> Tensor:
    double = any(p is not None and p.dtype in (torch.float64, torch.complex128) for p in leaves)
    return torch.ones(len(leaves), dtype=torch.float64 if double else torch.float32)


def nadam(
    lr: Hyper = 2e-3,
    betas: Betas = (0.9, 0.999),
    eps: Hyper = 1e-8,
    weight_decay: Hyper = 0.0,
    momentum_decay: Hyper = 4e-3,
    *,
    decoupled_weight_decay: bool = False,
) -> Optimizer:
    """Adam with Nesterov momentum (Dozat, 2016), torch's rule: μₜ = β₁(1 − ½ · 0.96^(t · momentum_decay)), and with m, v as in `adam`

    p ← p − lr · [(1 − μₜ) g / (1 − ∏μ) + μₜ₊₁ m / (1 − μₜ₊₁ ∏μ)] / (√(v/(1 − β₂ᵗ)) + eps).
    optax's nadam is another rule, without the momentum schedule.
    """
    settings = adam_settings(lr, betas, eps, weight_decay, momentum_decay=momentum_decay)

    def update(ops: Any, p: Any, g: Any, slots: Any, h: Any, t: Any) -> Any:
        p, g = decay(ops, p, g, h, decoupled_weight_decay)
        m, v = moments(ops, g, slots, h)
        mu, mu_next = (h["beta1"] * (1.0 - 0.5 * 0.96 ** (s * h["momentum_decay"])) for s in (t, t + 1))
        products = (slots["mu_product"] * mu).to(slots["mu_product"].dtype)
        seen = host_values(products, p)
        denominator = ops.add_(ops.div_(ops.sqrt(v), (1 - h["beta2"] ** t) ** 0.5), h["eps"])
        new = ops.addcdiv(p, g, denominator, [-(h["lr"] * (1.0 - mu) / (1.0 - s)) for s in seen])
        new = ops.addcdiv_(new, m, denominator, [-(h["lr"] * mu_next / (1.0 - s * mu_next)) for s in seen])
        return new, {"exp_avg": list(m), "exp_avg_sq": list(v), "mu_product": products}

    rule = Rule(dict.fromkeys(("exp_avg", "exp_avg_sq"), torch.zeros_like), update, scalars={"mu_product": _ones})
    return optimizer(rule, settings)


def radam(
    lr: Hyper = 1e-3,
    betas: Betas = (0.9, 0.999),
    eps: Hyper = 1e-8,
    weight_decay: Hyper = 0.0,
    *,
    decoupled_weight_decay: bool = False,
) -> Optimizer:
    """Rectified Adam (Liu et al., 2020), torch's rule. With ρ∞ = 2/(1 − β₂) − 1 and ρₜ = ρ∞ − 2tβ₂ᵗ/(1 − β₂ᵗ), and m, v as in `adam`:

    where ρₜ > 5, p ← p − lr · rₜ · m/(1 − β₁ᵗ) · √(1 − β₂ᵗ) / (√v + eps), rₜ = √((ρₜ − 4)(ρₜ − 2)ρ∞ / ((ρ∞ − 4)(ρ∞ − 2)ρₜ));
    before that, p ← p − lr · m/(1 − β₁ᵗ).
    """
    settings = adam_settings(lr, betas, eps, weight_decay)

    def update(ops: Any, p: Any, g: Any, slots: Any, h: Any, t: Any) -> Any:
        p, g = decay(ops, p, g, h, decoupled_weight_decay)
        m, v = moments(ops, g, slots, h)
        beta1, beta2 = h["beta1"], h["beta2"]
        rho_end = 2 / (1 - beta2) - 1
        rho = rho_end - 2 * t * beta2**t / (1 - beta2**t)
        size = -(h["lr"] / (1 - beta1**t))
        new = {"exp_avg": list(m), "exp_avg_sq": list(v)}
        if not isinstance(rho, Tensor) and rho <= 5:
            return ops.add(p, m, alpha=size), new
        valid = rho.clamp(min=5) if isinstance(rho, Tensor) else rho
        rectified = ((valid - 4) * (valid - 2) * rho_end / ((rho_end - 4) * (rho_end - 2) * valid)) ** 0.5
        adapted = ops.addcdiv(p, m, ops.add_(ops.sqrt(v), h["eps"]), size * rectified * (1 - beta2**t) ** 0.5)
        if isinstance(rho, Tensor):
            adapted = [torch.where(rho > 5, a, b) for a, b in zip(adapted, ops.add(p, m, alpha=size), strict=True)]
        return adapted, new

    return optimizer(Rule(dict.fromkeys(("exp_avg", "exp_avg_sq"), torch.zeros_like), update), settings)


def adamax(lr: Hyper = 2e-3, betas: Betas = (0.9, 0.999), eps: Hyper = 1e-8, weight_decay: Hyper = 0.0) -> Optimizer:
    """Adam with the infinity norm (Kingma and Ba, 2015), torch's rule: u ← max(β₂u, |g| + eps); p ← p − lr/(1 − β₁ᵗ) · m/u."""
    settings = adam_settings(lr, betas, eps, weight_decay)

    def update(ops: Any, p: Any, g: Any, slots: Any, h: Any, t: Any) -> Any:
        p, g = decay(ops, p, g, h, decoupled=False)
        m = ops.lerp(slots["exp_avg"], g, 1 - h["beta1"])
        u = ops.maximum_(ops.mul(slots["exp_inf"], h["beta2"]), ops.add_(ops.abs(g), h["eps"]))
        return ops.addcdiv(p, m, u, -(h["lr"] / (1 - h["beta1"] ** t))), {"exp_avg": list(m), "exp_inf": list(u)}

    return optimizer(Rule(dict.fromkeys(("exp_avg", "exp_inf"), torch.zeros_like), update), settings)


def lion(lr: Hyper = 1e-4, betas: Betas = (0.9, 0.99), weight_decay: Hyper = 0.0) -> Optimizer:
    """Evolved sign momentum (Chen et al., 2023): p ← p − lr · (sign(β₁m + (1 − β₁)g) + weight_decay · p); m ← β₂m + (1 − β₂)g.

    Its learning rate is 3 to 10 times smaller than Adam's, its weight decay as many times larger.
    """
    settings = adam_settings(lr, betas, 0.0, weight_decay)

    def update(ops: Any, p: Any, g: Any, slots: Any, h: Any, t: Any) -> Any:
        m = slots["exp_avg"]
        direction = ops.sign_(ops.add_(ops.mul(m, h["beta1"]), g, alpha=1 - h["beta1"]))
        if not is_zero(h["weight_decay"]):
            direction = ops.add_(direction, p, alpha=h["weight_decay"])
        new = ops.add(p, direction, alpha=-h["lr"])
        return new, {"exp_avg": list(ops.add_(ops.mul(m, h["beta2"]), g, alpha=1 - h["beta2"]))}

    return optimizer(Rule({"exp_avg": torch.zeros_like}, update), settings)


def lamb(lr: Hyper = 1e-3, betas: Betas = (0.9, 0.999), eps: Hyper = 1e-6, weight_decay: Hyper = 0.0) -> Optimizer:
    """Adam for large batches (You et al., 2020): p ← p − lr · ‖p‖/‖r‖ · r, leaf by leaf, with r the step of `adamw` before its rate.

    Where a norm is 0 the ratio is 1. Norms and biases are usually left without weight decay: see `partition`.
    """
    settings = adam_settings(lr, betas, eps, weight_decay)

    def update(ops: Any, p: Any, g: Any, slots: Any, h: Any, t: Any) -> Any:
        m, v = moments(ops, g, slots, h)
        denominator = ops.add_(ops.sqrt(ops.div(v, 1 - h["beta2"] ** t)), h["eps"])
        step = ops.div_(ops.div(m, 1 - h["beta1"] ** t), denominator)
        if not is_zero(h["weight_decay"]):
            step = ops.add_(step, p, alpha=h["weight_decay"])
        ratios = [_ratio(weight, size) for weight, size in zip(ops.norm(p), ops.norm(step), strict=True)]
        return ops.add(p, ops.mul_(step, ratios), alpha=-h["lr"]), {"exp_avg": list(m), "exp_avg_sq": list(v)}

    return optimizer(Rule(dict.fromkeys(("exp_avg", "exp_avg_sq"), torch.zeros_like), update), settings)


def _ratio(weight: Tensor, step: Tensor) -> Tensor:
    usable = (weight > 0) & (step > 0)
    return torch.where(usable, weight / torch.where(usable, step, 1.0), 1.0)
