"""The checkpoint observer: when it saves, what it keeps, and how it bears a disk that fails."""

from __future__ import annotations

import itertools
import logging
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from fnrun import data, epoch_loop, eval_loop, observers, optim, repeat, sequence, step
from fnrun.checkpoint import CheckpointError, Checkpoints
from fnrun.checkpoint.background import Background
from fnrun.core.state import TrainState
from fnrun.steps import make_eval_step, make_train_step


def training(rounds: int, saving: Any) -> Any:
    """A program of 4 steps a round, its validation scripted: the loss falls, the accuracy is best in round 2; and its state and data."""
    model = torch.nn.Linear(2, 1)
    accuracies = [0.5, 0.9, 0.7, 0.6, 0.65, 0.1]

    def measured(model: Any, batch: Any) -> dict[str, Any]:
        done = round(float(model.bias.detach()) / 4)  # the bias counts the steps
        return {"loss": torch.tensor(1.0 / done), "accuracy": torch.tensor(accuracies[done - 1])}

    optimizer = optim.sgd(1.0)
    step = make_train_step(model, lambda model, batch: -model.bias.sum() + 0 * model(batch["x"]).sum(), optimizer)
    fit = repeat(sequence(train=epoch_loop(step), val=eval_loop(make_eval_step(model, measured))), rounds, observers=[saving])
    state = TrainState.create(model, optimizer)
    state = state.replace(params={**state.params, "bias": torch.zeros(1)})
    return fit, state, {name: data.arrays({"x": torch.ones(8, 2)}, 2 if name == "train" else 8) for name in ("train", "val")}


def test_the_best_by_each_of_several_metrics_stays(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    saving = observers.checkpoint(checkpoints, monitor={"val/loss": "min", "val/accuracy": "max"}, keep=1)
    fit, state, batches = training(6, saving)
    assert str(saving).endswith("best by val/loss (min) and val/accuracy (max)")
    fit(state, batches)
    assert (checkpoints.steps(), checkpoints.best("val/accuracy"), checkpoints.best()) == ([8, 24], 8, 24)
    resumed, _ = fit(checkpoints.restore(state, "best:val/accuracy"), batches)
    assert resumed.step == 24


def test_the_best_round_is_saved_whenever_it_comes(tmp_path: Path) -> None:
    """val/accuracy is best in the second of six rounds, val/loss in the last one; neither is a fourth."""
    checkpoints = Checkpoints(tmp_path)
    monitor = {"val/accuracy": "max", "val/loss": "min"}
    fit, state, batches = training(6, observers.checkpoint(checkpoints, monitor={"val/accuracy": "max"}, every=4, keep=1))
    _, metrics = fit(state, batches)
    assert checkpoints.steps() == [8, 24]
    assert checkpoints.manifest(24).metrics["val/loss"] == pytest.approx(
        float(metrics["val/loss"])
    )  # what is saved at the end is judged too
    fit, state, batches = training(3, observers.checkpoint(Checkpoints(tmp_path / "b"), monitor=monitor, every=4))
    fit(state, batches)
    assert Checkpoints(tmp_path / "b").steps() == [4, 8, 12]
    assert (Checkpoints(tmp_path / "b").best("val/accuracy"), Checkpoints(tmp_path / "b").best("val/loss")) == (8, 12)


def test_what_is_best_is_known_after_a_resume(tmp_path: Path) -> None:
    whole, cut = Checkpoints(tmp_path / "whole"), Checkpoints(tmp_path / "cut")
    options: Any = {"monitor": "val/accuracy", "mode": "max", "every": 3}
    fit, state, batches = training(6, observers.checkpoint(whole, **options))
    fit(state, batches)
    fit, state, batches = training(6, observers.checkpoint(cut, **options))
    polls = iter(range(100))
    fit(state, batches, interrupt=lambda: "now" if next(polls) == 17 else None)
    before = set(cut.steps())
    training(6, observers.checkpoint(cut, **options))[0](cut.restore(state), batches)
    assert set(whole.steps()) <= set(cut.steps()) <= set(whole.steps()) | before


def test_one_monitored_metric_is_minimized_as_everywhere(tmp_path: Path) -> None:
    assert str(observers.checkpoint(Checkpoints(tmp_path), monitor="val/loss")).endswith("best by val/loss (min)")


def test_one_of_each_so_many_steps_stays(tmp_path: Path) -> None:
    fit, state, batches = training(6, observers.checkpoint(Checkpoints(tmp_path), keep=1, keep_every=10))
    fit(state, batches)
    assert Checkpoints(tmp_path).steps() == [12, 20, 24]


def test_what_makes_no_sense_is_refused_when_it_is_made(tmp_path: Path) -> None:
    for options, message in (
        ({"monitor": {"val/loss": "lowest"}}, "mode is 'min' or 'max', not 'lowest'"),
        ({"keep": 0}, "keep is at least 1, not 0"),
        ({"keep": 1, "keep_every": -1}, "keep_every is at least 1 step, not -1"),
        ({"keep_every": 5}, "give keep too"),
        ({"max_failures": 0}, "max_failures is at least 1, not 0"),
    ):
        with pytest.raises(ValueError, match=message):
            observers.checkpoint(Checkpoints(tmp_path), **options)
    with pytest.raises(ValueError, match="no step reports 'test/loss': the members here are 'train', 'val'"):
        training(1, observers.checkpoint(Checkpoints(tmp_path), monitor={"val/loss": "min", "test/loss": "min"}))


def test_a_save_that_fails_is_told_and_training_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The directory's place is taken by a file for two rounds."""
    place = tmp_path / "checkpoints"
    place.write_text("in the way")

    def clearing(state: Any, metrics: Any) -> None:
        if state.step == 12:
            saving.checkpoints.steps()  # waits for the save in flight
            place.unlink()

    saving = observers.checkpoint(Checkpoints(place))
    fit, state, batches = training(4, saving)
    fit = repeat(fit.step, 4, observers=[clearing, saving])
    with caplog.at_level(logging.ERROR, "fnrun"):
        fit(state, batches)
    told = [record.getMessage() for record in caplog.records]
    assert [text.partition(": ")[2].partition(" was not saved")[0] for text in told] == ["step 4", "step 8"]
    assert all(text.endswith("Training goes on, the next save is tried in full") for text in told)
    assert Checkpoints(place).steps() == [12, 16]


@pytest.mark.parametrize("allowed", [1, 2])
def test_after_so_many_failures_in_a_row_the_run_ends(allowed: int, tmp_path: Path) -> None:
    place = tmp_path / "checkpoints"
    place.write_text("in the way")
    seen: list[int] = []
    saving = observers.checkpoint(Checkpoints(place), max_failures=allowed)
    fit, state, batches = training(6, saving)
    fit = repeat(fit.step, 6, observers=[lambda state, metrics: seen.append(state.step), saving])
    with pytest.raises(CheckpointError, match=f"step {4 * allowed} was not saved") as error:
        fit(state, batches)
    assert seen[-1] == error.value.state.step == 4 * (allowed + 1)
    place.unlink()
    goes_on, _ = training(6, observers.checkpoint(Checkpoints(place)))[0](error.value.state, batches)
    assert goes_on.step == 24


def test_failures_with_a_save_between_them_are_not_in_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Each save takes until the training waits for it, and each second one fails."""
    waited_for, join, saves = threading.Event(), Background.join, itertools.count(1)

    def noticed(background: Background) -> None:
        if background.busy:
            waited_for.set()
        join(background)

    def guard() -> None:
        if threading.current_thread() is threading.main_thread():
            waited_for.clear()
        elif waited_for.wait(10) and next(saves) % 2:
            raise CheckpointError("not now")

    monkeypatch.setattr(Background, "join", noticed)
    fit, state, batches = training(6, observers.checkpoint(Checkpoints(tmp_path, guard=guard), max_failures=2))
    with caplog.at_level(logging.ERROR, "fnrun"):
        fit(state, batches)
    assert [record.getMessage().partition(": ")[2][:7] for record in caplog.records] == ["step 4 ", "step 12", "step 20"]
    assert Checkpoints(tmp_path).steps() == [8, 16, 24]


def test_what_a_donated_state_holds_twice_is_copied_and_written_once(tmp_path: Path) -> None:
    def remembers(state: Any, metrics: Any) -> Any:
        return state.replace(memory={"held": state.params})

    model, optimizer = torch.nn.Linear(2, 1), optim.sgd(1.0)
    step = make_train_step(model, lambda model, batch: model(batch["x"]).sum(), optimizer)
    loop = epoch_loop(step, hooks=[remembers], observers=[observers.checkpoint(Checkpoints(tmp_path))], donate=True)
    loop(TrainState.create(model, optimizer), data.arrays({"x": torch.ones(8, 2)}, 2))
    leaves = Checkpoints(tmp_path).manifest(2).leaves
    assert {leaf.path for leaf in leaves if leaf.shares is not None} == {"memory/held/weight", "memory/held/bias"}


def test_a_process_that_is_not_the_first_of_several_saves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    fit, state, streams = training(1, observers.checkpoint(checkpoints))
    saved, _ = fit(state, streams)
    before = checkpoints.steps()
    fit, _, streams = training(2, observers.checkpoint(checkpoints))
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(CheckpointError, match="process 1 of several"):
        fit(saved.rewind(), streams)
    assert checkpoints.steps() == before


def test_the_first_save_leaves_the_global_generators_as_they_are(tmp_path: Path) -> None:
    """JAX, which a save imports, draws from NumPy's: in a process of its own, whose first save it is."""
    code = """
import sys, random, numpy as np, torch, fnrun
from fnrun import data, observers, optim
from fnrun.checkpoint import Checkpoints
model, optimizer = torch.nn.Linear(4, 1), optim.sgd(0.1)
step = fnrun.make_train_step(model, lambda model, x: model(x).square().mean(), optimizer)
fit = fnrun.epoch_loop(step, observers=[observers.checkpoint(Checkpoints(sys.argv[1]))])
np.random.seed(0), random.seed(0)
before = np.random.get_state(legacy=False), random.getstate()
fit(fnrun.TrainState.create(model, optimizer), data.arrays(torch.ones(8, 4), 2))
assert fnrun.tree.equal(before, (np.random.get_state(legacy=False), random.getstate()))
"""
    subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code, str(tmp_path)], check=True, timeout=120)


@pytest.mark.parametrize("keep", [None, 1])
def test_a_mode_that_is_corrected_judges_what_was_saved_before_too(tmp_path: Path, keep: int | None) -> None:
    values = [0.9, 0.2, 0.3, 0.5]
    checkpoints = Checkpoints(tmp_path)
    fresh = TrainState.create(torch.nn.Linear(1, 1))

    @step
    def measured(state: Any, batch: Any) -> Any:
        return state, {"m": torch.tensor(values[state.step])}

    for rounds, mode in ((2, "max"), (4, "min")):
        fit = repeat(epoch_loop(measured), rounds, observers=[observers.checkpoint(checkpoints, monitor="m", mode=mode, keep=keep)])
        fit(checkpoints.restore(like=fresh) if rounds > 2 else fresh, [torch.ones(1)])
    assert checkpoints.best() == 2
