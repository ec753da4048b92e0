"""Metrics as folds: values that merge, so that what is measured batch by batch is what would be measured at once.

A fold is a pytree with `merge(other) -> fold`, associative, and `compute() -> tensor`, or a dict of tensors. The functions here
make the fold of one batch. Nothing in this module waits for a device, and no fold grows with the data.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from fnrun import tree
from fnrun.tree import struct


class Fold(Protocol):
    """What is known of the data seen so far: a pytree of fixed size."""

    def merge(self, other: Self, /) -> Self:
        """The fold of both parts; associative, up to rounding."""
        ...

    def compute(self) -> Any:
        """The value: a tensor, or a dict of tensors by name."""
        ...


# --- folds -------------------------------------------------------------------------------------------------------------


@struct
class Mean:
    """A weighted mean: `total` of weight times value, and `weight`, both float64; of any shape, each element on its own."""

    total: Tensor
    weight: Tensor

    def merge(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.weight + other.weight)

    def compute(self) -> Tensor:
        return self.total / self.weight


@struct
class Sum:
    """A sum: float64 for floats, int64 for ints."""

    total: Tensor

    def merge(self, other: Sum) -> Sum:
        return Sum(self.total + other.total)

    def compute(self) -> Tensor:
        return self.total


@struct
class Last:
    """The newest value."""

    value: Tensor

    def merge(self, other: Last) -> Last:
        return other

    def compute(self) -> Tensor:
        return self.value


@struct
class Min:
    """The smallest value; NaN where one was seen."""

    value: Tensor

    def merge(self, other: Min) -> Min:
        return Min(torch.minimum(self.value, other.value))

    def compute(self) -> Tensor:
        return self.value


@struct
class Max:
    """The largest value; NaN where one was seen."""

    value: Tensor

    def merge(self, other: Max) -> Max:
        return Max(torch.maximum(self.value, other.value))

    def compute(self) -> Tensor:
        return self.value


@struct
class Confusion:
    """Counts of pairs: `counts[label, prediction]`, int64."""

    counts: Tensor

    def merge(self, other: Confusion) -> Confusion:
        return Confusion(self.counts + other.counts)

    def compute(self) -> Tensor:
        return self.counts


# --- the fold of one batch ---------------------------------------------------------------------------------------------


def mean(values: Any, weight: Any = None) -> Mean:
    """The mean over all elements of `values`, each with its `weight` (a number, or a tensor that broadcasts to `values`; 1 if not given).

    >>> whole = mean(torch.tensor([1.0, 2.0, 3.0]))
    >>> whole.merge(mean(torch.tensor([7.0]))).compute()
    tensor(3.2500, dtype=torch.float64)
    """
    values = _wide(torch.as_tensor(values))
    if weight is None:
        return Mean(values.sum(), values.new_full((), values.numel()))
    weight = torch.as_tensor(weight, device=values.device).to(values.dtype)
    if torch.broadcast_shapes(weight.shape, values.shape) != values.shape:
        raise ValueError(f"mean: weights of shape {tuple(weight.shape)} do not broadcast to values of shape {tuple(values.shape)}")
    return Mean((values * weight).sum(), weight.expand_as(values).sum())


def sum(values: Any) -> Sum:
    """The sum over all elements."""
    values = torch.as_tensor(values)
    return Sum((_wide(values) if values.is_floating_point() else values).sum())


def last(value: Any) -> Last:
    """The value of the newest batch, as it is."""
    return Last(torch.as_tensor(value))


def min(values: Any) -> Min:
    """The smallest of all elements."""
    return Min(torch.as_tensor(values).amin())


def max(values: Any) -> Max:
    """The largest of all elements."""
    return Max(torch.as_tensor(values).amax())


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
    return Mean(_wide((hit & counted).sum()), _wide(counted.sum()))


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


def _wide(values: Tensor) -> Tensor:
    return values.to(_dtype(values.device))


def _dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # Apple's devices have no float64


# --- a dictionary of metrics, tick by tick -----------------------------------------------------------------------------


@struct
class Means:
    """The means of the plain tensors that come together in a tick, stacked, so that a tick is one addition; or that of one Python number.

    `total` and `weight` count in units of `unit` examples, those of the first batch. So for batches of one size nothing is rounded
    but the sum, and the mean of a single batch is its value.
    """

    names: tuple[str, ...]
    total: Any  # a tensor [names, ...], or a float
    weight: float
    unit: int

    def add(self, value: Any, examples: int) -> Means:
        if examples == self.unit:
            return Means(self.names, self.total + value, self.weight + 1.0, self.unit)
        # The product is rounded by itself: fused with the sum, its bits would depend on where in the stack the value stands.
        share = examples / self.unit
        return Means(
            self.names, self.total + (_wide(value) if isinstance(value, Tensor) else value) * share, self.weight + share, self.unit
        )

    def only(self, names: list[str]) -> Means:
        return Means(tuple(names), self.total[[self.names.index(name) for name in names]], self.weight, self.unit)


@struct
class Totals:
    """The metrics of the ticks so far, folded: `names` as they first came; tensors in `means`, Python numbers in `numbers`, folds in `folds`."""

    names: tuple[str, ...] = ()
    means: tuple[Means, ...] = ()
    numbers: dict[str, Means] = dataclasses.field(default_factory=dict)
    folds: dict[str, Any] = dataclasses.field(default_factory=dict)


def fold(totals: Totals | None, metrics: Mapping[str, Any], examples: int) -> Totals:
    """The totals with one more tick: its metrics by name, and how many examples its batch had.

    A tensor or a number is a mean over examples: each tick's value counts `examples` times, each element of a tensor on its own.
    A fold merges. A name may be missing from a tick, or come later: its total is over the ticks that had it.
    The result is a function of the ticks and their order alone, and its size does not grow with their number.

    Raises TypeError for what is no metric and for a name that is a fold in one tick and not in another, ValueError for a changed shape.

    >>> totals = fold(None, {"loss": torch.tensor(1.0), "seen": sum(torch.ones(3))}, examples=3)
    >>> compute(fold(totals, {"loss": torch.tensor(2.0), "seen": sum(torch.ones(1))}, examples=1))
    {'loss': tensor(1.2500, dtype=torch.float64), 'seen': tensor(4., dtype=torch.float64)}
    """
    old = totals if totals is not None else Totals()
    tensors: dict[str, Tensor] = {}
    numbers, folds = old.numbers, old.folds
    for name, value in metrics.items():
        if isinstance(value, Tensor):
            tensors[name] = value
        elif isinstance(value, Real):
            known = numbers.get(name) or Means((name,), 0.0, 0.0, examples or 1)
            numbers = {**numbers, name: known.add(float(value), examples)}
        elif hasattr(value, "merge") and hasattr(value, "compute"):
            folds = {**folds, name: _merge(name, folds[name], value) if name in folds else value}
        else:
            raise TypeError(f"metric {name!r} is a {type(value).__name__}: a metric is a tensor, a number or a fold (see fnrun.metrics)")
    means = _add(old.means, tensors, examples)
    fresh = [name for name in metrics if name not in old.names]
    if folds:
        plain = {*numbers, *(name for stack in means for name in stack.names)}
        for name in folds:
            if name in plain:
                raise TypeError(f"metric {name!r} is a {type(folds[name]).__name__} in one tick and a plain value in another")
    return Totals((*old.names, *fresh) if fresh else old.names, means, numbers, folds)


def _add(means: tuple[Means, ...], tensors: dict[str, Tensor], examples: int) -> tuple[Means, ...]:
    """`means` with the tensors of a tick. Those that no longer come together are parted, so there are never more of them than names."""
    added: list[Means] = []
    for stack in means:
        present: Sequence[str] = [name for name in stack.names if name in tensors]
        if not present:
            added.append(stack)
            continue
        if len(present) < len(stack.names):
            added.append(stack.only([name for name in stack.names if name not in tensors]))
            stack = stack.only(present)
        added.append(stack.add(_stacked(present, [tensors.pop(name) for name in present], stack.total.shape[1:]), examples))
    if tensors:
        groups: dict[Any, list[str]] = {}
        for name, value in tensors.items():
            groups.setdefault((value.shape, value.dtype, value.device), []).append(name)
        for (shape, _, _), names in groups.items():
            value = _wide(_stacked(names, [tensors[name] for name in names], shape))
            added.append(Means(tuple(names), torch.zeros_like(value), 0.0, examples or 1).add(value, examples))
    return tuple(added)


def _stacked(names: Sequence[str], values: list[Tensor], shape: torch.Size) -> Tensor:
    for name, value in zip(names, values, strict=True):
        if value.shape != shape:
            raise ValueError(f"metric {name!r} has shape {tuple(value.shape)}, and had {tuple(shape)} in the ticks before")
    if len({value.dtype for value in values}) > 1:  # stacked as they are, an int would be rounded to its neighbour's float32
        values = [_wide(value) for value in values]
    stacked = torch.stack(values)
    return stacked.detach() if stacked.requires_grad else stacked


def _merge(name: str, old: Any, new: Any) -> Any:
    if type(old) is not type(new):
        raise TypeError(f"metric {name!r} is a {type(old).__name__} in one tick and a {type(new).__name__} in another")
    return old.merge(new)


def compute(totals: Totals) -> dict[str, Any]:
    """The values by name, in the order in which the names first came: float64 tensors for what were tensors, floats for numbers.

    What a fold computes is under its name; of a fold that computes a dict, under `name/key`.
    """
    found: dict[str, Any] = {}
    for stack in totals.means:
        found.update(zip(stack.names, (stack.total / stack.weight).unbind(), strict=True))
    for name, number in totals.numbers.items():
        if name not in found:
            found[name] = number.total / number.weight if number.weight else float("nan")
            continue
        stack = next(stack for stack in totals.means if name in stack.names)  # a number in some ticks and a tensor in others
        ours, theirs = stack.weight * stack.unit, number.weight * number.unit
        found[name] = (found[name] * ours + number.total * number.unit) / (ours + theirs)
    found.update((name, value.compute()) for name, value in totals.folds.items())
    return _flat({name: found[name] for name in totals.names})


def values(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """One tick's metrics as values: folds computed, tensors and numbers as they are."""
    return _flat({name: value if isinstance(value, (Tensor, Real)) else value.compute() for name, value in metrics.items()})


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    if dict not in {type(value) for value in values.values()}:
        return values
    nested = ({f"{name}/{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value} for name, value in values.items())
    return {name: value for part in nested for name, value in part.items()}


def examples(batch: Any) -> int:
    """How many examples a batch has: the leading length of its first tensor that has one, else 1.

    >>> examples({"image": torch.zeros(8, 3), "label": torch.zeros(8)}), examples(3.5)
    (8, 1)
    """
    for leaf in (batch,) if isinstance(batch, Tensor) else tree.leaves(batch):
        if isinstance(leaf, (Tensor, np.ndarray)) and leaf.ndim:
            return len(leaf)
    return 1
