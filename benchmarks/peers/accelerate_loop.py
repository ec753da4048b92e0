"""Accelerate: one's own loop, with model, optimizer and data prepared by an Accelerator."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from benchmarks.measure import Turns
from benchmarks.problems import Problem, loss_fn


def train(turns: Turns, problem: Problem, **adamw: Any) -> None:
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(problem.model.parameters(), lr=1e-3, **adamw)
    model, optimizer, loader = accelerator.prepare(problem.model, optimizer, DataLoader(turns, batch_size=None))
    while True:
        for batch in loader:
            optimizer.zero_grad()
            accelerator.backward(loss_fn(model, batch))
            optimizer.step()
