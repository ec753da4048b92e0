"""The assertions find what they are for: each is given something that breaks its law."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fnrun
from fnrun import observers
from fnrun.testing import assert_observers_do_not_matter, assert_resumable
from tests.programs import fresh, train

STREAM = [torch.ones(1), torch.zeros(1)]


def test_a_hook_that_remembers_in_itself_does_not_resume():
    class Hidden:
        name = "hidden"

        def __init__(self):
            self.calls = 0

        def init(self, state):
            self.calls = 0
            return {}

        def after(self, state, metrics):
            self.calls += 1
            return state.replace(params={"x": state.params["x"] * self.calls})

    with pytest.raises(AssertionError, match=r"resumed from epoch_loop / tick 1, the program ends in another state"):
        assert_resumable(fnrun.epoch_loop(train, hooks=[Hidden()]), fresh(), STREAM, limit=2)


def test_a_step_that_counts_its_calls_does_not_resume():
    calls = iter(range(1000))

    @fnrun.step
    def step(state, batch):
        return state, {"calls": float(next(calls))}

    with pytest.raises(AssertionError, match="ends with other metrics"):
        assert_resumable(fnrun.epoch_loop(step), fresh(), STREAM, restored=lambda state, like: state)


def test_an_observer_that_writes_into_the_state_matters():
    def meddles(state, metrics):
        state.params["x"].add_(1.0)

    with pytest.raises(AssertionError, match=r"the observer .*meddles changed params/x in place"):
        assert_observers_do_not_matter(fnrun.epoch_loop(train, observers=[meddles]), fresh(), STREAM)


def test_a_program_in_which_nothing_happens_proves_nothing():
    with pytest.raises(AssertionError, match="nothing to resume from"):
        assert_resumable(fnrun.step_loop(train, 0), fresh(), STREAM)


def test_a_log_that_a_resume_would_change_is_found():
    class Forgetful(type(observers.log(2, to=[]))):
        def fold(self, folded, before, metrics, examples):
            return super().fold(folded if self.since else None, before, metrics, examples)

        def open(self, program, state):
            super().open(program, state)
            self.since = not state.position.ticks

    log = observers.log(2, to=[])
    log.__class__ = Forgetful
    loop = fnrun.epoch_loop(train, observers=[log])
    with pytest.raises(AssertionError, match=r"logs other lines(.|\n)*metrics/loss"):
        assert_resumable(loop, fresh(), [torch.ones(1) * i for i in range(5)], restored=lambda state, like: state)


def test_an_observer_that_folds_what_it_keeps_in_itself_fails_the_resume_law():
    class Counting:
        name = "counting"
        seen = 0

        def fold(self, folded: Any, before: Any, metrics: Any, examples: int) -> int:
            self.seen += examples  # and not `folded`: a run that goes on counts from where this object stands
            return self.seen

        def __call__(self, state: Any, metrics: Any) -> None:
            pass

    loop = fnrun.epoch_loop(lambda state, batch: (state, {}), observers=[Counting()])
    with pytest.raises(AssertionError, match="an observer folds something else"):
        assert_resumable(loop, fresh(), STREAM, limit=2)
