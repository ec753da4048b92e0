"""Accuracy, confusion, precision, recall and F1, by counts: exact in any order of merging."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fnrun.core.counts import count
from fnrun.core.tree import static, struct
from fnrun.metrics.base import Additive, averaged, check_choice, check_labels, check_scores, is_class, to_accumulator_dtype
from fnrun.metrics.basic import Mean

# --- accuracy ----------------------------------------------------------------------------------------------------------


def accuracy(logits: Tensor, labels: Tensor, k: int = 1) -> Mean:
    """The share of examples whose label is among the `k` highest scores.

    - `logits`: float scores `[N, C]`, or `[N, C, ...]` for one decision a pixel.
    - `labels`: ints of that shape without `C`. A label outside the classes (`ignore_index`, as -100 or 255) omits its example.
    - `k=1`: from 1 to C.

    Of equal scores the lower class ranks higher. A NaN ranks above all numbers, and is a miss if it is the label's score.

    Raises ValueError for other shapes and types.

    >>> accuracy(torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.6, 0.4]]), torch.tensor([1, 0, 1])).compute()
    tensor(0.6667, dtype=torch.float64)
    """
    classes = check_scores("accuracy", logits, labels)
    k = count("accuracy: k", k)
    if k > classes:
        raise ValueError(f"accuracy: k={k} of {classes} classes")
    if k == 1:
        top = logits.argmax(1, keepdim=True)
        hit = (top.squeeze(1) == labels) & ~logits.gather(1, top).squeeze(1).isnan()
    else:
        hit = _classes_before(logits, labels) < k
    counted = is_class(labels.long(), classes)  # a narrow int cannot be compared with large numbers
    return Mean(to_accumulator_dtype((hit & counted).sum()), to_accumulator_dtype(counted.sum()))


@struct(name="fnrun.metrics.TopK")
class TopK(Additive):
    """The number of labels among the k highest scores, int64 `[ks]`, and the number of labels."""

    hits: Tensor
    counted: Tensor
    ks: tuple[int, ...] = static()

    def compute(self) -> dict[str, Tensor]:
        shares = to_accumulator_dtype(self.hits) / to_accumulator_dtype(self.counted).unsqueeze(-1)
        return {f"top{k}": share for k, share in zip(self.ks, shares.unbind(-1), strict=True)}


def top_k(logits: Tensor, labels: Tensor, ks: Sequence[int] = (1, 5)) -> TopK:
    """`accuracy` for several `k` at once: `{"accuracy": top_k(...)}` is reported as `accuracy/top1` and `accuracy/top5`.

    >>> folded = top_k(torch.tensor([[0.1, 0.6, 0.3], [0.8, 0.2, 0.0]]), torch.tensor([2, 0]), ks=(1, 2))
    >>> folded.compute()
    {'top1': tensor(0.5000, dtype=torch.float64), 'top2': tensor(1., dtype=torch.float64)}
    """
    classes = check_scores("top_k", logits, labels)
    ks = [count("top_k: each of ks", k) for k in ks]
    if not ks or any(not 1 <= k <= classes for k in ks) or len(set(ks)) < len(ks):
        raise ValueError(f"top_k: ks={tuple(ks)} of {classes} classes; wanted are different numbers from 1 to {classes}")
    ahead, counted = _classes_before(logits, labels), is_class(labels.long(), classes)
    return TopK(torch.stack([((ahead < k) & counted).sum() for k in ks]), counted.sum(), tuple(ks))


def _classes_before(logits: Tensor, labels: Tensor) -> Tensor:
    """The number of classes that rank above the label's."""
    classes = logits.shape[1]
    labels = labels.long()  # a narrow int cannot be compared with large numbers
    at = labels.clamp(0, classes - 1).unsqueeze(1)
    score = logits.gather(1, at)
    numbers = torch.arange(classes, device=logits.device).view(-1, *[1] * (logits.ndim - 2))
    before = ~(logits <= score) | ((logits == score) & (numbers < at))
    return before.sum(1)


# --- pairs of classes --------------------------------------------------------------------------------------------------


@struct(name="fnrun.metrics.Confusion")
class Confusion(Additive):
    """Counts of pairs: `counts[label, prediction]`, int64."""

    counts: Tensor

    def compute(self) -> Tensor:
        return self.counts


def confusion(predictions: Tensor, labels: Tensor, classes: int) -> Confusion:
    """The counts of pairs, `[classes, classes]`: a row for each label, a column for each prediction.

    `predictions` are ints of the shape of `labels`, or float scores `[N, C, ...]`, of which the highest is the prediction. Pairs with a
    label or a prediction outside `0 .. classes - 1` (`ignore_index`) are not counted.

    Raises ValueError for other shapes and types.

    >>> confusion(torch.tensor([0, 1, 1, 2]), torch.tensor([0, 1, 2, 2]), classes=3).compute()
    tensor([[1, 0, 0],
            [0, 1, 0],
            [0, 1, 1]])
    """
    predictions, labels, classes = _decided("confusion", predictions, labels, classes)
    inside = is_class(predictions, classes) & is_class(labels, classes)
    return Confusion(_counted(labels * classes + predictions, inside, classes * classes).view(classes, classes))


def _decided(what: str, predictions: Tensor, labels: Tensor, classes: int | None) -> tuple[Tensor, Tensor, int]:
    """The predicted classes and the labels, flat and int64, and the number of classes."""
    classes = None if classes is None else count(f"{what}: classes", classes)
    if predictions.is_floating_point():
        scored = check_scores(what, predictions, labels)
        if classes is not None and scored > classes:
            raise ValueError(f"{what}: scores of shape {tuple(predictions.shape)} have {scored} classes, more than {classes}")
        classes = classes or scored
        predictions = predictions.argmax(1)
    else:
        if predictions.shape != labels.shape:
            raise ValueError(f"{what}: predictions of shape {tuple(predictions.shape)} and labels of shape {tuple(labels.shape)} differ")
        check_labels(what, labels)
        if classes is None:
            raise ValueError(f"{what}: predicted class numbers do not say how many classes there are: give classes=")
    return predictions.reshape(-1).long(), labels.reshape(-1).long(), classes


def _counted(numbers: Tensor, wanted: Tensor, classes: int) -> Tensor:
    """The count of each wanted number."""
    cell = torch.where(wanted, numbers, classes)  # the others in an extra cell: to remove them would wait for the device
    return torch.zeros(classes + 1, dtype=torch.int64, device=numbers.device).index_add(0, cell, torch.ones_like(cell))[:-1]


# --- precision, recall, F1, intersection over union --------------------------------------------------------------------

AVERAGES = ("macro", "micro", "weighted", "binary", None)


@struct(name="fnrun.metrics.ClassCounts")
class ClassCounts(Additive):
    """For each class the counts of hits, predictions and labels: int64 `[classes]`; `[1]`, of the positive class, if it is binary.

    `measures` are the names of the values, averaged by `average`.
    """

    hits: Tensor
    predicted: Tensor
    labelled: Tensor
    measures: tuple[str, ...] = static()
    average: str | None = static()

    def compute(self) -> Tensor | dict[str, Tensor]:
        counts = to_accumulator_dtype(torch.stack([self.hits, self.predicted, self.labelled]))
        if self.average == "micro":
            counts = counts.sum(-1, keepdim=True)
        found = {measure: self._averaged(_measured(measure, *counts.unbind(0)), counts) for measure in self.measures}
        return found if len(found) > 1 else found[self.measures[0]]

    def _averaged(self, measured: Tensor, counts: Tensor) -> Tensor:
        _, predicted, labelled = counts.unbind(0)
        seen = predicted + labelled > 0
        if self.average in ("micro", "binary"):
            return torch.where(seen, measured, torch.nan).squeeze(-1)
        return averaged(measured, seen, labelled, self.average)


def _measured(measure: str, hits: Tensor, predicted: Tensor, labelled: Tensor) -> Tensor:
    parts, whole = {
        "precision": (hits, predicted),
        "recall": (hits, labelled),
        "f1": (2 * hits, predicted + labelled),
        "iou": (hits, predicted + labelled - hits),
    }[measure]
    return parts / whole.clamp(min=1)


def class_counts(
    what: str,
    predictions: Tensor,
    labels: Tensor,
    classes: int | None,
    measures: tuple[str, ...],
    average: str | None,
    ignore_index: int | None = None,
) -> ClassCounts:
    """The counts of one batch. A prediction outside the classes is a miss; a label outside of them omits its example."""
    predictions, labels, classes = _decided(what, predictions, labels, classes)
    valid = is_class(labels, classes)
    if ignore_index is not None:
        check_labels(f"{what}: ignore_index", torch.as_tensor(ignore_index))
        valid = valid & (labels != ignore_index)
    hits = _counted(labels, valid & (predictions == labels), classes)
    predicted = _counted(predictions, valid & is_class(predictions, classes), classes)
    return ClassCounts(hits, predicted, _counted(labels, valid, classes), measures, average)


def _binary_counts(what: str, predictions: Tensor, labels: Tensor, threshold: float, measures: tuple[str, ...]) -> ClassCounts:
    if predictions.shape != labels.shape:
        raise ValueError(
            f"{what}: average='binary' wants one score (or 0 or 1) for each label, and predictions of shape {tuple(predictions.shape)} "
            f"and labels of shape {tuple(labels.shape)} differ"
        )
    check_labels(what, labels, booleans=True)
    positive = predictions > threshold if predictions.is_floating_point() else predictions == 1
    labelled, valid = labels == 1, (labels == 0) | (labels == 1)
    hits, predicted, labelled = ((part & valid).sum().unsqueeze(0) for part in (positive & labelled, positive, labelled))
    return ClassCounts(hits, predicted, labelled, measures, "binary")


def _of_classes(
    what: str, predictions: Tensor, labels: Tensor, classes: int | None, average: str | None, threshold: float, *measures: str
) -> ClassCounts:
    check_choice(what, "average", average, AVERAGES)
    if average == "binary":
        return _binary_counts(what, predictions, labels, threshold, measures)
    return class_counts(what, predictions, labels, classes, measures, average)


def precision(
    predictions: Tensor, labels: Tensor, classes: int | None = None, *, average: str | None = "macro", threshold: float = 0.5
) -> ClassCounts:
    """The share of predictions of a class that are right: hits / predicted.

    - `predictions`: float scores `[N, C, ...]`, of which the highest is the prediction, or class numbers of the shape of `labels`, with
      `classes`. A prediction outside the classes is a miss.
    - `labels`: class numbers. A label outside the classes (`ignore_index`, as -100 or 255) omits its example.
    - `average`:
        - `"macro"` (the default): the mean over the classes that occur as label or prediction;
        - `"weighted"`: their mean weighted by labels;
        - `"micro"`: all classes counted together;
        - None: a tensor `[classes]`, NaN for a class that does not occur;
        - `"binary"`: class 1 alone. `predictions` are one float a label, or 0s and 1s.
    - `threshold=0.5`: binary floats above it are positive (0.0 for logits).

    A class without predictions has a precision of 0. Without examples the value is NaN.

    Raises ValueError for other shapes and types, and for an unknown `average`.

    >>> folded = precision(torch.tensor([0, 1, 1, 2]), torch.tensor([0, 1, 2, 2]), classes=3, average=None)
    >>> folded.merge(precision(torch.tensor([1]), torch.tensor([1]), classes=3, average=None)).compute()
    tensor([1.0000, 0.6667, 1.0000], dtype=torch.float64)
    """
    return _of_classes("precision", predictions, labels, classes, average, threshold, "precision")


def recall(
    predictions: Tensor, labels: Tensor, classes: int | None = None, *, average: str | None = "macro", threshold: float = 0.5
) -> ClassCounts:
    """The share of a class's labels that are predicted: hits / labelled. Arguments, averages and errors are those of `precision`.

    >>> recall(torch.tensor([0.9, 0.2, 0.7]), torch.tensor([1, 1, 0]), average="binary").compute()
    tensor(0.5000, dtype=torch.float64)
    """
    return _of_classes("recall", predictions, labels, classes, average, threshold, "recall")


def f1(
    predictions: Tensor, labels: Tensor, classes: int | None = None, *, average: str | None = "macro", threshold: float = 0.5
) -> ClassCounts:
    """The harmonic mean of precision and recall: 2 hits / (predicted + labelled). Arguments, averages and errors are those of `precision`.

    >>> f1(torch.tensor([0, 1, 1, 2]), torch.tensor([0, 1, 2, 2]), classes=3, average="micro").compute()
    tensor(0.7500, dtype=torch.float64)
    """
    return _of_classes("f1", predictions, labels, classes, average, threshold, "f1")


def precision_recall_f1(
    predictions: Tensor, labels: Tensor, classes: int | None = None, *, average: str | None = "macro", threshold: float = 0.5
) -> ClassCounts:
    """All three from the same counts, logged as `name/precision`, `name/recall` and `name/f1`.

    >>> precision_recall_f1(torch.tensor([1, 1, 0]), torch.tensor([1, 0, 0]), average="binary").compute()["recall"]
    tensor(1., dtype=torch.float64)
    """
    return _of_classes("precision_recall_f1", predictions, labels, classes, average, threshold, "precision", "recall", "f1")
