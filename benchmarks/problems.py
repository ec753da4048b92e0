"""What is trained: a model, the loss of a batch, and batches that are there already."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]


class Problem(NamedTuple):
    model: nn.Module
    batches: Sequence[Batch]


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    return F.cross_entropy(model(x).flatten(0, -2), y.flatten())


def cut(x: Tensor, y: Tensor, size: int) -> list[Batch]:
    return [(a.clone(), b.clone()) for a, b in zip(x.split(size), y.split(size), strict=True)]


def tiny(batches: int = 2000) -> Problem:
    """64-64-10, ReLU, batches of 32: a step is so short that what is around it shows."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    return Problem(model, cut(torch.randn(32 * batches, 64), torch.randint(0, 10, (32 * batches,)), 32))


class Transformer(nn.Module):
    """A causal language model over bytes: six layers of 256, four heads, 128 positions; 4.9M parameters."""

    def __init__(self, width: int = 256, heads: int = 4, layers: int = 6, length: int = 128) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(256, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.place.weight[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def transformer(size: int, batches: int = 2) -> Problem:
    torch.manual_seed(0)
    text = torch.randint(0, 256, (size * batches, 129))
    return Problem(Transformer(), cut(text[:, :-1], text[:, 1:], size))


def cnn(batches: int = 10) -> Problem:
    """Three convolutions with batch norm on images of 3x32x32, batches of 32."""
    torch.manual_seed(0)
    widths = [3, 32, 64, 128]
    layers = [
        layer
        for before, after in pairwise(widths)
        for layer in (nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2))
    ]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))
    return Problem(model, cut(torch.randn(32 * batches, 3, 32, 32), torch.randint(0, 10, (32 * batches,)), 32))
