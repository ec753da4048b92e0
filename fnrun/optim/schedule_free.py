"""Schedule-free learning: an average of the iterates replaces a decaying schedule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fnrun.optim.adam import adam_settings
from fnrun.optim.base import Optimizer
from fnrun.optim.hyper import Hyper
from fnrun.optim.lists import host_values, is_zero, tree_map
from fnrun.optim.rule import Rule, RuleState, optimizer


def schedule_free_adamw(
    lr: Hyper = 2.5e-3,
    betas: tuple[float, Hyper] = (0.9, 0.999),
    eps: Hyper = 1e-8,
    weight_decay: Hyper = 0.0,
    weight_lr_power: float = 2.0,
) -> Optimizer:
    """Schedule-free AdamW (Defazio et al., 2024), optax's rule; `lr` may warm up, and need not decay.

    The state's parameters are y = (1 − β₁) z + β₁ x, at which gradients are taken. With v as in `adam`, and w the largest lr so far to the
    power `weight_lr_power`: z ← z − lr · (g/(√(v/(1 − β₂ᵗ)) + eps) + weight_decay · y); x ← x + w/∑w · (z − x).
    Evaluate with x: `eval_params(opt_state, params)`. Batch statistics are those of y.
    """
    beta1 = betas[0]
    if callable(beta1) or not isinstance(beta1, (int, float)) or not 0.0 < beta1 <= 1.0:
        raise ValueError(f"schedule_free_adamw: betas[0] is a number in (0, 1], because x is computed from y and z with it; got {beta1!r}")
    settings = adam_settings(lr, (0.0, betas[1]), eps, weight_decay)

    def update(ops: Any, y: Any, g: Any, slots: Any, h: Any, t: Any) -> Any:
        v = ops.addcmul_(ops.mul(slots["exp_avg_sq"], h["beta2"]), g, g, 1 - h["beta2"])
        step = ops.div(g, ops.add_(ops.sqrt_(ops.div(v, 1 - h["beta2"] ** t)), h["eps"]))
        if not is_zero(h["weight_decay"]):
            step = ops.add_(step, y, alpha=h["weight_decay"])
        z = ops.add(slots["z"], step, alpha=-h["lr"])
        x = average(ops, y, slots["z"])
        lr_max = slots["lr_max"].clamp(min=h["lr"])
        weights = lr_max**weight_lr_power
        totals = slots["weight_sum"] + weights
        shares = host_values(torch.where(totals > 0, weights / torch.where(totals > 0, totals, 1.0), 0.0), y)
        x = ops.add_(ops.mul_(x, [1.0 - s for s in shares]), ops.mul(z, shares))
        new = ops.add_(ops.mul_(x, beta1), z, alpha=1.0 - beta1)
        return new, {"z": list(z), "exp_avg_sq": list(v), "lr_max": lr_max, "weight_sum": totals}

    def average(ops: Any, y: Any, z: Any) -> Any:
        return ops.div_(ops.add(y, z, alpha=-(1.0 - beta1)), beta1)

    def eval_params(state: RuleState, params: Any) -> Any:
        """x of the parameters y and the state's z; parameters that are not trained are unchanged."""

        def x(y: Tensor, z: Tensor) -> Tensor:
            return (y - (1.0 - beta1) * z) / beta1

        z: Any = state.slots["z"]
        if isinstance(params, Mapping) and isinstance(z, Mapping):
            return {name: x(y, z[name]) if name in z else y for name, y in params.items()}
        return tree_map(x, params, z)

    rule = Rule({"z": torch.clone, "exp_avg_sq": torch.zeros_like}, update, scalars={"lr_max": _zeros, "weight_sum": _zeros})
    return optimizer(rule, settings, eval_params)


def _zeros(leaves: list[Tensor]) -> Tensor:
    return torch.zeros(len(leaves), dtype=torch.float64)
