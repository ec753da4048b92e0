"""Elementwise step sizes from the history of gradients: adagrad, adadelta, rmsprop, rprop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fnrun.optim.adam_variants import decay
from fnrun.optim.base import Optimizer
from fnrun.optim.hyper import Hyper, Settings, check
from fnrun.optim.lists import is_zero, kernels
from fnrun.optim.rule import Rule, optimizer, steps


def adagrad(
    lr: Hyper = 1e-2,
    lr_decay: Hyper = 0.0,
    weight_decay: Hyper = 0.0,
    initial_accumulator_value: float = 0.0,
    eps: Hyper = 1e-10,
) -> Optimizer:
    """Adagrad (Duchi et al., 2011), torch's rule (bit for bit that of `torch.optim.Adagrad(fused=True)`).

    s ← s + g²; p ← p − lr/(1 + (t − 1) · lr_decay) · g/(√s + eps). (optax begins at s = 0.1 and has eps under the root.)
    """
    check({"initial_accumulator_value": initial_accumulator_value})
    settings = Settings(**check({"lr": lr, "lr_decay": lr_decay, "weight_decay": weight_decay, "eps": eps}))

    def update(ops: Any, p: Any, g: Any, slots: Any, h: Any, t: Any) -> Any:
        p, g = decay(ops, p, g, h, decoupled=False)
        s = ops.addcmul(slots["sum"], g, g)
        rate = -h["lr"] / (1 + (t - 1) * h["lr_decay"])
        return ops.addcdiv(p, ops.mul(g, rate), ops.add_(ops.sqrt(s), h["eps"])), {"sum": list(s)}

    def fused(p: Any, g: Any, slots: Any, h: Any, t: Any) -> None:
        kernels._fused_adagrad_(p, g, slots["sum"], steps(p, t), maximize=False, **h)

    return optimizer(Rule({"sum": _filled(initial_accumulator_value)}, update, fused), settings)


def _filled(value: float) -> Callable[[Tensor], Tensor]:
    """A slot that begins at `value`, in both parts of complex numbers."""
    return lambda p: torch.full_like(p, complex(value, value) if p.is_complex() else value)


def adadelta(lr: Hyper = 1.0, rho: Hyper = 0.9, eps: Hyper = 1e-6, weight_decay: Hyper = 0.0) -> Optimizer:
    """Adadelta (Zeiler, 2012): v ← ρv + (1 − ρ)g²; δ = √(u + eps)/√(v + eps) · g; u ← ρu + (1 − ρ)δ²; p ← p − lr · δ."""
    settings = Settings(**check({"lr": lr, "eps": eps, "weight_decay": weight_decay}), **check({"rho": rho}, below=1.0))

    def update(ops: Any, p: Any, g: Any, slots: Any, h: Any, t: Any) -> Any:
        p, g = decay(ops, p, g, h, decoupled=False)
        v = ops.addcmul_(ops.mul(slots["square_avg"], h["rho"]), g, g, 1 - h["rho"])
        delta = ops.sqrt_(ops.add(slots["acc_delta"], h["eps"]))
        delta = ops.mul_(ops.div_(delta, ops.sqrt_(ops.add(v, h["eps"]))), g)
        u = ops.addcmul_(ops.mul(slots["acc_delta"], h["rho"]), delta, delta, 1 - h["rho"])
        return ops.add(p, delta, alpha=-h["lr"]), {"square_avg": list(v), "acc_delta": list(u)}

    return optimizer(Rule(dict.fromkeys(("square_avg", "acc_delta"), torch.zeros_like), update), settings)


def rmsprop(
    lr: Hyper = 1e-2,
    alpha: Hyper = 0.99,
    eps: Hyper = 1e-8,
    weight_decay: Hyper = 0.0,
    momentum: Hyper = 0.0,
    *,
    centered: bool = False,
) -> Optimizer:
    """RMSprop (Tieleman and Hinton, 2012), torch's rule: v ← αv + (1 − α)g²; p ← p − lr · g/(√v + eps).

    With `centered`, v − m² is under the root, where m is the running mean of g. With `momentum`, b ← momentum · b + g/(…) and
    p ← p − lr · b. (optax has eps under the root unless `eps_in_sqrt=False`.)
    """
    rates = check({"lr": lr, "eps": eps, "weight_decay": weight_decay, "momentum": momentum})
    settings = Settings(**rates, **check({"alpha": alpha}, below=1.0))
    names = ["square_avg", *(["grad_avg"] if centered else []), *([] if is_zero(momentum) else ["momentum_buffer"])]

    def update(ops: Any, p: Any, g: Any, slots: Any, h: Any, t: Any) -> Any:
        p, g = decay(ops, p, g, h, decoupled=False)
        v = ops.addcmul_(ops.mul(slots["square_avg"], h["alpha"]), g, g, 1 - h["alpha"])
        new = {"square_avg": list(v)}
        if centered:
            mean = ops.lerp(slots["grad_avg"], g, 1 - h["alpha"])
            new["grad_avg"] = list(mean)
            root = ops.add_(ops.sqrt_(ops.addcmul(v, mean, mean, -1.0)), h["eps"])
        else:
            root = ops.add_(ops.sqrt(v), h["eps"])
        if is_zero(momentum):
            return ops.addcdiv(p, g, root, -h["lr"]), new
        b = ops.addcdiv_(ops.mul(slots["momentum_buffer"], h["momentum"]), g, root)
        return ops.add(p, b, alpha=-h["lr"]), {**new, "momentum_buffer": list(b)}

    return optimizer(Rule(dict.fromkeys(names, torch.zeros_like), update), settings)


def rprop(lr: float = 1e-2, etas: tuple[float, float] = (0.5, 1.2), step_sizes: tuple[float, float] = (1e-6, 50.0)) -> Optimizer:
    """Resilient backpropagation (Riedmiller and Braun, 1993), torch's rule: only signs count, each element has its own step size.

    For full batches. The reported `lr`, which `lr_scale` multiplies, is a factor on all steps.

    - `lr=1e-2`: the first step size.
    - `etas=(0.5, 1.2)`: the factors where the gradient changes its sign (the element then skips this step), and where it keeps it.
    - `step_sizes=(1e-6, 50.0)`: the bounds.
    """
    check({"lr": lr})
    if not 0.0 < etas[0] < 1.0 < etas[1]:
        raise ValueError(f"rprop: etas are a factor below 1 and one above, not {etas!r}")

    def update(ops: Any, p: Any, g: Any, slots: Any, h: Any, t: Any) -> Any:
        turns = ops.sign_(ops.mul(g, slots["prev"]))
        factors = [torch.where(turn > 0, etas[1], torch.where(turn < 0, etas[0], 1.0)).to(turn.dtype) for turn in turns]
        sizes = [size.clamp(*step_sizes) for size in ops.mul(slots["step_size"], factors)]
        g = [torch.where(turn < 0, 0.0, grad) for turn, grad in zip(turns, g, strict=True)]
        steps = ops.sign(g)
        if is_zero(h["lr"] - 1.0):
            new = ops.addcmul(p, steps, sizes, -1.0)
        else:
            new = ops.add(p, ops.mul_(steps, sizes), alpha=-h["lr"])
        return new, {"prev": g, "step_size": sizes}

    return optimizer(Rule({"prev": torch.zeros_like, "step_size": _filled(lr)}, update), Settings(lr=1.0))
