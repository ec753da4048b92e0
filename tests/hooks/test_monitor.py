"""Early stopping: when it stops, what it does with rounds without the metric, and what it says of a name that nobody reports."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn

import fnrun
from fnrun import hooks


def stopped_after(values, **options):
    """In which round a run with these values of `val/loss` stops, and why; None where it comes to its end."""
    loop = fnrun.repeat(
        fnrun.sequence(val=fnrun.eval_loop(lambda state, batch: {"loss": batch[0, state.position.frames[0].ticks]})),
        len(values),
        hooks=[hooks.early_stopping("val/loss", **options)],
    )
    state, _ = loop(fnrun.TrainState.create(nn.Linear(1, 1)), {"val": [torch.tensor([values], dtype=torch.float64)]})
    return (state.position.frames[0].ticks, state.stop) if state.stop else None


def test_it_stops_after_the_sixth():
    rounds, why = stopped_after([90, 91, 92, 88, 89, 90, 99], patience=3, min_delta=1, mode="max")
    assert rounds == 6
    assert why == "early_stopping: val/loss has not improved on 92 for 3 rounds"


@given(st.lists(st.floats(-5, 5).map(lambda v: round(v, 1)), min_size=1, max_size=12), st.integers(1, 4), st.sampled_from([0.0, 0.5]))
def test_it_stops_when_the_rule_says(values, patience, min_delta):
    best, waited, expected = None, 0, None
    for i, value in enumerate(values, start=1):
        if best is None or value < best - min_delta:
            best, waited = value, 0
        else:
            waited += 1
        if waited >= patience:
            expected = i
            break
    found = stopped_after(values, patience=patience, min_delta=min_delta)
    assert (found and found[0]) == expected


def test_a_nan_is_no_improvement():
    assert stopped_after([1.0, float("nan"), float("nan")], patience=2)[0] == 3
    assert stopped_after([float("nan"), float("nan")], patience=2)[0] == 2


def test_rounds_without_validation_do_not_count():
    loop = fnrun.repeat(
        fnrun.sequence(
            train=fnrun.epoch_loop(fnrun.step(lambda state, batch: (state, {"loss": 1.0}))),
            val=fnrun.every(3, fnrun.eval_loop(lambda state, batch: {"loss": 1.0})),
        ),
        9,
        hooks=[hooks.early_stopping("val/loss", patience=2)],
    )
    state, _ = loop(fnrun.TrainState.create(nn.Linear(1, 1)), {"train": [torch.zeros(1)], "val": [torch.zeros(1)]})
    assert state.position.frames[0].ticks == 9
    assert state.stop is not None


@pytest.mark.parametrize("monitor", ["val/los", "train/accuracy"])
def test_a_name_that_no_step_reports(monitor):
    loop = fnrun.repeat(
        fnrun.sequence(
            train=fnrun.epoch_loop(fnrun.step(lambda state, batch: (state, {"loss": 1.0}))),
            val=fnrun.eval_loop(lambda state, batch: {"loss": 1.0, "accuracy": 1.0}),
        ),
        2,
        hooks=[hooks.early_stopping(monitor, patience=2)],
    )
    expected = rf"early_stopping: no step reports '{monitor}'; reported: 'train/loss', 'val/loss', 'val/accuracy'; did you mean"
    with pytest.raises(ValueError, match=expected):
        loop(fnrun.TrainState.create(nn.Linear(1, 1)), {"train": [torch.zeros(1)], "val": [torch.zeros(1)]})


def test_a_member_that_does_not_exist_is_found_before_anything_runs():
    """Also where validation would not have run for a long time."""
    step = fnrun.step(lambda state, batch: (state, {"loss": 1.0}))
    inner = fnrun.sequence(train=fnrun.epoch_loop(step), val=fnrun.every(50, fnrun.epoch_loop(step)))
    for part in (
        {"hooks": [hooks.early_stopping("valid/loss", patience=2)]},
        {"observers": [fnrun.observers.checkpoint(None, monitor="valid/loss")]},
    ):
        with pytest.raises(ValueError, match="no step reports 'valid/loss': the members here are 'train', 'val'"):
            fnrun.repeat(inner, 100, **part)
    with pytest.raises(ValueError, match="early_stopping: no step reports 'loss'"):
        fnrun.repeat(inner, 100, hooks=[hooks.every(2, hooks.early_stopping("loss", patience=2))])


def test_options_that_are_none():
    with pytest.raises(ValueError, match="'min' or 'max', not 'up'"):
        hooks.early_stopping("loss", mode="up", patience=1)
    with pytest.raises(ValueError, match="at least 1"):
        hooks.early_stopping("loss", patience=0)
