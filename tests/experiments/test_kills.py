"""Killed anywhere, a run resumes to the same bits."""

from __future__ import annotations

import random

import pytest

from tests.experiments.commands import Process, outcome, run

CONFIG = ["--epochs", 4, "--seed", 3, "--batch-size", 32]
KILLS = 20


@pytest.fixture(scope="module")
def left_alone(tmp_path_factory):
    """The run that nobody interrupted, loaded in the main process."""
    path = tmp_path_factory.mktemp("runs") / "left-alone"
    run("train", *CONFIG, "--workers", 0, "--out", path)
    return outcome(path)


@pytest.mark.slow
def test_twenty_kills_at_random_moments(left_alone, tmp_path):
    """Dropout, augmentation in workers, shuffling, EMA, log windows. Kills fall anywhere: in training, validation, saving, starting."""
    moments, kills, finished = random.Random(0), 0, 0
    while kills < KILLS or not finished:
        path = tmp_path / f"run-{finished}"
        args = ["train", *CONFIG, "--workers", 2, "--out", path]
        while True:
            with Process(*args) as process:
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
