"""Bins of a fixed relative width: counts of fixed size, with any value to a fixed relative error."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from fnrun.metrics.base import to_accumulator_dtype


@dataclasses.dataclass(frozen=True)
class Bins:
    """Bins over all floats, in their order, the last one for NaN.

    Each octave `[2^e, 2^(e+1))` from `2^low` to `2^high`, of either sign, is divided into `per_octave` equal bins: the ends of a bin differ
    by at most `1 / per_octave` of its value. Smaller magnitudes are in one bin, larger ones in one on either side.

    This is DDSketch (Masson, Rim and Lee, VLDB 2019) with a logarithm that is interpolated linearly: the bin is a function of the value's
    bits, the same on all devices.
    """

    low: int
    high: int
    per_octave: int

    @property
    def side(self) -> int:
        """The number of bins on either side of the middle one, with the outermost."""
        return (self.high - self.low) * self.per_octave + 1

    @property
    def size(self) -> int:
        """The number of bins, with that of NaN."""
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
        """The number of (wanted) values in each bin, over the last dimension of `index`: int64 `[..., size]`."""
        ones = torch.ones_like(index) if wanted is None else wanted.long()
        return torch.zeros(*index.shape[:-1], self.size, dtype=torch.int64, device=index.device).scatter_add(-1, index, ones)

    def middle(self, index: Tensor) -> Tensor:
        """A value for each bin except that of NaN, with a relative error of at most `1 / (2 per_octave + 1)` for all values in the bin.

        It is 0 for the bin around 0, and infinite for the outermost.
        """
        place = (index - self.side).abs()
        step = (place - 1) % self.per_octave
        octave = torch.exp2(to_accumulator_dtype((place - 1 - step) // self.per_octave + self.low))
        start, end = octave * (1 + step / self.per_octave), octave * (1 + (step + 1) / self.per_octave)
        magnitude = torch.where(place == self.side, torch.inf, 2 * start * end / (start + end))
        return torch.where(place == 0, 0, torch.where(index < self.side, -magnitude, magnitude))
