"""A run directory: one writer at a time, what its status says, its history, and where its code is found."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fnrun
from fnrun import observers
from fnrun.checkpoint import CheckpointError, Checkpoints
from fnrun.core.position import Position
from fnrun.runs import writer
from fnrun.runs.run import Run, RunError, load_build
from tests.experiments.tiny import tiny
from tests.programs import fresh, train


@dataclasses.dataclass(frozen=True)
class Config:
    epochs: int = 3
    lr: float = 0.1


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.create("some.experiment", Config(), tmp_path / "run")


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "LEASE", 0.6)
    monkeypatch.setattr(writer, "HEARTBEAT", 0.1)


@pytest.fixture
def hasty(short: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock that nobody signed is soon nobody's."""
    monkeypatch.setattr(writer, "UNSIGNED", 0.05)
    monkeypatch.setattr("filelock._soft.MALFORMED_LOCK_AGE_THRESHOLD", 0.05)


def until(condition: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.01)


@contextlib.contextmanager
def another_process(run: Run) -> Iterator[subprocess.Popen]:
    """A real one that writes to the run until its standard input ends, with the times that hold here."""
    code = (
        "import sys; from fnrun import writer; from fnrun.runs.run import Run\n"
        f"writer.LEASE, writer.HEARTBEAT = {writer.LEASE}, {writer.HEARTBEAT}\n"
        "with Run.open(sys.argv[1]).writing(): print('writing', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen([sys.executable, "-c", code, run.path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "writing\n"
        yield process
    finally:
        process.stdin.close()
        process.wait(60)
        process.stdout.close()


def left_by_node7(run: Run) -> Path:
    """The lock as filelock of another host leaves it."""
    lock = run.path / "run.lock"
    lock.write_text(f"filelock/2\npid=123\nhost=node7\nmode=lease\ntoken=theirs\nduration={writer.LEASE!r}\nstart=1\n")
    return lock


class TestOneWriter:
    def test_a_second_process_is_refused_at_once(self, run: Run):
        with another_process(run) as other:
            by = f"process {other.pid} on host {socket.gethostname()}"
            message = rf"{run.path} is being written by {by} \(since 2.*stop it \(kill {other.pid}\)"
            with pytest.raises(RunError, match=message), run.writing():
                pass
        with run.writing():
            pass
        assert not (run.path / "run.lock").exists()

    def test_a_second_time_in_this_process_is_refused(self, run: Run):
        with run.writing():
            with pytest.raises(RunError, match="by this process already"), Run.open(run.path).writing():
                pass
            assert run.status().state == "running"
        with run.writing():
            pass

    def test_what_a_killed_process_held_is_taken_over_at_once(self, run: Run):
        with another_process(run) as other:
            other.kill()
            other.wait()
            assert (run.path / "run.lock").exists()
            with run.writing():
                assert run.status().pid == os.getpid()

    def test_a_zombie_holds_nothing_for_longer_than_the_lease(self, run: Run, short: None):
        with another_process(run) as other:
            other.kill()  # and nobody waits for it
            until(lambda: _state(other.pid) == "Z")
            assert run.status().reason == "killed"
            with run.writing():
                pass

    def test_another_host_that_gives_signs_of_life_is_left_alone(self, run: Run):
        """As soon as it does: nobody waits for the end of the lease."""
        lock, end, late = left_by_node7(run), threading.Event(), time.monotonic() + writer.LEASE / 2

        def refresh() -> None:
            while not end.wait(0.05):
                os.utime(lock)

        beating = threading.Thread(target=refresh)
        beating.start()
        refused = pytest.raises(RunError, match=r"written by process 123 on host node7: wait for it, or stop it \(kill 123\)")
        try:
            with refused, run.writing(lambda: "too late" if time.monotonic() > late else None):
                pass
        finally:
            end.set()
            beating.join()
        assert "token=theirs" in lock.read_text()
        assert run.status().state == "new"

    def test_another_host_that_gives_none_is_taken_over_after_the_lease(self, run: Run, short: None, caplog: pytest.LogCaptureFixture):
        left_by_node7(run)
        began = time.monotonic()
        with run.writing():
            assert time.monotonic() - began >= writer.LEASE
        assert "waiting up to 1 s to see whether process 123 on host node7 is alive" in caplog.text

    def test_an_interrupt_ends_the_waiting(self, run: Run):
        left_by_node7(run)
        with pytest.raises(RunError, match="SIGTERM while waiting"), run.writing(lambda: "SIGTERM"):
            pass

    def test_other_settings_are_not_guessed_at(self, run: Run, short: None):
        lock = left_by_node7(run)
        lock.write_text(lock.read_text().replace("0.6", "30.0"))
        with pytest.raises(RunError, match=r"another version of fnrun: .*30\.0s"), run.writing():
            pass

    @pytest.mark.parametrize(("rank", "world"), [("0", "2"), ("1", "2"), ("1", ""), ("", "2"), ("x", "1"), ("0", "two")])
    def test_one_of_several_ranks_is_refused(self, rank: str, world: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        before = sorted(run.path.iterdir())
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", world)
        with pytest.raises(RunError, match=r"RANK|WORLD_SIZE"), run.writing():
            pass
        assert sorted(run.path.iterdir()) == before
        assert tiny("train", "--out", tmp_path / "new", code=1).startswith("error: ")
        assert not (tmp_path / "new").exists()

    @pytest.mark.parametrize(("rank", "world"), [("", ""), ("0", "1"), (" ", "1"), ("0", "")])
    def test_a_launcher_that_starts_one_process_makes_no_difference(self, rank: str, world: str, run: Run, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", world)
        with run.writing():
            assert run.status().state == "running"

    @pytest.mark.parametrize("content", [b"", b"filelock/2\npid="])
    def test_a_lock_that_nobody_signed_is_taken_over(self, content: bytes, run: Run, hasty: None):
        """Its maker was killed between making it and writing his name into it."""
        (run.path / "run.lock").write_bytes(content)
        with run.writing():
            assert run.status().pid == os.getpid()
        assert not (run.path / "run.lock").exists()

    def test_a_link_in_its_place_is_not_followed(self, run: Run, tmp_path: Path, hasty: None):
        (tmp_path / "mine").touch()
        (run.path / "run.lock").symlink_to(tmp_path / "mine")
        with run.writing():
            pass
        assert (tmp_path / "mine").read_bytes() == b""

    def test_a_directory_that_cannot_be_written(self, run: Run):
        (run.path / "run.lock").mkdir()
        with pytest.raises(RunError, match=r"cannot write .*run\.lock: "), run.writing():
            pass
        with pytest.raises(RunError, match=r"cannot write .*run\.lock: "), dataclasses.replace(run, path=Path("/proc")).writing():
            pass
        shutil.rmtree(run.path)
        with pytest.raises(RunError, match="there is no run"), run.writing():
            pass
        assert not run.path.exists()

    def test_a_run_may_be_moved_meanwhile(self, run: Run, tmp_path: Path):
        moved = dataclasses.replace(run, path=tmp_path / "moved")
        with run.writing():
            run.path.rename(moved.path)
        assert not run.path.exists()
        assert moved.status().state == "finished"
        assert {path.name for path in moved.path.iterdir()} == {"config.yaml", "environment.json", "status.json"}


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


#: A process that writes a line, and another one when it has lost its run.
LOSING = """
import sys
from fnrun import observers
from tests.programs import fresh
sink = getattr(observers, sys.argv[1])(sys.argv[2])
sink.open(fresh())
sink.write(observers.Record((1,), 1, 1, {"loss": 0.125}, {}))
print("written", flush=True)
sys.stdin.readline()
sink.write(observers.Record((2,), 2, 1, {"loss": 0.25}, {}))
sink.close()
"""


class TestALostRun:
    """The lease is lost where this process was suspended for too long, or somebody deleted the file."""

    @pytest.mark.parametrize(("lose", "said"), [(left_by_node7, "taken over by process 123 on host node7"), (None, "was deleted")])
    def test_the_program_ends_and_writes_no_more(self, run: Run, short: None, lose: Callable[[Run], Path] | None, said: str):
        def losing(state, batch):
            if state.step == 3:
                run.checkpoints.wait()  # the one of step 2 has its place
                (run.path / "run.lock").unlink()
                if lose is not None:
                    lose(run)
                until(writing)
            return train(state, batch)

        program = fnrun.repeat(fnrun.epoch_loop(losing), 5, observers=[observers.checkpoint(run.checkpoints)])
        with pytest.raises((RunError, CheckpointError), match=said), run.writing() as writing:  # noqa: PT012
            status = (run.path / "status.json").read_bytes()
            program(fresh(), [torch.ones(2), torch.ones(2)], interrupt=writing)
        assert run.checkpoints.latest() == 2
        assert (run.path / "status.json").read_bytes() == status
        assert (run.path / "run.lock").exists() == (lose is not None)
        with pytest.raises(CheckpointError, match=said):
            run.checkpoints.save(fresh())

    def test_a_process_that_was_suspended_sees_it_at_its_next_tick(self, run: Run, monkeypatch: pytest.MonkeyPatch):
        """And not at its next heartbeat."""
        now = time.monotonic()
        with pytest.raises(RunError, match="taken over by process 123"), run.writing() as writing:  # noqa: PT012
            left_by_node7(run)
            monkeypatch.setattr(time, "monotonic", lambda: now + 100)
            assert "taken over by process 123" in (writing() or "")

    @pytest.mark.parametrize("sink", ["jsonl", "csv"])
    def test_what_it_still_logs_is_not_in_the_log(self, sink: str, tmp_path: Path):
        log = tmp_path / "log"
        command = [sys.executable, "-c", LOSING, sink, str(log)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as lost:
            assert lost.stdout is not None
            assert lost.stdout.readline() == "written\n"
            ours = getattr(observers, sink)(log)
            ours.open(fresh().replace(step=1, position=Position(ticks=1)))
            lost.communicate("go on\n")
            ours.write(observers.Record((2,), 2, 1, {"loss": 0.5}, {}))
            ours.close()
        assert lost.returncode == 0
        assert [log.read_text().count(loss) for loss in ("0.125", "0.25", "0.5")] == [1, 0, 1]

    def test_nothing_is_saved_between_the_loss_and_its_being_told(self, run: Run):
        """A process that was suspended wakes up in the middle of a save: that the lease is another's it reads by itself."""
        with pytest.raises(RunError, match="taken over by process 123"), run.writing() as writing:  # noqa: PT012
            left_by_node7(run)
            assert writing() is None
            with pytest.raises(CheckpointError, match="taken over by process 123 on host node7"):
                run.checkpoints.save(fresh())
            assert writing() is not None
        assert run.checkpoints.entries() == []


class TestStatus:
    def test_a_run_that_nobody_trained_is_new(self, run: Run):
        assert run.status() == writer.Status("new")

    def test_while_and_after(self, run: Run):
        with another_process(run) as other:
            running = run.status()
            assert (running.state, running.pid, running.host) == ("running", other.pid, socket.gethostname())
            assert running.ended is None
        finished = run.status()
        assert (finished.state, finished.began) == ("finished", running.began)
        assert finished.ended is not None
        assert finished.began is not None
        assert finished.ended >= finished.began

    def test_where_the_newest_checkpoint_stands(self, run: Run):
        with run.writing():
            run.checkpoints.save(fresh().replace(step=5))  # still under way at the end
        assert (run.status().step, run.status().ticks) == (5, 0)
        with run.writing():  # a process that does not look at checkpoints
            assert run.status().step == 5

    def test_a_checkpoint_that_fails_at_the_end_is_a_crash(self, run: Run):
        (run.path / "checkpoints").write_text("")
        with pytest.raises(CheckpointError, match="step 0 was not saved"), run.writing():
            run.checkpoints.save(fresh())
        assert run.status().state == "crashed"

    def test_an_exception_is_a_crash(self, run: Run):
        with pytest.raises(ZeroDivisionError), run.writing():
            _ = 1 / 0
        assert (run.status().state, run.status().reason) == ("crashed", "ZeroDivisionError: division by zero")
        with pytest.raises(KeyError), run.writing():
            raise KeyError("several\nlines")
        assert run.status().reason == r"KeyError: 'several\nlines'"

    def test_ctrl_c_and_what_was_said_are_stops(self, run: Run):
        with pytest.raises(KeyboardInterrupt), run.writing():
            raise KeyboardInterrupt
        assert (run.status().state, run.status().reason) == ("stopped", "KeyboardInterrupt")
        with run.writing() as writing:
            writing.stopped("no patience left")
        assert (run.status().state, run.status().reason) == ("stopped", "no patience left")

    def test_what_was_withdrawn_leaves_it_as_it_was(self, run: Run):
        with run.writing() as writing:
            writing.withdraw()
        assert not (run.path / "status.json").exists()
        with run.writing():
            pass
        before = run.status()
        with pytest.raises(RunError), run.writing() as writing:  # noqa: PT012
            writing.withdraw()
            raise RunError("refused")
        assert run.status() == before

    def test_a_process_that_is_no_more_was_killed(self, run: Run):
        with another_process(run) as other:
            other.kill()
            other.wait()
        killed = run.status()
        assert (killed.state, killed.reason, killed.pid) == ("crashed", "killed", other.pid)

    def test_another_host_is_taken_at_its_word_as_long_as_it_refreshes(self, run: Run):
        with another_process(run) as other:
            other.kill()
            other.wait()
        lock = left_by_node7(run)
        assert run.status().state == "running"
        os.utime(lock, (time.time() - 100, time.time() - 100))
        assert run.status().reason == "killed"
        lock.unlink()
        assert run.status().reason == "killed"

    def test_a_damaged_file_is_named_and_written_anew(self, run: Run):
        for content in (b"", b'{"state": "walking"}', b"\xff"):
            (run.path / "status.json").write_bytes(content)
            with pytest.raises(RunError, match=r"status\.json is damaged"):
                run.status()
            with run.writing():
                pass
            assert run.status().state == "finished"

    def test_reading_it_needs_no_torch(self, run: Run):
        with run.writing():
            pass
        code = "import sys, fnrun.runs.run; print(fnrun.runs.run.Run.open(sys.argv[1]).status().state, 'torch' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", code, run.path], capture_output=True, text=True, check=True)
        assert done.stdout == "finished False\n"


class TestHistory:
    ENTRY = {"changed": {"epochs": [3, 5]}, "step": 115, "ticks": 120}  # noqa: RUF012

    def test_it_is_kept_with_the_config(self, run: Run):
        assert Run.open(run.path).history == []
        assert "history" not in (run.path / "config.yaml").read_text()
        run.history.append(self.ENTRY)
        run.history.append({"forked": "../try1", "step": 460, "ticks": 480, "sha256": "ab" * 32, "changed": {"optimizer.lr": [0.1, None]}})
        run.write_config()
        assert Run.open(run.path, Config).history == run.history

    @pytest.mark.parametrize(
        ("nonsense", "field"),
        [
            ("history: 3", "`history`"),
            ("history: [3]", r"`history\[0\]`"),
            ("history: [{ticks: 3}]", r"missing required field `step` - at `history\[0\]`"),
            ("history: [{step: 1, ticks: -3}]", r"`history\[0\]\.ticks`"),
            ("history: [{step: 1, ticks: 3}, {step: many, ticks: 3}]", r"`history\[1\]\.step`"),
            ("history: [{step: 1, ticks: 3, changed: {epochs: 5}}]", r"`history\[0\]\.changed\[\.\.\.\]`"),
            ("history: [{step: 1, ticks: 3, forked: [a]}]", r"`history\[0\]\.forked`"),
        ],
    )
    def test_nonsense_names_the_field(self, run: Run, nonsense: str, field: str):
        with (run.path / "config.yaml").open("a") as file:
            file.write(nonsense)
        with pytest.raises(RunError, match=rf"config\.yaml: .*{field}"):
            Run.open(run.path)


class TestWhoseCodeItIs:
    @pytest.fixture(autouse=True)
    def here(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
        monkeypatch.setattr(sys, "dont_write_bytecode", True)
        for name in ("kept_here", "broken_here", "misses_here"):
            monkeypatch.delitem(sys.modules, name, raising=False)

    def test_a_module_of_the_current_directory(self, tmp_path: Path):
        (tmp_path / "kept_here.py").write_text("def build(config, run): return 1\ndef other(config, run): return 2\nnumber = 3\n")
        assert load_build("kept_here")(None, None) == 1  # pyright: ignore[reportArgumentType]
        assert load_build("kept_here:other")(None, None) == 2  # pyright: ignore[reportArgumentType]
        for name in ("nothing", "number"):
            with pytest.raises(RunError, match=rf"kept_here \(.*kept_here\.py\) has no function {name}"):
                load_build(f"kept_here:{name}")

    @pytest.mark.parametrize("name", ["not_there", "not_there.at_all", "tests.not_there"])
    def test_no_such_module(self, name: str, tmp_path: Path):
        with pytest.raises(RunError, match=rf"there is no module {name} in {tmp_path}"):
            load_build(name)

    def test_an_exception_of_its_own_passes(self, tmp_path: Path):
        (tmp_path / "broken_here.py").write_text("1 / 0")
        with pytest.raises(ZeroDivisionError):
            load_build("broken_here")
        (tmp_path / "misses_here.py").write_text("import not_there")
        with pytest.raises(ModuleNotFoundError, match="not_there"):
            load_build("misses_here")

    def test_a_checkpoint_says_which_source_made_it(self, tmp_path: Path):
        (tmp_path / "kept_here.py").write_text("def build(config, run): ...\n")
        load_build("kept_here")
        run = Run.create("kept_here:other", Config(), tmp_path / "run")
        with run.checkpoints:
            run.checkpoints.save(fresh())
        digest = subprocess.run(["sha256sum", "kept_here.py"], capture_output=True, text=True, check=True).stdout.split()[0]
        assert Checkpoints(run.path / "checkpoints").manifest().environment["experiment"] == f"kept_here sha256:{digest}"

    def test_without_a_file_it_says_the_module(self, run: Run):
        run.checkpoints.save(fresh())
        assert run.checkpoints.manifest().environment["experiment"] == "some.experiment"


def test_a_run_that_is_discarded_leaves_its_place(run: Run, tmp_path: Path):
    run.discard()
    assert list(tmp_path.iterdir()) == []


def test_a_name_of_a_function_is_none_of_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert Run.create("experiments.digits:other", Config()).path.parent == Path("runs/digits")


class TestSignals:
    """In a process of its own, which needs no torch."""

    CODE = (
        "import sys, fnrun.loops.interrupts as i\n"
        "with i.Signals().listening() as signals:\n"
        "    print('listening', flush=True)\n"
        "    for line in sys.stdin: print(signals(), flush=True)"
    )

    @contextlib.contextmanager
    def process(self) -> Iterator[tuple[subprocess.Popen, Callable[[], str]]]:
        options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen([sys.executable, "-c", self.CODE], **options)  # pyright: ignore[reportCallIssue, reportArgumentType]

        def ask() -> str:
            process.stdin.write("\n")
            process.stdin.flush()
            return process.stdout.readline().strip()

        assert process.stdout.readline() == "listening\n"
        yield process, ask
        process.stdin.close()
        process.wait(60)
        process.stdout.close()
        process.stderr.close()

    def test_a_scheduler_may_repeat_itself(self):
        with self.process() as (process, ask):
            for sent in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
                process.send_signal(sent)
                until(lambda: ask() == "SIGUSR1")
        assert process.returncode == 0

    def test_ctrl_c_a_second_time_ends_the_process(self):
        with self.process() as (process, ask):
            process.send_signal(signal.SIGINT)
            until(lambda: ask() == "SIGINT")
            assert process.stderr.readline() == "\n"
            assert "Ctrl-C once more" in process.stderr.readline()
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == -signal.SIGINT


@dataclasses.dataclass(frozen=True)
class _One:
    a: int = 1


@dataclasses.dataclass(frozen=True)
class _Other:
    b: int = 1


@dataclasses.dataclass(frozen=True)
class _Choice:
    rule: _One | _Other = _One()


@dataclasses.dataclass(frozen=True)
class _Place:
    rows: int = 1
    folder: Any = Path("data")


@pytest.mark.parametrize(
    ("config", "words"), [(_Choice(), "could not be read again.*msgspec.Struct"), (_Place(), "'folder' cannot be written")]
)
def test_a_config_that_could_not_be_read_again_makes_no_run(config, words, tmp_path):
    with pytest.raises(RunError, match=words):
        Run.create("experiment", config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
