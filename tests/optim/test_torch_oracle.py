"""The same rule as torch.optim's own class, leaf by leaf over 30 steps: bit for bit where the same kernels run, else to rounding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fnrun import optim, schedules

from . import cases

#: Ours, torch's, arguments, the torch kernels that give the same bits, and how far the others may be away (units in the last place).
CASES: list[tuple[str, str, dict[str, Any], str, int]] = [
    ("sgd", "SGD", {"lr": 0.01}, "fused", 16),
    ("sgd", "SGD", {"lr": 0.01, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.1}, "fused", 32),
    ("sgd", "SGD", {"lr": 0.01, "momentum": 0.9, "nesterov": True}, "fused", 32),
    ("adam", "Adam", {"lr": 0.01, "weight_decay": 0.1}, "fused", 32),
    ("adam", "Adam", {"lr": 0.01, "amsgrad": True}, "fused", 32),
    ("adamw", "AdamW", {"lr": 0.01, "betas": (0.8, 0.95)}, "fused", 32),
    ("adamw", "AdamW", {"lr": 0.01, "amsgrad": True}, "fused", 32),
    ("adagrad", "Adagrad", {"lr": 0.01, "lr_decay": 0.1, "weight_decay": 0.1, "initial_accumulator_value": 0.1}, "fused", 32),
    (
        "nadam",
        "NAdam",
        {"lr": 0.01, "weight_decay": 0.1},
        "foreach",
        512,
    ),  # torch's default kernel computes in float32 what is a number here
    ("nadam", "NAdam", {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True}, "foreach", 512),
    ("radam", "RAdam", {"lr": 0.01, "weight_decay": 0.1}, "", 32),  # one pass less than torch's kernels
    ("radam", "RAdam", {"lr": 0.01, "betas": (0.8, 0.9), "decoupled_weight_decay": True, "weight_decay": 0.1}, "", 32),
    ("adamax", "Adamax", {"lr": 0.01, "weight_decay": 0.1}, "foreach", 32),
    ("adadelta", "Adadelta", {"lr": 0.1, "weight_decay": 0.1}, "foreach", 32),
    ("rmsprop", "RMSprop", {"lr": 0.001}, "foreach", 32),
    ("rmsprop", "RMSprop", {"lr": 0.001, "momentum": 0.9, "centered": True, "weight_decay": 0.1}, "foreach", 32),
    ("rprop", "Rprop", {"lr": 0.001}, "foreach", 0),
    ("adafactor", "Adafactor", {"lr": 0.01, "weight_decay": 0.1}, "foreach", 64),
    ("muon", "Muon", {"lr": 0.001}, "default", 0),
    ("muon", "Muon", {"lr": 0.001, "adjust_lr_fn": "match_rms_adamw", "nesterov": False}, "default", 0),
]
MODES: dict[str, dict[str, Any]] = {"default": {}, "single": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request: Any) -> Iterator[torch.dtype]:
    """torch's optimizers keep some numbers in the default dtype."""
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


def peers(cls: str, arguments: dict[str, Any], start: cases.Tensors) -> dict[str, tuple[cases.Tensors, torch.optim.Optimizer]]:
    """torch's optimizer under each set of kernels that the class has, each over its own parameters."""
    kind = getattr(torch.optim, cls)
    taken = {"Muon": ("default",)}.get(
        cls, ("single", "foreach", "fused") if cls in ("SGD", "Adam", "AdamW", "Adagrad") else ("single", "foreach")
    )
    found = {}
    for mode in taken:
        leaves = {name: torch.nn.Parameter(p.clone()) for name, p in start.items()}
        found[mode] = (leaves, kind([leaves[name] for name in sorted(leaves)], **arguments, **MODES[mode]))
    return found


def train(leaves: cases.Tensors, optimizer: torch.optim.Optimizer, grads: dict[str, Any]) -> None:
    for name, p in leaves.items():
        p.grad = None if grads[name] is None else torch.empty_like(p).copy_(grads[name])
    optimizer.step()


@pytest.mark.parametrize(("name", "cls", "arguments", "same", "near"), CASES, ids=[f"{i}-{case[0]}" for i, case in enumerate(CASES)])
def test_agrees_with_torch(name: str, cls: str, arguments: dict[str, Any], same: str, near: int, dtype: torch.dtype) -> None:
    start = cases.params(name, dtype)
    optimizer, now = getattr(optim, name)(**arguments), start
    state, others = optimizer.init(start), peers(cls, arguments, start)
    assert not same or same in others
    for step in range(30):
        grads = cases.grads(start, step)
        now, state = optimizer.update(grads, state, now)
        for mode, (leaves, other) in others.items():
            train(leaves, other, grads)
            for leaf in start:
                ours, theirs = now[leaf], leaves[leaf].detach()
                if mode == same:
                    assert torch.equal(ours, theirs), f"{leaf}, step {step}, {mode}"
                else:
                    assert (ours - theirs).abs().max() <= near * torch.finfo(dtype).eps * theirs.abs().clamp(min=1.0).max(), (
                        leaf,
                        step,
                        mode,
                    )


@pytest.mark.parametrize("name", ["adamw", "nadam", "radam", "adagrad", "adafactor"])
def test_parameters_without_gradient_age_as_in_torch(name: str) -> None:
    """torch counts the steps of each parameter: the late ones are corrected for their own age."""
    cls = {"adamw": "AdamW", "nadam": "NAdam", "radam": "RAdam", "adagrad": "Adagrad", "adafactor": "Adafactor"}[name]
    mode = "fused" if name in ("adamw", "adagrad") else "foreach"
    start = cases.params(name)
    optimizer, now = getattr(optim, name)(1e-2), start
    state, (leaves, other) = optimizer.init(start), peers(cls, {"lr": 1e-2}, start)[mode]
    for step in range(30):
        grads: dict[str, Any] = cases.grads(start, step)
        grads = {n: None if (n == "b.bias" and step % 3 == 0) or (n == "c" and step < 20) else g for n, g in grads.items()}
        now, state = optimizer.update(grads, state, now)
        train(leaves, other, grads)
    for leaf in start:
        if name == "radam":
            assert cases.ulps(now[leaf], leaves[leaf].detach()) <= 4
        else:
            assert torch.equal(now[leaf], leaves[leaf].detach()), leaf


def test_complex_parameters_are_pairs_of_real_ones_as_in_torch() -> None:
    start = {"z": torch.tensor([1 + 2j, -1 + 0.5j, 2 - 1j]), "x": torch.tensor([1.0, 2.0])}
    for name, cls in (("adamw", "AdamW"), ("adagrad", "Adagrad"), ("rprop", "Rprop"), ("nadam", "NAdam"), ("rmsprop", "RMSprop")):
        optimizer, now = getattr(optim, name)(1e-2), start
        state, (leaves, other) = optimizer.init(start), peers(cls, {"lr": 1e-2}, start)["foreach"]
        for step in range(30):
            grads = {n: torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(step)) for n, p in start.items()}
            now, state = optimizer.update(grads, state, now)
            train(leaves, other, grads)
        for leaf, p in start.items():
            assert now[leaf].dtype == p.dtype
            assert torch.allclose(now[leaf], leaves[leaf].detach(), rtol=1e-6), (name, leaf)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_parameters_keep_their_dtype_and_torchs_bits(dtype: torch.dtype) -> None:
    start = cases.params("adamw", dtype)
    optimizer, now = optim.adamw(1e-2), start
    state, (leaves, other) = optimizer.init(start), peers("AdamW", {"lr": 1e-2}, start)["fused"]
    for step in range(30):
        grads = cases.grads(start, step)
        now, state = optimizer.update(grads, state, now)
        train(leaves, other, grads)
    assert all(torch.equal(now[n], leaves[n].detach()) and now[n].dtype == dtype for n in start)


def test_leaves_of_several_dtypes_each_take_their_kernel() -> None:
    start = {"a": torch.ones(3), "b": torch.ones(2, dtype=torch.float64), "c": torch.ones(4, dtype=torch.bfloat16)}
    optimizer, now = optim.adamw(1e-2), start
    state, (leaves, other) = optimizer.init(start), peers("AdamW", {"lr": 1e-2}, start)["fused"]
    for step in range(10):
        grads = cases.grads(start, step)
        now, state = optimizer.update(grads, state, now)
        train(leaves, other, grads)
    assert all(torch.equal(now[n], leaves[n].detach()) for n in start)


def test_schedules_are_torchs_learning_rates_set_from_outside() -> None:
    curve = schedules.warmup_cosine(1e-2, 5, 30)
    start = cases.params()
    optimizer, now = optim.adamw(curve), start
    state, (leaves, other) = optimizer.init(start), peers("AdamW", {"lr": 1e-2}, start)["fused"]
    for step in range(30):
        other.param_groups[0]["lr"] = curve(step)
        grads = cases.grads(start, step)
        now, state = optimizer.update(grads, state, now)
        train(leaves, other, grads)
        assert all(torch.equal(now[n], leaves[n].detach()) for n in start)


def test_layout_of_gradients_and_slots_does_not_matter() -> None:
    """Fused kernels walk over memory: a transposed gradient would silently be another one."""
    start = {"w": torch.randn(5, 4, generator=torch.Generator().manual_seed(0))}
    grads = [torch.randn(4, 5, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    ends = []
    for contiguous in (True, False):
        optimizer, now = optim.adamw(0.1), start
        state = optimizer.init(start)
        for g in grads:
            now, state = optimizer.update({"w": g.t().contiguous() if contiguous else g.t()}, state, now)
        ends.append(now["w"])
    assert torch.equal(*ends)
