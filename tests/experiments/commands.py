"""Experiments as people run them: real processes, real signals, real files."""

from __future__ import annotations

import contextlib
import io
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fnrun
from fnrun.checkpoint import Checkpoints
from fnrun.core import tree

ROOT = Path(__file__).parents[2]
#: Bits may depend on the number of threads, so both sides of a comparison have one.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100", "PYTHONPATH": str(ROOT)}


def command(*args: Any) -> list[str]:
    return [sys.executable, "-m", "experiments.digits", *map(str, args)]


def run(*args: Any, cwd: Path | None = None, code: int = 0) -> str:
    """Run to the end; the output of both streams. Asserts the exit code, and shows the output where it is another."""
    done = subprocess.run(
        command(*args), env=ENVIRONMENT, cwd=cwd or ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=300
    )  # fmt: skip
    assert done.returncode == code, f"exit code {done.returncode}:\n{done.stdout}"
    return done.stdout


def call(build: Callable[..., fnrun.Experiment], *args: Any, code: int = 0) -> str:
    """The same in this process, where no process is the point: starting one takes seconds."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed), pytest.raises(SystemExit) as left:
        fnrun.main(build, [str(arg) for arg in args])
    assert left.value.code == code, f"exit code {left.value.code}:\n{printed.getvalue()}"
    return printed.getvalue()


class Process:
    """A command in a process group of its own, as a terminal makes them."""

    def __init__(self, *args: Any) -> None:
        self.popen = self.start([str(arg) for arg in args])
        self.output = ""

    def start(self, args: list[str]) -> Any:
        """What runs these arguments in a session of its own: a `Popen`, or what is like one."""
        return subprocess.Popen(
            command(*args), env=ENVIRONMENT, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )

    def read_until(self, *words: str, timeout: float = 120) -> None:
        """Read until one of the words was printed or the output ends."""
        assert self.popen.stdout is not None
        descriptor = self.popen.stdout.fileno()
        while not any(word in self.output for word in words):
            assert select.select([descriptor], [], [], timeout)[0], f"nothing was printed for {timeout} s after:\n{self.output}"
            piece = os.read(descriptor, 65536)
            if not piece:
                return
            self.output += piece.decode()

    def ends_within(self, seconds: float) -> bool:
        """Whether the process ends by itself in that time."""
        try:
            self.popen.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def kill(self) -> None:
        """SIGKILL to the whole group: what a power cut or an impatient scheduler does."""
        os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait()

    def finish(self) -> int:
        self.read_until("\0")
        return self.popen.wait(120)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *exc: Any) -> None:
        if self.popen.poll() is None:
            self.kill()
        assert self.popen.stdout is not None
        self.popen.stdout.close()


def outcome(path: Path) -> tuple[str, list[dict[str, Any]]]:
    """What a run came to: the fingerprint of its last state, and its log without what was timed."""
    state = Checkpoints(path / "checkpoints").restore()
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return tree.fingerprint(state), [{k: v for k, v in line.items() if k != "clock"} for line in lines]
