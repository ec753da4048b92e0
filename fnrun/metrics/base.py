"""What a fold is, the base of additive folds, and common checks.

The name of each struct begins with `fnrun.metrics`, whichever file it is in: checkpoints contain it.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Protocol, Self

import torch
from torch import Tensor


class Fold(Protocol):
    """The merged metric of some batches: a pytree of fixed size."""

    def merge(self, other: Self, /) -> Self:
        """The fold of both parts; associative, up to rounding."""
        ...

    def compute(self) -> Any:
        """The value: a tensor, or a dict of tensors by name."""
        ...


class Additive:
    """A fold that merges field by field: tensors are added, folds are merged, static fields are equal.

    Raises ValueError for folds with different static fields, or tensors of different shapes.
    """

    __slots__ = ()

    def merge(self, other: Self) -> Self:
        merged, cls = [], type(self)
        for name, is_static in _fields(cls):
            ours, theirs = getattr(self, name), getattr(other, name)
            if is_static:
                check_same(cls.__name__, name, ours, theirs)
            elif isinstance(ours, Tensor):
                if ours.shape != theirs.shape:
                    check_same(cls.__name__, f"{name} of shape", tuple(ours.shape), tuple(theirs.shape))
                ours = ours + theirs
            else:
                ours = ours.merge(theirs)
            merged.append(ours)
        return cls(*merged)


@functools.cache
def _fields(cls: Any) -> tuple[tuple[str, bool], ...]:
    """The name of each field, and whether it is static."""
    return tuple((field.name, not field.metadata.get("pytree_node", True)) for field in dataclasses.fields(cls))


def to_accumulator_dtype(values: Tensor) -> Tensor:
    """`values` in float64, or float32 on Apple's devices, which have no float64."""
    return values.to(torch.float32 if values.device.type == "mps" else torch.float64)


def averaged(values: Tensor, seen: Tensor, weight: Tensor, average: str | None) -> Tensor:
    """The average of one value for each class: `"macro"` over the classes that were seen, `"weighted"`, or None for all values.

    A class that was not seen is NaN, and not averaged.
    """
    if average is None:
        return torch.where(seen, values, torch.nan)
    weight = to_accumulator_dtype(seen) if average == "macro" else torch.where(seen, weight, 0)
    return torch.where(seen, values * weight, 0).sum(-1) / weight.sum(-1)


# --- checks ------------------------------------------------------------------------------------------------------------


def is_class(numbers: Tensor, classes: int) -> Tensor:
    """Which numbers are those of a class."""
    return (numbers >= 0) & (numbers < classes)


def check_labels(what: str, labels: Tensor, booleans: bool = False) -> None:
    """Raise ValueError unless labels are class numbers, or booleans where these are allowed."""
    if labels.is_floating_point() or (labels.dtype == torch.bool and not booleans):
        raise ValueError(f"{what}: labels are class numbers, not {labels.dtype}")


def check_scores(what: str, logits: Tensor, labels: Tensor) -> int:
    """The number of classes of scores `[N, C, ...]`. Raises ValueError where they are no scores, or have another shape than the labels."""
    if not logits.is_floating_point() or logits.ndim < 2:
        raise ValueError(f"{what}: scores must be floats of shape [N, C, ...], not {logits.dtype} of shape {tuple(logits.shape)}")
    check_labels(what, labels)
    if labels.shape != (wanted := (logits.shape[0], *logits.shape[2:])):
        hint = "; are the classes last? Then give scores.movedim(-1, 1)" if labels.shape == logits.shape[:-1] else ""
        raise ValueError(
            f"{what}: scores of shape {tuple(logits.shape)} want labels of shape {tuple(wanted)}, not {tuple(labels.shape)}{hint}"
        )
    return logits.shape[1]


def check_choice(what: str, name: str, value: object, choices: tuple[object, ...]) -> None:
    """Raise ValueError unless `value` is one of the choices."""
    if value not in choices:
        raise ValueError(f"{what}: {name} is one of {', '.join(repr(choice) for choice in choices)}, not {value!r}")


def check_same(what: str, name: str, ours: object, theirs: object) -> None:
    """Raise ValueError unless two folds have the same setting."""
    if ours != theirs:
        raise ValueError(f"{what}: a fold with {name} {ours!r} does not merge with one with {theirs!r}: both are made in the same way")
