"""All values, in order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fnrun.core import tree
from fnrun.core.tree import struct


@struct(name="fnrun.metrics.Chunks")
class Chunks:
    """The rows of all batches, in order, in a few chunks: pytrees of tensors with the same number of rows."""

    chunks: tuple[Any, ...]

    def merge(self, other: Chunks) -> Chunks:
        return Chunks(joined((*self.chunks, *other.chunks), lambda a, b: _rows(a) <= _rows(b), lambda a, b: tree.map(_cat, a, b)))

    def compute(self) -> Any:
        return self.chunks[0] if len(self.chunks) == 1 else tree.map(lambda *parts: torch.cat(parts), *self.chunks)


def joined(chunks: tuple[Any, ...], joins: Callable[[Any, Any], bool], join: Callable[[Any, Any], Any]) -> tuple[Any, ...]:
    """The chunks, neighbours joined where `joins`: as the digits of a binary number, so that n rows are copied log(n) times."""
    found: list[Any] = []
    for chunk in chunks:
        while found and joins(found[-1], chunk):
            chunk = join(found.pop(), chunk)
        found.append(chunk)
    return tuple(found)


def _rows(chunk: Any) -> int:
    return len(tree.leaves(chunk)[0])


def _cat(one: Tensor, other: Tensor) -> Tensor:
    if one.shape[1:] != other.shape[1:]:
        raise ValueError(f"collect: rows of shape {tuple(other.shape[1:])} came after rows of shape {tuple(one.shape[1:])}")
    return torch.cat([one, other])


def collect(values: Any) -> Chunks:
    """All values in order: a tensor, concatenated along its first dimension, or several by name, `collect({"score": s, "label": y})`.

    A value without dimensions is one row. The fold, and each checkpoint within the pass, grows with the data.

    Raises ValueError where tensors of a batch differ in their number of rows, or batches in the shape of rows.

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
    """A copy: a view would keep the whole batch alive."""
    value = torch.as_tensor(value).detach()
    return (value if value.ndim else value.unsqueeze(0)).clone()
