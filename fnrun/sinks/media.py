"""Metrics that are no numbers: images, histograms and texts.

Each is a metric like another: a step may return it, a program's totals keep the newest, and a sink that cannot show it leaves it out.
"""

from __future__ import annotations

from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from fnrun.core.counts import count
from fnrun.core.tree import struct


class _Newest:
    """A fold that keeps the newest value, and computes to itself."""

    __slots__ = ()

    def merge(self, other: Self) -> Self:
        return other

    def compute(self) -> Self:
        return self


@struct(name="fnrun.observers.Image")
class Image(_Newest):
    """A picture: `[H, W]` or `[C, H, W]` with 1, 3 or 4 channels, bytes or floats in 0..1 (others are cut off there).

    >>> Image(torch.rand(1, 8, 8)).pixels().shape
    (8, 8, 1)
    """

    values: Tensor

    def pixels(self) -> np.ndarray:
        """Bytes `[H, W, C]`. Raises ValueError for a shape that is no picture's. Waits for the device."""
        values = self.values.detach().cpu()
        values = values.unsqueeze(0) if values.ndim == 2 else values
        if values.ndim != 3 or values.shape[0] not in (1, 3, 4):
            raise ValueError(f"an image is [H, W] or [C, H, W] with 1, 3 or 4 channels, not {tuple(self.values.shape)}")
        if values.dtype != torch.uint8:
            values = (values.float().nan_to_num().clamp(0, 1) * 255).round().to(torch.uint8)
        return values.permute(1, 2, 0).contiguous().numpy()


@struct(name="fnrun.observers.Text")
class Text(_Newest):
    """A text, such as a model's output."""

    text: str


@struct(name="fnrun.observers.Histogram")
class Histogram(_Newest):
    """How often values fell between `edges[i]` and `edges[i + 1]`: `counts` [bins], `edges` [bins + 1], float64. See `histogram`."""

    counts: Tensor
    edges: Tensor


Media = Image | Text | Histogram


def histogram(values: Any, bins: int = 64) -> Histogram:
    """The histogram of all finite elements of `values`, in `bins` bins from the smallest to the largest. Does not wait for a device.

    >>> histogram(torch.tensor([0.0, 1.0, 1.0, float("nan")]), bins=2)
    Histogram(counts=tensor([1., 2.], dtype=torch.float64), edges=tensor([0.0000, 0.5000, 1.0000], dtype=torch.float64))
    """
    bins = count("histogram: bins", bins)
    flat = torch.as_tensor(values).detach().reshape(-1).double()
    finite = flat.isfinite()
    if not flat.numel():
        flat, finite = flat.new_zeros(1), torch.zeros(1, dtype=torch.bool, device=flat.device)
    low = flat.where(finite, torch.inf).amin().nan_to_num(posinf=0.0)
    high = flat.where(finite, -torch.inf).amax().nan_to_num(neginf=0.0)
    width = torch.where(high > low, high - low, 1.0)
    cell = ((flat.where(finite, low) - low) / width * bins).long().clamp(0, bins - 1)
    counts = flat.new_zeros(bins).index_add(0, cell, finite.double())
    return Histogram(counts, low + width * torch.arange(bins + 1, device=flat.device) / bins)
