"""Stochastic gradient descent."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fnrun.optim.base import Optimizer
from fnrun.optim.hyper import Hyper, Settings, check
from fnrun.optim.lists import is_zero, kernels
from fnrun.optim.rule import Rule, optimizer


def sgd(lr: Hyper = 1e-3, momentum: Hyper = 0.0, *, dampening: Hyper = 0.0, nesterov: bool = False, weight_decay: Hyper = 0.0) -> Optimizer:
    """Stochastic gradient descent, torch's rule (bit for bit that of `torch.optim.SGD(fused=True)`, in half precision on
    a CPU of `torch.optim.SGD`).

    With g the gradient plus `weight_decay` times the parameter: b ← g at a parameter's first update, then
    b ← momentum · b + (1 − dampening) · g; p ← p − lr · b, or with nesterov p ← p − lr · (g + momentum · b).

    Raises ValueError for a negative number, and for nesterov without momentum or with dampening.

    >>> optimizer = sgd(0.1, momentum=0.9)
    >>> params = {"x": torch.tensor([1.0])}
    >>> params, state = optimizer.update({"x": torch.tensor([2.0])}, optimizer.init(params), params)
    >>> params
    {'x': tensor([0.8000])}
    """
    plain = is_zero(momentum)
    if nesterov and (plain or not is_zero(dampening)):
        raise ValueError("sgd: nesterov wants a momentum and no dampening")
    settings = Settings(dampening=dampening, **check({"lr": lr, "momentum": momentum, "weight_decay": weight_decay}))

    def update(ops: Any, p: Any, g: Any, slots: Any, h: Any, t: Any) -> Any:
        if not is_zero(h["weight_decay"]):
            g = ops.add(g, p, alpha=h["weight_decay"])
        if plain:
            return ops.add(p, g, alpha=-h["lr"]), {}
        if isinstance(t, Tensor):
            later = ops.add_(ops.mul(slots["momentum_buffer"], h["momentum"]), g, alpha=1 - h["dampening"])
            b = later if is_zero(h["dampening"]) else [torch.where(t == 1, x, y) for x, y in zip(g, later, strict=True)]
        elif t == 1:
            b = ops.clone(g)
        else:
            b = ops.add_(ops.mul(slots["momentum_buffer"], h["momentum"]), g, alpha=1 - h["dampening"])
        return ops.add(p, ops.add(g, b, alpha=h["momentum"]) if nesterov else b, alpha=-h["lr"]), {"momentum_buffer": list(b)}

    def fused(p: Any, g: Any, slots: Any, h: Any, t: Any) -> None:
        # If only the device knows whether it is the first step, the buffer's first zeros have the same effect without dampening.
        first = not isinstance(t, Tensor) and t == 1
        kernels._fused_sgd_(p, g, slots.get("momentum_buffer", []), nesterov=nesterov, is_first_step=first, maximize=False, **h)

    def fusable(h: Any, t: Any) -> bool:
        """The kernel needs a momentum for a buffer, and with dampening needs to know whether the step is the first."""
        return plain or not (is_zero(h["momentum"]) or (isinstance(t, Tensor) and not is_zero(h["dampening"])))

    slots = {} if plain else {"momentum_buffer": torch.zeros_like}
    # In half precision torch 2.13's kernel for CPUs loses whole vectors of the result: of 1,000 elements 992 keep their value.
    return optimizer(Rule(slots, update, fused, fusable=fusable, on_cpu=frozenset({torch.float32, torch.float64})), settings)
