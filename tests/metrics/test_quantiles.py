import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from fnrun import metrics
from fnrun.metrics.bins import Bins
from fnrun.metrics.quantiles import BINS
from tests.metrics.folds import agree, generator, in_parts, unhurried

ERROR = 1 / 129
anything = st.floats(allow_nan=False, allow_infinity=False, min_value=-1e12, max_value=1e12)


@unhurried
@given(st.lists(anything, min_size=1, max_size=50), st.floats(0, 1), st.integers(0, 10**6))
def test_a_quantile_is_numpys_to_the_stated_error(values, q, seed):
    expected = np.quantile(np.array(values), q, method="lower")
    found = in_parts(lambda v: metrics.quantiles(v, q), (torch.tensor(values, dtype=torch.float64),), seed)
    assert abs(float(found) - expected) <= ERROR * abs(expected) * (1 + 1e-12) + 2.0**-40


def test_the_error_is_of_the_size_that_is_stated():
    """Neither wider than it says, nor so narrow that the bins are more than they need to be."""
    values = torch.logspace(-11, 11, 100_001, dtype=torch.float64)
    values = torch.cat([-values, values])
    middles = BINS.middle(BINS.index(values))
    worst = float(((middles - values) / values).abs().max())
    assert 0.99 * ERROR < worst <= ERROR * (1 + 1e-12)


def test_bins_are_in_order_and_each_middle_is_in_its_own():
    bins = Bins(low=-3, high=4, per_octave=8)
    middles = bins.middle(torch.arange(bins.size - 1))
    assert (middles.diff() > 0).all()
    assert bins.index(middles).tolist() == list(range(bins.size - 1))
    assert bins.index(torch.tensor([float("nan"), -0.0, 2.0**-4, 2.0**-3, 16.0])).tolist() == [
        bins.size - 1, bins.side, bins.side, bins.side + 1, 2 * bins.side,
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64])
def test_any_dtype_and_shape(dtype):
    values = (torch.rand(4, 5, 6, generator=generator(0)) * 100).to(dtype)
    found = metrics.quantiles(values).compute()
    assert list(found) == ["p50", "p90", "p99"]
    for name, q in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
        assert float(found[name]) == pytest.approx(np.quantile(values.double().numpy(), q, method="lower"), rel=ERROR)


def test_the_extremes_are_exact_and_what_is_too_large_counts_as_one():
    values = torch.tensor([1e-300, -1e300, 3.0, float("inf"), 1e200], dtype=torch.float64)
    found = metrics.quantiles(values, (0.0, 0.25, 0.5, 0.75, 1.0)).compute()
    assert found["p0"] == -1e300
    assert found["p25"] == 0
    assert float(found["p50"]) == pytest.approx(3, rel=ERROR)
    assert found["p75"] == found["p100"] == float("inf")


def test_nothing_and_nan():
    nan = torch.tensor([1.0, float("nan")])
    assert metrics.quantiles(nan).merge(metrics.quantiles(torch.ones(5))).compute()["p50"].isnan()
    assert metrics.quantiles(torch.ones(0), 0.5).compute().isnan()
    agree(metrics.quantiles(torch.ones(0), 0.5).merge(metrics.quantiles(2.0, 0.5)).compute(), torch.tensor(2.0, dtype=torch.float64))


@pytest.mark.parametrize("q", [1.5, -0.1, (), (0.5, 2), float("nan")])
def test_no_quantile(q):
    with pytest.raises(ValueError, match="q is a number from 0 to 1, or several"):
        metrics.quantiles(torch.ones(3), q)
