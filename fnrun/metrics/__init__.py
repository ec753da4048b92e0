"""Metrics as folds: values that merge, so that what is measured batch by batch is what would be measured at once.

A fold is a pytree with `merge(other) -> fold`, associative, and `compute() -> tensor`, or a dict of tensors. The functions here
make the fold of one batch. Nothing in this package waits for a device, and no fold grows with the data unless it was asked to keep it.
"""

from fnrun.metrics.base import Fold
from fnrun.metrics.basic import Last, Max, Mean, Min, Sum, last, max, mean, min, sum
from fnrun.metrics.classification import Confusion, accuracy, confusion
from fnrun.metrics.totals import Means, Totals, compute, examples, fold, values

__all__ = [
    "Confusion",
    "Fold",
    "Last",
    "Max",
    "Mean",
    "Means",
    "Min",
    "Sum",
    "Totals",
    "accuracy",
    "compute",
    "confusion",
    "examples",
    "fold",
    "last",
    "max",
    "mean",
    "min",
    "sum",
    "values",
]
