"""What a fold is, and what all of them do alike.

Every struct of this package gives the package as its module: that is the name that checkpoints write, whichever file it stands in.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Protocol, Self

import torch
from torch import Tensor


class Fold(Protocol):
    """What is known of the data seen so far: a pytree of fixed size."""

    def merge(self, other: Self, /) -> Self:
        """The fold of both parts; associative, up to rounding."""
        ...

    def compute(self) -> Any:
        """The value: a tensor, or a dict of tensors by name."""
        ...


class Additive:
    """A fold that merges field by field: tensors are added, folds are merged. Its static fields say how it was made, the same in both.

    Raises ValueError for a fold that was made otherwise, or whose tensors have other shapes.
    """

    __slots__ = ()

    def merge(self, other: Self) -> Self:
        merged, cls = [], type(self)
        for name, setting in _fields(cls):
            ours, theirs = getattr(self, name), getattr(other, name)
            if setting:
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
    """Of each field, its name and whether it is a setting."""
    return tuple((field.name, not field.metadata.get("pytree_node", True)) for field in dataclasses.fields(cls))


def to_accumulator_dtype(values: Tensor) -> Tensor:
    """`values` in the widest float of their device."""
    return values.to(wide_dtype(values.device))


def wide_dtype(device: torch.device) -> torch.dtype:
    """float64, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64  # Apple's devices have no float64


def averaged(values: Tensor, seen: Tensor, weight: Tensor, average: str | None) -> Tensor:
    """One value for each class as one for all: `"macro"` over the classes that were seen, or `"weighted"`; or, for None, as they are.

    A class that was not seen is NaN, and has no part in an average.
    """
    if average is None:
        return torch.where(seen, values, torch.nan)
    weight = to_accumulator_dtype(seen) if average == "macro" else torch.where(seen, weight, 0)
    return torch.where(seen, values * weight, 0).sum(-1) / weight.sum(-1)


# --- what was given ----------------------------------------------------------------------------------------------------


def check_labels(what: str, labels: Tensor, booleans: bool = False) -> None:
    """Raise ValueError unless labels are class numbers."""
    if labels.is_floating_point() or (labels.dtype == torch.bool and not booleans):
        raise ValueError(f"{what}: labels are class numbers, not {labels.dtype}")


def check_scores(what: str, logits: Tensor, labels: Tensor) -> int:
    """How many classes the scores `[N, C, ...]` have. Raise ValueError where they are no scores, or not of these labels."""
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
    """Raise ValueError unless two folds that are to be merged were made alike."""
    if ours != theirs:
        raise ValueError(f"{what}: a fold with {name} {ours!r} does not merge with one with {theirs!r}: both are made in the same way")
