"""Means, sums, extremes, the last value."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fnrun.core.tree import struct
from fnrun.metrics.base import Additive, to_accumulator_dtype


@struct(name="fnrun.metrics.Mean")
class Mean(Additive):
    """A weighted mean: the `total` of weight times value, and the total `weight`, both float64 and of one shape; elementwise."""

    total: Tensor
    weight: Tensor

    def compute(self) -> Tensor:
        return self.total / self.weight


@struct(name="fnrun.metrics.Sum")
class Sum(Additive):
    """A sum: float64 for floats, int64 for ints."""

    total: Tensor

    def compute(self) -> Tensor:
        return self.total


@struct(name="fnrun.metrics.Last")
class Last:
    """The last value."""

    value: Tensor

    def merge(self, other: Last) -> Last:
        return other

    def compute(self) -> Tensor:
        return self.value


@struct(name="fnrun.metrics.Min")
class Min:
    """The smallest value; NaN if any value is NaN."""

    value: Tensor

    def merge(self, other: Min) -> Min:
        return Min(torch.minimum(self.value, other.value))

    def compute(self) -> Tensor:
        return self.value


@struct(name="fnrun.metrics.Max")
class Max:
    """The largest value; NaN if any value is NaN."""

    value: Tensor

    def merge(self, other: Max) -> Max:
        return Max(torch.maximum(self.value, other.value))

    def compute(self) -> Tensor:
        return self.value


# --- the fold of one batch ----------------------------------------------------------------------------------------------


def mean(values: Any, weight: Any = None) -> Mean:
    """The weighted mean over all elements of `values`.

    `weight=None` is 1 for each element; otherwise a number, or a tensor that broadcasts to `values`. Broadcasting aligns shapes at the last
    dimension, as in torch: a weight for each row of `values` [B, T] is `weight[:, None]`.

    Raises ValueError, with the shapes, for a weight that does not broadcast.

    >>> whole = mean(torch.tensor([1.0, 2.0, 3.0]))
    >>> whole.merge(mean(torch.tensor([7.0]))).compute()
    tensor(3.2500, dtype=torch.float64)
    """
    values = to_accumulator_dtype(torch.as_tensor(values))
    if weight is None:
        return Mean(values.sum(), values.new_full((), values.numel()))
    weight = torch.as_tensor(weight, device=values.device).to(values.dtype)
    if not _broadcasts(weight.shape, values.shape):
        raise ValueError(
            f"mean: weights of shape {tuple(weight.shape)} do not broadcast to values of shape {tuple(values.shape)}, for shapes are "
            f"aligned at the last dimension: {_remedy(weight.shape, values.shape)}"
        )
    return Mean((values * weight).sum(), weight.expand_as(values).sum())


def _broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    return len(shape) <= len(to) and all(n in (1, m) for n, m in zip(reversed(shape), reversed(to), strict=False))


def _remedy(weight: torch.Size, values: torch.Size) -> str:
    if weight == values[: len(weight)]:
        return f"weight[{', '.join([':'] * len(weight) + ['None'] * (len(values) - len(weight)))}] is one for each row"
    if values == weight[: len(values)]:
        return 'give a value for each weight (reduction="none" in torch\'s losses), or one weight for each value'
    return "give one weight, or one for each value"


def sum(values: Any) -> Sum:
    """The sum over all elements."""
    values = torch.as_tensor(values)
    return Sum((to_accumulator_dtype(values) if values.is_floating_point() else values).sum())


def last(value: Any) -> Last:
    """The value of the last batch, unchanged."""
    return Last(torch.as_tensor(value))


def min(values: Any) -> Min:
    """The smallest of all elements."""
    return Min(torch.as_tensor(values).amin())


def max(values: Any) -> Max:
    """The largest of all elements."""
    return Max(torch.as_tensor(values).amax())
