"""The laws as assertions, for steps and programs of users. Each says what broke, and where."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from fnrun.core import tree
from fnrun.core.context import tick_listener
from fnrun.core.counts import count
from fnrun.core.donation import shared
from fnrun.core.inplace import InPlaceError, strictly
from fnrun.core.state import TrainState
from fnrun.data import ambient
from fnrun.loops import Loop
from fnrun.loops.entry import with_observers
from fnrun.observers.log import listener
from fnrun.sinks import Record


def assert_same(a: Any, b: Any, what: str) -> None:
    """Assert that two trees are equal bit for bit; otherwise every difference is listed."""
    differences = tree.diff(a, b)
    assert not differences, f"{what}:\n" + "\n".join(f"  {d}" for d in differences[:20])


@contextlib.contextmanager
def _never_written_to() -> Iterator[None]:
    """Within it, a step, a hook or an observer that changes bits of its arguments in place fails the law, by name."""
    try:
        with strictly():
            yield
    except InPlaceError as error:
        raise AssertionError(str(error)) from error


@_never_written_to()
def assert_pure(step: Callable[[Any, Any], Any], state: Any, batch: Any, *, model: torch.nn.Module | None = None) -> None:
    """Law 1: two calls of `step(state, batch)` give the same bits, and the arguments, `model` and the global generators are as they were.

    >>> from fnrun import make_train_step, optim
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(), torch.nn.Linear(2, 1))
    >>> train_step = make_train_step(model, lambda model, x: model(x).mean(), optim.sgd(0.1))
    >>> assert_pure(train_step, TrainState.create(model, optim.sgd(0.1)), torch.ones(4, 2), model=model)
    """
    before = tree.snapshot((state, batch))
    tensors = {} if model is None else dict(model.state_dict(keep_vars=True))
    saved = {name: (t, t.detach().clone(), t.requires_grad) for name, t in tensors.items()}
    modes = [] if model is None else [m.training for m in model.modules()]
    generators = [(generator, generator.save()) for generator in ambient.generators()]
    first = step(state, batch)
    assert_same((state, batch), before, "the step changed its arguments")
    moved = [generator.what for generator, state in generators if generator.moved(state)]
    assert not moved, f"the step moved a global generator: {', '.join(moved)}"
    second = step(state, batch)
    assert_same(first, second, "two calls of the step differ")
    assert_same((state, batch), before, "the second call changed the arguments")
    if model is not None:
        assert modes == [m.training for m in model.modules()], "the step changed the train/eval modes of the module"
        after = model.state_dict(keep_vars=True)
        assert list(after) == list(saved), "the step changed the names of the module's tensors"
        for name, (tensor, value, requires_grad) in saved.items():
            assert after[name] is tensor, f"the step left another tensor in the module: {name}"
            assert tensor.requires_grad == requires_grad, f"the step changed requires_grad of the module's {name}"
            assert tree.equal(tensor, value), f"the step changed the module's {name}"


def states_seen(loop: Callable[..., Any], state: Any, data: Any) -> tuple[list[Any], tuple[Any, Any]]:
    """Every state that an observer could see while `loop(state, data)` runs, at any depth, in order; and the result of the call."""
    seen: list[Any] = []
    token = tick_listener.set(lambda state: seen.append(shared(state)))
    try:
        return seen, loop(state, data)
    finally:
        tick_listener.reset(token)


def through_a_checkpoint(state: Any, like: Any) -> Any:
    """`state`, saved to a real checkpoint in a temporary directory and restored."""
    from fnrun.checkpoint import Checkpoints

    with tempfile.TemporaryDirectory() as directory, Checkpoints(directory) as checkpoints:
        checkpoints.save(state)
        checkpoints.wait()
        return checkpoints.restore(like=like)


def assert_resumable(
    loop: Callable[..., Any],
    state: Any,
    data: Any,
    *,
    limit: int = 20,
    restored: Callable[[Any, Any], Any] = through_a_checkpoint,
) -> None:
    """Law 2: from every state that an observer could see, saved and restored, `loop` goes on and ends as the whole run.

    Compared are the state at the end, its metrics, the lines of the logs, and what observers fold at each tick. What an observer that does
    not fold keeps in itself shows in none of these.

    - `limit=20`: the number of states that are tried, evenly spaced, the first and the last among them.
    - `restored`: a function `(state, like) -> state` that saves and restores a state; by default through a real checkpoint.
    """
    limit = count("assert_resumable: limit", limit, 2)  # the first and the last
    lines, (seen, (end, metrics)) = _listening(lambda: states_seen(loop, state, data))
    assert seen, "no loop finished a tick: nothing to resume from"
    folds = {one.position.order: _folds(one) for one in seen}
    chosen = seen if len(seen) <= limit else [seen[round(i * (len(seen) - 1) / (limit - 1))] for i in range(limit)]
    for one in chosen:
        again_lines, (again_seen, (again, again_metrics)) = _listening(lambda one=one: states_seen(loop, restored(one, state), data))
        where = " > ".join(f"{frame.name} tick {frame.ticks}" for frame in one.position.frames)
        assert_same(end, again, f"resumed from {where}, the program ends in another state")
        assert_same(metrics, again_metrics, f"resumed from {where}, the program ends with other metrics")
        later = [line for line in lines if line["order"] > one.position.order]
        assert_same(later, again_lines, f"resumed from {where}, the program logs other lines")
        for other in again_seen:
            assert_same(folds.get(other.position.order), _folds(other), f"resumed from {where}, an observer folds something else")


def _folds(state: Any) -> dict[str, Any]:
    """The folds of observers in the open loops, by loop."""
    return {frame.name: frame.folds for frame in state.position.frames}


def _listening(run: Callable[[], Any]) -> tuple[list[dict[str, Any]], Any]:
    """The lines that the logs write during `run()`, without their clocks; and the result of the call."""
    lines: list[dict[str, Any]] = []

    def listen(name: str, line: Record) -> None:
        lines.append({"log": name, "order": line.order, "step": line.step, "epoch": line.epoch, "metrics": line.metrics})

    token = listener.set(listen)
    try:
        return lines, run()
    finally:
        listener.reset(token)


@_never_written_to()
def assert_observers_do_not_matter(loop: Loop, state: Any, data: Any) -> None:
    """Law 3: `loop` ends with the same bits with its observers, without any, and with one more in every loop.

    Loops that a wrapper function holds keep the observers that they have.
    """
    end, metrics = loop(state, data)
    for what, changed in (
        ("without its observers", with_observers(loop, lambda observers: ())),
        ("with its observers in reverse", with_observers(loop, lambda observers: tuple(reversed(observers)))),
        ("with one more observer in every loop", with_observers(loop, lambda observers: (*observers, _Reader()))),
    ):
        again, again_metrics = changed(state, data)
        assert_same(_unwatched(end), _unwatched(again), f"{what}, the program ends in another state")
        assert_same(metrics, again_metrics, f"{what}, the program ends with other metrics")


def _unwatched(state: Any) -> Any:
    """The state without what observers fold in the open loops of a program that was stopped."""
    frames = tuple(dataclasses.replace(frame, folds={}) for frame in state.position.frames)
    return state.replace(position=dataclasses.replace(state.position, frames=frames))


class _Reader:
    """An observer that does what it can to disturb: it reads, draws and folds."""

    name = "fnrun.testing reader"

    def fold(self, folded: Any, before: Any, metrics: Any, examples: int) -> Any:
        return (folded or 0) + examples

    def __call__(self, state: TrainState, metrics: dict[str, Any]) -> None:
        for value in tree.leaves(metrics):
            if isinstance(value, torch.Tensor):
                value.tolist()
        _ = torch.rand(1), random.random(), np.random.rand()
