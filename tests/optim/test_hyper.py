"""Hyperparameters: configuration or state, reached through chains and partitions."""

from __future__ import annotations

import pytest
import torch

from fnrun import optim, schedules
from fnrun.core import tree
from fnrun.core.reports import collect

from . import cases

P = cases.params()


def test_numbers_and_schedules_are_no_state() -> None:
    """Another number or a longer schedule fits the same state, and acts from then on."""
    short, long = (optim.adamw(schedules.cosine(1e-2, steps)) for steps in (10, 100))
    state = short.init(P)
    assert tree.equal(state, long.init(P))
    *_, (now, state) = cases.steps(short, P, state, 5)
    with collect() as reports:
        long.update(cases.grads(P, 5), state, now)
    assert reports["lr"] == schedules.cosine(1e-2, 100)(5)


def test_lr_scale_acts_on_every_optimizer() -> None:
    for name, make in cases.OPTIMIZERS.items():
        params, optimizer = cases.params(name), make()
        *_, (params, state) = cases.steps(optimizer, params, optimizer.init(params), 6)
        stopped = optim.set_hyperparam(state, "lr_scale", 0.0)
        grads = cases.grads(params, 6)
        moving, _ = optimizer.update(grads, state, params, key=cases.Key(6))
        still, _ = optimizer.update(grads, stopped, params, key=cases.Key(6))
        assert any(not torch.equal(moving[n], params[n]) for n in params), name
        if name not in ("adafactor", "schedule_free_adamw", "lookahead"):  # whose parameters move on for other reasons
            assert all(torch.equal(still[n], params[n]) for n in params), name


def test_a_leaf_is_the_number_that_it_holds() -> None:
    with_leaf = optim.adamw(optim.in_state(1e-2), weight_decay=optim.in_state(0.1), betas=(optim.in_state(0.8), 0.9))
    plain = optim.adamw(1e-2, weight_decay=0.1, betas=(0.8, 0.9))
    assert tree.equal(cases.last(with_leaf, P, 5), cases.last(plain, P, 5))


def test_gradients_flow_to_a_leaf_through_the_update() -> None:
    """d loss(p − lr g) / d lr = −g · loss'(p), here for a loss that is the sum."""
    optimizer = optim.sgd(optim.in_state(0.1))
    rate = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    state = optim.set_hyperparam(optimizer.init(P), "lr", rate)
    grads = cases.grads(P, 0)
    new, _ = optimizer.update(grads, state, P)
    (slope,) = torch.autograd.grad(sum(p.sum() for p in new.values()), rate)
    assert slope == pytest.approx(-sum(g.double().sum().item() for g in grads.values()), rel=1e-5)
    for make in (optim.adamw, optim.adagrad, optim.nadam, optim.rmsprop, optim.lion):
        optimizer = make(optim.in_state(0.1))
        state = optim.set_hyperparam(optimizer.init(P), "lr", rate)
        new, _ = optimizer.update(grads, state, P)
        assert torch.autograd.grad(sum(p.sum() for p in new.values()), rate)[0].isfinite()


def test_a_sweep_is_one_value_a_member() -> None:
    optimizer = optim.adamw(optim.in_state(0.0))
    rates = torch.tensor([1e-2, 1e-3], dtype=torch.float64)
    grads = cases.grads(P, 0)
    together = torch.func.vmap(lambda lr: optimizer.update(grads, optim.set_hyperparam(optimizer.init(P), "lr", lr), P)[0])(rates)
    for i, lr in enumerate((1e-2, 1e-3)):
        assert cases.far({n: p[i] for n, p in together.items()}, cases.last(optim.adamw(lr), P, 1)) < 1e-6


def test_names_are_short_and_carry_labels_and_places_only_where_needed() -> None:
    group = optim.partition(optim.decay_labels, {"decay": optim.adamw(optim.in_state(0.1)), "no_decay": optim.sgd(0.1)})
    optimizer = optim.chain(optim.accumulate(2), optim.scale(optim.in_state(1.0)), optim.scale(optim.in_state(2.0)), group)
    names = optim.hyperparams(optimizer.init(P))
    assert sorted(names) == ["0/factor", "1/factor", "decay/lr", "decay/lr_scale", "no_decay/lr_scale"]
    assert names["1/factor"] == 2.0


def test_a_name_sets_all_that_end_so() -> None:
    optimizer = optim.partition(optim.decay_labels, {"decay": optim.adamw(0.1), "no_decay": optim.sgd(0.1)})
    state = optimizer.init(P)
    both = optim.hyperparams(optim.set_hyperparam(state, "lr_scale", 0.5))
    assert [value.item() for value in both.values()] == [0.5, 0.5]
    one = optim.hyperparams(optim.set_hyperparam(state, "decay/lr_scale", 0.5))
    assert (one["decay/lr_scale"].item(), one["no_decay/lr_scale"].item()) == (0.5, 1.0)
    assert optim.hyperparams(state)["decay/lr_scale"].item() == 1.0
    with pytest.raises(ValueError, match=r"no hyperparameter 'lr_scal' in this state; there are: decay/lr_scale, no_decay/lr_scale"):
        optim.set_hyperparam(state, "lr_scal", 0.5)


def test_momentum_and_betas_take_schedules() -> None:
    start = {"x": torch.tensor([0.0], dtype=torch.float64)}
    optimizer = optim.sgd(1.0, momentum=schedules.piecewise([0.5, 0.0], [2]))
    state, now, seen = optimizer.init(start), start, []
    for _ in range(3):
        now, state = optimizer.update({"x": torch.tensor([1.0], dtype=torch.float64)}, state, now)
        seen.append(now["x"].item())
    assert seen == [-1.0, -2.5, -3.5]  # buffers 1, 1.5, and 1 again once the momentum is gone


def test_the_old_name_says_the_new_one() -> None:
    with pytest.raises(AttributeError, match=r"optim\.leaf\(value\) is optim\.in_state\(value\) now"):
        optim.leaf(0.1)  # pyright: ignore[reportAttributeAccessIssue]
    assert not hasattr(optim, "nonsense")


def test_one_that_requires_grad_is_refused_for_no_gradient_would_reach_it() -> None:
    rate = torch.tensor(0.1, requires_grad=True)
    with pytest.raises(ValueError, match=r"optim\.in_state: this tensor requires grad, .*give value\.detach\(\)"):
        optim.in_state(rate)
    with torch.no_grad():
        assert optim.in_state(rate).value.item() == rate.item()


def test_a_number_is_no_hyperparameter_of_the_state_and_what_makes_it_one_is_named() -> None:
    for optimizer in (optim.sgd(0.1), optim.adamw(schedules.cosine(0.1, 10)), optim.freeze()):
        with pytest.raises(
            ValueError, match=r"no hyperparameter 'lr' .* optim\.in_state\(number\) is: optim\.sgd\(optim\.in_state\(0\.1\)\)$"
        ):
            optim.set_hyperparam(optimizer.init(P), "lr", 0.2)
