"""Small runs, made in this process."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fnrun
from fnrun import data, observers, optim
from fnrun.cli.commands import main

FEATURES = torch.arange(48.0).view(12, 4).sin()


@dataclasses.dataclass(frozen=True)
class Config:
    epochs: int = 2
    seed: int = 0
    lr: float = 0.05


def train(
    path: Path,
    *,
    config: Config = Config(),
    resumed: bool = False,
    interrupt: Callable[[], str | None] | None = None,
    watching: Any = (),
    keep: int | None = None,
) -> fnrun.Run:
    """A run of a linear model on 12 examples, 3 steps an epoch, validated and saved after each epoch; `resumed` goes on from the last."""
    run = fnrun.Run.open(path, Config) if resumed else fnrun.Run.create("tests.cli.commands.made", config, path)
    torch.manual_seed(0)
    model, optimizer = torch.nn.Linear(4, 1), optim.adamw(run.config.lr)

    def loss_fn(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return (model(batch["x"]).squeeze(1) - batch["x"].sum(1)).square().mean() + 0.01 * torch.rand(())

    step = fnrun.make_train_step(model, loss_fn, optimizer)
    score = fnrun.make_eval_step(model, lambda model, batch: {"loss": loss_fn(model, batch), "accuracy": model(batch["x"]).mean()})
    rows = {"x": FEATURES}
    sinks = [observers.jsonl(run.metrics)]
    training = fnrun.epoch_loop(step, observers=[observers.log(2, to=sinks), *watching])
    saving = observers.checkpoint(run.checkpoints, monitor="val/loss", mode="min", keep=keep)
    program = fnrun.repeat(
        fnrun.sequence(train=training, val=fnrun.eval_loop(score)), run.config.epochs, observers=[observers.log(to=sinks), saving]
    )
    state = fnrun.TrainState.create(model, optimizer, seed=run.config.seed)
    with run.writing() as writing, run.checkpoints:
        if resumed:
            state = run.checkpoints.restore(like=state)
        streams = {"train": data.arrays(rows, 4, shuffle=True), "val": data.arrays(rows, 6)}
        state, _ = program(state, streams, interrupt=interrupt or writing)
        if interrupt is not None:
            writing.stopped("SIGTERM")
    return run


def after(ticks: int) -> Callable[[], str | None]:
    """An interrupt that comes when it was asked for so many times."""
    left = iter(range(ticks))
    return lambda: "SIGTERM" if next(left, None) is None else None


def told(capsys: Any, *args: Any) -> tuple[int, str, str]:
    """The exit code of `fnrun args` and what it printed, to the standard output and to the standard error."""
    capsys.readouterr()
    code = main([str(arg) for arg in args])
    return (code, *capsys.readouterr())


def document(capsys: Any, *args: Any) -> Any:
    """What `fnrun args --json` printed: one JSON document."""
    code, out, err = told(capsys, *args, "--json")
    assert (code in (0, 1)) == (err == "")
    return json.loads(out, parse_constant=_refuse)


def _refuse(name: str) -> Any:
    raise AssertionError(f"{name} is no JSON")


def newest(run: Path) -> Path:
    return sorted(path for path in (run / "checkpoints").iterdir() if path.name[0].isdigit())[-1]


def largest_file(checkpoint: Path) -> Path:
    """The file that holds the arrays."""
    return max((path for path in (checkpoint / "arrays").glob("state/*/[0-9]*")), key=lambda path: path.stat().st_size)


def flip(file: Path, at: int = 0) -> None:
    """One bit of a file, wrong."""
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)
