"""train, resume, evaluate: what they print, how they end, what they refuse."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest

from experiments import digits
from fnrun.checkpoint import Checkpoints
from fnrun.runs.run import Run, RunError
from fnrun.runs.summary import command_line
from tests.experiments.commands import ENVIRONMENT, ROOT, Process, call, outcome, run

SHORT = ["--epochs", 2, "--batch-size", 128]


def here(*args, code=0):
    return call(digits.build, *args, code=code)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "finished"
    return path, here("train", *SHORT, "--out", path)


def test_train_ends_with_a_summary(finished):
    path, output = finished
    assert f"a new run in {path}" in output
    assert "val/accuracy" in output
    assert f" -m experiments.digits evaluate {path} --checkpoint best\n" in output
    assert f" -m experiments.digits resume {path}\n" in output
    assert (path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert {p.name for p in path.iterdir()} == {
        "config.yaml", "environment.json", "status.json", "checkpoints", "metrics.jsonl", "run.log", "curves.png",
    }  # fmt: skip
    assert "Traceback" not in output
    assert "Warning" not in output


def test_a_line_of_the_log_is_one_flat_object(finished):
    lines = [json.loads(line) for line in (finished[0] / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    assert {"ticks", "step", "epoch", "train/loss", "train/lr", "val/loss", "val/accuracy", "clock"} <= lines[0].keys()
    assert all(isinstance(v, dict) == (k == "clock") for line in lines for k, v in line.items())


def test_evaluate_prints_the_metrics_of_the_checkpoint(finished):
    path, _ = finished
    best = Checkpoints(path / "checkpoints").manifest("best").metrics["val/accuracy"]
    output = here("evaluate", path, "--checkpoint", "best")
    assert f"{best:.4f}" in output
    assert "Warning" not in output
    last = json.loads((path / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"{last['val/loss']:.4f}" in here("evaluate", path)
    assert "there is no checkpoint of step 5" in here("evaluate", path, "--checkpoint", "5", code=1)
    assert "latest, best, best:METRIC or a step, not 'bets'" in here("evaluate", path, "--checkpoint", "bets", code=1)


def test_a_finished_run_says_so_and_can_train_longer(finished, tmp_path):
    path = tmp_path / "moved"  # a run can be moved
    shutil.copytree(finished[0], path)
    before = outcome(path)
    assert f"{path} is finished: 24 steps" in here("resume", path)
    assert outcome(path) == before
    output = here("resume", path, "--epochs", 3)
    assert "resuming" in output
    assert Checkpoints(path / "checkpoints").latest() == 36
    lines = outcome(path)[1]
    assert lines[:2] == before[1]
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    assert lines[2]["train/lr"] > 0  # the schedule follows the new length: behind its old end it was 0


INTERRUPTED = ["--epochs", 3, "--batch-size", 32]


@pytest.fixture(scope="module")
def left_alone(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "left-alone"
    run("train", *INTERRUPTED, "--out", path)
    return outcome(path)


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_says_how_to_go_on(sent, code, left_alone, tmp_path):
    """Ctrl-C reaches the whole process group, data workers too."""
    path = tmp_path / "run"
    with Process("train", *INTERRUPTED, "--workers", 2, "--out", path) as process:
        process.read_until("step 50")
        (os.killpg if sent == signal.SIGINT else os.kill)(process.popen.pid, sent)
        assert process.finish() == code, process.output
    assert f"{sent.name}: interrupted at step" in process.output
    assert f" -m experiments.digits resume {path}\n" in process.output
    assert "Traceback" not in process.output
    run("resume", path, "--workers", 0)
    assert outcome(path) == left_alone


def test_a_run_killed_before_its_first_checkpoint_starts_at_step_0(tmp_path):
    path = tmp_path / "run"
    with Process("train", *SHORT, "--out", path) as process:
        process.read_until("a new run in")
        process.kill()
    shutil.rmtree(path / "checkpoints", ignore_errors=True)
    assert "no checkpoint yet: starting at step 0" in here("resume", path)
    assert Checkpoints(path / "checkpoints").latest() == 24


def test_an_early_signal_leaves_a_run_that_can_be_resumed(tmp_path):
    path = tmp_path / "a run"  # with a space: the printed command can be pasted
    with Process("train", *SHORT, "--out", path) as process:
        process.read_until("a new run in")
        os.killpg(process.popen.pid, signal.SIGINT)
        assert process.finish() == 130, process.output
    assert "SIGINT: interrupted" in process.output
    assert f"resume '{path}'" in process.output
    assert "Traceback" not in process.output
    here("resume", path)
    assert Checkpoints(path / "checkpoints").latest() == 24


def test_a_refused_resume_leaves_the_run_as_it_was(finished, tmp_path):
    path = tmp_path / "run"
    shutil.copytree(finished[0], path)
    before = {p: p.read_bytes() for p in (path / "config.yaml", path / "metrics.jsonl")}
    output = here("resume", path, "--batch-size", 64, "--epochs", 3, code=1)
    assert "changed: epochs 2 -> 3, batch_size 128 -> 64" in output
    assert {p: p.read_bytes() for p in before} == before
    assert "is finished: 24 steps" in here("resume", path)


def test_a_config_that_cannot_be_built_leaves_no_run_behind(tmp_path):
    path = tmp_path / "run"
    output = here("train", "--dropout", 2, "--out", path, code=1)
    assert "cannot be built with this config: dropout probability has to be between 0 and 1" in output
    assert "Traceback" not in output
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_goes_away_does_not_end_the_training(tmp_path):
    path = tmp_path / "run"
    with Process("train", *SHORT, "--out", path) as process:
        process.read_until("a new run in")
        process.popen.stdout.close()
        assert process.popen.wait(120) == 0
        assert Checkpoints(path / "checkpoints").latest() == 24
    assert Run.open(path).status().state == "finished"


def test_as_a_script_it_is_the_same_experiment(tmp_path):
    path = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "experiments/digits.py", "train", *map(str, SHORT), "--out", path],
        cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert f"-m experiments.digits resume {path}" in done.stdout
    assert "is finished" in here("resume", path)


@pytest.mark.parametrize(("first", "said"), [("own", "python -m"), ("another", "{}/own/python3 -m")])
def test_the_interpreter_has_the_name_by_which_the_shell_finds_it(first, said, finished, tmp_path, monkeypatch):
    """`python` also where this process was started as python3, but not where that is another environment's."""
    for directory in ("own", "another"):
        (tmp_path / directory).mkdir()
        for name in ("python", "python3"):
            (tmp_path / directory / name).symlink_to(sys.executable)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "own" / "python3"))
    monkeypatch.setenv("PATH", str(tmp_path / first))
    assert command_line(Run.open(finished[0]), "resume").startswith(said.format(tmp_path))


class TestMessages:
    """One clear line, an exit code that is not 0, and no traceback unless it was asked for."""

    def refused(self, *args, code=1):
        output = here(*args, code=code)
        assert "Traceback" not in output, output
        return output

    def test_a_directory_that_holds_a_run(self, finished):
        path, _ = finished
        assert f"error: {path} already holds a run. To go on with it: resume {path}" in self.refused("train", "--out", path)
        with pytest.raises(RunError, match="already holds a run"):  # with its traceback
            here("train", "--out", path, "--debug")

    def test_a_directory_that_holds_something_else(self, tmp_path):
        (tmp_path / "notes.txt").write_text("mine")
        assert "already holds other files" in self.refused("train", "--out", tmp_path)

    def test_a_wrong_flag(self):
        assert "--epochs" in self.refused("train", "--epoch", "3", code=2)
        assert "INT" in self.refused("train", "--epochs", "many", code=2)

    def test_no_run(self, tmp_path):
        assert f"there is no run at {tmp_path / 'none'}" in self.refused("resume", tmp_path / "none")
        assert "it has no config.yaml" in self.refused("resume", tmp_path)
        assert "it has no config.yaml" in self.refused("evaluate", tmp_path)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("experiment: [", "it is not YAML"),
            ("epochs: 3", "has the fields experiment and config"),
            ("experiment: experiments.other\nconfig: {}", "is a run of experiments.other, not of experiments.digits"),
            ("experiment: experiments.digits\nconfig: {epochs: three}", "Expected `int`, got `str` - at `config.epochs`"),
            ("experiment: experiments.digits\nconfig: {optimizer: {type: Adam}}", "Invalid value 'Adam' - at `config.optimizer.type`"),
            ("experiment: experiments.digits\nconfig: {epoch: 3}", "there is no field config.epoch"),
        ],
    )
    def test_a_damaged_config(self, content, message, tmp_path):
        (tmp_path / "config.yaml").write_text(content)
        assert message in self.refused("resume", tmp_path)

    def test_a_disk_that_cannot_be_written(self, tmp_path):
        (tmp_path / "file").write_text("")
        assert "cannot make the run directory" in self.refused("train", "--out", tmp_path / "file" / "run")

    def test_another_batch_size_than_the_checkpoints(self, finished, tmp_path):
        path = tmp_path / "run"
        shutil.copytree(finished[0], path)
        output = self.refused("resume", path, "--batch-size", "64", "--epochs", "3")
        assert "the data of 'train' is not what the state's position" in output
        assert "128 a batch" in output

    def test_a_log_that_cannot_be_written(self, finished, tmp_path):
        path = tmp_path / "run"
        shutil.copytree(finished[0], path)
        (path / "metrics.jsonl").unlink()
        (path / "metrics.jsonl").mkdir()
        assert f"error: cannot write {path / 'metrics.jsonl'}: Is a directory" in self.refused("resume", path, "--epochs", "3")

    def test_a_damaged_checkpoint(self, finished, tmp_path):
        path = tmp_path / "run"
        shutil.copytree(finished[0], path)
        newest = sorted((path / "checkpoints").iterdir())[-1]
        largest = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
        content = bytearray(largest.read_bytes())
        content[len(content) // 2] ^= 1
        largest.write_bytes(content)
        assert largest.name in self.refused("resume", path)
