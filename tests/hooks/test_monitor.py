"""A monitored name that no step reports is an error as soon as a whole round has passed without it, with the names that exist."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fnrun
from fnrun import hooks, observers, optim
from fnrun.checkpoint import Checkpoints

STREAMS = {"train": [torch.zeros(1)] * 2, "val": [torch.zeros(1)]}


def monitors(monitor):
    return {
        "early_stopping": hooks.early_stopping(monitor, patience=9),
        "reduce_on_plateau": hooks.reduce_on_plateau(monitor),
        "rollback": hooks.rollback(monitor),
    }


def fresh():
    return fnrun.TrainState.create(nn.Linear(1, 1), optim.sgd(0.1))


def train(metrics=None):
    return fnrun.step(lambda state, batch: (state, {"loss": 1.0} if metrics is None else metrics(state)))


def program(times=4, validate=1, **parts):
    inner = fnrun.sequence(
        train=fnrun.epoch_loop(train()),
        val=fnrun.every(validate, fnrun.eval_loop(lambda state, batch: {"loss": 1.0, "accuracy": 1.0})),
    )
    return fnrun.repeat(inner, times, **parts)


@pytest.mark.parametrize("kind", monitors("x"))
@pytest.mark.parametrize("monitor", ["val/los", "train/accuracy"])
@pytest.mark.parametrize("n", [1, 3])
def test_in_a_round_it_is_found_at_the_end_of_the_first(kind, monitor, n):
    """Also where the hook would act in the third round only."""
    rounds = []
    loop = program(hooks=[hooks.every(n, monitors(monitor)[kind])])
    loop = fnrun.repeat(loop.step, 4, hooks=[lambda state, metrics: rounds.append(1) or state, *loop.hooks])
    expected = rf"{kind}: no step reports '{monitor}'; reported: 'train/loss', 'val/loss', 'val/accuracy'; did you mean"
    with pytest.raises(ValueError, match=expected):
        loop(fresh(), STREAMS)
    assert len(rounds) == 1


@pytest.mark.parametrize("kind", monitors("x"))
def test_in_a_loop_of_steps_it_is_found_at_the_first(kind):
    for monitor in ("los", "val/loss"):
        with pytest.raises(ValueError, match=rf"{kind}: no step reports '{monitor}'; reported: 'loss'"):
            fnrun.epoch_loop(train(), hooks=[monitors(monitor)[kind]])(fresh(), STREAMS["train"])
    with pytest.raises(ValueError, match=rf"{kind}: no step reports 'los'; reported: nothing"):
        fnrun.epoch_loop(train(lambda state: {}), hooks=[monitors("los")[kind]])(fresh(), STREAMS["train"])


@pytest.mark.parametrize("kind", monitors("x"))
def test_a_member_that_has_not_run_is_waited_for(kind):
    loop = program(6, validate=3, hooks=[monitors("val/loss")[kind]])
    loop(fresh(), STREAMS)
    with pytest.raises(ValueError, match="no step reports 'val/los'"):
        program(6, validate=3, hooks=[monitors("val/los")[kind]])(fresh(), STREAMS)


def test_a_name_of_a_member_whose_members_report_is_no_metric():
    both = fnrun.sequence(a=fnrun.eval_loop(lambda s, b: {"loss": 1.0}), b=fnrun.eval_loop(lambda s, b: {"loss": 1.0}))
    with pytest.raises(ValueError, match="no step reports 'val/loss': the members here are 'val/a', 'val/b'"):
        fnrun.repeat(fnrun.sequence(val=both), 2, hooks=[hooks.early_stopping("val/loss", patience=1)])


@pytest.mark.parametrize("kind", monitors("x"))
def test_a_skipped_update_reports_nothing_and_is_no_error(kind):
    model, batches = nn.Linear(1, 1), [torch.full((1, 1), float("nan")), torch.ones(1, 1)]
    step = fnrun.skip_nonfinite(fnrun.make_train_step(model, lambda model, x: model(x).sum(), optim.sgd(0.1)))
    state, _ = fnrun.epoch_loop(step, hooks=[monitors("loss")[kind]])(fresh(), batches)
    assert state.step == 2
    with pytest.raises(ValueError, match="no step reports 'los'; reported: 'loss'"):
        fnrun.epoch_loop(step, hooks=[monitors("los")[kind]])(fresh(), batches)


def test_a_metric_of_each_other_step_is_monitored_at_each_other_step():
    step = train(lambda state: {"g_loss": 1.0} if state.step % 2 else {"d_loss": 1.0})
    state, _ = fnrun.epoch_loop(step, hooks=[hooks.every(2, hooks.early_stopping("g_loss", patience=1))])(fresh(), STREAMS["train"] * 2)
    assert state.step == 4


def test_a_checkpoint_observer_says_so_in_the_first_round(tmp_path):
    loop = program(observers=[observers.checkpoint(Checkpoints(tmp_path), monitor="val/acc", every=3)])
    with pytest.raises(ValueError, match=r"checkpoint: no step reports 'val/acc'; reported: .*; did you mean 'val/accuracy'"):
        loop(fresh(), STREAMS)
    assert Checkpoints(tmp_path).latest() < 4  # the first round has two steps


def test_a_member_that_does_not_exist_is_found_before_anything_runs():
    """Also where validation would not have run for a long time."""
    inner = program(validate=50).step
    for part in (
        {"hooks": [hooks.early_stopping("valid/loss", patience=2)]},
        {"observers": [observers.checkpoint(None, monitor="valid/loss")]},
    ):
        with pytest.raises(ValueError, match="no step reports 'valid/loss': the members here are 'train', 'val'"):
            fnrun.repeat(inner, 100, **part)
    with pytest.raises(ValueError, match="early_stopping: no step reports 'loss'"):
        fnrun.repeat(inner, 100, hooks=[hooks.every(2, hooks.early_stopping("loss", patience=2))])
