"""fnrun: the step alone, and whole programs around it."""

from __future__ import annotations

from typing import Any

import torch

import fnrun
from benchmarks.measure import Turns
from benchmarks.problems import Problem, loss_fn
from fnrun import data, observers, optim
from fnrun.checkpoint import Checkpoints


def step(turns: Turns, problem: Problem) -> None:
    optimizer = optim.adamw(1e-3)
    train_step = fnrun.make_train_step(problem.model, loss_fn, optimizer)
    state = fnrun.TrainState.create(problem.model, optimizer)
    while True:
        for batch in turns:
            state, _ = train_step(state, batch)


def loop(turns: Turns, problem: Problem, log_every: int | None = None) -> None:
    """An `epoch_loop` that nobody watches, or a log."""
    optimizer = optim.adamw(1e-3)
    watching = [observers.log(every=log_every, to=[observers.jsonl("log.jsonl")])] if log_every else []
    fit = fnrun.epoch_loop(fnrun.make_train_step(problem.model, loss_fn, optimizer), observers=watching)
    state = fnrun.TrainState.create(problem.model, optimizer)
    stream = data.batches(problem.batches)  # made once: a plain list would be digested in each call
    while True:
        with turns.turn(len(stream)):
            state, _ = fit(state, stream)


def program(
    turns: Turns,
    problem: Problem,
    validation: int,
    epochs: int,
    log_every: int,
    saves: bool = True,
    donate: bool = False,
    compile: bool = False,
    fused_steps: int = 1,
) -> None:
    """Shuffling, a log, validation, a checkpoint each epoch. All of a call counts: its start, and the wait for the last checkpoint."""
    optimizer = optim.adamw(1e-3)
    train_step = fnrun.make_train_step(problem.model, loss_fn, optimizer, compile=compile)
    watching = [observers.log(every=log_every, to=[observers.jsonl("log.jsonl")])]
    if fused_steps > 1:
        train = fnrun.step_loop(train_step, len(problem.batches), fused_steps=fused_steps, donate=donate, observers=watching)
    else:
        train = fnrun.epoch_loop(train_step, donate=donate, observers=watching)
    fit = fnrun.repeat(
        fnrun.sequence(train=train, val=fnrun.eval_loop(fnrun.make_eval_step(problem.model, loss_fn_of_eval))),
        times=epochs,
        observers=[observers.checkpoint(Checkpoints("checkpoints"), keep=2)] if saves else [],
    )
    state = fnrun.TrainState.create(problem.model, optimizer)
    x, y = (torch.cat(column) for column in zip(*problem.batches, strict=True))
    size = len(problem.batches[0][0])
    streams = {"train": data.arrays((x, y), size, shuffle=True), "val": list(problem.batches[:validation])}
    while True:
        with turns.turn(epochs * len(problem.batches)):
            state, _ = fit(state, streams)


def loss_fn_of_eval(model: torch.nn.Module, batch: Any) -> dict[str, torch.Tensor]:
    return {"loss": loss_fn(model, batch)}
