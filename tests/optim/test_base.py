"""Chains: what they are made of and what they refuse."""

from __future__ import annotations

import pytest
import torch

import fnrun
from fnrun import optim, schedules
from fnrun.core import tree

P = {"x": torch.ones(2)}


def test_state_of_a_chain_is_the_tuple_of_its_members_states() -> None:
    chained = optim.chain(optim.clip_by_global_norm(1.0), optim.chain(optim.trace(0.9), optim.sgd(0.1)))
    alone = (optim.clip_by_global_norm(1.0), optim.trace(0.9), optim.sgd(0.1))
    assert tree.equal(chained.init(P), tuple(member.init(P) for member in alone))


def test_a_chain_of_one_is_that_one() -> None:
    optimizer = optim.adamw(0.1)
    assert optim.chain(optimizer) is optimizer


def test_a_chain_without_optimizer_is_a_transform() -> None:
    transform = optim.chain(optim.scale(2.0), optim.scale(3.0))
    assert isinstance(transform, optim.Transform)
    assert torch.equal(transform.update(P, transform.init(P), P)[0]["x"], torch.full((2,), 6.0))


def test_a_wrapper_wraps_all_that_comes_after_it() -> None:
    inside = optim.chain(optim.accumulate(2), optim.scale(2.0), optim.sgd(1.0))
    outside = optim.accumulate(2, optim.chain(optim.scale(2.0), optim.sgd(1.0)))
    assert tree.equal(inside.init(P), outside.init(P))
    assert isinstance(optim.chain(optim.scale(2.0), optim.accumulate(2)), optim.Wrapper)


def test_offers_of_the_optimizer_come_through_chains_and_wrappers() -> None:
    optimizer = optim.dynamic_loss_scale(optim.chain(optim.clip_by_global_norm(1.0), optim.schedule_free_adamw(0.1)), init_scale=4.0)
    state = optimizer.init(P)
    assert optimizer.loss_scale is not None
    assert optimizer.eval_params is not None
    assert optimizer.loss_scale(state) == 4.0
    assert tree.equal(optimizer.eval_params(state, P), P)
    assert optim.adamw(0.1).loss_scale is None


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: optim.chain(optim.sgd(0.1), optim.scale(2.0)), TypeError, "the optimizer of a chain is its last member; member 1 of 2"),
        (lambda: optim.chain(optim.scale(2.0), 0.1), TypeError, "argument 2 is a float"),
        (lambda: optim.accumulate(2)(optim.scale(1.0)), TypeError, "expected an Optimizer to wrap, not a Transform"),
        (lambda: optim.chain(optim.scale(2.0), optim.dynamic_loss_scale(optim.sgd(0.1))), ValueError, "comes first in a chain"),
        (lambda: optim.chain(optim.scale(2.0), optim.dynamic_loss_scale(), optim.sgd(0.1)), ValueError, "comes first in a chain"),
        (lambda: optim.dynamic_loss_scale(optim.dynamic_loss_scale(optim.sgd(0.1))), ValueError, "scales the loss already"),
        (lambda: optim.sgd(-0.1), ValueError, "lr is at least 0, not -0.1"),
        (lambda: optim.sgd(0.1, nesterov=True), ValueError, "nesterov wants a momentum and no dampening"),
        (lambda: optim.adamw(0.1, betas=(1.0, 0.9)), ValueError, "beta1 is from 0 up to, but not, 1, not 1.0"),
        (lambda: optim.adamw("0.1"), TypeError, "lr is a number, a schedule or optim.in_state"),
        (lambda: optim.accumulate(0), ValueError, "n is at least 1, not 0"),
        (lambda: optim.muon(0.1).init(P), ValueError, r"muon is for real matrices, and here is a torch.float32 leaf of shape \(2,\)"),
        (lambda: optim.schedule_free_adamw(0.1, betas=(0.0, 0.9)), ValueError, r"betas\[0\] is a number in \(0, 1\]"),
        (lambda: optim.adafactor(0.1).init({"z": torch.zeros(2, 2, dtype=torch.complex64)}), ValueError, "no complex parameters"),
    ],
)
def test_what_makes_no_optimizer_is_refused_in_words(make: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()  # pyright: ignore[reportCallIssue]


def test_gradients_of_another_structure_are_refused() -> None:
    optimizer = optim.adamw(0.1)
    with pytest.raises(ValueError, match="y"):
        optimizer.update({"y": torch.ones(2)}, optimizer.init(P), P)


def test_one_optimizer_serves_parameters_of_several_structures() -> None:
    optimizer = optim.sgd(1.0)
    for params in (P, {"x": (torch.ones(1), torch.ones(2))}, {"x": {"y": torch.ones(3)}}, P, torch.ones(2), {"x": P["x"], "y": P["x"]}):
        new, _ = optimizer.update(params, optimizer.init(params), params)
        assert tree.equal(new, tree.map(torch.zeros_like, params))


def test_no_parameters_are_no_trouble() -> None:
    for optimizer in (
        optim.adamw(0.1),
        optim.chain(optim.clip_by_global_norm(1.0), optim.nadam()),
        optim.from_torch(torch.optim.SGD, lr=0.1),
    ):
        assert optimizer.update({}, optimizer.init({}), {})[0] == {}


def test_two_optimizers_in_one_step_report_two_rates():
    """Also where one is called several times, and where branches call one twice."""
    one, other = optim.sgd(0.1), optim.freeze_until(3, optim.adamw(0.2))
    params = {"x": torch.ones(2)}

    @fnrun.step
    def step(state, batch):
        new, memory = one.update({"x": batch}, state.opt_state["one"], state.params)
        new, memory = one.update({"x": batch}, memory, new)
        new, more = other.update({"x": batch}, state.opt_state["other"], new)
        return state.replace(params=new, opt_state={"one": memory, "other": more}), {}

    state = fnrun.TrainState(params, {}, {"one": one.init(params), "other": other.init(params)}, fnrun.Key(0))
    assert step(state, torch.ones(2))[1] == {"lr": 0.1, "lr_2": 0.2}


def test_many_groups_of_one_rate_are_one_column():
    model = torch.nn.Sequential(*[torch.nn.Linear(2, 2) for _ in range(5)])
    rule = optim.name_multipliers({f"{i}.": 0.5**i for i in range(5)})
    optimizer = optim.scaled_lr(lambda lr: optim.adamw(lr), schedules.cosine(0.1, 10), rule)
    step = fnrun.make_train_step(model, lambda model, x: model(x).mean(), optimizer)
    state, metrics = step(fnrun.TrainState.create(model, optimizer), torch.ones(1, 2))
    assert set(metrics) == {"loss", "lr"}
    assert metrics["lr"] == 0.1
    assert step(state, torch.ones(1, 2))[1]["lr"] == schedules.cosine(0.1, 10)(1)
