"""A small experiment with randomness, folds, a stop and hidden state everywhere, for what is done with runs: replayed, forked, compared."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path
from typing import Any

import pytest

import fnrun
from fnrun import data, hooks, observers
from tests.observers.small import Small

#: At this step the process gets a SIGTERM: not in the config, since it changes nothing.
terminated_at: list[int] = []
#: The steps that an observer has seen.
observed: list[int] = []


@dataclasses.dataclass(frozen=True)
class Config:
    epochs: int = 2
    """passes over the rows"""
    donate: bool = False
    """whether states are written over"""
    stop_after: int = 1000
    """a hook stops the run at this step"""
    rows: int = 20
    """of the data"""
    keep: int = 10
    """so many checkpoints"""


def observe(state: Any, metrics: dict[str, Any]) -> None:
    observed.append(state.step)
    if state.step in terminated_at:
        os.kill(os.getpid(), signal.SIGTERM)


def build(config: Config, run: fnrun.Run) -> fnrun.Experiment:
    small = Small()
    train = fnrun.epoch_loop(
        small.step,
        hooks=[hooks.ema(0.9), hooks.stop_after(steps=config.stop_after)],
        observers=[observers.log(3, to=[observers.jsonl(run.metrics)], window=4), observe],
        donate=config.donate,
    )
    val = fnrun.eval_loop(fnrun.make_eval_step(small.model, small.loss, weights="ema"))
    saving = observers.checkpoint(run.checkpoints, monitor="val/loss", mode="min", keep=config.keep)
    batches = data.arrays({"x": small.x[: config.rows], "y": small.x[: config.rows].sum(1, keepdim=True)}, 4, shuffle=True)
    return fnrun.Experiment(
        state=small.state,
        program=fnrun.repeat(fnrun.sequence(train=train, val=val), config.epochs, observers=[saving]),
        data={"train": batches, "val": data.arrays({"x": small.x, "y": small.x.sum(1, keepdim=True)}, 5)},
    )


def command(*args: Any, code: int = 0, experiment: Any = build) -> None:
    """`python -m experiment ...`, in this process."""
    with pytest.raises(SystemExit) as end:
        fnrun.main(experiment, list(map(str, args)))
    assert end.value.code == code


def trained(path: Path, *flags: Any) -> fnrun.Run:
    """A run that has come to its end."""
    command("train", "--out", path, "--log-level", "error", *flags)
    return fnrun.Run.open(path)
