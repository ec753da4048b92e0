"""Bins that are as narrow as their values are small: counts of fixed size that know any value to a fixed relative error."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from fnrun.metrics.base import to_accumulator_dtype


@dataclasses.dataclass(frozen=True)
class Bins:
    """Bins over all floats, in their order, the last one for NaN.

    Each octave `[2^e, 2^(e+1))` from `2^low` to `2^high`, of either sign, is cut into `per_octave` equal bins, so that the two ends of a
    bin differ by at most a share `1 / per_octave`. Smaller magnitudes are one bin, larger ones one on either side. This is DDSketch
    (Masson, Rim and Lee, VLDB 2019) with its logarithm interpolated linearly: a value's bin is read off its bits, the same on every device.
    """

    low: int
    high: int
    per_octave: int

    @property
    def side(self) -> int:
        """How many bins there are on either side of the middle one, the outermost among them."""
        return (self.high - self.low) * self.per_octave + 1

    @property
    def size(self) -> int:
        """How many bins there are, that for NaN among them."""
        return 2 * self.side + 2

    def index(self, values: Tensor) -> Tensor:
        """The bin of each value, int64."""
        values = to_accumulator_dtype(values)
        magnitude = values.abs()
        mantissa, exponent = torch.frexp(magnitude)  # in [0.5, 1)
        step = ((2 * mantissa - 1) * self.per_octave).floor()
        place = (exponent - 1 - self.low) * self.per_octave + step + 1
        place = torch.where(magnitude < 2.0**self.low, 0, place)
        place = torch.where(magnitude >= 2.0**self.high, self.side, place)
        place = torch.where(values < 0, -place, place) + self.side
        return torch.where(values.isnan(), self.size - 1, place).long()

    def count(self, index: Tensor, wanted: Tensor | None = None) -> Tensor:
        """How many of the (wanted) values are in each bin, given the bin of each: over the last dimension, int64 `[..., size]`."""
        ones = torch.ones_like(index) if wanted is None else wanted.long()
        return torch.zeros(*index.shape[:-1], self.size, dtype=torch.int64, device=index.device).scatter_add(-1, index, ones)

    def middle(self, index: Tensor) -> Tensor:
        """The value that stands for a bin but that of NaN: at most a share `1 / (2 per_octave + 1)` from any value in it.

        The bin around 0 stands for 0, the outermost for the infinities.
        """
        place = (index - self.side).abs()
        step = (place - 1) % self.per_octave
        octave = torch.exp2(to_accumulator_dtype((place - 1 - step) // self.per_octave + self.low))
        start, end = octave * (1 + step / self.per_octave), octave * (1 + (step + 1) / self.per_octave)
        magnitude = torch.where(place == self.side, torch.inf, 2 * start * end / (start + end))
        return torch.where(place == 0, 0, torch.where(index < self.side, -magnitude, magnitude))
