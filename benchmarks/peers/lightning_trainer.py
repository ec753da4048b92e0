"""Lightning's Trainer: `barebones` (its own setting for measuring), plain, and with a `self.log` on each step.

The checkpoints, the model summary and the progress bar that it adds by itself are off, as its guide to speed advises.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytorch_lightning as lightning
import torch
from pytorch_lightning.loggers import CSVLogger
from torch import nn
from torch.utils.data import IterableDataset

from benchmarks.measure import Turns
from benchmarks.problems import Problem, loss_fn


class Module(lightning.LightningModule):
    def __init__(self, model: nn.Module, logs: bool, adamw: dict[str, Any]) -> None:
        super().__init__()
        self.model, self.logs, self.adamw = model, logs, adamw

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = loss_fn(self.model, batch)
        if self.logs:
            self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3, **self.adamw)


class Unsized(IterableDataset[Any]):
    """With a length, Lightning would not ask for the end of a pass, by which a turn ends."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns

    def __iter__(self) -> Iterator[Any]:
        return iter(self.turns)


def train(turns: Turns, problem: Problem, logs: bool = False, barebones: bool = False, **adamw: Any) -> None:
    quiet: dict[str, Any] = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(
        max_epochs=-1,
        accelerator="cpu",
        devices=1,
        **({"barebones": True} if barebones else {**quiet, "logger": CSVLogger(".") if logs else False, "log_every_n_steps": 50}),
    )
    trainer.fit(Module(problem.model, logs, adamw), Unsized(turns))
