from __future__ import annotations

import logging
import re

import pytest
import torch
from torch import nn

import fnrun
from fnrun import observers, optim
from fnrun.core import tree
from fnrun.testing import assert_pure, assert_same


class Broken(nn.Module):
    """Does as it is told on the third batch, whose first number is 3."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x):
        if x[0, 0].detach() < 2.5:
            return x
        if self.how == "forward":
            return x / 0.0 * 0.0
        if self.how == "infinite":
            return x / 0.0
        if self.how == "backward":
            return torch.where(x > 100, x, torch.sqrt(x * 0.0) + 1.0)
        return x


class First(nn.Module):
    """The first number passes as it is, through a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return x * self.weight


def training(how, lr=0.0):
    model = nn.Sequential(First(), nn.Sequential(nn.Dropout(0.0), Broken(how)), nn.Identity())
    optimizer = optim.sgd(lr)

    def loss_fn(model, batch):
        loss = model(batch["x"]).mean()
        return loss / 0.0 if how == "loss" and batch["x"][0, 0] > 2.5 else loss

    batches = [{"x": torch.full((2, 2), float(i)), "id": [f"{i}a", f"{i}b"]} for i in (1, 2, 3, 4)]
    if how == "batch":
        batches[2]["x"][1, 1] = torch.inf
    return model, optimizer, fnrun.make_train_step(model, loss_fn, optimizer), batches


CAUSES = {
    "forward": r"the first module with an output that is not finite: 1\.1 \(Broken\)$",
    "infinite": r"the first module with an output that is not finite: 1\.1 \(Broken\)$",
    "backward": r"the forward is finite; in the backward, the first gradient that is not is that of the input of 1\.1 \(Broken\)$",
    "loss": r"every module's output is finite: the loss function made it$",
    "batch": r"the batch is not finite: x$",
}


@pytest.mark.parametrize("how", CAUSES)
def test_it_names_what_was_not_finite_first(tmp_path, caplog, how):
    model, optimizer, step, batches = training(how)
    debugged = observers.debug_nonfinite(step, model, to=tmp_path)
    fnrun.epoch_loop(debugged)(fnrun.TrainState.create(model, optimizer), batches)
    (message,) = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert message.startswith("debug_nonfinite: step 3: the loss is")
    assert re.search(CAUSES[how], message, re.MULTILINE)
    assert [path.name for path in tmp_path.iterdir()] == ["step-3"]
    assert re.search(CAUSES[how], (tmp_path / "step-3" / "report.txt").read_text(), re.MULTILINE)
    assert not any(module._forward_hooks for module in model.modules())


def test_the_optimizer_is_named_where_gradients_are_finite(tmp_path, caplog):
    model, optimizer, step, batches = training("nothing", lr=1e39)
    fnrun.epoch_loop(observers.debug_nonfinite(step, model, to=tmp_path))(fnrun.TrainState.create(model, optimizer), batches)
    assert "step 1: the loss is 1, not finite after it: 0.weight\nthe forward is finite, and so are" in caplog.text


def test_a_state_that_was_broken_before_is_named(tmp_path, caplog):
    model, optimizer, step, batches = training("nothing")
    state = fnrun.TrainState.create(model, optimizer)
    state = state.replace(params={"0.weight": torch.full((1,), torch.nan)})
    observers.debug_nonfinite(step, model, to=tmp_path)(state, batches[0])
    assert "the state was not finite before the step: params/0.weight" in caplog.text


def test_an_infinity_may_be_meant_so_the_first_nan_is_named_too(tmp_path, caplog):
    model, optimizer, step, batches = training("infinite")

    class Difference(nn.Module):
        def forward(self, x):
            return x - x.detach()

    model[2] = Difference()
    optimizer = optim.sgd(0.0)
    step = fnrun.make_train_step(model, lambda model, batch: model(batch["x"]).mean(), optimizer)
    fnrun.epoch_loop(observers.debug_nonfinite(step, model, to=tmp_path))(fnrun.TrainState.create(model, optimizer), batches)
    assert "1.1 (Broken) (infinite); the first with a NaN: 2 (Difference)" in caplog.text


def test_the_lines_that_it_prints_repeat_the_step(tmp_path, caplog):
    with fnrun.Key(0).scope():
        model = nn.Sequential(nn.Linear(2, 4), nn.Dropout(0.5), nn.Linear(4, 1))
    optimizer = optim.adamw(1e-2)
    seen = []

    def loss_fn(model, batch):
        outputs = model(torch.as_tensor(batch["x"]))
        return outputs.mean() / (0.0 if float(batch["x"][0, 0]) > 2.5 else 1.0)

    train_step = fnrun.make_train_step(model, loss_fn, optimizer)

    def noting(state, batch):
        new, metrics = train_step(state, batch)
        seen.append((state, batch, new))
        return new, metrics

    batches = [{"x": torch.full((2, 2), float(i)), "id": ["a", "b"]} for i in (1, 2, 3)]
    fnrun.epoch_loop(observers.debug_nonfinite(noting, model, to=tmp_path))(fnrun.TrainState.create(model, optimizer, seed=3), batches)
    before, batch, after = seen[2]
    assert len(seen) == 4  # three steps, the last one repeated
    code = "\n".join(line[4:] for line in (tmp_path / "step-3" / "report.txt").read_text().splitlines() if line.startswith("    "))
    assert "weights_only=True" in code
    assert code in "\n".join(line.removeprefix("    ") for line in caplog.text.splitlines())
    names = {"torch": torch, "fnrun": fnrun, "model": model, "optimizer": optimizer, "train_step": train_step}
    exec(code.rpartition("\n")[0], names)
    assert_same(names["state"], before, "the state that was saved")
    assert_same(names["batch"], batch, "the batch that was saved")
    exec(code, names)
    assert_same(names["state"], after, "the step repeated")


def test_a_batch_of_other_classes_says_that_reading_it_runs_code(tmp_path):
    model, optimizer, _, _ = training("nothing")
    step = fnrun.make_train_step(model, lambda model, batch: model(torch.from_numpy(batch)).mean() / 0.0, optimizer)
    observers.debug_nonfinite(step, model, to=tmp_path)(fnrun.TrainState.create(model, optimizer), torch.ones(2, 2).numpy())
    assert "weights_only=False" in (tmp_path / "step-1" / "report.txt").read_text()


def test_it_returns_what_the_step_returns(tmp_path):
    ends = []
    for wrap in (lambda step, model: step, lambda step, model: observers.debug_nonfinite(step, model, to=tmp_path)):
        model, optimizer, step, batches = training("forward")
        start = fnrun.TrainState.create(model, optimizer, seed=1)
        ends.append(fnrun.epoch_loop(wrap(step, model))(start, batches))
        assert_pure(wrap(step, model), start, batches[2], model=model)
    assert_same(*ends, "with debug_nonfinite")


def test_only_the_first_is_written(tmp_path):
    model, optimizer, step, batches = training("forward")
    debugged = fnrun.skip_nonfinite(observers.debug_nonfinite(step, model, to=tmp_path))
    _, metrics = fnrun.epoch_loop(debugged)(fnrun.TrainState.create(model, optimizer), [*batches, batches[2]])
    assert metrics["skipped"] == pytest.approx(3 / 5)
    assert [path.name for path in tmp_path.iterdir()] == ["step-3"]


def test_what_cannot_be_written_does_not_end_the_training(tmp_path, caplog):
    model, optimizer, step, batches = training("forward")
    (tmp_path / "file").write_text("")
    debugged = observers.debug_nonfinite(step, model, to=tmp_path / "file")
    state, _ = fnrun.epoch_loop(debugged)(fnrun.TrainState.create(model, optimizer), batches)
    assert state.step == 4
    assert "1.1 (Broken)" in caplog.text
    assert "it could not be saved" in caplog.text


def test_a_finite_training_leaves_nothing(tmp_path, caplog):
    model, optimizer, step, batches = training("nothing")
    fnrun.epoch_loop(observers.debug_nonfinite(step, model, to=tmp_path))(fnrun.TrainState.create(model, optimizer), batches)
    assert list(tmp_path.iterdir()) == []
    assert caplog.text == ""


def test_a_mask_in_a_buffer_is_no_alarm_and_not_the_cause(tmp_path, caplog):
    model, optimizer, step, batches = training("forward")
    model[0].register_buffer("mask", torch.tensor([-torch.inf, 0.0]))
    step = fnrun.make_train_step(model, lambda model, batch: model(batch["x"]).mean(), optimizer)
    debugged = observers.debug_nonfinite(step, model, to=tmp_path)
    state, _ = fnrun.epoch_loop(debugged)(fnrun.TrainState.create(model, optimizer), batches[:2])
    assert caplog.text == ""
    debugged(state, batches[2])
    assert "1.1 (Broken)" in caplog.text


def test_around_a_loop_it_is_refused(tmp_path):
    model, optimizer, step, batches = training("nothing")
    loop = fnrun.repeat(observers.debug_nonfinite(fnrun.epoch_loop(step), model, to=tmp_path), 1)
    with pytest.raises(TypeError, match="goes around a step"):
        loop(fnrun.TrainState.create(model, optimizer), batches)


def test_the_state_is_not_donated(tmp_path):
    """A wrapped step needs the old state."""
    model, optimizer, step, batches = training("nothing")
    with pytest.warns(UserWarning, match="donate=True"):
        loop = fnrun.epoch_loop(observers.debug_nonfinite(step, model, to=tmp_path), donate=True)
    start = fnrun.TrainState.create(model, optimizer)
    held = tree.snapshot(start)
    loop(start, batches)
    assert_same(start, held, "the state given")
