"""The scripts of docs/preemption.md do what the page says of them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from fnrun.loops.interrupts import Signals
from tests.docs import pages

PAGE = pages.text("preemption.md")
SCRIPTS = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """The programs that the scripts call: `python` ends with $CODE, after a SIGUSR1 if it is told to wait for one."""
    programs = {
        "srun": 'exec "$@"',
        "scontrol": 'echo "$@" > requeued',
        "python": '[ "$CODE" = wait ] || exit $CODE; trap "sleep 0.2; exit 138" USR1; touch started; while :; do sleep 0.01; done',
    }
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    return {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}


def test_the_table_names_every_signal_that_is_heard_with_its_exit_code() -> None:
    rows = re.findall(r"^\|.*\|$", PAGE, re.MULTILINE)
    for number in Signals.LISTENED:
        assert [row for row in rows if number.name in row and row.endswith(f"| {128 + number} |")], number


def test_the_scripts_are_scripts() -> None:
    assert len(SCRIPTS) == PAGE.count("```bash") == 3
    for script in SCRIPTS:
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


@pytest.mark.parametrize("script", SCRIPTS[:2])
@pytest.mark.parametrize(("code", "requeued"), [(0, False), (1, False), (75, True), (138, True), (143, False)])
def test_a_job_is_requeued_where_it_was_warned(script: str, code: int, requeued: bool, cluster: dict[str, str], tmp_path: Path) -> None:
    done = subprocess.run(["bash", "-c", script], env=cluster | {"CODE": str(code)}, cwd=tmp_path, check=False)
    assert done.returncode == code
    assert (tmp_path / "requeued").exists() == requeued
    if requeued:
        assert (tmp_path / "requeued").read_text() == "requeue 7\n"


def test_a_batch_shell_that_is_warned_waits_for_the_saving(cluster: dict[str, str], tmp_path: Path) -> None:
    shell = subprocess.Popen(["bash", "-c", SCRIPTS[1]], env=cluster | {"CODE": "wait"}, cwd=tmp_path)
    end = time.monotonic() + 60
    while not (tmp_path / "started").exists():
        assert time.monotonic() < end
        time.sleep(0.01)
    shell.send_signal(signal.SIGUSR1)
    assert shell.wait(60) == 138
    assert (tmp_path / "requeued").exists()
