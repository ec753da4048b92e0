"""Where a run may begin, what is saved of a program that says nothing of it, and what the last lines advise."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import fnrun
from fnrun import observers, optim
from fnrun.cli.commands import main
from fnrun.runs.run import Run, RunError
from tests.experiments.tiny import Config, at, build, happens, tiny


def program(config: Config, saving: list[Any]) -> tuple[Any, Any]:
    model, optimizer = torch.nn.Linear(2, 1), optim.sgd(config.lr)
    inner = fnrun.make_train_step(model, lambda model, batch: model(batch).pow(2).mean(), optimizer)

    def train_step(state: Any, batch: Any) -> Any:
        happens(f"step {state.step}")
        return inner(state, batch)

    loop = fnrun.repeat(fnrun.epoch_loop(train_step), config.epochs, observers=saving)
    return lambda: fnrun.TrainState.create(model, optimizer), loop


DATA = [torch.ones(2, 2), torch.zeros(2, 2)]


def silent(config: Config, run: fnrun.Run) -> fnrun.Experiment:
    return fnrun.Experiment(*program(config, []), data=DATA)  # pyright: ignore[reportArgumentType]


def wrapped(config: Config, run: fnrun.Run) -> fnrun.Experiment:
    state, loop = program(config, [])
    return fnrun.Experiment(state, lambda state, data, interrupt=None: loop(state, data, interrupt=interrupt), data=DATA)  # pyright: ignore[reportArgumentType]


def unjudged(config: Config, run: fnrun.Run) -> fnrun.Experiment:
    state, loop = program(config, [observers.checkpoint(run.checkpoints)])
    return fnrun.Experiment(state, loop, data=DATA, evaluate=loop)  # pyright: ignore[reportArgumentType]


def advice(output: str) -> list[str]:
    return [line.split()[0] for line in output.splitlines() if line.startswith(("evaluate ", "resume ", "run "))]


def test_a_program_that_says_nothing_of_checkpoints_is_saved(tmp_path: Path):
    path = tmp_path / "run"
    output = tiny("train", "--epochs", 5, "--out", path, build=silent)
    assert "the program has no observers.checkpoint: one is saved each round and at the end, and the 3 newest stay" in output
    assert Run.open(path).checkpoints.steps() == [6, 8, 10]
    assert advice(output) == ["run", "resume"]
    assert "resuming" in tiny("resume", path, "--epochs", 6, build=silent)
    assert Run.open(path).checkpoints.latest() == 12


def test_what_cannot_be_saved_is_said_before_it_is_trained(tmp_path: Path):
    path = tmp_path / "run"
    with at("step 2", lambda: os.kill(os.getpid(), signal.SIGTERM)):
        output = tiny("train", "--out", path, code=143, build=wrapped)
    assert output.index("NOTHING IS SAVED") < output.index("SIGTERM: interrupted at step 3, and nothing was saved")
    assert "resume" not in output
    output = tiny("train", "--out", path, build=wrapped)
    assert advice(output) == ["run"]


def test_only_what_there_is_is_advised(tmp_path: Path):
    output = tiny("train", "--out", tmp_path / "run", build=unjudged)
    assert advice(output) == ["run", "evaluate", "resume"]
    assert "best" not in output


def fail() -> None:
    raise KeyError("mistake")


def test_a_first_attempt_that_failed_has_no_claim_on_its_place(tmp_path: Path):
    path = tmp_path / "run"
    with at("step 0", fail), pytest.raises(KeyError, match="mistake"):
        fnrun.main(build, ["train", "--out", str(path)])
    (path / "notes.txt").write_text("mine")
    assert Run.open(path).status().state == "crashed"
    tiny("train", "--epochs", 1, "--out", path)
    run = Run.open(path, Config)
    assert (run.config, run.history, run.status().state, run.checkpoints.steps()) == (Config(epochs=1), [], "finished", [4])
    assert (path / "notes.txt").read_text() == "mine"


def test_one_that_logged_or_saved_has(tmp_path: Path):
    path = tmp_path / "run"
    with at("step 5", fail), pytest.raises(KeyError):
        fnrun.main(build, ["train", "--out", str(path)])
    before = (path / "metrics.jsonl").read_bytes()
    assert f"error: {path} already holds a run" in tiny("train", "--out", path, code=1)
    assert (path / "metrics.jsonl").read_bytes() == before


class TestPlaces:
    @pytest.mark.parametrize("there", [True, False])
    def test_where_a_link_points_to(self, there: bool, tmp_path: Path):
        disk, link = tmp_path / "disk", tmp_path / "link"
        if there:
            disk.mkdir()
        link.symlink_to(disk)
        tiny("train", "--epochs", 1, "--out", link)
        assert link.is_symlink()
        assert Run.open(disk).checkpoints.latest() == 4
        assert sorted(entry.name for entry in tmp_path.iterdir()) == ["disk", "link"]
        (tmp_path / "fork").symlink_to(tmp_path / "forked")
        assert main(["fork", str(link), "--step", "4", "--out", str(tmp_path / "fork")]) == 0
        assert Run.open(tmp_path / "forked").checkpoints.latest() == 4

    @pytest.mark.parametrize("obstacle", ["mount", "busy", "parent"])
    def test_a_directory_that_cannot_be_replaced_is_filled(self, obstacle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        disk, rename, access = tmp_path / "disk", Path.rename, os.access
        (disk / "lost+found").mkdir(parents=True)

        def renamed(self: Path, to: Path) -> Any:
            if disk in (self, to):
                raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
            return rename(self, to)

        monkeypatch.setattr(Path, "rename", renamed)
        monkeypatch.setattr(Path, "is_mount", lambda self: obstacle == "mount" and self == disk)
        monkeypatch.setattr(os, "access", lambda path, mode: access(path, mode) and (obstacle != "parent" or Path(path) != tmp_path))
        with at("state", fail), pytest.raises(KeyError):
            fnrun.main(build, ["train", "--out", str(disk)])
        assert not (disk / "config.yaml").exists()
        tiny("train", "--epochs", 1, "--out", disk)
        assert Run.open(disk).checkpoints.latest() == 4
        with pytest.raises(RunError, match="already holds a run"):
            Run.create("other", Config(), disk)
        assert not [entry for entry in (*tmp_path.iterdir(), *disk.iterdir()) if entry.name.startswith(".tmp")]
