"""When hooks act: each n-th step or round, at some, between two, under a condition."""

from __future__ import annotations

import pytest
import torch

import fnrun
from fnrun import hooks
from tests.programs import Counter, fresh, train

BATCHES = [torch.full((2,), float(i)) for i in range(3)]


def acting(wrap):
    """After which of 9 steps, and after which of 3 rounds, a hook that `wrap` holds back acts."""
    steps, rounds = [], []

    def note(log, count):
        return lambda state, metrics: log.append(count(state)) or state

    loop = fnrun.repeat(
        fnrun.epoch_loop(train, hooks=[wrap(note(steps, lambda state: state.step))]),
        3,
        hooks=[wrap(note(rounds, lambda state: state.position.frames[-1].ticks))],
    )
    loop(fresh(), BATCHES)
    return steps, rounds


@pytest.mark.parametrize(
    ("wrap", "steps", "rounds"),
    [
        (lambda hook: hooks.every(2, hook), [2, 4, 6, 8], [2]),
        (lambda hook: hooks.at(3, hook), [3], [3]),
        (lambda hook: hooks.at([1, 7], hook), [1, 7], [1]),
        (lambda hook: hooks.between(2, 5, hook), [2, 3, 4], [2, 3]),
        (lambda hook: hooks.between(8, None, hook), [8, 9], []),
        (lambda hook: hooks.when(lambda state: state.step % 6 == 0, hook), [6], [2]),
        (lambda hook: hooks.every(2, hooks.between(4, 8, hook)), [4, 6], []),
    ],
)
def test_when_a_hook_acts(wrap, steps, rounds):
    assert acting(wrap) == (steps, rounds)


@pytest.mark.parametrize("wrap", [lambda h: hooks.every(2, h), lambda h: hooks.at([2, 4], h), lambda h: hooks.between(2, 4, h)])
def test_a_hook_with_memory_keeps_its_name_and_its_before(wrap):
    """`before` belongs to the batch: it adds 0.01 at each step. `after` counts the ticks at which it may act."""
    plain, _ = fnrun.step_loop(train, 4, hooks=[Counter("counter", None)])(fresh(), BATCHES)
    state, _ = fnrun.step_loop(train, 4, hooks=[wrap(Counter("counter", None))])(fresh(), BATCHES)
    assert torch.equal(state.params["x"], plain.params["x"])
    assert state.memory["counter"]["ticks"] == 2


def test_a_composition_is_held_back_whole():
    seen = []
    both = hooks.compose(lambda state, metrics: seen.append("f") or state, lambda state, metrics: seen.append("g") or state)
    fnrun.step_loop(train, 4, hooks=[hooks.at([2, 3], both)])(fresh(), BATCHES)
    assert seen == ["f", "g", "f", "g"]


def test_times_that_are_none():
    hook = hooks.ema(0.5)
    for bad in (0, -1, True, 1.5):
        with pytest.raises(ValueError, match=r"every: n is .*at least 1"):
            hooks.every(bad, hook)
    for bad in (0, [], [1, 0], [True], [1.5]):
        with pytest.raises(ValueError, match=r"at: .*at least"):
            hooks.at(bad, hook)
    with pytest.raises(ValueError, match="between: no step is at least 5 and less than 5"):
        hooks.between(5, 5, hook)
