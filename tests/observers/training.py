"""A short training with every sink and observer, as a command: `python -m tests.observers.training DIRECTORY SINK,SINK [TICKS]`.

It goes on from the newest checkpoint. With TICKS it kills itself at the state with so many, after it logged that.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fnrun
from fnrun import data, observers, optim
from fnrun.checkpoint import Checkpoints
from tests.observers.held import sink

STEPS = 5  # in each of 4 epochs


def training(path: Path, kinds: list[str], checkpoints: Checkpoints | None = None, *more: Any) -> tuple[Any, Any, Any]:
    """The program, its data and the fresh state."""
    with fnrun.Key(0).scope():
        model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 1))
    optimizer = optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(1e-2))

    def loss_fn(model: nn.Module, batch: Any) -> Any:
        loss = (model(batch["x"]) - batch["y"]).square().mean()
        shown = {"weights": observers.histogram(model[0].weight, 4), "input": observers.Image(batch["x"]), "said": observers.Text("a <b>")}
        return loss, {"by_class": loss.detach() * torch.arange(3), **shown}

    sinks = [sink(kind, path) for kind in kinds]
    wide = observers.log(2, to=sinks, statistics={"loss": ["mean", "max", ("mean", 3), ("min", "epoch"), ("max", "run")]}, name="lines")
    progress = observers.progress()
    saving = [] if checkpoints is None else [observers.checkpoint(checkpoints, keep=2)]
    program = fnrun.repeat(
        fnrun.sequence(
            train=fnrun.epoch_loop(fnrun.make_train_step(model, loss_fn, optimizer), hooks=[wide], observers=[wide, progress, *more]),
            val=fnrun.eval_loop(fnrun.make_eval_step(model, lambda model, batch: {"loss": model(batch["x"]).mean()}), observers=[progress]),
        ),
        4,
        observers=[observers.log(to=sinks, name="epochs"), *saving, *more],
    )
    x = torch.linspace(-1, 1, 80).view(20, 4)
    batches = data.arrays({"x": x, "y": x.sum(1, keepdim=True)}, 4, shuffle=True)
    return program, {"train": batches, "val": batches}, fnrun.TrainState.create(model, optimizer, seed=1)


class Killer:
    """SIGKILL, with the newest checkpoint on disk and lines behind it already written."""

    def __init__(self, at: int, checkpoints: Checkpoints) -> None:
        self.at, self.checkpoints = at, checkpoints

    def __call__(self, state: Any, metrics: Any) -> None:
        if state.position.ticks >= self.at:
            self.checkpoints.wait()
            os.kill(os.getpid(), signal.SIGKILL)


def main(path: Path, kinds: list[str], kill_at: int | None) -> None:
    torch.set_num_threads(1)
    checkpoints = Checkpoints(path / "checkpoints")
    program, streams, state = training(path, kinds, checkpoints, *([] if kill_at is None else [Killer(kill_at, checkpoints)]))
    if checkpoints.latest() is not None:
        state = checkpoints.restore(like=state)
    program(state, streams)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2].split(","), int(sys.argv[3]) if len(sys.argv) > 3 else None)
