"""torch's optimizers, and those of a third party, as pure functions: their bits, and nothing that lives on between calls."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from fnrun import optim, schedules
from fnrun.core import tree

from . import cases

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import pytorch_optimizer

O, X = torch.optim, pytorch_optimizer  # noqa: E741
CLASSES: dict[str, tuple[Any, dict[str, Any]]] = {
    "SGD": (O.SGD, {"lr": 0.01}),
    "SGD momentum": (O.SGD, {"lr": 0.01, "momentum": 0.9, "dampening": 0.1}),
    "Adam": (O.Adam, {"amsgrad": True}),
    "AdamW fused": (O.AdamW, {"fused": True}),
    "NAdam": (O.NAdam, {}),
    "RAdam": (O.RAdam, {}),
    "Adamax": (O.Adamax, {}),
    "Adagrad": (O.Adagrad, {"initial_accumulator_value": 0.1}),  # remembers from its making on
    "Adadelta": (O.Adadelta, {}),
    "RMSprop": (O.RMSprop, {"centered": True, "momentum": 0.9}),
    "Rprop": (O.Rprop, {}),
    "ASGD": (O.ASGD, {}),
    "Adafactor": (O.Adafactor, {}),  # remembers other things of vectors than of matrices
    "AdaBelief": (X.AdaBelief, {}),  # counts in its group
    "Prodigy": (X.Prodigy, {}),  # a running estimate in its group
    "Ranger21": (X.Ranger21, {"num_iterations": 40}),  # counts in the object itself
    "MADGRAD": (X.MADGRAD, {}),  # counts beside its parameters
    "SOAP": (X.SOAP, {"precondition_frequency": 3}),  # lists of matrices, empty ones among them
    "ScheduleFreeAdamW": (X.ScheduleFreeAdamW, {}),
    "DAdaptSGD": (X.DAdaptSGD, {}),  # an estimate in its group that the first steps may leave as it is
    "DAdaptLion": (X.DAdaptLion, {}),
    "DAdaptAdaGrad": (X.DAdaptAdaGrad, {}),
}
every = pytest.mark.parametrize("name", CLASSES)


def trained(cls: Any, arguments: dict[str, Any], start: cases.Tensors, steps: int, fn: Any = cases.grads) -> cases.Tensors:
    leaves = {n: torch.nn.Parameter(p.clone()) for n, p in start.items()}
    optimizer = cls([leaves[n] for n in sorted(leaves)], **arguments)
    for step in range(steps):
        grads = fn(start, step)
        for n, p in leaves.items():
            p.grad = None if grads[n] is None else torch.empty_like(p).copy_(grads[n])
        optimizer.step()
    return {n: p.detach() for n, p in leaves.items()}


@every
def test_has_the_bits_of_the_class_itself(name: str) -> None:
    cls, arguments = CLASSES[name]
    start = cases.params()
    assert tree.equal(cases.last(optim.from_torch(cls, **arguments), start, 30), trained(cls, arguments, start, 30))


@every
def test_is_pure_and_resumes_from_every_step(name: str) -> None:
    cls, arguments = CLASSES[name]
    start = cases.params()
    optimizer = optim.from_torch(cls, **arguments)
    fresh = optimizer.init(start)
    whole = list(cases.steps(optimizer, start, fresh, 12))
    kept = tree.snapshot(whole)
    for step, (now, state) in enumerate(whole[:-1], start=1):
        assert tree.equal(tree.map(lambda x: 0, fresh), tree.map(lambda x: 0, state))
        another = optim.from_torch(cls, **arguments)
        *_, end = cases.steps(another, cases.rebuilt(now), cases.rebuilt(state), 12 - step, begin=step)
        assert tree.equal(end, whole[-1]), f"resumed after update {step}"
    assert tree.equal(kept, whole)


@pytest.mark.parametrize("name", ["SGD momentum", "NAdam", "Adagrad", "Adafactor", "AdaBelief", "MADGRAD"])
def test_a_leaf_without_gradient_is_left_alone_as_in_torch(name: str) -> None:
    def fn(like: Any, step: int) -> Any:
        return {n: None if n == "c" or (n == "b.bias" and step < 3) else g for n, g in cases.grads(like, step).items()}

    cls, arguments = CLASSES[name]
    start = cases.params()
    assert tree.equal(cases.last(optim.from_torch(cls, **arguments), start, 8, fn), trained(cls, arguments, start, 8, fn))


def test_schedules_and_lr_scale_set_the_rate_of_each_step() -> None:
    curve = schedules.linear(0.1, 0.0, 10)
    start = {"x": torch.zeros(1, dtype=torch.float64)}
    optimizer = optim.from_torch(torch.optim.SGD, lr=curve)
    state = optim.set_hyperparam(optimizer.init(start), "lr_scale", 0.5)
    now = start
    for _ in range(3):
        now, state = optimizer.update({"x": torch.ones(1, dtype=torch.float64)}, state, now)
    assert now["x"].item() == pytest.approx(-0.5 * sum(curve(step) for step in range(3)))


def test_configuration_is_no_state() -> None:
    start = cases.params()
    one, two = (optim.from_torch(torch.optim.NAdam, lr=lr, weight_decay=lr) for lr in (0.1, 0.2))
    assert tree.equal(one.init(start), two.init(start))


def test_init_moves_no_global_generator() -> None:
    before = torch.get_rng_state()
    optim.from_torch(pytorch_optimizer.SOAP).init(cases.params())
    assert torch.equal(before, torch.get_rng_state())


def test_what_cannot_be_pure_is_refused() -> None:
    start = cases.params()
    with pytest.raises(TypeError, match=r"from_torch\(LBFGS\): its steps need a closure"):
        optim.from_torch(torch.optim.LBFGS).init(start)
    optimizer, grads = optim.from_torch(torch.optim.SGD, lr=0.1), cases.grads(start, 0)
    state = optimizer.init(start)
    with pytest.raises(RuntimeError, match=r"take an optimizer of fnrun.optim"):
        torch.func.vmap(lambda g: optimizer.update({**grads, "c": g}, state, start)[0])(torch.ones(2))


class Halving(torch.optim.SGD):
    """SGD that halves its own rate, at each `every`-th step."""

    def __init__(self, params: Any, lr: float = 1.0, every: int = 1) -> None:
        super().__init__(params, lr=lr)
        self.every, self.steps = every, 0

    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        self.steps += 1
        if self.steps % self.every == 0:
            for group in self.param_groups:
                group["lr"] *= 0.5


def test_a_rate_that_moves_late_is_memory_or_an_error_never_lost() -> None:
    start = cases.params()
    late = optim.from_torch(Halving, every=3)
    assert tree.equal(cases.last(late, start, 10), trained(Halving, {"every": 3}, start, 10))
    with pytest.raises(TypeError, match=r"from_torch\(Halving\): group 0 has changed \['lr'\]"):
        cases.last(optim.from_torch(Halving, every=3, lr=0.1), start, 3)


@pytest.mark.parametrize("scale", [0.5, 0.0, 2.0])
@pytest.mark.parametrize("after", [0, 1, 3])
@pytest.mark.parametrize(
    ("cls", "arguments", "why"),
    [
        (Halving, {}, "moves its own"),
        (Halving, {"lr": 1.0}, "moves its own"),
        (Halving, {"every": 3}, "moves its own"),
        (X.SWATS, {}, "moves its own"),
        (O.Rprop, {}, "do not depend on the"),
        (X.AdaFactor, {}, "do not depend on the"),
    ],
)
def test_lr_scale_is_refused_where_a_class_moves_its_rate_or_has_none(cls: Any, arguments: Any, why: str, after: int, scale: float) -> None:
    start = {"x": torch.ones(3, 2, dtype=torch.float64)}
    optimizer = optim.from_torch(cls, **arguments)
    now, state = start, optimizer.init(start)
    for step in range(after):
        now, state = optimizer.update(cases.grads(start, step), state, now)
    state = optim.set_hyperparam(state, "lr_scale", scale)
    with pytest.raises(ValueError, match=rf"from_torch\({cls.__name__}\): .*{why} learning rate.*lr_scale"):
        optimizer.update(cases.grads(start, after), state, now)
    optimizer.update(cases.grads(start, after), optim.set_hyperparam(state, "lr_scale", 1.0), now)


def test_lr_scale_is_refused_when_a_rate_moves_that_stood_still_so_far() -> None:
    start = {"x": torch.ones(3, dtype=torch.float64)}
    optimizer = optim.from_torch(Halving, every=20)
    now, state = start, optim.set_hyperparam(optimizer.init(start), "lr_scale", 0.5)
    for _ in range(19):
        now, state = optimizer.update({"x": torch.ones(3, dtype=torch.float64)}, state, now)
    assert torch.allclose(now["x"], start["x"] - 19 * 0.5)
    with pytest.raises(ValueError, match="moves its own learning rate"):
        optimizer.update({"x": torch.ones(3, dtype=torch.float64)}, state, now)


@pytest.mark.parametrize("name", ["SGD", "Adam", "ASGD", "Prodigy", "ScheduleFreeAdamW", "MADGRAD", "Adafactor"])
def test_lr_scale_has_the_bits_of_a_class_with_that_rate(name: str) -> None:
    cls, arguments = CLASSES[name]
    start = cases.params()
    plain, scaled = (optim.from_torch(cls, **{**arguments, "lr": lr}) for lr in (0.005, 0.01))
    state = optim.set_hyperparam(scaled.init(start), "lr_scale", 0.5)
    *_, (now, _) = cases.steps(scaled, start, state, 4)
    assert tree.equal(now, cases.last(plain, start, 4))


@pytest.mark.parametrize("wrap", [optim.apply_if_finite, optim.dynamic_loss_scale])
@pytest.mark.parametrize("name", ["AdaBelief", "Prodigy", "Ranger21", "DAdaptLion"])
def test_wrapped_the_structure_of_the_state_never_changes(name: str, wrap: Any) -> None:
    def shape(state: Any) -> Any:
        return tree.map(lambda x: f"{x.dtype} {tuple(x.shape)}" if isinstance(x, torch.Tensor) else str(type(x)), state)

    cls, arguments = CLASSES[name]
    start = cases.params()
    optimizer = wrap(optim.from_torch(cls, **arguments))
    fresh = optimizer.init(start)
    whole = list(cases.steps(optimizer, start, fresh, 6))
    for _, state in whole:
        assert tree.equal(shape(fresh), shape(state))
    now, state = whole[2]
    *_, end = cases.steps(optimizer, cases.rebuilt(now), cases.rebuilt(state), 3, begin=3)
    assert tree.equal(end, whole[-1])
