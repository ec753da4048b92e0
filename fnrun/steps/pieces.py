"""Microbatches: a batch in pieces, and what its pieces come to together."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import optree
import torch
from torch import Tensor

from fnrun import metrics as folds
from fnrun.metrics.base import wide
from fnrun.metrics.basic import Mean, Sum
from fnrun.steps.given import detached_all
from fnrun.steps.kinds import Metrics
from fnrun.steps.shell import Shell


class PairwiseSum:
    """A sum over the numbers 0..n-1 as a tree: neighbours (0, 1), (2, 3), ... join, then pairs of those; an odd one is passed up.

    Values come in the order of their numbers, some may be absent. They join by `+`, at most log2(n) + 1 of them live at a time.
    """

    def __init__(self) -> None:
        self._parts: list[tuple[int, Any]] = []  # (level, value), each level once
        self._next = 0

    def add(self, number: int, value: Any) -> None:
        while self._next < number:
            self._push(None)
        self._push(value)

    def _push(self, value: Any) -> None:
        level = 0
        while self._parts and self._parts[-1][0] == level:
            value, level = _joined(self._parts.pop()[1], value), level + 1
        self._parts.append((level, value))
        self._next += 1

    def result(self) -> Any:
        value = None
        for _, part in reversed(self._parts):
            value = _joined(part, value)
        return value


def _joined(a: Any, b: Any) -> Any:
    return b if a is None else a if b is None else a + b


class Weighed(NamedTuple):
    """The mean of a piece's loss; its weight (None: its rows); whether the whole is divided by the weights' sum."""

    mean: Any
    weight: Any
    divided: bool = True


@dataclasses.dataclass(frozen=True)
class Cut:
    """How a batch is cut: piece i of n holds rows `rows * i // n` to `rows * (i + 1) // n`; an empty one is absent."""

    name: str
    pieces: int = 1

    def rows(self, batch: Any) -> int:
        return folds.examples(batch)

    def __call__(self, batch: Any) -> Iterator[tuple[int, Any, int]]:
        """The number of each piece, the piece, its rows."""
        rows = self.rows(batch)
        edges = [rows * i // self.pieces for i in range(self.pieces + 1)]
        for i, (start, end) in enumerate(itertools.pairwise(edges)):
            if end > start:
                yield i, _between(batch, rows, start, end), end - start

    def mean_of(self, loss: Any, batch: Any) -> Weighed:
        """The mean that a loss comes to for this piece, and what it weighs."""
        if isinstance(loss, Tensor):
            return Weighed(loss, None)
        if isinstance(loss, Mean):
            weight = loss.weight
            if weight.requires_grad:
                raise ValueError(
                    f"{self.name}: the weight of a loss is data, and this one requires grad: give metrics.mean(values, weight.detach())"
                )
            return Weighed(loss.total / torch.where(weight == 0, 1, weight), weight)
        if isinstance(loss, Sum):
            rows = self.rows(batch)
            return Weighed(loss.total / rows, rows, divided=False)
        return Weighed(loss, None)  # which is refused as what it is


def _between(batch: Any, rows: int, start: int, end: int) -> Any:
    """Rows of a batch: of tensors and arrays of that length, and of lists with an entry for each example."""

    def entries(value: Any) -> bool:
        return isinstance(value, list) and len(value) == rows and not any(isinstance(v, (Tensor, np.ndarray)) for v in value)

    def cut(leaf: Any) -> Any:
        whole = isinstance(leaf, (Tensor, np.ndarray)) and leaf.ndim and len(leaf) == rows
        return leaf[start:end] if whole or entries(leaf) else leaf

    return optree.tree_map(cut, batch, is_leaf=entries)


# --- what pieces come to ------------------------------------------------------------------------------------------------


class Part:
    """What a piece came to, or several together: sums, weighted."""

    __slots__ = ("buffers", "divided", "grads", "metrics", "moved", "rows", "weight")

    def __init__(self, grads: list[Any], weight: Any, divided: bool, rows: int, buffers: Any, moved: Any, metrics: Any) -> None:
        self.grads, self.weight, self.divided, self.rows = grads, weight, divided, rows
        self.buffers, self.moved, self.metrics = buffers, moved, metrics

    def __add__(self, other: Part) -> Part:
        grads = [b if a is None else a if b is None else a + b for a, b in zip(self.grads, other.grads, strict=True)]
        metrics = dict(self.metrics)
        for name, value in other.metrics.items():
            metrics[name] = metrics[name].merge(value) if name in metrics else value
        weight, rows = self.weight + other.weight, self.rows + other.rows
        return Part(grads, weight, self.divided, rows, self.buffers + other.buffers, self.moved | other.moved, metrics)


class Joined:
    """How the pieces of one step come together; `buffers` are the step's own."""

    def __init__(self, name: str, shell: Shell, buffers: Mapping[str, Tensor]) -> None:
        self.name, self.buffers = name, buffers
        self.averages, self.counts = shell.statistics
        self._names = [name for name in self.averages if name in buffers]
        self._first: dict[str, Tensor] = {}
        self._others: dict[str, Tensor] = {}

    def part(self, grads: list[Any], loss: Weighed, rows: int, buffers: Mapping[str, Tensor], moved: set[str], metrics: Metrics) -> Part:
        weight = rows if loss.weight is None else loss.weight
        grads = [None if g is None else _summable(g) * weight for g in grads]
        for name in self.counts & buffers.keys():
            self._first.setdefault(name, buffers[name])
        for name in moved - self.counts - self.averages.keys():
            self._note(name, buffers[name])
        averages = [_summable(buffers[name]) * rows for name in self._names]
        return Part(grads, weight, loss.divided, rows, _Tensors(averages), moved, {k: _weighed(v, rows) for k, v in metrics.items()})

    def _note(self, name: str, value: Tensor) -> None:
        before = self._others.setdefault(name, value)
        if before is not value and not torch.equal(before, value):
            raise ValueError(
                f"{self.name}: the buffer {name!r} comes out of each microbatch with another value, and none of them is that of the whole batch. "
                "What is averaged over examples are the mean and variance of torch's norms: use microbatches=1, or keep it out of the state "
                "(register_buffer(..., persistent=False) for what is a cache)"
            )

    def result(self, whole: Part, dtypes: list[Any]) -> tuple[list[Any], dict[str, Tensor], Metrics]:
        weight: Any = whole.weight if whole.divided else 1
        grads = [None if g is None else (g / weight).to(dtype) for g, dtype in zip(whole.grads, dtypes, strict=True)]
        averages = dict(zip(self._names, whole.buffers, strict=True))
        buffers: dict[str, Tensor] = {}
        for name, before in self.buffers.items():
            if name in averages:
                buffers[name] = (averages[name] / whole.rows).to(before.dtype)
            else:
                buffers[name] = self._first.get(name, self._others.get(name, before))
        return grads, buffers, {name: detached_all(_value(value)) for name, value in whole.metrics.items()}


class _Tensors(list[Any]):
    def __add__(self, other: Any) -> Any:
        return _Tensors(a + b for a, b in zip(self, other, strict=True))


def _summable(tensor: Tensor) -> Tensor:
    """In float32 at least."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


class _PlainMean(NamedTuple):
    """Of a metric that is a plain value, a mean over examples."""

    total: Any
    rows: int

    def merge(self, other: _PlainMean) -> _PlainMean:
        return _PlainMean(self.total + other.total, self.rows + other.rows)


def _weighed(value: Any, rows: int) -> Any:
    if hasattr(value, "merge"):
        return value
    return _PlainMean((wide(value.detach()) if isinstance(value, Tensor) else value) * rows, rows)


def _value(metric: Any) -> Any:
    return metric.total / metric.rows if isinstance(metric, _PlainMean) else metric
