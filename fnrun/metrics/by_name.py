"""Dictionaries of metrics, as steps return them: their values, their weight, and learning rates among them."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from numbers import Real
from typing import Any

from torch import Tensor

from fnrun.core.examples import REMEDY, shapes
from fnrun.metrics.basic import Last


def values(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The values of metrics: folds are computed, tensors and numbers unchanged, dictionaries flattened to `name/key`."""
    return flat({name: value if isinstance(value, (Tensor, Real)) else value.compute() for name, value in metrics.items()})


def flat(values: dict[str, Any]) -> dict[str, Any]:
    """The entries of dictionaries under `name/key`. Raises ValueError where another metric has the name."""
    if dict not in {type(value) for value in values.values()}:
        return values
    nested = ({f"{name}/{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value} for name, value in values.items())
    flat: dict[str, Any] = {}
    for part in nested:
        if both := sorted(flat.keys() & part.keys()):
            raise ValueError(
                f"two metrics are named {', '.join(map(repr, both))}: one would be lost; a fold of several values is `name/key`"
            )
        flat.update(part)
    return flat


def rates_last(metrics: Mapping[str, Any]) -> Mapping[str, Any]:
    """The metrics with each learning rate (`lr`, or a name that ends in `/lr`) as `Last`: its mean has no use.

    >>> rates_last({"loss": 0.5, "decay/lr": 0.1})
    {'loss': 0.5, 'decay/lr': Last(value=0.1)}
    """
    rates = _rates(tuple(metrics))
    if not rates:
        return metrics
    return {**metrics, **{name: Last(metrics[name]) for name in rates if not hasattr(metrics[name], "merge")}}


@functools.lru_cache(maxsize=256)
def _rates(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in names if _RATE.search(name))


_RATE = re.compile(r"(^|/)lr(_\d+)?$")  # a second optimizer reports `lr_2`


def weight(examples: int | None, batch: Any, metrics: Mapping[str, Any]) -> int:
    """The weight of plain metrics: the number of `examples` in the batch, None if it is unclear.

    Raises ValueError where it is unclear and there are plain metrics.
    """
    if examples is not None:
        return examples
    unweighted = {"skipped", *_rates(tuple(metrics))}
    if plain := [name for name, value in metrics.items() if not hasattr(value, "merge") and name not in unweighted]:
        raise ValueError(
            f"how many examples this batch has is not clear: {shapes(batch)}; and {', '.join(plain[:5])} would be averaged over "
            f"examples. Say it where the step is made, make_train_step or make_eval_step(..., {REMEDY}); or let the step return "
            "folds, metrics.mean(value, weight=n)"
        )
    return 1
