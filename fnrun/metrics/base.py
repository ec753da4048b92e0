"""What a fold is, and what all of them do alike.

Every struct of this package gives the package as its module: that is the name that checkpoints write, whichever file it stands in.
"""

from __future__ import annotations

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


def wide(values: Tensor) -> Tensor:
    return values.to(wide_dtype(values.device))


def wide_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # Apple's devices have no float64
