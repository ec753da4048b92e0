"""Law 1 for the user's code too: what writes to a state that it was given is told, by leaf and by name, in the first tick in which it does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fnrun
from fnrun import data, hooks, observers, optim
from fnrun.checkpoint import CheckpointError, Checkpoints, codec, writing
from fnrun.checkpoint.manifest import Manifest
from fnrun.core.inplace import InPlaceError
from fnrun.testing import assert_pure, assert_same
from tests.programs import fresh, train

BATCHES = [torch.full((2,), float(i)) for i in range(6)]


class Mine:
    """The average that everybody writes first."""

    name = "mine"

    def init(self, state: Any) -> Any:
        return {name: p.clone() for name, p in state.params.items()}

    def after(self, state: Any, metrics: Any) -> Any:
        for name, p in state.params.items():
            state.memory["mine"][name].lerp_(p, 0.1)
        return state


class Alias(Mine):
    """Its memory is the parameters themselves."""

    def init(self, state: Any) -> Any:
        return dict(state.params)


class Counts:
    name = "counts"

    def init(self, state: Any) -> Any:
        return {"n": 0}

    def after(self, state: Any, metrics: Any) -> Any:
        state.memory["counts"]["n"] += 1
        return state


class Before(Counts):
    def before(self, state: Any, batch: Any) -> Any:
        state.params["x"].mul_(0.9)
        return state

    def after(self, state: Any, metrics: Any) -> Any:
        return state


def adds(state: Any, metrics: Any) -> Any:
    for p in state.params.values():
        p.add_(1.0)
    return state


def goes_around_the_count(state: Any, metrics: Any) -> Any:
    for p in state.params.values():
        p.data.add_(1.0)
    return state


def replaces(state: Any, metrics: Any) -> Any:
    state.params["x"] = state.params["x"] + 1
    return state


def late(state: Any, metrics: Any) -> Any:
    return adds(state, metrics) if state.step == 5 else state


HOOKS = {
    "memory": (Mine(), "the hook mine changed memory/mine/x in place"),
    "alias": (Alias(), "the hook mine changed .*x in place"),
    "number": (Counts(), "the hook counts changed memory/counts/n by putting another value"),
    "before": (Before(), "`before` of the hook counts changed params/x in place"),
    "params": (adds, "the hook adds changed params/x in place"),
    "data": (goes_around_the_count, "the hook goes_around_the_count changed params/x in place"),
    "dictionary": (replaces, "the hook replaces changed params/x by putting another value"),
    "late": (late, "the hook late changed params/x in place"),
    "now and then": (hooks.every(4, adds), "the hook adds changed params/x in place"),
    "now and then, remembering": (hooks.between(3, None, hooks.every(2, Mine())), "the hook mine changed memory/mine/x in place"),
    "composed": (hooks.compose(hooks.ema(0.5), Mine()), "the hook mine changed memory/mine/x in place"),
}


@pytest.mark.parametrize("kind", HOOKS)
def test_a_hook_that_writes_to_the_state_is_named_with_the_leaf(kind):
    hook, message = HOOKS[kind]
    for loop, streams in [
        (fnrun.epoch_loop(train, hooks=[hook]), BATCHES),
        *([] if kind in ("before", "late") else [(fnrun.repeat(fnrun.epoch_loop(train), 6, hooks=[hook]), BATCHES[:1])]),
    ]:
        with pytest.raises(InPlaceError, match=message):
            loop(fresh(), streams)
        with pytest.raises(AssertionError, match=message):
            assert_pure(loop, fresh(), streams)
        if kind != "late":
            with pytest.raises(InPlaceError, match=message):
                loop.dry_run(fresh(), streams)


def test_a_hook_in_a_function_around_a_loop_is_found():
    inner = fnrun.epoch_loop(train, hooks=[Mine()])
    with pytest.raises(InPlaceError, match="the hook mine changed memory/mine/x in place"):
        fnrun.repeat(lambda state, x: inner(state, x), 2)(fresh(), BATCHES)


def test_the_state_of_the_caller_is_as_it_was():
    """Where a step changes no parameter, as between updates, hooks are given the caller's own tensors."""
    still = fnrun.step(lambda state, batch: (state, {"x": batch.mean()}))
    for hook in (adds, goes_around_the_count):
        state = fresh()
        with pytest.raises(InPlaceError):
            fnrun.epoch_loop(still, hooks=[hook])(state, BATCHES)
        assert_same(state, fresh(), "the hook reached the caller's state")


class Observes:
    def __call__(self, state: Any, metrics: Any) -> None:
        pass


class Folds(Observes):
    name = "folds"

    def fold(self, folded: Any, before: Any, metrics: Any, examples: int) -> Any:
        return torch.zeros(()) if folded is None else folded.add_(metrics["loss"])


class Opens(Observes):
    def open(self, program: Any, state: Any) -> None:
        state.params["x"].zero_()


class Closes(Observes):
    def close(self, state: Any, reason: Any) -> None:
        state.params["x"].zero_()


class Seldom(Observes):
    every = 5

    def __call__(self, state: Any, metrics: Any) -> None:
        if state.step % 5 == 0:
            metrics["loss"].zero_()


def meddles(state: Any, metrics: Any) -> None:
    state.params["x"].zero_()


def rewrites_metrics(state: Any, metrics: Any) -> None:
    metrics["loss"].zero_()


@pytest.mark.parametrize(
    ("observer", "message"),
    [
        (meddles, "the observer meddles changed params/x in place"),
        (rewrites_metrics, "the observer rewrites_metrics changed metrics/loss in place"),
        (Folds(), "`fold` of the observer folds changed position/frames/0/folds/folds in place"),
        (Opens(), r"`open` of an observer \(Opens\) changed params/x in place"),
        (Closes(), r"`close` of an observer \(Closes\) changed params/x in place"),
        (Seldom(), "the observer Seldom changed metrics/loss in place"),
    ],
)
def test_an_observer_that_writes_is_named_with_the_leaf(observer, message):
    loop = fnrun.epoch_loop(train, observers=[observer])
    with pytest.raises(InPlaceError, match=message):
        loop(fresh(), BATCHES)
    with pytest.raises(AssertionError, match=message):
        assert_pure(loop, fresh(), BATCHES)


def test_a_step_by_hand_and_functions_around_steps_that_write_are_named():
    @fnrun.step
    def writes(state, batch):
        state.params["x"].sub_(0.1)
        return state, {"x": 1.0}

    def around(state, batch):
        state.params["x"].sub_(0.1)
        return train(state, batch)

    def evaluates(state, batch):
        state.params["x"].sub_(0.1)
        return {"x": 1.0}

    for name, loop in [
        ("writes", fnrun.epoch_loop(writes)),
        ("around", fnrun.epoch_loop(around)),
        ("evaluates", fnrun.eval_loop(evaluates)),
        ("evaluates", fnrun.predict_loop(evaluates)),
    ]:
        with pytest.raises(InPlaceError, match=rf"{name} changed params/x in place"):
            loop(fresh(), BATCHES)
    with pytest.raises(AssertionError, match="writes changed params/x in place"):
        assert_pure(writes, fresh(), BATCHES[0])


def linear(optimizer: Any) -> tuple[Any, Any]:
    with fnrun.Key(0).scope():
        model = torch.nn.Linear(2, 1)
    return fnrun.make_train_step(model, lambda model, x: model(x).square().mean(), optimizer), fnrun.TrainState.create(model, optimizer)


def velocity(grads: Any, state: Any, params: Any, /, *, key: Any = None, step: Any = None) -> Any:
    for name, velocity in state.items():
        velocity.mul_(0.9).add_(grads[name])
    return grads, state


def shrinks(grads: Any, state: Any, params: Any, /, *, key: Any = None, step: Any = None) -> Any:
    for p in params.values():
        p.mul_(0.9)
    return grads, state


@pytest.mark.parametrize(
    ("update", "message"),
    [
        (velocity, r"the optimizer \(velocity\) changed opt_state/1/bias in place"),
        (shrinks, r"the optimizer \(.*shrinks.*\) changed params/"),
    ],
)
def test_a_transform_that_writes_is_named(update, message):
    transform = optim.Transform(lambda params: {name: torch.zeros_like(p) for name, p in params.items()}, update)
    step, state = linear(optim.chain(optim.clip_by_global_norm(1.0), transform, optim.sgd(0.1)))
    with pytest.raises(InPlaceError, match=message):
        step(state, torch.ones(3, 2))


def test_what_may_write_raises_no_alarm():
    """Donation, averages, going back, accumulation, and hooks that remember the state's own tensors."""
    optimizer = optim.chain(optim.accumulate(2), optim.adamw(1e-2))
    step, state = linear(optimizer)
    stream = [torch.full((2, 2), float(i)) for i in range(6)]
    hooked: list[Any] = [hooks.ema(0.9, buffers="average"), hooks.rollback("loss"), hooks.every(2, hooks.swa())]
    plain = fnrun.repeat(fnrun.epoch_loop(step, hooks=hooked), 2)(state, stream)
    donated = fnrun.repeat(fnrun.epoch_loop(step, hooks=hooked, donate=True), 2)(state, stream)
    assert_same(plain, donated, "donation")
    assert_pure(fnrun.repeat(fnrun.epoch_loop(step, hooks=hooked), 2), state, stream)


def test_a_batch_of_a_list_that_is_written_to_is_told():
    """In the next pass it would be written to again."""
    step, state = linear(optim.sgd(0.1))

    def doubles(state, batch):
        return step(state, batch.mul_(2))

    stream = [torch.ones(2, 2)]
    with pytest.raises(InPlaceError, match="batch 0 of the list in place"):
        fnrun.repeat(fnrun.epoch_loop(doubles), 2)(state, stream)


def test_batches_of_arrays_are_the_takers_own_in_every_pass():
    def doubles(state, batch):
        return {"x": batch.mul_(2).sum()}

    seen: list[float] = []
    stream = data.arrays(torch.ones(8, 16), 4)  # rows of 64 bytes are gathered several batches at a time
    program = fnrun.repeat(
        fnrun.sequence(v=fnrun.eval_loop(doubles)), 3, observers=[lambda state, metrics: seen.append(float(metrics["v/x"]))]
    )
    program(fresh(), {"v": stream})
    assert seen == [128.0] * 3


# --- at the latest when the state is saved ------------------------------------------------------------------------------


def test_what_changed_between_two_saves_is_told_and_the_next_save_is_whole(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        state = fresh().replace(step=1, memory={"mine": {"x": torch.ones(3)}})
        checkpoints.save(state)
        checkpoints.wait()
        state.memory["mine"]["x"].add_(1.0)
        with pytest.raises(CheckpointError, match="memory/mine/x was changed in place after the state of step 1 was handed over"):
            checkpoints.save(state.replace(step=2))
        checkpoints.save(state.replace(step=2))
        checkpoints.wait()
        assert_same(checkpoints.restore(like=state), state.replace(step=2), "what was saved")


def test_what_changed_while_it_was_being_written_is_told_and_is_no_checkpoint(tmp_path):
    state, calls = fresh().replace(step=7), iter(range(10))

    def guard():
        if next(calls) == 1:  # before the files take their place
            state.params["x"].add_(1.0)

    checkpoints = Checkpoints(tmp_path, guard=guard)
    checkpoints.save(state)
    with pytest.raises(CheckpointError, match="step 7 was not saved: params/x was changed in place after the state of step 7"):
        checkpoints.wait()
    assert checkpoints.steps() == []


@pytest.mark.parametrize("size", [3, writing.PACKED])
def test_bits_that_changed_past_the_count_of_writes_are_told(tmp_path, size, monkeypatch):
    state = {"x": torch.zeros(size)}
    description = codec.describe(state)
    manifest = Manifest(step=0, ticks=0, created="", metrics={}, monitors={}, config=None, environment={}, structure=description.structure, leaves=description.leaves)  # fmt: skip
    write = writing._write
    monkeypatch.setattr(writing, "_write", lambda *arguments: (write(*arguments), state["x"].data.add_(1.0)))
    with pytest.raises(InPlaceError, match="x was changed in place"):
        writing.write(tmp_path, manifest, writing.bits(description.sources))


class Late(Mine):
    def after(self, state: Any, metrics: Any) -> Any:
        return super().after(state, metrics) if state.step > 5 else state


def test_a_run_whose_hook_writes_late_ends_at_a_save_and_loses_nothing(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        loop = fnrun.epoch_loop(train, hooks=[Late()], observers=[observers.checkpoint(checkpoints, every=2)])
        with pytest.raises(CheckpointError, match="memory/mine/x was changed in place after the state of step 4 was handed over"):
            loop(fresh(), [*BATCHES, *BATCHES])
    assert checkpoints.latest() == 6  # that of step 4 may have been under way
    assert [checkpoints.check(step).step for step in checkpoints.steps()] == checkpoints.steps()
