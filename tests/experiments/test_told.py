"""What a user is told by the command line of an experiment: their own frames, the right commands, and nothing that drives the terminal."""

from __future__ import annotations

import dataclasses
import sys
import warnings
from pathlib import Path

import pytest
import torch

import fnrun
from fnrun import data, observers, optim
from fnrun.cli import experiment as cli
from fnrun.runs.run import Run
from tests.experiments.commands import call
from tests.experiments.tiny import tiny

EVIL = "\x1b]0;owned\x07\x1b[31m"


@dataclasses.dataclass(frozen=True)
class Config:
    epochs: int = 1
    mistake: bool = False


def helper(outputs: torch.Tensor) -> torch.Tensor:
    return outputs.no_such_method()


def build(config: Config, run: fnrun.Run) -> fnrun.Experiment:
    model, optimizer = torch.nn.Linear(2, 1), optim.sgd(0.1)
    step = fnrun.make_train_step(model, lambda model, batch: helper(model(batch)) if config.mistake else model(batch).mean(), optimizer)
    loop = fnrun.epoch_loop(step, hooks=[lambda state, metrics: state.replace(stop=EVIL)])
    logs = [observers.log(to=[observers.console()]), observers.checkpoint(run.checkpoints)]
    memory = {} if config.mistake else {f"hook {EVIL}": {}}
    return fnrun.Experiment(
        lambda: fnrun.TrainState.create(model, optimizer, memory=memory),
        fnrun.repeat(loop, config.epochs, observers=logs),
        data.arrays(torch.ones(4, 2), 2),  # pyright: ignore[reportArgumentType]
    )


@pytest.mark.filterwarnings("ignore:the state remembers hooks")
def test_what_a_checkpoint_says_moves_no_cursor(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    said = call(build, "train", "--out", tmp_path / "run")
    said += call(build, "resume", tmp_path / "run")
    said += call(build, "evaluate", tmp_path / "run", code=1)
    assert said.count("\\x1b]0;owned\\x07\\x1b[31m") >= 2
    assert "\x1b" not in said
    log = (tmp_path / "run" / "run.log").read_text()
    assert "\x1b" not in log
    assert "\\x1b[31m" in log
    assert Run.open(tmp_path / "run").status().reason == EVIL  # in the file of programs it is what it is


def test_warnings_and_errors_neither(tmp_path: Path):
    with cli._printable_warnings():
        assert "\x1b" not in warnings.formatwarning(EVIL, UserWarning, "file", 1)
    assert "\x1b" in warnings.formatwarning(EVIL, UserWarning, "file", 1)
    assert "\x1b" not in tiny("resume", tmp_path / EVIL.replace("/", ""), code=1)


def test_an_exception_shows_the_users_frames(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    with pytest.raises(AttributeError) as caught:
        fnrun.main(build, ["train", "--mistake", "--out", str(tmp_path / "run")])
    sys.excepthook(caught.type, caught.value, caught.tb)
    told = capsys.readouterr().err
    assert "helper" in told
    assert "return outputs.no_such_method()" in told
    assert "AttributeError: 'Tensor' object has no attribute 'no_such_method'" in told
    assert f"{Path(fnrun.__file__).parent}/" not in told
    assert told.splitlines()[-1].endswith("frames of fnrun and torch are left out; --debug shows them)")
    assert f"{Path(fnrun.__file__).parent}/loops" in (tmp_path / "run" / "run.log").read_text()


def test_with_debug_all_frames_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    with pytest.raises(AttributeError):
        fnrun.main(build, ["train", "--mistake", "--debug", "--out", str(tmp_path / "run")])
    assert sys.excepthook is sys.__excepthook__


def test_a_wrong_flag_names_commands_that_there_are(capsys: pytest.CaptureFixture[str]):
    said = call(build, "train", "--epoch", 3, code=2)
    assert "in python -m tests.experiments.test_told train --help" in said
    assert "in python train" not in said
    assert len({len(line) for line in said.splitlines()}) == 1  # its frame is whole
