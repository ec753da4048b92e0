"""Signals, deadlines, a scheduler that starts it again and again, a damaged checkpoint: the run ends in the same bits."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import multiprocessing
import os
import shutil
import signal
import sys
import threading

import pytest
import yaml

import fnrun
from fnrun import interrupts
from fnrun.checkpoint import Checkpoints
from fnrun.cli import experiment as cli
from fnrun.loops.streams import Streams
from fnrun.runs import writer
from fnrun.runs.run import Run
from tests.experiments.commands import outcome
from tests.experiments.tiny import Config, at, build, flip, tiny, until


@pytest.fixture(scope="module")
def left_alone(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "left-alone"
    tiny("train", "--out", path)
    return path


@pytest.fixture
def finished(left_alone, tmp_path):
    return shutil.copytree(left_alone, tmp_path / "run")


@pytest.fixture(autouse=True)
def nothing_is_ignored():
    """As in a terminal: under `nohup` and in the background of a shell some signals are, and children inherit that."""
    before = {number: signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGUSR2, signal.SIGXCPU)}
    for number in before:
        signal.signal(number, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(sent):
    return lambda: os.kill(os.getpid(), sent)


def history(path):
    return Run.open(path).history


SIGNALS = [
    (signal.SIGUSR1, 138),
    (signal.SIGTERM, 143),
    (signal.SIGINT, 130),
    (signal.SIGHUP, 129),
    (signal.SIGUSR2, 140),
    (signal.SIGXCPU, 152),
]


def when_it_waits(action):
    """A thread calls `action()` when the main thread has been waiting for a batch for a while."""
    main, seen = threading.main_thread().ident, 0

    def waits():
        frame = sys._current_frames()[main]
        while frame is not None and frame.f_code is not Streams.next_batch.__code__:
            frame = frame.f_back
        return frame is not None

    def watch():
        until(long_enough)
        action()

    def long_enough():
        nonlocal seen
        seen = seen + 1 if waits() else 0
        return seen > 30

    threading.Thread(target=watch, daemon=True).start()


def hangs_from(row):
    """Reads from something that never answers, at this row of all that are loaded in a process."""
    rows, (end, _) = itertools.count(), os.pipe()
    return lambda: next(rows) >= row and os.read(end, 1)


class TestSignals:
    @pytest.mark.parametrize(("sent", "code"), SIGNALS)
    def test_in_the_middle_of_the_program(self, sent, code, left_alone, tmp_path):
        path = tmp_path / "run"
        with at("step 5", send(sent)):
            output = tiny("train", "--out", path, code=code)
        assert f"{sent.name}: interrupted at step 6, saved. To go on:\n" in output
        status = Run.open(path).status()
        assert (status.state, status.reason, status.step) == ("stopped", sent.name, 6)
        tiny("resume", path)
        assert outcome(path) == outcome(left_alone)

    @pytest.mark.parametrize("moment", ["build", "state"])
    def test_before_a_new_run_has_begun(self, moment, tmp_path):
        """It is not lost, nothing is killed in the middle, and no sink is opened for nothing."""
        path = tmp_path / "run"
        with at(moment, send(signal.SIGTERM)), at("open", lambda: pytest.fail("observers were opened")):
            assert "SIGTERM: interrupted before the first step" in tiny("train", "--out", path, code=143)
        assert "no checkpoint yet: starting at step 0" in tiny("resume", path)
        assert Run.open(path).status().state == "finished"

    @pytest.mark.parametrize("moment", ["build", "state"])
    def test_before_a_run_went_on(self, moment, finished):
        before = {path: path.read_bytes() for path in finished.iterdir() if path.is_file() and path.name != "run.log"}
        with at(moment, send(signal.SIGUSR1)):
            output = tiny("resume", finished, "--epochs", 5, code=138)
        assert "SIGUSR1: interrupted before it went on. To go on, the same again:\n" in output
        assert f" -m tests.experiments.tiny resume {finished} --epochs 5\n" in output
        assert {path: path.read_bytes() for path in before} == before

    def test_to_data_workers_too(self, tmp_path, left_alone):
        """A scheduler's signal goes to all processes of a job."""

        def to_all():
            os.kill(os.getpid(), signal.SIGTERM)
            for worker in multiprocessing.active_children():
                os.kill(worker.pid, signal.SIGTERM)
                os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)  # torch raises here

        path = tmp_path / "run"
        with at("step 5", to_all):
            assert "SIGTERM: interrupted at step" in tiny("train", "--workers", 1, "--out", path, code=143)
        assert Run.open(path).status().state == "stopped"
        tiny("resume", path, "--workers", 0)
        assert outcome(path) == outcome(left_alone)

    @pytest.mark.parametrize(("workers", "row"), [(0, 19), (1, 13), (2, 5)])
    def test_while_the_data_set_hangs(self, workers, row, tmp_path, left_alone, monkeypatch):
        monkeypatch.setattr(interrupts, "GRACE", 0.1)
        path, others = tmp_path / "run", set(multiprocessing.active_children())  # an iterator that an earlier test left to the collector
        with at("row", hangs_from(row)), at("step 3", lambda: when_it_waits(send(signal.SIGTERM))):
            output = tiny("train", "--workers", workers, "--out", path, code=143)
        assert "SIGTERM: interrupted at step" in output
        status = Run.open(path).status()
        assert (status.state, status.reason) == ("stopped", "SIGTERM")
        assert status.step == Checkpoints(path / "checkpoints").latest() >= 4
        assert set(multiprocessing.active_children()) <= others
        tiny("resume", path)
        assert outcome(path) == outcome(left_alone)

    @pytest.mark.parametrize(
        "error", [KeyError("fd"), ConnectionResetError(), FileNotFoundError(), EOFError(), BrokenPipeError()], ids=repr
    )
    def test_what_it_ends_besides_is_no_error(self, error, tmp_path, left_alone):
        """The data may depend on other processes that the signal was sent to as well."""
        path, rows = tmp_path / "run", itertools.count()

        def fails():
            if next(rows) == 19:
                os.kill(os.getpid(), signal.SIGTERM)
                raise error

        with at("row", fails):
            output = tiny("train", "--out", path, code=143)
        assert f"SIGTERM, while a batch was waited for; so this is no error: {type(error).__name__}" in output
        assert Run.open(path).status().step == Checkpoints(path / "checkpoints").latest() == 5
        tiny("resume", path)
        assert outcome(path) == outcome(left_alone)

    def test_what_is_ignored_from_the_start_stays_so(self, tmp_path):
        """`nohup`, which is for going on without a terminal."""
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            with at("step 5", send(signal.SIGHUP)):
                tiny("train", "--out", tmp_path / "run")
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        finally:
            signal.signal(signal.SIGHUP, before)
        assert Run.open(tmp_path / "run").status().state == "finished"

    def test_handlers_are_put_back(self, left_alone):
        before = [signal.getsignal(sent) for sent, _ in SIGNALS]
        tiny("evaluate", left_alone)
        tiny("resume", left_alone)
        assert [signal.getsignal(sent) for sent, _ in SIGNALS] == before


class TestDeadline:
    def test_it_saves_and_leaves(self, left_alone, tmp_path, monkeypatch):
        now = [0.0]
        monkeypatch.setattr(cli, "deadline", functools.partial(fnrun.deadline, clock=lambda: now[0]))
        path = tmp_path / "run"
        with at("step 5", lambda: now.__setitem__(0, 86400.0)):
            output = tiny("train", "--deadline", "1d", "--out", path, code=75)
        assert "the deadline of 1d has passed: interrupted at step 6, saved" in output
        assert Run.open(path).status().reason == "the deadline of 1d has passed"
        tiny("resume", path, "--deadline", "2d")
        assert outcome(path) == outcome(left_alone)

    def test_one_that_has_passed_already(self, tmp_path):
        """It counts from the start of the process, which is long ago here."""
        assert "interrupted before the first step" in tiny("train", "--deadline", "0.1s", "--out", tmp_path / "run", code=75)

    def test_one_that_is_too_short_to_go_on_is_not_to_be_repeated(self, finished):
        output = tiny("resume", finished, "--epochs", 5, "--deadline", "0.1s", code=75)
        assert "interrupted before it went on. To go on, the same with more time:\n" in output

    @pytest.mark.parametrize("text", ["50", "soon", "", "0m", "-5m", "5m2h", "00:50:00"])
    def test_a_bad_one_is_one_line_and_makes_nothing(self, text, tmp_path):
        output = tiny("train", f"--deadline={text}", "--out", tmp_path / "run", code=2)
        assert output == f"error: --deadline: {text!r} is no time: write it as 50m, 2h30m, 90s or 1d\n"
        assert list(tmp_path.iterdir()) == []


class TestAuto:
    """`resume --auto DIR`: one command, however often it is started."""

    def test_it_begins_goes_on_and_says_when_it_is_done(self, left_alone, tmp_path):
        path = tmp_path / "run"
        command = ["resume", "--auto", path, "--lr", 0.1]
        with at("step 2", send(signal.SIGTERM)):
            assert f"a new run in {path}" in tiny(*command, code=143)
        with at("step 9", send(signal.SIGUSR1)):
            assert "resuming" in tiny(*command, code=138)
        assert "epoch 3" in tiny(*command)
        assert outcome(path) == outcome(left_alone)
        assert history(path) == []
        with at("build", lambda: pytest.fail("it was built")):
            assert tiny(*command) == f"{path} is finished: 12 steps\n"

    def test_what_is_not_given_keeps_the_runs_values(self, tmp_path):
        path = tmp_path / "run"
        with at("step 2", send(signal.SIGTERM)):
            tiny("resume", "--auto", path, "--epochs", 2, code=143)
        tiny("resume", "--auto", path)
        assert Run.open(path).status().step == 8
        assert history(path) == []

    def test_a_finished_run_that_is_to_train_longer_does(self, finished):
        tiny("resume", "--auto", finished, "--epochs", 4)
        assert Run.open(finished).status().step == 16

    def test_a_finished_run_whose_last_checkpoints_were_deleted_trains_again(self, finished, left_alone):
        shutil.rmtree(max((finished / "checkpoints").iterdir()))
        tiny("resume", "--auto", finished)
        assert outcome(finished) == outcome(left_alone)

    def test_a_run_that_stopped_itself_stays_stopped(self, tmp_path):
        path = tmp_path / "run"
        tiny("resume", "--auto", path, "--stop", 5)
        assert "was stopped (enough)" in tiny("resume", "--auto", path, "--stop", 5)
        assert Run.open(path).status().state == "stopped"

    def test_an_empty_directory_is_no_run_yet(self, tmp_path):
        assert f"a new run in {tmp_path}" in tiny("resume", "--auto", tmp_path)

    def test_what_a_killed_one_left_while_it_was_made(self, tmp_path):
        (tmp_path / ".run-x7kd2").mkdir()
        (tmp_path / ".run-x7kd2" / "config.yaml").write_text("experiment: ")
        assert "a new run in" in tiny("resume", "--auto", tmp_path / "run")

    def test_a_run_without_a_checkpoint(self, finished, left_alone):
        shutil.rmtree(finished / "checkpoints")
        (finished / "status.json").unlink()
        assert "starting at step 0" in tiny("resume", "--auto", finished)
        assert outcome(finished) == outcome(left_alone)

    def test_a_config_that_cannot_be_built_leaves_the_place_free(self, tmp_path):
        def refuse():
            raise ValueError("no such rate")

        with at("build", refuse):
            tiny("resume", "--auto", tmp_path / "run", code=1)
        assert list(tmp_path.iterdir()) == []

    def test_a_directory_with_something_else(self, tmp_path):
        (tmp_path / "notes.txt").write_text("mine")
        assert tiny("resume", "--auto", tmp_path, code=1) == f"error: {tmp_path} already holds other files\n"

    def test_a_run_that_a_live_process_writes(self, finished):
        with Run.open(finished).writing(), at("build", lambda: pytest.fail("it was built")):
            assert "is being written by" in tiny("resume", "--auto", finished, "--epochs", 5, code=1)
        assert history(finished) == []

    def test_a_signal_ends_the_waiting_for_another_host(self, finished):
        (finished / "run.lock").write_text("filelock/2\npid=123\nhost=node7\nmode=lease\ntoken=theirs\nduration=90.0\n")
        output = tiny("resume", "--auto", finished, "--epochs", 5, "--deadline", "0.1s", code=75)
        assert "the deadline of 0.1s has passed while waiting for process 123 on host node7" in output

    def test_without_it_a_missing_run_is_an_error(self, tmp_path):
        assert "there is no run at" in tiny("resume", tmp_path / "run", code=1)


class TestOneWriter:
    def test_train_and_resume_take_the_run_and_evaluate_does_not(self, finished):
        with Run.open(finished).writing():
            assert f"error: {finished} is being written by" in tiny("resume", finished, code=1)
            tiny("evaluate", finished)
        with at("step 2", lambda: tiny("resume", finished.parent / "new", code=1)):
            tiny("train", "--out", finished.parent / "new")
        assert not (finished / "run.lock").exists()

    def test_a_run_that_is_lost_is_written_no_more(self, tmp_path, monkeypatch):
        monkeypatch.setattr(writer, "LEASE", 0.6)
        monkeypatch.setattr(writer, "HEARTBEAT", 0.1)
        path = tmp_path / "run"
        theirs = "filelock/2\npid=123\nhost=node7\nmode=lease\ntoken=theirs\nduration=0.6\n"

        def lose():
            until(lambda: Checkpoints(path / "checkpoints").steps() == [4])
            (path / "run.lock").unlink()
            (path / "run.lock").write_text(theirs)

        with at("step 6", lose):
            output = tiny("train", "--out", path, code=1)
        assert f"error: {path} was taken over by process 123 on host node7" in output.splitlines()[-1]
        assert Checkpoints(path / "checkpoints").steps() == [4]
        assert (path / "run.lock").read_text() == theirs

    def test_the_config_is_the_one_that_the_writer_before_left(self, finished, monkeypatch):
        """It may be changed while this process waits."""
        took = writer._took

        def waiting(path, interrupt):
            tiny_config = Run.open(path, Config)
            dataclasses.replace(tiny_config, config=dataclasses.replace(tiny_config.config, epochs=4)).write_config()
            return took(path, interrupt)

        monkeypatch.setattr(writer, "_took", waiting)
        tiny("resume", finished, "--lr", 0.05)
        assert Run.open(finished).status().step == 16
        assert history(finished) == [{"changed": {"lr": [0.1, 0.05]}, "step": 12, "ticks": 15}]
        assert Run.open(finished, Config).config == Config(epochs=4, lr=0.05)


class TestHistory:
    def test_a_changed_config_is_remembered(self, finished):
        tiny("resume", finished, "--epochs", 4, "--lr", 0.05)
        tiny("resume", finished)
        tiny("resume", finished, "--epochs", 5)
        assert history(finished) == [
            {"changed": {"epochs": [3, 4], "lr": [0.1, 0.05]}, "step": 12, "ticks": 15},
            {"changed": {"epochs": [4, 5]}, "step": 16, "ticks": 20},
        ]

    def test_a_stop_ends_with_the_config_that_stopped(self, tmp_path):
        """Also where the process that changed it was killed before its first checkpoint."""

        def crash():
            raise RuntimeError("power cut")

        path = tmp_path / "run"
        tiny("train", "--stop", 5, "--out", path)
        assert "was stopped (enough)" in tiny("resume", path)
        with at("step 5", crash), pytest.raises(RuntimeError, match="power cut"):
            fnrun.main(build, ["resume", str(path), "--stop", "6"])
        assert Checkpoints(path / "checkpoints").restore().stop == "enough"
        status = Run.open(path).status()
        assert (status.state, status.reason, status.step) == ("crashed", "RuntimeError: power cut", 5)
        assert "going on after: enough" in tiny("resume", path)
        assert Run.open(path).status().step == 6
        assert "was stopped (enough)" in tiny("resume", path)
        assert history(path) == [{"changed": {"stop": [5, 6]}, "step": 5, "ticks": 6}]

    def test_a_refused_resume_leaves_everything_as_it_was(self, finished):
        tiny("resume", finished, "--epochs", 4)
        before = {path: path.read_bytes() for path in finished.iterdir() if path.name in ("config.yaml", "status.json", "metrics.jsonl")}
        assert "is not what the state's position" in tiny("resume", finished, "--epochs", 5, "--batch-size", 4, code=1)
        assert len(before) == 3
        assert {path: path.read_bytes() for path in before} == before


class TestFallBack:
    def damaged(self, path, number):
        newest = sorted(entry for entry in (path / "checkpoints").iterdir())[-number:]
        return [flip(directory) for directory in reversed(newest)]

    def test_the_error_names_the_damage_and_the_way_out(self, finished):
        [file] = self.damaged(finished, 1)
        output = tiny("resume", finished, "--epochs", 4, code=1)
        assert output.count("\n") <= 2  # the log's line, and the error
        assert str(file.relative_to(finished / "checkpoints")) in output
        assert f"to go on from the one before (step 8): {_python(output)}resume {finished} --fall-back\n" in output
        assert Run.open(finished).status().state == "finished"
        assert history(finished) == []
        assert "fall-back" in tiny("resume", "--auto", finished, "--epochs", 4, code=1)

    @pytest.mark.parametrize("number", [1, 2])
    def test_with_it_the_newest_whole_one_is_taken(self, number, finished, left_alone):
        files = self.damaged(finished, number)
        output = tiny("resume", finished, "--fall-back")
        assert [line for line in output.splitlines() if line.startswith("passed over")] != []
        assert all(str(file) in output for file in files)
        assert f"resuming {finished} at step {12 - 4 * number}" in output
        assert outcome(finished) == outcome(left_alone)
        aside = [f"abandoned-{step:08d}-{ticks:08d}" for step, ticks in [(8, 10), (12, 15)][2 - number :]]
        assert sorted(path.name for path in (finished / "checkpoints").glob("abandoned-*")) == aside
        checkpoints = Checkpoints(finished / "checkpoints")
        assert checkpoints.restore(step="best:train/loss") is not None
        assert [checkpoints.restore(step=step).step for step in checkpoints.steps()] == [4, 8, 12]

    def test_where_none_is_whole(self, finished):
        files = self.damaged(finished, 3)
        output = tiny("resume", finished, "--fall-back", code=1)
        assert output.splitlines()[-1].startswith("error: ")
        assert str(files[-1]) in output.splitlines()[-1]


def _python(output):
    return output.rpartition("(step 8): ")[2].partition("resume")[0]


def test_evaluate_chooses_among_several_monitored_metrics(finished):
    checkpoints = Checkpoints(finished / "checkpoints")
    for metric in ("val/size", "train/loss"):
        assert f"step {checkpoints.best(metric)}" in tiny("evaluate", finished, "--checkpoint", f"best:{metric}")
    assert "'val/loss' monitored; monitored: " in tiny("evaluate", finished, "--checkpoint", "best:val/loss", code=1)


def other(config: Config, run: Run):
    return build(config, run)


def test_a_build_of_another_name_is_part_of_the_experiments(tmp_path):
    output = tiny("train", "--epochs", 1, "--out", tmp_path / "run", build=other)
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["experiment"] == "tests.experiments.test_preemption:other"
    assert f" -m tests.experiments.test_preemption resume {tmp_path / 'run'}\n" in output
    assert "is finished" in tiny("resume", tmp_path / "run", build=other)
    assert "is a run of tests.experiments.test_preemption:other, not of tests.experiments.tiny" in tiny("resume", tmp_path / "run", code=1)
