"""Parameter groups: labels, ready rules, messages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st

import fnrun
from fnrun import optim, schedules, tree
from fnrun.reports import collect

from . import cases
from .cases import OPTIMIZERS

P = cases.params()
PLAIN = sorted(set(OPTIMIZERS) - {"loss_scale"})


@pytest.mark.parametrize("name", PLAIN)
def test_everything_under_one_label_is_that_optimizer(name: str) -> None:
    params = cases.params(name)
    grouped = optim.partition(lambda path, p: "all", {"all": OPTIMIZERS[name]()})
    alone = OPTIMIZERS[name]()
    a, b, one, two = params, params, grouped.init(params), alone.init(params)
    for step in range(4):
        key, grads = cases.Key(step), cases.grads(params, step)
        a, one = grouped.update(grads, one, a, key=key, step=step)
        b, two = alone.update(grads, two, b, key=key.fold_in("partition", "all"), step=step)
    assert tree.equal(a, b)
    assert tree.equal(one, {"all": two})


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(P)), st.sampled_from(["x", "y", "z"]), min_size=len(P)))
def test_each_group_trains_as_if_alone(labels: dict[str, str]) -> None:
    optimizers = {"x": optim.chain(optim.clip_by_global_norm(0.1), optim.adamw(1e-2)), "y": optim.sgd(0.1), "z": optim.freeze()}
    for given_labels in (labels, lambda path, p: labels[path]):
        together = cases.last(optim.partition(given_labels, optimizers), P, 3)
        for label, optimizer in optimizers.items():
            mine = {n: p for n, p in P.items() if labels[n] == label}
            fn: Any = lambda like, step: {n: cases.grads(P, step)[n] for n in like}  # noqa: E731
            assert tree.equal({n: together[n] for n in mine}, cases.last(optimizer, mine, 3, fn) if mine else {})


def test_groups_agree_with_torchs_param_groups() -> None:
    optimizer = optim.partition(
        optim.decay_labels, {"decay": optim.adamw(1e-2, weight_decay=0.1), "no_decay": optim.adamw(1e-2, weight_decay=0.0)}
    )
    leaves = {n: torch.nn.Parameter(p.clone()) for n, p in P.items()}
    wide = [n for n in P if P[n].ndim > 1]
    groups = [{"params": [leaves[n] for n in P if (n in wide) == many], "weight_decay": 0.1 if many else 0.0} for many in (True, False)]
    reference = torch.optim.AdamW(groups, lr=1e-2, fused=True)
    now, state = P, optimizer.init(P)
    for step in range(30):
        grads = cases.grads(P, step)
        now, state = optimizer.update(grads, state, now)
        for n, p in leaves.items():
            p.grad = torch.empty_like(p).copy_(grads[n])
        reference.step()
    assert all(torch.equal(now[n], leaves[n].detach()) for n in P)


def test_reports_carry_the_label() -> None:
    optimizer = optim.partition(optim.decay_labels, {"decay": optim.adamw(0.2), "no_decay": optim.sgd(0.1)})
    with collect() as reports:
        optimizer.update(cases.grads(P, 0), optimizer.init(P), P)
    assert reports == {"decay/lr": 0.2, "no_decay/lr": 0.1}


def test_evaluation_weights_come_from_the_groups_that_have_them() -> None:
    optimizer = optim.partition(optim.decay_labels, {"decay": optim.schedule_free_adamw(0.1), "no_decay": optim.sgd(0.1)})
    assert optimizer.eval_params is not None
    now, state = optimizer.update(cases.grads(P, 0), optimizer.init(P), P)
    evaluated = optimizer.eval_params(state, now)
    assert torch.equal(evaluated["b.bias"], now["b.bias"])
    assert evaluated["b.weight"] is not now["b.weight"]


TRANSFORMER = {n: torch.zeros(2, 2) for n in ("embed.weight", "blocks.0.attn.weight", "blocks.1.attn.weight", "blocks.2.mlp.fc.weight", "norm.weight", "head.weight")}  # fmt: skip
RESNET = {n: torch.zeros(2, 2) for n in ("conv1.weight", "layer1.0.conv1.weight", "layer1.1.conv1.weight", "layer2.0.conv1.weight", "fc.weight")}  # fmt: skip


def test_layer_decay_counts_blocks_from_the_head() -> None:
    assert optim.layer_decay(0.5)(TRANSFORMER) == {
        "embed.weight": 0.5**4, "blocks.0.attn.weight": 0.5**3, "blocks.1.attn.weight": 0.5**2, "blocks.2.mlp.fc.weight": 0.5,
        "norm.weight": 1.0, "head.weight": 1.0,
    }  # fmt: skip
    assert optim.layer_decay(0.5)(RESNET) == {
        "conv1.weight": 0.5**3, "layer1.0.conv1.weight": 0.5**2, "layer1.1.conv1.weight": 0.5**2, "layer2.0.conv1.weight": 0.5, "fc.weight": 1.0,
    }  # fmt: skip


def test_the_longest_matching_name_wins() -> None:
    rule = optim.name_multipliers({"blocks": 0.1, "blocks.1": 0.5, "attn.weight": 0.2})
    assert rule(TRANSFORMER) == {
        "embed.weight": 1.0, "blocks.0.attn.weight": 0.2, "blocks.1.attn.weight": 0.2, "blocks.2.mlp.fc.weight": 0.1,
        "norm.weight": 1.0, "head.weight": 1.0,
    }  # fmt: skip


def test_scaled_rates_are_those_of_the_group() -> None:
    curve = schedules.linear(1.0, 0.0, 10)
    optimizer = optim.scaled_lr(lambda lr: optim.sgd(lr), curve, optim.name_multipliers({"a.": 0.5}))
    now = cases.last(optimizer, P, 3)
    for name, factor in (("a.weight", 0.5), ("b.weight", 1.0)):
        expected = cases.last(
            optim.sgd(schedules.multiply(curve, factor)), {name: P[name]}, 3, lambda like, step: {n: cases.grads(P, step)[n] for n in like}
        )
        assert torch.allclose(now[name], expected[name])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: optim.partition(lambda path, p: "w", {"x": optim.sgd(0.1)}).init(P), "no optimizer for label 'w'; there are: 'x'"),
        (lambda: optim.name_multipliers({"blockz": 0.1})(TRANSFORMER), "pattern 'blockz' matches no parameter; near names: blocks"),
        (lambda: optim.layer_decay(0.5)({"dense.weight": P["c"]}), "matches no parameter; near names: dense"),
        (lambda: optim.partition({}, {"x": optim.dynamic_loss_scale(optim.sgd(0.1))}), "put dynamic_loss_scale around the partition"),
    ],
)
def test_mistakes_are_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_scaled_lr_offers_what_its_optimizer_offers() -> None:
    multipliers = optim.name_multipliers({"a": 0.1})
    optimizer = optim.scaled_lr(lambda lr: optim.schedule_free_adamw(lr), 1e-2, multipliers)
    params = {"a": torch.ones(2), "b": torch.ones(2)}
    state = optimizer.init(params)
    for _ in range(3):
        params, state = optimizer.update({"a": torch.ones(2), "b": torch.ones(2)}, state, params)
    assert optimizer.eval_params is not None
    assert not torch.equal(optimizer.eval_params(state, params)["a"], params["a"])
    with pytest.raises(ValueError, match="goes around scaled_lr"):
        optim.scaled_lr(lambda lr: optim.dynamic_loss_scale(optim.sgd(lr)), 1.0, multipliers)


def test_labels_by_dtype_are_those_of_the_parameters_at_hand() -> None:
    def label(path: str, p: torch.Tensor) -> str:
        return "single" if p.dtype == torch.float32 else "double"

    optimizer = optim.partition(label, {"single": optim.sgd(1.0), "double": optim.sgd(0.1)})
    for dtype, moved in ((torch.float32, -1.0), (torch.float64, -0.1)):
        params = {"a": torch.zeros(1, dtype=dtype)}
        assert optimizer.update({"a": torch.ones(1, dtype=dtype)}, optimizer.init(params), params)[0]["a"].item() == moved


def test_the_head_of_common_models_is_not_decayed() -> None:
    rates = optim.layer_decay(0.5)(dict.fromkeys(["embed.w", "blocks.0.w", "blocks.1.w", "fc_norm.w", "lm_head.w"], torch.zeros(1)))
    assert rates == {"embed.w": 0.125, "blocks.0.w": 0.25, "blocks.1.w": 0.5, "fc_norm.w": 1.0, "lm_head.w": 1.0}


def test_weights_to_evaluate_with_beside_frozen_ones() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
    model[0].requires_grad_(False)
    optimizer = optim.schedule_free_adamw(0.1)
    step = fnrun.make_train_step(model, lambda model, x: model(x).mean(), optimizer)
    state = fnrun.TrainState.create(model, optimizer)
    for _ in range(2):
        state, _ = step(state, torch.ones(3, 2))
    weights = optimizer.eval_params(state.opt_state, state.params)
    assert torch.equal(weights["0.weight"], state.params["0.weight"])
    assert not torch.equal(weights["1.weight"], state.params["1.weight"])
