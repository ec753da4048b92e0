"""Intersection over union."""

from __future__ import annotations

from torch import Tensor

from fnrun.metrics.classification import ClassCounts, class_counts


def iou(predictions: Tensor, labels: Tensor, classes: int | None = None, *, ignore_index: int | None = None) -> ClassCounts:
    """The intersection over union of each class, over all pixels (Jaccard index): hits / (predicted + labelled - hits).

    - `predictions`: float scores `[N, C, ...]`, of which the highest is the prediction, or class numbers of the shape of `labels`, with
      `classes`.
    - `labels`: class numbers. A pixel with `ignore_index`, or a label outside the classes (as 255), is omitted.

    The value is a tensor `[classes]`, NaN for a class without labels and predictions. Raises ValueError for other shapes and types.

    >>> import torch
    >>> iou(torch.tensor([[0, 1, 1, 1]]), torch.tensor([[0, 1, 0, 255]]), classes=3).compute()
    tensor([0.5000, 0.5000,    nan], dtype=torch.float64)
    """
    return class_counts("iou", predictions, labels, classes, ("iou",), None, ignore_index)


def mean_iou(predictions: Tensor, labels: Tensor, classes: int | None = None, *, ignore_index: int | None = None) -> ClassCounts:
    """The mean of `iou` over the classes with labels or predictions (mIoU). Arguments and errors are those of `iou`.

    >>> import torch
    >>> mean_iou(torch.tensor([[0, 1, 1, 1]]), torch.tensor([[0, 1, 0, 255]]), classes=3).compute()
    tensor(0.5000, dtype=torch.float64)
    """
    return class_counts("mean_iou", predictions, labels, classes, ("iou",), "macro", ignore_index)
