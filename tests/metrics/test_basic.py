import pytest
import torch
from hypothesis import given, strategies as st
from torch.func import vmap  # pyright: ignore[reportPrivateImportUsage]

from fnrun import metrics
from fnrun.core import tree
from tests.metrics.folds import close, floats, unhurried

parts = st.lists(st.lists(floats, min_size=1, max_size=5), min_size=2, max_size=5)
BUILDERS = [metrics.mean, metrics.sum, metrics.min, metrics.max, metrics.last, lambda v: metrics.mean(v, weight=2 * v.abs() + 1)]


@pytest.mark.parametrize("build", BUILDERS)
@unhurried
@given(parts=parts, split=st.integers(1, 4))
def test_merging_is_associative(build, parts, split):
    folds = [build(torch.tensor(part)) for part in parts]
    split = min(split, len(folds) - 1)

    def merged(some):
        first, *rest = some
        for one in rest:
            first = first.merge(one)
        return first

    left, grouped = merged(folds), merged(folds[:split]).merge(merged(folds[split:]))
    assert type(left) is type(grouped)
    assert all(close(a, b) for a, b in zip(tree.leaves(left), tree.leaves(grouped), strict=True))


@unhurried
@given(parts)
def test_merged_is_what_it_would_be_at_once(parts):
    folds = [torch.tensor(part, dtype=torch.float64) for part in parts]
    whole = torch.cat(folds)
    for build, expected in (
        (metrics.mean, whole.mean()),
        (metrics.sum, whole.sum()),
        (metrics.min, whole.min()),
        (metrics.max, whole.max()),
    ):
        fold = build(folds[0])
        for part in folds[1:]:
            fold = fold.merge(build(part))
        assert close(fold.compute(), expected)
    assert torch.equal(metrics.last(folds[0]).merge(metrics.last(folds[1])).compute(), folds[1])


def test_a_mean_may_be_weighted():
    assert float(metrics.mean(torch.tensor([1.0, 3.0]), weight=torch.tensor([3.0, 1.0])).compute()) == 1.5
    assert float(metrics.mean(2.0, weight=3).merge(metrics.mean(5.0, weight=1)).compute()) == 2.75
    assert float(metrics.mean(torch.ones(2, 3), weight=torch.tensor([1.0, 2.0, 0.0])).weight) == 6
    with pytest.raises(ValueError, match=r"shape \(2, 1\) do not broadcast to values of shape \(2,\)"):
        metrics.mean(torch.ones(2), weight=torch.ones(2, 1))


def test_sums_of_ints_stay_ints():
    assert metrics.sum(torch.tensor([1, 2])).compute().dtype == torch.int64
    assert metrics.sum(torch.tensor([0.5, 2])).compute().dtype == torch.float64


def test_a_nan_is_not_lost():
    nan, one = torch.tensor(float("nan")), torch.tensor(1.0)
    for build in (metrics.mean, metrics.sum, metrics.min, metrics.max):
        assert build(one).merge(build(nan)).compute().isnan()


def test_float32_values_lose_nothing():
    values = torch.full((1000,), 16_777_217.0, dtype=torch.float64)
    fold = metrics.mean(values[0])
    for value in values[1:]:
        fold = fold.merge(metrics.mean(value))
    assert float(fold.compute()) == 16_777_217.0


def test_folds_go_through_vmap():
    def member(scores, labels):
        return metrics.accuracy(scores, labels), metrics.confusion(scores, labels, 3), metrics.mean(scores, 2.0), metrics.max(scores)

    scores, labels = torch.randn(4, 10, 3), torch.randint(0, 3, (4, 10))
    together = vmap(member)(scores, labels)
    for i in range(4):
        for all_folds, one in zip(together, member(scores[i], labels[i]), strict=True):
            assert close(all_folds.compute()[i], one.compute())


def test_weights_that_do_not_broadcast_are_told_with_what_to_do():
    values, rows = torch.arange(6.0).view(2, 3), torch.tensor([1.0, 3.0])
    with pytest.raises(ValueError, match=r"weights of shape \(2,\) do not broadcast to values of shape \(2, 3\), .*: weight\[:, None\] is"):
        metrics.mean(values, rows)
    assert metrics.mean(values, rows[:, None]).compute() == (values * rows[:, None]).sum() / 12
    with pytest.raises(ValueError, match=r"\(2, 3\) .* \(2, 3, 5, 1\), .*: weight\[:, :, None, None\] is"):
        metrics.mean(torch.ones(2, 3, 5, 1), torch.ones(2, 3))
    for single in (torch.ones(2), torch.ones(())):
        with pytest.raises(ValueError, match=r"\(2, 3\) do not broadcast .*give a value for each weight \(reduction=\"none\""):
            metrics.mean(single, torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"\(4,\) do not broadcast to values of shape \(2, 3\), .*one for each value"):
        metrics.mean(values, torch.ones(4))
    for weight in (2.0, torch.ones(3), torch.ones(1, 3), torch.ones(2, 1)):
        assert metrics.mean(values, weight).compute() == 2.5
