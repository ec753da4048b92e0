"""Errors of predicted numbers, explained variance, correlation."""

from __future__ import annotations

import torch
from torch import Tensor

from fnrun.core.tree import struct
from fnrun.metrics.base import Additive, to_accumulator_dtype
from fnrun.metrics.basic import Mean, mean


def mae(predictions: Tensor, targets: Tensor) -> Mean:
    """The mean absolute error over all elements. Raises ValueError unless `predictions` and `targets` have the same shape.

    >>> mae(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0])).compute()
    tensor(1., dtype=torch.float64)
    """
    predictions, targets = _pair("mae", predictions, targets)
    return mean((predictions - targets).abs())


def mse(predictions: Tensor, targets: Tensor) -> Mean:
    """The mean squared error over all elements; shapes and errors are those of `mae`.

    >>> mse(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0])).compute()
    tensor(2., dtype=torch.float64)
    """
    predictions, targets = _pair("mse", predictions, targets)
    return mean((predictions - targets).square())


@struct(name="fnrun.metrics.RootMean")
class RootMean(Additive):
    """The root of a mean."""

    mean: Mean

    def compute(self) -> Tensor:
        return self.mean.compute().sqrt()


def rmse(predictions: Tensor, targets: Tensor) -> RootMean:
    """The root of the mean squared error over all elements of all batches; shapes and errors are those of `mae`.

    >>> rmse(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0])).merge(rmse(torch.zeros(2), torch.zeros(2))).compute()
    tensor(1., dtype=torch.float64)
    """
    predictions, targets = _pair("rmse", predictions, targets)
    return RootMean(mean((predictions - targets).square()))


@struct(name="fnrun.metrics.Moments")
class Moments:
    """The number of rows of k variables, their means `[k]`, and the sums of products of deviations `[k, k]`, all float64.

    Merged as by Chan, Golub and LeVeque (1983), without cancellation for values far from 0.
    """

    rows: Tensor
    mean: Tensor
    products: Tensor

    @classmethod
    def of(cls, variables: Tensor) -> Moments:
        """The moments of `[k, rows]`."""
        rows = variables.new_full((), variables.shape[1])
        mean = variables.sum(1) / rows.clamp(min=1)
        deviations = variables - mean.unsqueeze(1)
        return cls(rows, mean, (deviations.unsqueeze(0) * deviations.unsqueeze(1)).sum(-1))

    def merge(self, other: Moments) -> Moments:
        rows = self.rows + other.rows
        share = (other.rows / rows.clamp(min=1)).unsqueeze(-1)
        apart = other.mean - self.mean
        shift = apart.unsqueeze(-1) * apart.unsqueeze(-2) * (self.rows.unsqueeze(-1) * share).unsqueeze(-1)
        return Moments(rows, self.mean + apart * share, self.products + other.products + shift)


@struct(name="fnrun.metrics.R2")
class R2(Additive):
    """The squared errors, and the moments of the targets."""

    errors: Tensor
    targets: Moments

    def compute(self) -> Tensor:
        return 1 - self.errors / self.targets.products[..., 0, 0]


def r2(predictions: Tensor, targets: Tensor) -> R2:
    """The share of the targets' variance that the predictions explain, over all elements: 1 - sum (t - p)^2 / sum (t - mean t)^2.

    Shapes and errors are those of `mae`. If all targets are equal it is -inf, or NaN for exact predictions.

    >>> r2(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0])).merge(r2(torch.tensor([5.0]), torch.tensor([5.0]))).compute()
    tensor(0.8750, dtype=torch.float64)
    """
    predictions, targets = _pair("r2", predictions, targets)
    return R2((targets - predictions).square().sum(), Moments.of(targets.reshape(1, -1)))


@struct(name="fnrun.metrics.Pearson")
class Pearson(Additive):
    """The moments of predictions and targets."""

    moments: Moments

    def compute(self) -> Tensor:
        products = self.moments.products
        scale = products[..., 0, 0].sqrt() * products[..., 1, 1].sqrt()
        return (products[..., 0, 1] / scale).clamp(-1, 1)


def pearson(predictions: Tensor, targets: Tensor) -> Pearson:
    """The linear correlation of predictions and targets over all elements; NaN if one is constant. Shapes and errors are those of `mae`.

    >>> folded = pearson(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 4.0])).merge(pearson(torch.tensor([3.0]), torch.tensor([6.0])))
    >>> round(float(folded.compute()), 6)
    1.0
    """
    predictions, targets = _pair("pearson", predictions, targets)
    return Pearson(Moments.of(torch.stack([predictions.reshape(-1), targets.reshape(-1)])))


def _pair(what: str, predictions: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    if predictions.shape != targets.shape:
        raise ValueError(
            f"{what}: predictions of shape {tuple(predictions.shape)} and targets of shape {tuple(targets.shape)} differ: "
            "squeeze or reshape one of them"
        )
    return to_accumulator_dtype(predictions.detach()), to_accumulator_dtype(targets.detach())
