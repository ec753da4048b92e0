"""Law 2 on a real training: shuffled loader with random augmentation, dropout, batch norm, EMA, plateau-like stopping, log windows."""

from __future__ import annotations

import dataclasses
import json
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fnrun
from fnrun import data, hooks, metrics, observers, optim, schedules
from fnrun.checkpoint import Checkpoints
from fnrun.core import tree
from fnrun.testing import assert_observers_do_not_matter, assert_resumable, assert_same, states_seen


class Blobs(torch.utils.data.Dataset):
    """29 points of two classes, jittered with the generators of torch, Python and NumPy."""

    def __len__(self):
        return 29

    def __getitem__(self, i):
        x = torch.tensor([i % 2 * 2.0 - 1, i / 29]) + 0.1 * torch.randn(2)
        return {"x": x * (1 + 0.1 * random.random()) + 0.1 * np.random.rand(), "label": i % 2}


def loss_fn(model, batch):
    logits = model(batch["x"].float())
    return F.cross_entropy(logits, batch["label"]), {"accuracy": metrics.accuracy(logits, batch["label"])}


class Training:
    """The same program each time it is made; 6 steps an epoch, 3 batches of validation."""

    def __init__(self, *, epochs=3, workers=0, log=None, checkpoints=None):
        with fnrun.Key(0).scope():
            model = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 2))
        optimizer = optim.chain(
            optim.clip_by_global_norm(1.0), optim.adamw(schedules.warmup_cosine(peak=0.05, warmup=4, total=18), weight_decay=0.1)
        )
        sinks = [] if log is None else [observers.jsonl(log)]
        self.fresh = fnrun.TrainState.create(model, optimizer, seed=7)
        self.program = fnrun.repeat(
            fnrun.sequence(
                train=fnrun.epoch_loop(
                    fnrun.make_train_step(model, loss_fn, optimizer, microbatches=2),
                    hooks=[hooks.ema(0.8), hooks.every(4, hooks.ema(0.5, name="slow"))],
                    observers=[observers.log(4, to=sinks)],
                ),
                val=fnrun.eval_loop(fnrun.make_eval_step(model, loss_fn, weights="ema")),
            ),
            epochs,
            hooks=[hooks.early_stopping("val/loss", patience=9)],
            observers=[
                observers.log(to=sinks, name="epoch"),
                *([] if checkpoints is None else [observers.checkpoint(checkpoints, monitor="val/accuracy", mode="max", keep=2)]),
            ],
        )
        self.data = {
            "train": data.loader(Blobs(), 5, shuffle=True, workers=workers),
            "val": data.arrays({"x": torch.linspace(-1, 1, 20).view(10, 2), "label": torch.arange(10) % 2}, 4),
        }

    def run(self, state=None, **kw):
        return self.program(self.fresh if state is None else state, self.data, **kw)


def on_disk(state, like, directory):
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(state)
        checkpoints.wait()
    return Checkpoints(directory).restore(like=like)


def test_resumes_from_every_state_through_real_checkpoints():
    """27 ticks and what lies between them: in mid-epoch, at its end, in validation, after it."""
    training = Training()
    assert_resumable(training.program, training.fresh, training.data, limit=100)


def test_around_the_end_of_an_epoch_with_another_number_of_workers(tmp_path):
    training = Training()
    seen, end = states_seen(training.program, training.fresh, training.data)
    for step in (5, 6, 7):
        state = next(s for s in seen if s.step == step)
        other = Training(workers=1)
        assert_same(other.run(on_disk(state, other.fresh, tmp_path / str(step))), end, f"from step {step}")


def test_two_resumes_one_after_the_other(tmp_path):
    end = Training().run()
    state = Training().fresh
    for n in (3, 5, 1, 9):
        training, polls = Training(), iter([None] * n + ["now"])
        state, _ = training.run(state, interrupt=lambda polls=polls: next(polls))
        state = on_disk(state, training.fresh, tmp_path / str(state.position.ticks))
    assert_same(Training().run(state), end, "after four interrupts")


def test_ten_epochs_from_a_finished_run_of_five(tmp_path):
    five = Training(epochs=5, checkpoints=Checkpoints(tmp_path))
    five.run()
    restored = Checkpoints(tmp_path).restore(like=five.fresh)
    assert restored.step == 30
    ten, _ = Training(epochs=10).run(restored)
    assert ten.step == 60
    assert_same(ten, Training(epochs=10).run()[0], "ten epochs at once")


@pytest.mark.parametrize("at", [1, 5, 8, 9, 11, 17, 20])
def test_the_log_reads_as_if_nothing_had_happened(at, tmp_path):
    """The run that is cut goes on for a while after the state that is restored: what it logged then is written again, once."""

    def lines(path):
        return [{k: v for k, v in json.loads(line).items() if k != "clock"} for line in path.read_text().splitlines()]

    Training(log=tmp_path / "whole.jsonl").run()
    cut = Training(log=tmp_path / "cut.jsonl")
    seen, _ = states_seen(cut.program, cut.fresh, cut.data)
    with (tmp_path / "cut.jsonl").open("a") as file:
        file.write('{"ticks": 99, "at": "3", "st')  # the power went while this line was written
    state = next(s for s in seen if s.position.ticks == at)
    again = Training(log=tmp_path / "cut.jsonl")
    again.run(on_disk(state, again.fresh, tmp_path / "checkpoints"))
    assert lines(tmp_path / "cut.jsonl") == lines(tmp_path / "whole.jsonl")
    assert len(lines(tmp_path / "whole.jsonl")) == 7


def test_observers_do_not_matter_here_either():
    training = Training()
    assert_observers_do_not_matter(training.program, training.fresh, training.data)


def test_an_exception_leaves_a_checkpoint_of_the_last_good_state(tmp_path):
    end = Training().run()
    failing = Training(checkpoints=Checkpoints(tmp_path))

    class Fails(Blobs):
        calls = 0

        def __getitem__(self, i):
            Fails.calls += 1
            if Fails.calls == 29 + 5 * 3 + 2:
                raise OSError("a bad sector")
            return super().__getitem__(i)

    streams = {**failing.data, "train": data.loader(Fails(), 5, shuffle=True)}
    with pytest.raises(OSError, match="a bad sector") as caught:
        failing.program(failing.fresh, {**streams, "train": _As(streams["train"], failing.data["train"].source)})
    assert any(entry.name == "__getitem__" for entry in caught.traceback)
    restored = Checkpoints(tmp_path).restore(like=failing.fresh)
    assert restored.step == 9
    assert_same(Training().run(restored), end, "from the state before the exception")


class _As:
    """A stream that says of itself that it is another."""

    def __init__(self, inner, source):
        self.inner, self.name, self._source = inner, inner.name, source

    @property
    def source(self):
        return self._source

    def __len__(self):
        return len(self.inner)

    def iterate(self, key, cursor, *, replay=False):
        for batch, after in self.inner.iterate(key, cursor, replay=replay):
            yield batch, dataclasses.replace(after, source=self._source)


def test_early_stopping_and_its_patience_survive(tmp_path):
    """The stop comes in the same round, whichever round the run was restored in."""

    def program():
        return fnrun.repeat(
            fnrun.sequence(val=fnrun.eval_loop(lambda state, batch: {"loss": batch[0, state.position.frames[0].ticks]})),
            20,
            hooks=[hooks.early_stopping("val/loss", patience=3, min_delta=1.0, mode="max")],
        )

    scores = torch.tensor([[90.0, 91, 92, 88, 89, 90, 95, 99] + [0.0] * 12])
    fresh = fnrun.TrainState.create(nn.Linear(1, 1))
    seen, (end, _) = states_seen(program(), fresh, {"val": [scores]})
    assert "early_stopping: val/loss has not improved on 92" in end.stop
    assert end.position.frames[0].ticks == 6
    for state in seen:
        if state.stop is None:
            again, _ = program()(tree.snapshot(state), {"val": [scores]})
            assert_same(again, end, "the stop")
