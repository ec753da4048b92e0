"""The loop that everybody writes by hand, in plain PyTorch."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import Turns
from benchmarks.problems import Problem, loss_fn


def train(turns: Turns, problem: Problem, **adamw: Any) -> None:
    model = problem.model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, **adamw)
    while True:
        for batch in turns:
            optimizer.zero_grad()
            loss_fn(model, batch).backward()
            optimizer.step()


def whole(turns: Turns, problem: Problem, validation: int, epochs: int, log_every: int, **adamw: Any) -> None:
    """What fnrun's program does, by hand: shuffling, a log, validation, a checkpoint each epoch (in the foreground, no synchronising)."""
    model, size = problem.model, len(problem.batches[0][0])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, **adamw)
    x, y = (torch.cat(column) for column in zip(*problem.batches, strict=True))
    held_out, step = problem.batches[:validation], 0
    log = Path("log.jsonl").open("a")  # noqa: SIM115  (it lives as long as the process)
    while True:
        with turns.turn(epochs * len(problem.batches)):
            for _ in range(epochs):
                total = torch.zeros(())
                for rows in torch.randperm(len(x)).split(size):
                    optimizer.zero_grad()
                    loss = loss_fn(model, (x[rows], y[rows]))
                    loss.backward()
                    optimizer.step()
                    total += loss.detach()
                    step += 1
                    if step % log_every == 0:
                        print(json.dumps({"step": step, "loss": total.item() / log_every, "time": time.time()}), file=log, flush=True)
                        total.zero_()
                with torch.no_grad():
                    torch.stack([loss_fn(model, batch) for batch in held_out]).mean().item()
                torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, "last.pt")
