"""`reduce_on_plateau` against torch's `ReduceLROnPlateau`."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

import fnrun
from fnrun import hooks, optim
from fnrun.core import tree


def fresh(optimizer=None):
    return fnrun.TrainState.create(nn.Linear(1, 1), optimizer or optim.sgd(0.1))


def scales(values, *, state=None, **options):
    """`lr_scale` after each of these values of `val/score`, one a round; None is a round without."""
    found = []
    member = fnrun.eval_loop(lambda state, batch: {"score": values[state.position.frames[0].ticks]})

    def skipping(state, x):
        return (state, {}) if values[state.position.frames[0].ticks] is None else member(state, x)

    loop = fnrun.repeat(
        fnrun.sequence(val=skipping),
        len(values),
        hooks=[hooks.reduce_on_plateau("val/score", **options)],
        observers=[lambda state, metrics: found.append(optim.hyperparams(state.opt_state)["lr_scale"])],
    )
    end, _ = loop(state or fresh(), {"val": [torch.zeros(1)]})
    return found, end


def torchs(values, *, min_value=0.0, **options):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, min_lr=min_value, eps=0.0, **options)
    found = []
    for value in values:
        scheduler.step(value)
        found.append(optimizer.param_groups[0]["lr"])
    return found


finite = st.integers(-8, 8).map(lambda n: n / 8)


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("threshold_mode", ["rel", "abs"])
@settings(max_examples=60, deadline=None)
@given(
    values=st.one_of(st.lists(finite, min_size=8, max_size=30), st.lists(st.one_of(finite, st.floats()), max_size=12)),
    factor=st.sampled_from([0.1, 0.5, 0.9]),
    patience=st.integers(0, 2),
    cooldown=st.integers(0, 2),
    threshold=st.sampled_from([1e-4, 0.3, 0.0]),
    min_value=st.sampled_from([0.0, 0.2, 2.0]),
)
def test_it_is_torchs(values, mode, threshold_mode, factor, patience, cooldown, threshold, min_value):
    """Bit for bit, in all modes, with values that are not finite, and a least value above the one that there is."""
    options = {"mode": mode, "threshold_mode": threshold_mode, "factor": factor, "patience": patience, "cooldown": cooldown}
    options |= {"threshold": threshold, "min_value": min_value}
    if threshold_mode == "rel":  # below 0 torch takes every value for an improvement
        values = [abs(value) for value in values]
    found, _ = scales(values, **options)
    assert [scale.item() for scale in found] == torchs(values, **options)


@pytest.mark.parametrize("mode", ["min", "max"])
def test_a_part_of_a_value_below_zero_is_a_part_of_its_size(mode):
    """A log likelihood that is lower by less than 1%, or higher, is none: what 10 to 9.95 and 10 to 10.05 are above 0."""
    sign = -1.0 if mode == "min" else 1.0
    values = [-10.0, -10.0 + 0.05 * sign, -10.0 + 0.09 * sign, -10.0 + 0.2 * sign]
    found, _ = scales(values, mode=mode, threshold=0.01, patience=0, factor=0.5)
    assert [scale.item() for scale in found] == [1.0, 0.5, 0.25, 0.25]


def test_a_number_keeps_its_precision():
    _, end = scales([0.1])
    assert end.memory["reduce_on_plateau"]["best"].item() == 0.1


def test_rounds_without_the_metric_do_not_count():
    values = [1.0, None, 2.0, None, None, 2.0, 2.0]
    found, _ = scales(values, patience=1, factor=0.5)
    assert [scale.item() for scale in found] == [1.0, 1.0, 1.0, 1.0, 1.0, 0.5, 0.5]


def test_each_group_of_a_partition_has_its_own_value_and_its_own_floor():
    optimizer = optim.partition(lambda path, p: path, {"weight": optim.sgd(0.1), "bias": optim.sgd(0.1)})
    state = fresh(optimizer)
    state = state.replace(opt_state=optim.set_hyperparam(state.opt_state, "bias/lr_scale", 0.5))
    loop = fnrun.repeat(
        fnrun.sequence(val=fnrun.eval_loop(lambda state, batch: {"loss": 1.0})),
        3,
        hooks=[hooks.reduce_on_plateau("val/loss", patience=0, factor=0.5, min_value=0.2)],
    )
    state, _ = loop(state, {"val": [torch.zeros(1)]})
    assert {name: value.item() for name, value in optim.hyperparams(state.opt_state).items()} == {
        "weight/lr_scale": 0.25,
        "bias/lr_scale": 0.2,
    }


def test_it_acts_on_a_leaf_of_another_name():
    optimizer = optim.sgd(0.1, momentum=optim.in_state(0.8))
    loop = fnrun.repeat(
        fnrun.sequence(val=fnrun.eval_loop(lambda state, batch: {"loss": 1.0})),
        2,
        hooks=[hooks.reduce_on_plateau("val/loss", patience=0, factor=0.5, hyperparam="momentum")],
    )
    state, _ = loop(fresh(optimizer), {"val": [torch.zeros(1)]})
    assert optim.hyperparams(state.opt_state)["momentum"].item() == 0.4
    assert optim.hyperparams(state.opt_state)["lr_scale"].item() == 1.0


def test_members_each_have_a_plateau_of_their_own():
    """One value for each member: each is reduced when it would have been alone."""
    columns = torch.tensor([[1.0, 1.0, 1.0, 1.0], [4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 0.5, 0.6]], dtype=torch.float64)
    state = fresh()
    stacked = state.replace(
        opt_state=tree.map(
            lambda t: t.expand(3).clone() if isinstance(t, torch.Tensor) and t.dtype == torch.float64 else t, state.opt_state
        )
    )
    hook = hooks.reduce_on_plateau("score", patience=0, factor=0.5)
    together = stacked.replace(memory={hook.name: hook.init(stacked)})
    alone = [state.replace(memory={hook.name: hook.init(state)}) for _ in range(3)]
    for t in range(4):
        together = hook.after(together, {"score": columns[:, t]})
        alone = [hook.after(one, {"score": columns[i, t]}) for i, one in enumerate(alone)]
    found = optim.hyperparams(together.opt_state)["lr_scale"]
    assert found.tolist() == [optim.hyperparams(one.opt_state)["lr_scale"].item() for one in alone] == [0.125, 1.0, 0.25]
    for i, one in enumerate(alone):
        assert tree.equal(tree.map(lambda t, i=i: t[i], together.memory[hook.name]), one.memory[hook.name])


def test_options_that_are_none():
    for options, message in [
        ({"mode": "up"}, "'min' or 'max', not 'up'"),
        ({"threshold_mode": "x"}, "'rel' or 'abs', not 'x'"),
        ({"factor": 1.0}, "factor is between 0 and 1"),
        ({"patience": -1}, "patience is at least 0"),
        ({"cooldown": -1}, "cooldown is at least 0"),
        ({"threshold": math.nan}, "threshold is at least 0"),
        ({"min_value": -1.0}, "min_value is at least 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            hooks.reduce_on_plateau("val/loss", **options)
    with pytest.raises(ValueError, match="reduce_on_plateau: the optimizer's state has no hyperparameter 'momentum'; there are: lr_scale"):
        scales([1.0], hyperparam="momentum")
