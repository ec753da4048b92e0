"""`rollback`: what goes back, what goes on, and when it gives up."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import fnrun
from fnrun import hooks, optim
from fnrun.core import tree
from fnrun.testing import assert_same, states_seen

NAN = math.nan
OPTIMIZER = optim.chain(optim.clip_by_global_norm(10.0), optim.adamw(0.1))


def network():
    with fnrun.Key(0).scope():
        return nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout(0.2), nn.Linear(2, 1))


def batches(poison, n=8):
    """Batches of which some make the loss and the update not a number."""
    with fnrun.Key(1).scope():
        good = [torch.randn(4, 2) for _ in range(n)]
    return [torch.full((4, 2), NAN) if i in poison else batch for i, batch in enumerate(good)]


def trained(poison, *hook_list, n=8, steps=None):
    """The end of a training over these batches, and the state after each step."""
    model = network()
    step = fnrun.make_train_step(model, lambda model, x: model(x).square().mean(), OPTIMIZER)
    loop = fnrun.step_loop(step, steps or n, hooks=hook_list)
    seen, (end, _) = states_seen(loop, fnrun.TrainState.create(model, OPTIMIZER), batches(poison, n))
    return end, seen


def weights(state):
    return {"params": state.params, "buffers": state.buffers}


def test_it_goes_back_to_before_the_last_good_step():
    """Batch 4 poisons loss and weights: the state is that before step 4, whose loss was the last good one."""
    _, plain = trained([], n=8)
    end, seen = trained([4], hooks.rollback("loss"))
    assert_same(weights(seen[3]), weights(plain[3]), "a rollback that has nothing to do")
    assert_same(weights(seen[4]), weights(plain[2]), "the weights went back")
    assert_same(seen[4].opt_state, plain[2].opt_state, "the optimizer went back")
    assert seen[4].step == 5
    assert [t.isfinite().all() for t in end.params.values()] == [True] * len(end.params)
    assert end.step == 8
    assert end.memory["rollback"]["retries"] == 1


def test_the_retry_meets_other_data_and_other_randomness():
    """The step after the rollback is the one that the restored weights would take as step 6, with batch 5 and its dropout."""
    model = network()
    step = fnrun.make_train_step(model, lambda model, x: model(x).square().mean(), OPTIMIZER)
    _, seen = trained([4], hooks.rollback("loss"))
    expected, _ = step(seen[2].replace(step=5), batches([])[5])
    assert_same(weights(seen[5]), weights(expected), "the retry")
    same, _ = step(seen[2].replace(step=3), batches([])[5])
    assert not tree.equal(same.params, seen[5].params)


def test_a_poison_that_shows_a_step_later_is_undone_too():
    """The loss is fine and the update is not: known at the next step, whose weights were no good. They are not what is gone back to."""

    @fnrun.step
    def step(state, batch):
        loss = state.params["x"].sum()
        return state.replace(params={"x": state.params["x"] + batch}), {"loss": loss}

    state = fnrun.TrainState(params={"x": torch.zeros(1)}, buffers={}, opt_state=None, rng=fnrun.Key(0))
    stream = [torch.tensor([value]) for value in (1.0, 1.0, NAN, 1.0, 1.0)]
    for order in (lambda *hooks: hooks, lambda *hooks: tuple(reversed(hooks))):
        loop = fnrun.epoch_loop(step, hooks=order(hooks.rollback("loss"), hooks.ema(0.5), hooks.swa()))
        seen, (end, _) = states_seen(loop, state, stream)
        assert [s.params["x"].item() for s in seen if s.step != 3] == [1.0, 2.0, 2.0, 3.0]
        assert seen[2].params["x"].isnan().all()
        for name in ("ema", "swa"):  # averages that saw it went back too
            assert end.memory[name]["params"]["x"].isfinite().all()


def test_weights_that_another_hook_set_are_those_before_the_next_step():
    """As a rollback in the rounds around it does. The fourth batch is poisoned: back to before the third, which is 0."""

    @fnrun.step
    def step(state, batch):
        return state.replace(params={"x": state.params["x"] + batch}), {"loss": state.params["x"].sum() + batch.sum()}

    def reset(state, metrics):
        return state.replace(params={"x": torch.zeros(1)})

    state = fnrun.TrainState(params={"x": torch.zeros(1)}, buffers={}, opt_state=None, rng=fnrun.Key(0))
    stream = [torch.tensor([value]) for value in (1.0, 1.0, 1.0, NAN)]
    loop = fnrun.repeat(fnrun.step_loop(step, 2, hooks=[hooks.rollback("loss")]), 2, hooks=[hooks.at(1, reset)])
    end, _ = loop(state, stream)
    assert end.params["x"].item() == 0.0


@pytest.mark.parametrize(("n", "expected"), [(2, 2.0), (3, 0.0)])
def test_held_back_it_goes_back_in_strides(n, expected):
    """Of 6 steps the sixth is poisoned: each second step it looks, so at 2, 4 (good: 2) and 6; each third, at 3 (good: 0) and 6."""

    @fnrun.step
    def step(state, batch):
        return state.replace(params={"x": state.params["x"] + 1}), {"loss": batch}

    state = fnrun.TrainState(params={"x": torch.zeros(1)}, buffers={}, opt_state=None, rng=fnrun.Key(0))
    stream = [torch.tensor(value) for value in (1.0, 1.0, 1.0, 1.0, 1.0, NAN)]
    end, _ = fnrun.epoch_loop(step, hooks=[hooks.every(n, hooks.rollback("loss"))])(state, stream)
    assert end.params["x"].item() == expected


def test_averages_go_back_also_from_the_very_first_step():
    for hook_list in ([hooks.rollback("loss"), hooks.ema(0.5)], [hooks.ema(0.5), hooks.rollback("loss")]):
        end, _ = trained([0], *hook_list)
        assert all(t.isfinite().all() for t in end.memory["ema"]["params"].values())


def test_explosions_are_what_when_says():
    """Values of the loss: 1, 2, 30 (exploded), 3, 40 (exploded)."""

    @fnrun.step
    def step(state, batch):
        return state.replace(params={"x": state.params["x"] + 1}), {"loss": batch}

    asked = []

    def when(value, good):
        asked.append((value, good))
        return value > 10 * good

    state = fnrun.TrainState(params={"x": torch.zeros(1)}, buffers={}, opt_state=None, rng=fnrun.Key(0))
    stream = [torch.tensor(value) for value in (1.0, 2.0, 30.0, 3.0, 40.0)]
    seen, (end, _) = states_seen(fnrun.epoch_loop(step, hooks=[hooks.rollback("loss", when=when)]), state, stream)
    assert asked == [(2.0, 1.0), (30.0, 2.0), (3.0, 2.0), (40.0, 3.0)]
    assert [s.params["x"].item() for s in seen] == [1.0, 2.0, 1.0, 2.0, 1.0]
    assert end.memory["rollback"]["retries"] == 2


def test_the_rate_is_lowered_at_each_retry_and_what_lowered_it_before_stays():
    lowered = hooks.at(2, lambda state, metrics: state.replace(opt_state=optim.set_hyperparam(state.opt_state, "lr_scale", 0.5)))
    _, seen = trained([3, 6], lowered, hooks.rollback("loss", lr_factor=0.1))
    scales = [optim.hyperparams(state.opt_state)["lr_scale"].item() for state in seen]
    assert scales == pytest.approx([1.0, 0.5, 0.5, 0.05, 0.05, 0.05, 0.005, 0.005])


def test_after_so_many_retries_it_gives_up():
    with pytest.raises(
        RuntimeError, match=r"rollback: loss is nan at step 6, and all retries \(2\) are used up; the last good state is that of"
    ) as error:
        trained([2, 4, 5], hooks.rollback("loss", max_retries=2))
    assert "step 1." in str(error.value)
    end, _ = trained([2, 4, 5], hooks.rollback("loss", max_retries=3))
    assert end.memory["rollback"]["retries"] == 3


def test_in_rounds_it_goes_back_to_the_end_of_the_last_good_one():
    """Validation is of the weights at the end of its round. The third round is poisoned, the fifth has no validation."""
    model = network()
    step = fnrun.make_train_step(model, lambda model, x: model(x).square().mean(), OPTIMIZER)
    stream = batches([5])  # two batches a round: round 3
    evaluate = fnrun.make_eval_step(model, lambda model, x: model(x).square().mean())

    def val(state, x):
        return (state, {}) if state.step == 10 else fnrun.eval_loop(evaluate)(state, x)

    def program(*hook_list):
        return fnrun.repeat(fnrun.sequence(train=fnrun.step_loop(step, 2), val=val), 5, hooks=hook_list)

    rounds, kept = [], []
    loop = program(hooks.rollback("val/loss"), lambda state, metrics: rounds.append(state) or state)
    plain = program(lambda state, metrics: kept.append(state) or state)
    data = {"train": stream, "val": [torch.ones(4, 2)]}
    end, _ = loop(fnrun.TrainState.create(model, OPTIMIZER), data)
    plain(fnrun.TrainState.create(model, OPTIMIZER), data)
    assert_same(weights(rounds[2]), weights(kept[1]), "the third round went back to the end of the second")
    assert_same(rounds[2].opt_state, kept[1].opt_state, "and its optimizer")
    assert rounds[2].step == 6
    assert end.memory["rollback"]["retries"] == 1


def test_weights_that_the_last_step_of_a_round_spoiled_are_not_kept():
    """The mean loss of the round is fine: it is that of the weights before."""

    @fnrun.step
    def step(state, batch):
        return state.replace(params={"x": state.params["x"] + batch}), {"loss": state.params["x"].sum()}

    state = fnrun.TrainState(params={"x": torch.zeros(1)}, buffers={}, opt_state=None, rng=fnrun.Key(0))
    stream = [torch.tensor([value]) for value in (1.0, 1.0, 1.0, NAN, 1.0, 1.0)]
    end, _ = fnrun.repeat(fnrun.step_loop(step, 2), 3, hooks=[hooks.rollback("loss")])(state, stream)
    assert end.params["x"].item() == 4.0


def test_what_is_remembered_is_kept_by_reference():
    end, _ = trained([], hooks.rollback("loss"))
    newest = end.memory["rollback"]["newest"]
    assert all(newest["params"][name] is p for name, p in end.params.items())
    assert newest["opt_state"] is end.opt_state


def test_options_that_are_none():
    with pytest.raises(ValueError, match="max_retries is at least 1"):
        hooks.rollback("loss", max_retries=0)
    for bad in (0.0, 1.5, NAN):
        with pytest.raises(ValueError, match="lr_factor is above 0 and at most 1"):
            hooks.rollback("loss", lr_factor=bad)
    step = fnrun.step(lambda state, batch: (state, {"loss": 1.0}))
    with pytest.raises(ValueError, match="rollback: the optimizer's state has no hyperparameter 'lr_scale'; there are: none"):
        fnrun.epoch_loop(step, hooks=[hooks.rollback("loss", lr_factor=0.5)])(fnrun.TrainState.create(nn.Linear(1, 1)), [torch.ones(1)])
