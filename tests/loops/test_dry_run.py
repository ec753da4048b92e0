from __future__ import annotations

import traceback

import pytest
import torch

import fnrun
from fnrun import data, hooks, observers
from fnrun.checkpoint import Checkpoints
from fnrun.core import tree
from fnrun.loops.dry_run import dry_run
from fnrun.testing import assert_same
from tests.observers.small import Small


def dry(loop, state, data):
    return dry_run(loop, state, data)


class Calls:
    """A hook with memory, or an observer, that counts its calls."""

    def __init__(self, name):
        self.name, self.calls, self.opened = name, 0, 0

    def open(self, program, state):
        self.opened += 1

    def init(self, state):
        return 0

    def after(self, state, metrics):
        self.calls += 1
        return state.replace(memory={**state.memory, self.name: state.memory[self.name] + 1})

    def __call__(self, state, metrics):
        self.calls += 1


def whole(tmp_path, small, *, step=None, watch=(), hook=None, more=()):
    """Each loop and combinator that there is, with observers that write."""
    steps = fnrun.make_eval_step(small.model, small.loss, weights="ema")
    predict = fnrun.make_predict_step(small.model, lambda model, batch: model(batch["x"]))
    log = observers.log(1, to=[observers.jsonl(tmp_path / "metrics.jsonl")])
    train = fnrun.epoch_loop(step or small.step, hooks=[hooks.ema(0.9), *([hook] if hook else [])], observers=[log, *watch])
    return fnrun.repeat(
        fnrun.sequence(
            train=train,
            more=fnrun.step_loop(small.step, 100, until_step=3),
            val=fnrun.every(7, fnrun.eval_loop(steps), begin=5, last=False),
            test=fnrun.predict_loop(predict, observers=[observers.predictions(tmp_path / "predictions.jsonl")]),
            both=fnrun.workflow([("a", 3), ("b", 2)], times=9, a=fnrun.epoch_loop(small.step), b=fnrun.eval_loop(steps)),
        ),
        50,
        hooks=[hooks.early_stopping("val/loss", patience=3), *more],
        observers=[observers.checkpoint(Checkpoints(tmp_path / "checkpoints"))],
    ), dict.fromkeys(("train", "more", "val", "test"), small.batches) | {"both": {"a": small.batches, "b": small.batches}}


def test_each_loop_runs_once_and_nothing_is_written(tmp_path):
    small, watch = Small(), Calls("watch")
    loop, streams = whole(tmp_path, small, watch=[watch])
    state = small.state()
    held = tree.snapshot(state)
    found = dry(loop, state, streams)
    assert list(tmp_path.iterdir()) == []
    assert (watch.opened, watch.calls) == (0, 0)
    assert_same(state, held, "the state given")
    assert [len(found.inner), [each.name for each in found.inner[0].inner]] == [1, ["train", "more", "val", "test", "both"]]
    train, more, val, test, both = found.inner[0].inner
    assert train.metrics == more.metrics == ("loss", "lr")
    assert val.metrics == ("loss",)
    assert test.metrics == ("outputs",)
    assert [each.metrics for each in both.inner] == [("loss", "lr"), ("loss",)]
    for outer in (found, found.inner[0]):
        assert {"train/loss", "val/loss", "both/a/loss"} <= set(outer.metrics)
    every = [found, found.inner[0], *found.inner[0].inner, *both.inner]
    assert all(each.seconds > 0 for each in every)
    assert found.seconds >= found.inner[0].seconds >= sum(each.seconds for each in found.inner[0].inner)
    assert str(found).splitlines()[2].startswith("    train: epoch_loop ")
    assert str(found).splitlines()[2].endswith(" s  loss, lr")


def test_one_step_of_each_loop_is_taken(tmp_path):
    small, seen = Small(), []

    def step(state, batch):
        seen.append(state.step)
        return small.step(state, batch)

    loop, streams = whole(tmp_path, small, step=step)
    dry(loop, small.state(), streams)
    assert seen == [0]


def test_hooks_that_act_now_and_then_act(tmp_path):
    small, counting = Small(), Calls("counting")
    loop, streams = whole(tmp_path, small, hook=hooks.every(50, hooks.between(7, 8, counting)))
    dry(loop, small.state(), streams)
    assert counting.calls == 1


def test_a_hook_that_stops_does_not_keep_the_rest_from_its_turn(tmp_path):
    small, last = Small(), Calls("last")
    loop, streams = whole(tmp_path, small, hook=lambda state, metrics: state.replace(stop="enough"), more=[last])
    found = dry(loop, small.state(), streams)
    assert all(each.metrics for each in found.inner[0].inner)
    assert last.calls == 1


def test_a_state_in_the_middle_of_a_program_serves_too(tmp_path):
    small = Small()
    loop, streams = whole(tmp_path / "run", small)
    asked = iter(range(1000))
    half, _ = loop(small.state(), streams, interrupt=lambda: "enough" if next(asked) == 5 else None)
    half = half.replace(stop="a hook stopped it", step=10)
    held = tree.snapshot(half)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    found = dry(loop, half, streams)
    assert [each.metrics for each in found.inner[0].inner[:3]] == [("loss", "lr"), ("loss", "lr"), ("loss",)]
    assert_same(half, held, "the state given")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_the_users_error_comes_with_its_traceback(tmp_path):
    small = Small()

    def broken_hook(state, metrics):
        return metrics["no such metric"]

    loop, streams = whole(tmp_path, small, more=[broken_hook])
    with pytest.raises(KeyError, match="no such metric") as raised:
        dry(loop, small.state(), streams)
    assert "broken_hook" in "".join(traceback.format_exception(raised.value))


def test_a_name_that_no_step_reports_is_found_in_seconds(tmp_path):
    small = Small()
    loop, streams = whole(tmp_path, small, more=[hooks.early_stopping("val/los", patience=1, name="misspelt")])
    with pytest.raises(ValueError, match="val/los"):
        dry(loop, small.state(), streams)


@pytest.mark.filterwarnings("ignore:donate=True")
def test_a_loop_that_donates_leaves_the_state_alone(tmp_path):
    small = Small()
    state = small.state()
    held = tree.snapshot(state)
    dry(fnrun.epoch_loop(small.step, donate=True), state, small.batches)
    assert_same(state, held, "the state given")


def test_until_is_asked_and_there_is_one_round_whatever_it_says():
    small, asked = Small(), []

    def until(state):
        asked.append(state.step)
        return True

    found = dry(fnrun.repeat(fnrun.epoch_loop(small.step), until=until), small.state(), small.batches)
    assert asked == [0]
    assert found.inner[0].metrics == ("loss", "lr")


def test_the_data_is_checked_as_in_a_run():
    small = Small()
    half, _ = fnrun.step_loop(small.step, 2)(small.state(), small.batches)
    with pytest.raises(fnrun.ProgramError, match="counted in"):
        dry(fnrun.epoch_loop(small.step), half, data.arrays({"x": torch.ones(4, 4), "y": torch.ones(4, 1)}, 2))
