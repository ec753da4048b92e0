"""Lightning Fabric: one's own loop, with model, optimizer and data set up by Fabric."""

from __future__ import annotations

from typing import Any

import torch
from lightning_fabric import Fabric
from torch.utils.data import DataLoader

from benchmarks.measure import Turns
from benchmarks.problems import Problem, loss_fn


def train(turns: Turns, problem: Problem, **adamw: Any) -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.launch()
    model, optimizer = fabric.setup(problem.model, torch.optim.AdamW(problem.model.parameters(), lr=1e-3, **adamw))
    loader = fabric.setup_dataloaders(DataLoader(turns, batch_size=None))
    while True:
        for batch in loader:
            optimizer.zero_grad()
            fabric.backward(loss_fn(model, batch))
            optimizer.step()
