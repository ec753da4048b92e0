import numpy as np
import pytest
import sklearn.metrics
import torch
import torchmetrics
from hypothesis import given, strategies as st

from fnrun import metrics
from tests.metrics.folds import generator, in_parts, unhurried

ORACLES = {
    "mae": (metrics.mae, sklearn.metrics.mean_absolute_error, torchmetrics.functional.mean_absolute_error),
    "mse": (metrics.mse, sklearn.metrics.mean_squared_error, torchmetrics.functional.mean_squared_error),
    "rmse": (
        metrics.rmse,
        sklearn.metrics.root_mean_squared_error,
        lambda p, t: torchmetrics.functional.mean_squared_error(p, t, squared=False),
    ),
    "r2": (metrics.r2, lambda t, p: sklearn.metrics.r2_score(t, p), torchmetrics.functional.r2_score),
    "pearson": (metrics.pearson, lambda t, p: np.corrcoef(p, t)[0, 1], torchmetrics.functional.pearson_corrcoef),
}


def pair(seed, n, offset=0.0):
    targets = torch.randn(n, generator=generator(seed), dtype=torch.float64)
    return targets + 0.3 * torch.randn(n, generator=generator(seed + 1), dtype=torch.float64) + offset, targets + offset


@pytest.mark.parametrize("name", ORACLES)
@unhurried
@given(seed=st.integers(0, 10**6), n=st.integers(3, 50))
def test_errors_are_scikit_learns_and_torchmetrics(name, seed, n):
    ours, theirs, own = ORACLES[name]
    predictions, targets = pair(seed, n)
    found = in_parts(ours, (predictions, targets), seed)
    assert found.dtype == torch.float64
    assert float(found) == pytest.approx(theirs(targets, predictions), rel=1e-9, abs=1e-9)
    assert float(found) == pytest.approx(float(own(predictions, targets)), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("name", ["r2", "pearson"])
def test_values_far_from_zero_lose_nothing(name):
    """The textbook sums of squares would have lost every digit."""
    ours, theirs, _ = ORACLES[name]
    for seed in range(5):
        predictions, targets = pair(seed, 1000, offset=1e8)
        near = theirs(targets.numpy() - 1e8, predictions.numpy() - 1e8)
        assert float(in_parts(ours, (predictions, targets), seed)) == pytest.approx(near, abs=1e-6)


@pytest.mark.parametrize("name", ORACLES)
def test_elements_of_any_shape_and_dtype(name):
    ours = ORACLES[name][0]
    predictions, targets = (value.view(5, 4).bfloat16() for value in pair(0, 20))
    assert float(ours(predictions, targets).compute()) == float(ours(predictions.double().view(-1), targets.double().view(-1)).compute())
    assert ours(torch.zeros(0), torch.zeros(0)).compute().isnan()


def test_constant_values():
    ones, rising = torch.ones(4), torch.arange(4.0)
    assert metrics.r2(ones, ones).compute().isnan()
    assert metrics.r2(rising, ones).compute() == -torch.inf
    assert metrics.pearson(rising, ones).compute().isnan()
    assert float(metrics.r2(ones * 1.5, rising).compute()) == 0


@pytest.mark.parametrize("name", ORACLES)
def test_what_would_only_broadcast_is_refused(name):
    with pytest.raises(ValueError, match=rf"{name}: predictions of shape \(4, 1\) and targets of shape \(4,\) differ: squeeze"):
        ORACLES[name][0](torch.zeros(4, 1), torch.zeros(4))
