"""An experiment of milliseconds, run in this process: the command line is real, its signals are, and so are its files."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fnrun
from fnrun import data, observers, optim
from tests.experiments.commands import call

#: What happens at a moment: "build", "state", "open" (of the observers), "data", "step 5", "row" (where it is loaded).
EVENTS: dict[str, Callable[[], Any]] = {}


@dataclasses.dataclass(frozen=True)
class Config:
    epochs: int = 3
    """rounds of 4 steps"""
    lr: float = 0.1
    """of SGD"""
    batch_size: int = 2
    """rows a step"""
    stop: int = 0
    """at this step the run stops itself; 0 for never"""
    workers: int = 0
    """processes that load"""


def happens(moment: str) -> None:
    EVENTS.get(moment, lambda: None)()


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        happens("row")
        return {"x": torch.tensor([float(index), 1.0]) + 0.1 * torch.randn(2)}


class Opening:
    """An observer that is told when the observers open: then sinks begin their runs elsewhere."""

    def open(self, program: Any, state: Any) -> None:
        happens("open")

    def __call__(self, state: Any, metrics: Any) -> None: ...


def build(config: Config, run: fnrun.Run) -> fnrun.Experiment:
    happens("build")
    with fnrun.Key(0).scope():
        model = nn.Sequential(nn.Linear(2, 4), nn.Dropout(0.5), nn.Linear(4, 1))
    optimizer = optim.sgd(config.lr)
    inner = fnrun.make_train_step(model, lambda model, batch: model(batch["x"]).pow(2).mean(), optimizer)

    def train_step(state: Any, batch: Any) -> Any:
        happens(f"step {state.step}")
        return inner(state, batch)

    def stopping(state: Any, metrics: Any) -> Any:
        return state.replace(stop="enough") if state.step == config.stop else state

    def state() -> Any:
        happens("state")
        return fnrun.TrainState.create(model, optimizer, seed=0)

    def rows() -> Any:
        happens("data")
        return data.loader(Rows(), config.batch_size, shuffle=True, workers=config.workers)

    eval_step = fnrun.make_eval_step(model, lambda model, batch: {"size": model(batch["x"]).pow(2).mean()})
    train = fnrun.epoch_loop(train_step, hooks=[stopping])
    saving = observers.checkpoint(run.checkpoints, monitor={"val/size": "min", "train/loss": "max"})
    logging = observers.log(to=[observers.console(), observers.jsonl(run.metrics)])
    return fnrun.Experiment(
        state=state,
        program=fnrun.repeat(
            fnrun.sequence(train=train, val=fnrun.eval_loop(eval_step)), config.epochs, observers=[Opening(), logging, saving]
        ),
        data={"train": rows, "val": lambda: data.loader(Rows(), 8)},
        evaluate=fnrun.sequence(val=fnrun.eval_loop(eval_step)),
    )


def tiny(*args: Any, code: int = 0, build: Any = build) -> str:
    """The command, run in this process; what it printed."""
    return call(build, *args, code=code)


def at(moment: str, event: Callable[[], Any]) -> contextlib.AbstractContextManager[None]:
    """Within it `event()` happens at that moment."""

    def apart() -> Any:
        """What waits for a lock draws how long: the step within which it happens does not."""
        drawn = random.getstate()
        try:
            return event()
        finally:
            random.setstate(drawn)

    @contextlib.contextmanager
    def happening():
        EVENTS[moment] = apart
        try:
            yield
        finally:
            del EVENTS[moment]

    return happening()


def flip(directory: Path) -> Path:
    """Turn over a bit in the largest file of a checkpoint."""
    largest = max((path for path in directory.rglob("*") if path.is_file()), key=lambda path: (path.stat().st_size, path))
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    return largest


def until(condition: Callable[[], Any], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.01)
