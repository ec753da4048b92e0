"""Early stopping: when it stops, and what it does with rounds without the metric."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn

import fnrun
from fnrun import hooks

NAN, INF = float("nan"), float("inf")


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


def test_a_value_that_is_not_finite_stops_at_once_or_is_no_improvement():
    assert stopped_after([1.0, NAN, 0.5], patience=9) == (2, "early_stopping: val/loss is nan")
    assert stopped_after([1.0, -INF, 0.5], patience=9) == (2, "early_stopping: val/loss is -inf")
    assert stopped_after([1.0, NAN, NAN], patience=2, check_finite=False)[0] == 3
    assert stopped_after([NAN, NAN], patience=2, check_finite=False)[0] == 2
    assert stopped_after([1.0, NAN, 0.5, 0.4], patience=2, check_finite=False) is None


def test_a_threshold_that_is_reached_stops_the_run():
    assert stopped_after([3.0, 2.5, 1.0, 0.5], patience=9, threshold=1.0) == (3, "early_stopping: val/loss has reached 1: it is 1")
    assert stopped_after([3.0, 2.5, 4.0], patience=9, mode="max", threshold=3.5)[0] == 3
    assert stopped_after([3.0, 2.5, 1.0], patience=9, threshold=0.5) is None


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


def test_options_that_are_none():
    with pytest.raises(ValueError, match="'min' or 'max', not 'up'"):
        hooks.early_stopping("loss", mode="up", patience=1)
    with pytest.raises(ValueError, match="at least 1"):
        hooks.early_stopping("loss", patience=0)
    with pytest.raises(ValueError, match="min_delta is at least 0"):
        hooks.early_stopping("loss", patience=1, min_delta=-1.0)


class TestStopAfter:
    BATCHES = (torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(1, 3))  # 15 elements a pass

    def stopped(self, program, data=None):
        """At which step a run stops, and why."""
        state, _ = program(fnrun.TrainState.create(nn.Linear(1, 1)), list(self.BATCHES) if data is None else data)
        return (state.step, state.stop) if state.stop else None

    @pytest.fixture
    def step(self):
        return fnrun.step(lambda state, batch: (state, {"loss": 1.0}))

    def test_steps(self, step):
        limit = hooks.stop_after(steps=4)
        assert self.stopped(fnrun.repeat(fnrun.epoch_loop(step, hooks=[limit]), 5)) == (4, "stop_after: 4 steps")
        assert self.stopped(fnrun.repeat(fnrun.epoch_loop(step), 5, hooks=[limit])) == (6, "stop_after: 6 steps")
        assert self.stopped(fnrun.epoch_loop(step, hooks=[limit])) is None

    def test_tokens_are_the_elements_of_a_tensor_or_what_count_says(self, step):
        program = fnrun.repeat(fnrun.epoch_loop(step, hooks=[hooks.stop_after(tokens=22)]), 5)
        assert self.stopped(program) == (5, "stop_after: 27 tokens")
        count = hooks.stop_after(tokens=4, count=lambda batch: len(batch["ids"]))
        batches = [{"ids": batch, "mask": batch} for batch in self.BATCHES]
        assert self.stopped(fnrun.repeat(fnrun.epoch_loop(step, hooks=[count]), 5), batches) == (2, "stop_after: 4 tokens")
        with pytest.raises(ValueError, match="say how many tokens a batch has"):
            self.stopped(program, batches)

    def test_tokens_are_counted_at_each_step_also_where_the_limit_is_looked_at_now_and_then(self, step):
        program = fnrun.repeat(fnrun.epoch_loop(step, hooks=[hooks.every(4, hooks.stop_after(tokens=1))]), 5)
        assert self.stopped(program) == (4, "stop_after: 21 tokens")

    def test_epochs_are_finished_passes_in_whatever_loop(self, step):
        limit = hooks.stop_after(epochs=2)
        expected = (6, "stop_after: 2 epochs")
        assert self.stopped(fnrun.repeat(fnrun.epoch_loop(step), 5, hooks=[limit])) == expected
        assert self.stopped(fnrun.step_loop(step, 20, hooks=[limit])) == expected
        assert self.stopped(fnrun.repeat(fnrun.step_loop(step, 4), 5, hooks=[limit])) == (8, "stop_after: 2 epochs")

    def test_where_there_are_several_streams_one_is_named(self, step):
        def program(**options):
            members = {"train": fnrun.step_loop(step, 3), "val": fnrun.eval_loop(lambda state, batch: {"n": 1.0}, steps=1)}
            return fnrun.repeat(fnrun.sequence(**members), 9, hooks=[hooks.stop_after(epochs=2, **options)])

        data = {"train": list(self.BATCHES), "val": list(self.BATCHES)}
        assert self.stopped(program(stream="train"), data) == (6, "stop_after: 2 epochs")
        assert self.stopped(program(stream="val"), data) == (18, "stop_after: 2 epochs")
        for options in ({}, {"stream": "vla"}):
            with pytest.raises(ValueError, match=r"stop_after: whose epochs.*'train', 'val'"):
                self.stopped(program(**options), data)

    def test_a_higher_limit_goes_on(self, step):
        def program(steps):
            return fnrun.repeat(fnrun.epoch_loop(step, hooks=[hooks.stop_after(steps=steps)]), 5)

        state, _ = program(4)(fnrun.TrainState.create(nn.Linear(1, 1)), list(self.BATCHES))
        state, _ = program(7)(state.replace(stop=None), list(self.BATCHES))
        assert (state.step, state.stop) == (7, "stop_after: 7 steps")

    def test_limits_that_are_none(self):
        for options in ({}, {"steps": 1, "epochs": 1}):
            with pytest.raises(ValueError, match="one of steps=, tokens= and epochs="):
                hooks.stop_after(**options)
        for options in ({"steps": 0}, {"tokens": -1}, {"epochs": 1.5}, {"steps": True}):
            with pytest.raises(ValueError, match=r"is .*at least 1"):
                hooks.stop_after(**options)
