"""Killed anywhere, a run resumes to the same bits."""

from __future__ import annotations

import os
import random
import subprocess
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch

import fnrun
from experiments import digits
from tests.experiments.commands import Process, outcome, run
from tests.torture.training import SERVER

CONFIG = ["--epochs", 4, "--seed", 3, "--batch-size", 32]
KILLS = 20


@pytest.fixture(scope="module")
def left_alone(tmp_path_factory):
    """The run that nobody interrupted, loaded in the main process."""
    path = tmp_path_factory.mktemp("runs") / "left-alone"
    run("train", *CONFIG, "--workers", 0, "--out", path)
    return outcome(path)


class Warm(Process):
    """The same command in a child of a warm process: to import takes seconds, in which there is nothing to lose."""

    def start(self, args: list[str]) -> Any:
        return Child(args)


class Child:
    """What `Popen` is, as far as `Process` knows it."""

    def __init__(self, args: list[str]) -> None:
        self.stdout, output = SERVER.Pipe(duplex=False)
        self.process = SERVER.Process(target=trains, args=(args, output))
        self.process.start()
        self.pid = self.process.pid
        output.close()

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, seconds: float | None = None) -> int:
        self.process.join(seconds)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired("train", seconds or 0)
        return self.process.exitcode


def trains(args: list[str], output: Connection) -> None:
    os.setsid()
    for stream in (1, 2):
        os.dup2(output.fileno(), stream)
    output.close()
    torch.set_num_threads(1)
    fnrun.main(digits.build, args)


@pytest.mark.slow
def test_twenty_kills_at_random_moments(left_alone, tmp_path):
    """Dropout, augmentation in workers, shuffling, EMA, log windows. Kills fall anywhere: in training, validation, saving, starting."""
    moments, kills, finished = random.Random(0), 0, 0
    while kills < KILLS or not finished:
        path = tmp_path / f"run-{finished}"
        args = ["train", *CONFIG, "--workers", 2, "--out", path]
        while True:
            with Warm(*args) as process:
                process.read_until("a new run in", "resuming", "starting at step 0")
                if kills >= KILLS or process.ends_within(moments.uniform(0.0, 2.5)):
                    assert process.finish() == 0, process.output
                    break
                process.kill()
                kills += 1
            args = ["resume", path]
        assert outcome(path) == left_alone
        finished += 1


def test_another_number_of_workers_after_a_resume(left_alone, tmp_path):
    path = tmp_path / "run"
    with Process("train", *CONFIG, "--workers", 1, "--out", path) as process:
        process.read_until("epoch 1")
        process.kill()
    run("resume", path, "--workers", 0)
    assert outcome(path) == left_alone
