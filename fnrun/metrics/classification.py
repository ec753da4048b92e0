"""Right and wrong classes, counted: accuracy, confusion, precision, recall and F1."""

from __future__ import annotations

import torch
from torch import Tensor

from fnrun.metrics.base import wide
from fnrun.metrics.basic import Mean
from fnrun.tree import struct


@struct
class Confusion:
    """Counts of pairs: `counts[label, prediction]`, int64."""

    __module__ = "fnrun.metrics"

    counts: Tensor

    def merge(self, other: Confusion) -> Confusion:
        return Confusion(self.counts + other.counts)

    def compute(self) -> Tensor:
        return self.counts


def accuracy(logits: Tensor, labels: Tensor, k: int = 1) -> Mean:
    """How often the label is among the `k` highest scores, over examples.

    `logits` are float scores `[N, C]`, or `[N, C, ...]` for one decision a pixel; `labels` are ints of that shape without `C`.
    Of equal scores the lower class counts as the higher one; a NaN counts above every number, and as a miss where it is the label's own.
    A label below 0 (such as `cross_entropy`'s `ignore_index`, -100) leaves its example out. Raises ValueError for other shapes and types.

    >>> accuracy(torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.6, 0.4]]), torch.tensor([1, 0, 1])).compute()
    tensor(0.6667, dtype=torch.float64)
    """
    classes = _check_scores("accuracy", logits, labels)
    if not 1 <= k <= classes:
        raise ValueError(f"accuracy: k={k} of {classes} classes")
    if k == 1:
        top = logits.argmax(1, keepdim=True)
        hit = (top.squeeze(1) == labels) & ~logits.gather(1, top).squeeze(1).isnan()
    else:
        at = labels.clamp(0, classes - 1).unsqueeze(1).long()
        own = logits.gather(1, at)
        numbers = torch.arange(classes, device=logits.device).view(-1, *[1] * (logits.ndim - 2))
        before = ~(logits <= own) | ((logits == own) & (numbers < at))
        hit = (before.sum(1) < k) & (labels < classes)
    counted = labels >= 0
    return Mean(wide((hit & counted).sum()), wide(counted.sum()))


def confusion(predictions: Tensor, labels: Tensor, classes: int) -> Confusion:
    """How often each label met each prediction: `[classes, classes]`, a row for each label, a column for each prediction.

    `predictions` are ints of the shape of `labels`, or float scores `[N, C, ...]`, of which the highest predicts.
    Pairs with a label or a prediction outside `0 .. classes - 1` (`ignore_index` is one) are not counted.
    Raises ValueError for other shapes and types.

    >>> confusion(torch.tensor([0, 1, 1, 2]), torch.tensor([0, 1, 2, 2]), classes=3).compute()
    tensor([[1, 0, 0],
            [0, 1, 0],
            [0, 1, 1]])
    """
    if predictions.is_floating_point():
        if _check_scores("confusion", predictions, labels) > classes:
            raise ValueError(
                f"confusion: scores of shape {tuple(predictions.shape)} have {predictions.shape[1]} classes, more than {classes}"
            )
        predictions = predictions.argmax(1)
    elif predictions.shape != labels.shape:
        raise ValueError(f"confusion: predictions of shape {tuple(predictions.shape)} and labels of shape {tuple(labels.shape)} differ")
    elif labels.is_floating_point():
        raise ValueError(f"confusion: labels are class numbers, not {labels.dtype}")
    predictions, labels = predictions.reshape(-1).long(), labels.reshape(-1).long()
    inside = (predictions >= 0) & (predictions < classes) & (labels >= 0) & (labels < classes)
    cell = torch.where(inside, labels * classes + predictions, classes * classes)
    counts = torch.zeros(classes * classes + 1, dtype=torch.int64, device=labels.device).index_add(0, cell, torch.ones_like(cell))
    return Confusion(counts[:-1].view(classes, classes))


def _check_scores(what: str, logits: Tensor, labels: Tensor) -> int:
    if not logits.is_floating_point() or logits.ndim < 2:
        raise ValueError(f"{what}: scores must be floats of shape [N, C, ...], not {logits.dtype} of shape {tuple(logits.shape)}")
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"{what}: labels are class numbers, not {labels.dtype}")
    if labels.shape != (wanted := (logits.shape[0], *logits.shape[2:])):
        raise ValueError(f"{what}: scores of shape {tuple(logits.shape)} want labels of shape {tuple(wanted)}, not {tuple(labels.shape)}")
    return logits.shape[1]
