"""A small training with randomness in it, for what watches one."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import fnrun
from fnrun import data, optim


class Small:
    """A network with dropout on 20 rows, 4 a batch: 5 steps a pass."""

    def __init__(self, *transforms: Any) -> None:
        with fnrun.Key(0).scope():
            self.model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 1))
        self.optimizer = optim.chain(*transforms, optim.adamw(1e-2))
        self.step = fnrun.make_train_step(self.model, self.loss, self.optimizer)
        self.x = torch.linspace(-1, 1, 80).view(20, 4)
        self.batches = data.arrays({"x": self.x, "y": self.x.sum(1, keepdim=True)}, 4, shuffle=True)

    @staticmethod
    def loss(model: Any, batch: Any) -> Any:
        return (model(batch["x"]) - batch["y"]).square().mean()

    def state(self) -> Any:
        return fnrun.TrainState.create(self.model, self.optimizer, seed=1)


class Kept:
    """A sink in memory."""

    def __init__(self) -> None:
        self.records: list[Any] = []
        self.is_open = False

    def open(self, state: Any) -> None:
        self.is_open = True
        self.records = [record for record in self.records if record.order <= state.position.order]

    def write(self, record: Any) -> None:
        assert self.is_open
        self.records.append(record)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.is_open = False
