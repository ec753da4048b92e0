"""How well areas are covered: intersection over union."""

from __future__ import annotations

from torch import Tensor

from fnrun.metrics.classification import ClassCounts, class_counts


def iou(predictions: Tensor, labels: Tensor, classes: int | None = None, *, ignore_index: int | None = None) -> ClassCounts:
    """The intersection over union of each class over all pixels of all examples (Jaccard index): hits / (predicted + labelled - hits).

    `predictions` are float scores `[N, C, ...]`, of which the highest predicts, or class numbers of the shape of `labels`, with `classes`.
    A pixel whose label is `ignore_index`, or outside of the classes (as 255), is left out. The value is a tensor `[classes]`, NaN for a
    class that neither a label nor a prediction has shown. Exact; three counts a class. Raises ValueError for other shapes and types.

    >>> import torch
    >>> iou(torch.tensor([[0, 1, 1, 1]]), torch.tensor([[0, 1, 0, 255]]), classes=3).compute()
    tensor([0.5000, 0.5000,    nan], dtype=torch.float64)
    """
    return class_counts("iou", predictions, labels, classes, ("iou",), None, ignore_index)


def mean_iou(predictions: Tensor, labels: Tensor, classes: int | None = None, *, ignore_index: int | None = None) -> ClassCounts:
    """The mean of `iou` over the classes that a label or a prediction has shown (mIoU). Arguments and errors are those of `iou`.

    >>> import torch
    >>> mean_iou(torch.tensor([[0, 1, 1, 1]]), torch.tensor([[0, 1, 0, 255]]), classes=3).compute()
    tensor(0.5000, dtype=torch.float64)
    """
    return class_counts("mean_iou", predictions, labels, classes, ("iou",), "macro", ignore_index)
