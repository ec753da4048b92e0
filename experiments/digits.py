"""A small network on real handwritten digits, with randomness everywhere: shuffling, shifted images, dropout.

    python -m experiments.digits train --epochs 5 --optimizer.lr 3e-4
    python -m experiments.digits resume runs/digits/<name>
    python -m experiments.digits evaluate runs/digits/<name> --checkpoint best

The data are the 1,797 images of 8 x 8 pixels that scikit-learn ships (`load_digits`): 1,437 to train, 360 held out, a fixed stratified
split.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fnrun
from fnrun import data, hooks, metrics, observers, optim, schedules


class AdamW(msgspec.Struct, frozen=True, tag=True):
    """AdamW with warmup and cosine decay."""

    lr: float = 3e-3
    """peak learning rate"""
    weight_decay: float = 0.05
    """decoupled weight decay"""


class SGD(msgspec.Struct, frozen=True, tag=True):
    """SGD with Nesterov momentum, warmup and cosine decay."""

    lr: float = 0.1
    """peak learning rate"""
    momentum: float = 0.9
    """momentum"""


@dataclasses.dataclass(frozen=True)
class Config:
    epochs: int = 30
    """passes over the training images"""
    batch_size: int = 64
    """images a step"""
    seed: int = 0
    """of everything that is random"""
    dropout: float = 0.2
    """share of activations dropped"""
    ema: float = 0.95
    """decay of the averaged weights that validation uses"""
    workers: int = 0
    """processes that load the training images"""
    optimizer: AdamW | SGD = dataclasses.field(default_factory=AdamW)
    """how the weights are updated"""
    tensorboard: bool = False
    """also log to TensorBoard's event files in the run directory"""
    wandb: Literal["off", "offline", "online"] = "off"
    """also log to Weights & Biases"""


class Digits(torch.utils.data.Dataset):
    """One split of the digits: images [1, 8, 8] float32 in 0..1, labels int. With `shift`, each image moves by up to one pixel."""

    def __init__(self, train: bool, shift: bool) -> None:
        self.images, self.labels = split(train)
        self.shift = shift

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        image = self.images[index]
        if self.shift:
            down, right = torch.randint(0, 3, (2,)).tolist()
            image = F.pad(image, (1, 1, 1, 1))[:, down : down + 8, right : right + 8]
        return {"image": image, "label": self.labels[index]}


@functools.cache
def split(train: bool) -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16  # pyright: ignore[reportAttributeAccessIssue]
    labels = torch.tensor(digits.target)  # pyright: ignore[reportAttributeAccessIssue]
    kept, held_out = train_test_split(range(len(labels)), test_size=360, stratify=labels, random_state=0)
    rows = kept if train else held_out
    return images[rows], labels[rows]


def network(dropout: float) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Dropout(dropout), nn.Linear(64 * 4 * 4, 10),
    )  # fmt: skip


def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, object]]:
    logits = model(batch["image"])
    return F.cross_entropy(logits, batch["label"]), {"accuracy": metrics.accuracy(logits, batch["label"])}


def build(config: Config, run: fnrun.Run) -> fnrun.Experiment:
    with fnrun.Key(config.seed).fold_in("weights").scope():
        model = network(config.dropout)
    steps = config.epochs * -(-1437 // config.batch_size)
    schedule = schedules.warmup_cosine(peak=config.optimizer.lr, warmup=min(50, steps // 10), total=steps)
    match config.optimizer:
        case AdamW(weight_decay=decay):
            rule = optim.adamw(schedule, weight_decay=decay)
        case SGD(momentum=momentum):
            rule = optim.sgd(schedule, momentum=momentum, nesterov=True)
    optimizer = optim.chain(optim.clip_by_global_norm(1.0), rule)

    progress = observers.progress("images")
    sinks = [observers.console(), observers.jsonl(run.metrics)]
    if config.tensorboard:
        sinks.append(observers.tensorboard(run.path / "tensorboard"))
    if config.wandb != "off":
        sinks.append(observers.wandb(run.path, project="digits", mode=config.wandb, config=config, summary={"val/accuracy": "max"}))
    train_step = fnrun.make_train_step(model, loss_fn, optimizer)
    eval_step = fnrun.make_eval_step(model, loss_fn, weights="ema")
    train = fnrun.epoch_loop(train_step, hooks=[hooks.ema(config.ema)], observers=[observers.log(50, window=10), progress])
    val = fnrun.eval_loop(eval_step, observers=[progress])
    saving = observers.checkpoint(run.checkpoints, monitor="val/accuracy", mode="max", keep=3)
    return fnrun.Experiment(
        state=lambda: fnrun.TrainState.create(model, optimizer, seed=config.seed),
        program=fnrun.repeat(fnrun.sequence(train=train, val=val), config.epochs, observers=[observers.log(to=sinks), saving]),
        data={
            "train": lambda: data.loader(Digits(True, shift=True), config.batch_size, shuffle=True, workers=config.workers),
            "val": lambda: data.loader(Digits(False, shift=False), 360),
        },
        evaluate=fnrun.sequence(val=fnrun.eval_loop(eval_step)),
    )


if __name__ == "__main__":
    fnrun.main(build)
