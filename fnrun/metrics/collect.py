"""All values, kept: for what no fold of a fixed size can say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fnrun.core import tree
from fnrun.core.tree import struct


@struct(name="fnrun.metrics.Chunks")
class Chunks:
    """The rows of all batches, in order: a few chunks of them, each a pytree of tensors that have their rows in common."""

    chunks: tuple[Any, ...]

    def merge(self, other: Chunks) -> Chunks:
        # Each chunk is longer than all behind it, as the digits of a binary number: n rows are copied log(n) times, not n times.
        chunks = list(self.chunks)
        for chunk in other.chunks:
            chunks.append(chunk)
            while len(chunks) > 1 and _rows(chunks[-2]) <= _rows(chunks[-1]):
                last = chunks.pop()
                chunks[-1] = tree.map(_joined, chunks[-1], last)
        return Chunks(tuple(chunks))

    def compute(self) -> Any:
        return self.chunks[0] if len(self.chunks) == 1 else tree.map(lambda *parts: torch.cat(parts), *self.chunks)


def _rows(chunk: Any) -> int:
    return len(tree.leaves(chunk)[0])


def _joined(one: Tensor, other: Tensor) -> Tensor:
    if one.shape[1:] != other.shape[1:]:
        raise ValueError(f"collect: rows of shape {tuple(other.shape[1:])} came after rows of shape {tuple(one.shape[1:])}")
    return torch.cat([one, other])


def collect(values: Any) -> Chunks:
    """Every value, in order: a tensor, joined along its first dimension, or several by name: `collect({"score": s, "label": y})`.

    Its memory, and that of each checkpoint within the pass, grows with the data: the one fold that does so, besides those that say
    that they collect. A value without dimensions is one row. Raises ValueError where tensors or batches differ in their rows.

    >>> collect(torch.tensor([[1, 2]])).merge(collect(torch.tensor([[3, 4], [5, 6]]))).compute()
    tensor([[1, 2],
            [3, 4],
            [5, 6]])
    """
    if not isinstance(values, Mapping):
        return Chunks((_kept(values),))
    kept = {name: _kept(value) for name, value in values.items()}
    if len({len(value) for value in kept.values()}) != 1:
        raise ValueError(f"collect: tensors of one batch have as many rows, not { {name: len(value) for name, value in kept.items()} }")
    return Chunks((kept,))


def _kept(value: Any) -> Tensor:
    """A copy, for a view would keep the whole batch alive."""
    value = torch.as_tensor(value).detach()
    return (value if value.ndim else value.unsqueeze(0)).clone()
