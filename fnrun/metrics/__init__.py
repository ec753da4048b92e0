"""Metrics as folds: values that merge, so that the merged batches have the value of all data at once.

A fold is a pytree with `merge(other) -> fold`, associative, and `compute() -> tensor`, or a dict of tensors. The functions here make the
fold of one batch. They do not wait for a device. Folds have a fixed size, except those that collect values.

    base             what a fold is; additive folds; checks
    basic            mean, sum, last, min, max
    classification   accuracy, confusion, precision, recall, F1
    segmentation     intersection over union
    auroc            the area under the ROC curve
    regression       errors, R2, correlation
    perplexity       of language models
    bins, quantiles  quantiles of a fixed relative error
    collect          all values
    adapter, naming  metrics of torchmetrics
    by_name          dictionaries of metrics
"""

import importlib
from typing import Any

from fnrun.core.examples import examples
from fnrun.metrics.adapter import TorchmetricsInputs, TorchmetricsState, from_torchmetrics
from fnrun.metrics.auroc import AUROC, ExactAUROC, auroc
from fnrun.metrics.base import Fold
from fnrun.metrics.basic import Last, Max, Mean, Min, Sum, last, max, mean, min, sum
from fnrun.metrics.by_name import values
from fnrun.metrics.classification import (
    ClassCounts,
    Confusion,
    TopK,
    accuracy,
    confusion,
    f1,
    precision,
    precision_recall_f1,
    recall,
    top_k,
)
from fnrun.metrics.collect import Chunks, collect
from fnrun.metrics.perplexity import Perplexity, perplexity
from fnrun.metrics.quantiles import Quantiles, quantiles
from fnrun.metrics.regression import R2, Moments, Pearson, RootMean, mae, mse, pearson, r2, rmse
from fnrun.metrics.segmentation import iou, mean_iou

__all__ = [
    "AUROC",
    "R2",
    "Chunks",
    "ClassCounts",
    "Confusion",
    "ExactAUROC",
    "Fold",
    "Last",
    "Max",
    "Mean",
    "Min",
    "Moments",
    "Pearson",
    "Perplexity",
    "Quantiles",
    "RootMean",
    "Sum",
    "TopK",
    "TorchmetricsInputs",
    "TorchmetricsState",
    "accuracy",
    "auroc",
    "collect",
    "confusion",
    "examples",
    "f1",
    "from_torchmetrics",
    "iou",
    "last",
    "mae",
    "max",
    "mean",
    "mean_iou",
    "min",
    "mse",
    "pearson",
    "perplexity",
    "precision",
    "precision_recall_f1",
    "quantiles",
    "r2",
    "recall",
    "rmse",
    "sum",
    "top_k",
    "values",
]


def __getattr__(name: str) -> Any:
    """The public names of the loops' totals, imported on access, since loops are on a floor above."""
    if name in ("Means", "Totals", "compute", "fold", "fold_each", "flushed"):
        return getattr(importlib.import_module("fnrun.loops.totals"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
