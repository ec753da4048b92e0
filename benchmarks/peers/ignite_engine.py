"""Ignite's Engine around an update function, without handlers, or with a handler that looks at each 50th loss."""

from __future__ import annotations

import logging
from typing import Any

import torch
from ignite.engine import Engine, Events

from benchmarks.measure import Turns
from benchmarks.problems import Problem, loss_fn


def train(turns: Turns, problem: Problem, logs: bool = False, **adamw: Any) -> None:
    model = problem.model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, **adamw)

    def update(engine: Engine, batch: Any) -> torch.Tensor:
        model.train()
        optimizer.zero_grad()
        loss = loss_fn(model, batch)
        loss.backward()
        optimizer.step()
        return loss.detach()

    engine = Engine(update)
    if logs:
        engine.on(Events.ITERATION_COMPLETED(every=50))(lambda engine: logging.info("loss %f", engine.state.output.item()))
    engine.run(turns, max_epochs=10**6, epoch_length=len(turns))
