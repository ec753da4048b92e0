"""What the tests of the folds share: how parts are merged, batches of ragged lengths, and one of every fold there is."""

from __future__ import annotations

import itertools
import random
from typing import Any

import torch
from hypothesis import settings, strategies as st

from fnrun import metrics
from fnrun.core import tree

unhurried = settings(deadline=None)
floats = st.floats(-100, 100, width=32)


def close(a, b):
    return torch.allclose(torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def merged(parts: list[Any], seed: int) -> Any:
    """The parts merged in an order and a tree that the seed draws."""
    draw, parts = random.Random(seed), list(parts)
    draw.shuffle(parts)
    while len(parts) > 1:
        i = draw.randrange(len(parts) - 1)
        parts[i : i + 2] = [parts[i].merge(parts[i + 1])]
    return parts[0]


def cut(tensors: tuple[Any, ...], seed: int) -> list[tuple[Any, ...]]:
    """The rows of some tensors as up to six batches of random lengths, some of them empty."""
    n, draw = len(tensors[0]), random.Random(seed)
    edges = [0, *sorted(draw.randint(0, n) for _ in range(draw.randint(0, 5))), n]
    return [tuple(t[a:b] for t in tensors) for a, b in itertools.pairwise(edges)]


def in_parts(build: Any, tensors: tuple[Any, ...], seed: int) -> Any:
    """What the fold of ragged batches computes, merged in random order and shape."""
    return merged([build(*part) for part in cut(tensors, seed)], seed).compute()


def agree(a: Any, b: Any, exactly: bool = True) -> None:
    """Two values are the same, a NaN being itself."""
    if exactly:
        assert tree.equal(a, b), tree.diff(a, b)
    else:
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, equal_nan=True)


def scored(seed: int, n: int, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores `[n, classes]` and labels, of which some are to be ignored."""
    labels = torch.randint(-1, classes, (n,), generator=generator(seed + 1))
    return torch.randn(n, classes, generator=generator(seed)).round(decimals=1), torch.where(labels < 0, -100, labels)


#: Each fold by name, made of scores and labels, and whether merging it in any order gives the same bits.
EVERY: dict[str, tuple[Any, bool]] = {
    "mean": (lambda s, y: metrics.mean(s), False),
    "sum": (lambda s, y: metrics.sum(y), True),
    "accuracy": (metrics.accuracy, True),
    "top_k": (lambda s, y: metrics.top_k(s, y, ks=(1, 2)), True),
    "confusion": (lambda s, y: metrics.confusion(s, y, 4), True),
    "precision": (metrics.precision, True),
    "recall": (lambda s, y: metrics.recall(s, y, average="weighted"), True),
    "f1": (lambda s, y: metrics.f1(s, y, average=None), True),
    "precision_recall_f1": (lambda s, y: metrics.precision_recall_f1(s[:, 0], y == 1, average="binary"), True),
    "iou": (metrics.iou, True),
    "mean_iou": (metrics.mean_iou, True),
    "auroc": (metrics.auroc, True),
    "auroc of two": (lambda s, y: metrics.auroc(s[:, 0], y == 1), True),
    "perplexity": (metrics.perplexity, False),
    "mae": (lambda s, y: metrics.mae(s[:, 0], y), False),
    "mse": (lambda s, y: metrics.mse(s[:, 0], y), False),
    "rmse": (lambda s, y: metrics.rmse(s[:, 0], y), False),
    "r2": (lambda s, y: metrics.r2(s[:, 0], y), False),
    "pearson": (lambda s, y: metrics.pearson(s[:, 0], y), False),
    "quantiles": (lambda s, y: metrics.quantiles(s), True),
}
#: Folds that keep all values, in the order in which they came.
COLLECTING: dict[str, Any] = {
    "collect": lambda s, y: metrics.collect(s),
    "collect several": lambda s, y: metrics.collect({"s": s, "y": y}),
    "exact auroc": lambda s, y: metrics.auroc(s, y, exact=True),
}
