"""Every optimizer of the library with awkward leaves: what the suites of this folder run over."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import optree
import torch

from fnrun import Key, optim, schedules
from fnrun.core import tree

Tensors = dict[str, torch.Tensor]

CURVE = schedules.warmup_cosine(peak=1e-2, warmup=4, total=40, floor=1e-4)

#: Every terminal optimizer, with what it has in options, and with a schedule where it takes one.
OPTIMIZERS: dict[str, Callable[[], optim.Optimizer]] = {
    "sgd": lambda: optim.sgd(CURVE),
    "momentum": lambda: optim.sgd(CURVE, momentum=0.9, dampening=0.1, weight_decay=0.1),
    "nesterov": lambda: optim.sgd(1e-2, momentum=0.9, nesterov=True),
    "adam": lambda: optim.adam(CURVE, weight_decay=0.1),
    "amsgrad": lambda: optim.adam(1e-2, amsgrad=True),
    "adamw": lambda: optim.adamw(CURVE, betas=(schedules.linear(0.8, 0.95, 10), 0.99)),
    "adamw_leaf": lambda: optim.adamw(optim.in_state(1e-2), weight_decay=optim.in_state(0.1)),
    "nadam": lambda: optim.nadam(CURVE, weight_decay=0.1),
    "radam": lambda: optim.radam(CURVE, betas=(0.9, 0.95), decoupled_weight_decay=True, weight_decay=0.1),
    "adamax": lambda: optim.adamax(CURVE),
    "adagrad": lambda: optim.adagrad(CURVE, lr_decay=0.1, initial_accumulator_value=0.1),
    "adadelta": lambda: optim.adadelta(CURVE),
    "rmsprop": lambda: optim.rmsprop(CURVE, momentum=0.9, centered=True),
    "rprop": lambda: optim.rprop(1e-2),
    "lion": lambda: optim.lion(CURVE, weight_decay=0.1),
    "lamb": lambda: optim.lamb(CURVE, weight_decay=0.1),
    "adafactor": lambda: optim.adafactor(CURVE, weight_decay=0.1),
    "muon": lambda: optim.muon(CURVE),
    "schedule_free_adamw": lambda: optim.schedule_free_adamw(CURVE, weight_decay=0.1),
    "chain": lambda: optim.chain(optim.clip_by_global_norm(1.0), optim.add_noise(0.01), optim.trace(0.9), optim.adamw(CURVE)),
    "partition": lambda: optim.partition(optim.decay_labels, {"decay": optim.adamw(CURVE), "no_decay": optim.sgd(CURVE, momentum=0.9)}),
    "lookahead": lambda: optim.lookahead(optim.adamw(CURVE), sync_period=3),
    "finite": lambda: optim.apply_if_finite(optim.adamw(CURVE)),
    "loss_scale": lambda: optim.dynamic_loss_scale(optim.adamw(CURVE), growth_interval=3),
    "freeze_until": lambda: optim.freeze_until(5, optim.adamw(CURVE)),
    "from_torch": lambda: optim.from_torch(torch.optim.NAdam, lr=CURVE),
}


def params(name: str = "", dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensors:
    """Leaves away from 0 in every layout: contiguous, transposed, of one dimension, of none; matrices alone for muon."""
    g = torch.Generator().manual_seed(seed)

    def leaf(*shape: int) -> torch.Tensor:
        x = torch.rand(shape, generator=g, dtype=torch.float64) + 1.0
        return (x * torch.where(torch.rand(shape, generator=g) < 0.5, -1.0, 1.0)).to(dtype)

    leaves = {"b.weight": leaf(5, 4), "a.weight": leaf(4, 6).t()}
    if name != "muon":
        leaves |= {"b.bias": leaf(3), "c": leaf(), "a.conv": leaf(3, 2, 2)}
    return leaves


def grads(like: Tensors, step: int) -> Tensors:
    """The gradient of this step: contiguous, whatever the layout of the parameters."""
    g = torch.Generator().manual_seed(1_000 + step)
    return {name: torch.randn(p.shape, generator=g, dtype=torch.float64).to(p.dtype) for name, p in sorted(like.items())}


def steps(optimizer: optim.Optimizer, start: Any, state: Any, count: int, begin: int = 0, fn: Any = grads) -> Iterator[tuple[Any, Any]]:
    """The parameters and the state after each update from `begin` on, with the key that a training step would give."""
    now = start
    for step in range(begin, begin + count):
        now, state = optimizer.update(fn(now, step), state, now, key=Key(7).fold_in(step), step=step)
        yield now, state


def last(optimizer: optim.Optimizer, start: Any, count: int, fn: Any = grads) -> Any:
    *_, (now, _) = steps(optimizer, start, optimizer.init(start), count, fn=fn)
    return now


def rebuilt(value: Any) -> Any:
    """What a restore gives: the same values in new containers and new memory of the same layout, dictionaries in another order."""
    node = tree.node(value)
    if node is None:
        return value.detach().clone() if isinstance(value, torch.Tensor) else value
    if isinstance(value, dict):
        return {key: rebuilt(value[key]) for key in sorted(value, reverse=True)}
    children = [rebuilt(child) for child in node.children]
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return tuple(children)
    return optree.tree_unflatten(optree.tree_structure(value, none_is_leaf=True), optree.tree_leaves(children, none_is_leaf=True))


def far(a: Tensors, b: Tensors) -> float:
    """The largest difference between two sets of leaves, relative to the larger of 1 and the leaf."""
    return max(((a[name].double() - b[name].double()).abs() / b[name].double().abs().clamp(min=1.0)).max().item() for name in a)


def ulps(a: torch.Tensor, b: torch.Tensor) -> int:
    """How many representable numbers lie between the two, at the worst element."""
    ints = {torch.float32: torch.int32, torch.float64: torch.int64}[a.dtype]

    def order(x: torch.Tensor) -> torch.Tensor:
        i = x.contiguous().view(ints).to(torch.int64)
        return torch.where(i < 0, torch.iinfo(ints).min - i, i)

    return int((order(a) - order(b)).abs().max()) if a.numel() else 0
