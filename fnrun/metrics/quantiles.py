"""Quantiles of a value, in a fixed amount of memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fnrun.core.tree import static, struct
from fnrun.metrics.base import check_same, to_accumulator_dtype
from fnrun.metrics.bins import Bins

BINS = Bins(low=-40, high=40, per_octave=64)


@struct(name="fnrun.metrics.Quantiles")
class Quantiles:
    """The number of values in each bin (int64), and the smallest and the largest value."""

    counts: Tensor
    low: Tensor
    high: Tensor
    q: float | tuple[float, ...] = static()

    def merge(self, other: Quantiles) -> Quantiles:
        check_same("quantiles", "q", self.q, other.q)
        low, high = torch.minimum(self.low, other.low), torch.maximum(self.high, other.high)
        return Quantiles(self.counts + other.counts, low, high, self.q)

    def compute(self) -> Tensor | dict[str, Tensor]:
        below = self.counts[..., :-1].cumsum(-1)

        def quantile(q: float) -> Tensor:
            rank = (to_accumulator_dtype(below[..., -1:] - 1) * q).floor()
            value = BINS.middle((below <= rank).sum(-1)).clamp(self.low, self.high)  # low and high are NaN if any value is
            return torch.where(below[..., -1] > 0, value, torch.nan)

        return {f"p{100 * q:g}": quantile(q) for q in self.q} if isinstance(self.q, tuple) else quantile(self.q)


def quantiles(values: Any, q: float | Sequence[float] = (0.5, 0.9, 0.99)) -> Quantiles:
    """Quantiles over all elements, with a relative error of at most 1/129 (0.8%), in 82 kB (DDSketch: Masson, Rim and Lee, VLDB 2019).

    `q` is a number, for a tensor, or several, for a dict of `p50`, `p90` and so on. The quantile `q` of n elements is the one of rank
    `floor(q (n - 1))`, as in numpy's `method="lower"`; NaN if an element is NaN, or if there is none.

    The error holds for magnitudes from 2^-40 to 2^40 (1e-12 to 1e12). Smaller elements count as 0, larger ones as the smallest or the
    largest element, which are exact. Merging adds counts: the result has the same bits in any order.

    Raises ValueError for a `q` outside of 0 to 1.

    >>> quantiles(torch.arange(1, 1001)).merge(quantiles(torch.arange(1001, 2001))).compute()["p50"]
    tensor(1003.9841, dtype=torch.float64)
    """
    values = to_accumulator_dtype(torch.as_tensor(values)).reshape(-1).detach()
    wanted = q if isinstance(q, (int, float)) else tuple(float(one) for one in q)
    if any(not 0 <= one <= 1 for one in (wanted if isinstance(wanted, tuple) else (wanted,))) or wanted == ():
        raise ValueError(f"quantiles: q is a number from 0 to 1, or several, not {q!r}")
    if values.numel():
        low, high = values.amin(), values.amax()
    else:
        low, high = values.new_full((), torch.inf), values.new_full((), -torch.inf)
    return Quantiles(BINS.count(BINS.index(values)), low, high, wanted if isinstance(wanted, tuple) else float(wanted))
