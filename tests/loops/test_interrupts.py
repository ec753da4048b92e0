"""Interrupts: a limit in time ends the call between two ticks, and the state goes on to the end of the run that was never cut."""

from __future__ import annotations

import pytest
import torch

import fnrun
from fnrun.testing import assert_same
from tests.programs import fresh, train

BATCHES = [torch.full((2,), float(i)) for i in range(3)]


class Clock:
    """A clock that a step moves on by a minute."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now

    def step(self, state, batch):
        self.now += 60
        return train(state, batch)


def test_a_deadline_ends_the_call_after_the_step_under_way():
    clock, reasons = Clock(), []

    class Closing:
        def __call__(self, state, metrics):
            pass

        def close(self, state, reason):
            reasons.append(reason)

    program = fnrun.repeat(fnrun.epoch_loop(clock.step), 4, observers=[Closing()])
    state, _ = program(fresh(), BATCHES, interrupt=fnrun.deadline(minutes=4, seconds=30, clock=clock))
    assert state.step == 5
    assert state.stop is None
    assert reasons == ["the deadline of 4 minutes 30 seconds has passed"]
    end = program(state, BATCHES)
    assert_same(end, fnrun.repeat(fnrun.epoch_loop(train), 4)(fresh(), BATCHES), "interrupted by a deadline and continued")


def test_the_time_runs_from_when_the_deadline_is_made():
    clock = Clock()
    interrupt = fnrun.deadline(hours=1, clock=clock)
    clock.now += 3600
    state, _ = fnrun.epoch_loop(clock.step)(fresh(), BATCHES, interrupt=interrupt)
    assert state.step == 0


def test_without_a_clock_it_is_the_machines():
    state, _ = fnrun.epoch_loop(train)(fresh(), BATCHES, interrupt=fnrun.deadline(hours=1))
    assert state.step == 3


def test_any_of_several_ends_the_call():
    asked = []

    def ask(name, text):
        return lambda: asked.append(name) or (text if len(asked) > 4 else None)

    state, _ = fnrun.epoch_loop(train)(fresh(), BATCHES, interrupt=fnrun.any_of(ask("a", None), ask("b", "b ends it"), ask("c", None)))
    assert asked == ["a", "b", "c", "a", "b"]
    assert state.step == 1


def test_a_deadline_in_words_of_which_a_part_is_over():
    clock = Clock()
    interrupt = fnrun.deadline("1h2m", spent=60, clock=clock)
    clock.now += 3659
    assert interrupt() is None
    clock.now += 1
    assert interrupt() == "the deadline of 1h2m has passed"
    for bad in ("", "50", "0s", "-5m", "5m2h", "1h 2m", "infh"):
        with pytest.raises(ValueError, match=f"'{bad}' is no time: write it as 50m"):
            fnrun.deadline(bad)


def test_a_deadline_without_time():
    for bad in ({}, {"minutes": 0}, {"seconds": -1}):
        with pytest.raises(ValueError, match="deadline: how long"):
            fnrun.deadline(**bad)
