import numpy as np
import pytest
import sklearn.metrics
import torch
from hypothesis import assume, given, settings, strategies as st
from torch.func import vmap  # pyright: ignore[reportPrivateImportUsage]

from fnrun import metrics, tree

unhurried = settings(deadline=None)
floats = st.floats(-100, 100, width=32)
parts = st.lists(st.lists(floats, min_size=1, max_size=5), min_size=2, max_size=5)
BUILDERS = [metrics.mean, metrics.sum, metrics.min, metrics.max, metrics.last, lambda v: metrics.mean(v, weight=2 * v.abs() + 1)]


def close(a, b):
    return torch.allclose(torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64), rtol=1e-12, atol=1e-12)


# --- folds


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


# --- accuracy and confusion


@unhurried
@given(st.integers(0, 10**6), st.integers(1, 30), st.integers(2, 6), st.data())
def test_accuracy_is_scikit_learns(seed, n, classes, draw):
    generator = torch.Generator().manual_seed(seed)
    k = draw.draw(st.integers(1, classes))
    scores, labels = torch.randn(n, classes, generator=generator), torch.randint(0, classes, (n,), generator=generator)
    assume(k < classes)
    cut = draw.draw(st.integers(0, n))
    fold = metrics.accuracy(scores[:cut], labels[:cut], k).merge(metrics.accuracy(scores[cut:], labels[cut:], k))
    if k == 1:
        expected = sklearn.metrics.accuracy_score(labels, scores.argmax(1))
    else:
        given = (labels, scores) if classes > 2 else (labels, scores[:, 1] - scores[:, 0])
        expected = sklearn.metrics.top_k_accuracy_score(*given, k=k, labels=range(classes))
    assert float(fold.compute()) == expected


@unhurried
@given(st.integers(0, 10**6), st.integers(0, 30), st.integers(2, 5))
def test_confusion_is_scikit_learns(seed, n, classes):
    generator = torch.Generator().manual_seed(seed)
    predictions, labels = (torch.randint(0, classes, (n + 1,), generator=generator) for _ in range(2))
    fold = metrics.confusion(predictions[:n], labels[:n], classes).merge(metrics.confusion(predictions[n:], labels[n:], classes))
    assert fold.compute().tolist() == sklearn.metrics.confusion_matrix(labels, predictions, labels=range(classes)).tolist()


def test_top_k_of_one_is_the_first_highest():
    ties = torch.tensor([[1.0, 1.0, 0.0]] * 3)
    labels = torch.tensor([0, 1, 2])
    assert float(metrics.accuracy(ties, labels).compute()) == pytest.approx(1 / 3)
    assert float(metrics.accuracy(ties, labels, k=2).compute()) == pytest.approx(2 / 3)
    assert float(metrics.accuracy(torch.ones(3, 3), labels, k=2).compute()) == pytest.approx(2 / 3)
    assert float(metrics.accuracy(torch.full((4, 3), float("nan")), torch.tensor([2, 2, 1, 1]), k=2).compute()) == 0


def test_each_pixel_is_an_example():
    scores, labels = torch.randn(2, 4, 3, 5), torch.randint(0, 4, (2, 3, 5))
    fold = metrics.accuracy(scores, labels)
    assert float(fold.weight) == 30
    assert float(fold.compute()) == float((scores.argmax(1) == labels).double().mean())
    assert float(metrics.accuracy(scores, labels, k=4).compute()) == 1
    assert metrics.confusion(scores, labels, 4).compute().sum() == 30


def test_ignored_labels_are_left_out():
    scores, labels = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]]), torch.tensor([1, -100, 1])
    for k in (1, 2):
        fold = metrics.accuracy(scores, labels, k)
        assert (float(fold.total), float(fold.weight)) == (k, 2)
    assert metrics.confusion(scores, labels, 2).compute().tolist() == [[0, 0], [1, 1]]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: metrics.accuracy(torch.zeros(3), torch.zeros(3, dtype=torch.long)), r"\[N, C, ...\], not torch.float32 of shape \(3,\)"),
        (lambda: metrics.accuracy(torch.zeros(3, 2, dtype=torch.long), torch.zeros(3, dtype=torch.long)), "scores must be floats"),
        (lambda: metrics.accuracy(torch.zeros(3, 2), torch.zeros(4, dtype=torch.long)), r"want labels of shape \(3,\), not \(4,\)"),
        (lambda: metrics.accuracy(torch.zeros(3, 2), torch.zeros(3)), "labels are class numbers, not torch.float32"),
        (lambda: metrics.accuracy(torch.zeros(3, 2), torch.zeros(3, dtype=torch.long), k=3), "k=3 of 2 classes"),
        (
            lambda: metrics.confusion(torch.zeros(3, dtype=torch.long), torch.zeros(2, dtype=torch.long), 2),
            r"shape \(3,\) and .* \(2,\) differ",
        ),
        (lambda: metrics.confusion(torch.zeros(3, 4), torch.zeros(3, dtype=torch.long), 2), "4 classes, more than 2"),
    ],
)
def test_shapes_that_make_no_sense_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


# --- the dictionary


values = st.one_of(st.none(), floats)
ticks = st.lists(st.tuples(values, values, values, st.integers(1, 40)), min_size=1, max_size=8)


def folded(ticks, totals=None):
    for *three, n in ticks:
        named = {name: torch.tensor(v) for name, v in zip("abc", three, strict=True) if v is not None}
        if three[0] is not None:
            named |= {"number": three[0], "fold": metrics.mean(torch.full((n,), three[0]))}
        totals = metrics.fold(totals, named, n)
    return totals


@unhurried
@given(ticks)
def test_totals_are_means_weighted_by_examples(ticks):
    found = metrics.compute(folded(ticks))
    for i, name in enumerate("abc"):
        seen = [(tick[i], tick[3]) for tick in ticks if tick[i] is not None]
        assert (name in found) == bool(seen)
        if seen:
            expected = np.average([v for v, _ in seen], weights=[n for _, n in seen])
            assert close(found[name], expected)
            if i == 0:
                assert close(found["number"], expected)
                assert close(found["fold"], expected)
                assert type(found["number"]) is float


@unhurried
@given(ticks, st.integers(0, 8))
def test_totals_are_a_function_of_the_ticks(ticks, at):
    """Kept between any two ticks and taken up again: the same bits."""
    kept = folded(ticks[:at])
    assert tree.equal(folded(ticks[at:], tree.snapshot(kept)), folded(ticks))
    if kept is not None:
        before = tree.snapshot(kept)
        folded(ticks[at:], kept)
        assert tree.equal(kept, before)


@unhurried
@given(ticks)
def test_a_name_is_folded_alone(ticks):
    """What else is measured changes no bit of a metric."""
    alone = metrics.compute(folded([(None, b, None, n) for _, b, _, n in ticks]))
    assert tree.equal(alone.get("b"), metrics.compute(folded(ticks)).get("b"))


@unhurried
@given(st.floats(-1e6, 1e6), st.integers(1, 1000))
def test_the_mean_of_one_batch_is_its_value(value, n):
    found = metrics.compute(metrics.fold(None, {"x": torch.tensor(value, dtype=torch.float64), "y": value}, n))
    assert float(found["x"]) == found["y"] == value


def test_totals_do_not_grow():
    totals, first = None, None
    for i in range(300):
        named = {f"m{j}": torch.tensor(1.0) for j in range(6) if i % (j + 1) == 0}
        totals = metrics.fold(totals, named, 3)
        first = first if i != 60 else len(tree.leaves(totals))
    assert len(tree.leaves(totals)) == first
    assert all(float(value) == 1 for value in metrics.compute(totals).values())


def test_names_come_in_the_order_in_which_they_first_came():
    totals = metrics.fold(None, {"z": torch.tensor(1.0), "lr": 0.1}, 1)
    totals = metrics.fold(totals, {"b": torch.ones(2), "a": torch.tensor(1), "z": torch.tensor(2.0)}, 1)
    assert list(metrics.compute(totals)) == ["z", "lr", "b", "a"]


def test_vmapped_members_keep_their_own_means():
    totals = metrics.fold(None, {"loss": torch.tensor([1.0, 2.0]), "seen": torch.tensor(1.0)}, 4)
    totals = metrics.fold(totals, {"loss": torch.tensor([3.0, 4.0]), "seen": torch.tensor(1.0)}, 4)
    assert metrics.compute(totals)["loss"].tolist() == [2, 3]


def test_a_number_may_become_a_tensor():
    totals = metrics.fold(metrics.fold(None, {"aux": 0.0}, 3), {"aux": torch.tensor(4.0)}, 1)
    assert float(metrics.compute(totals)["aux"]) == 1
    assert float(metrics.compute(metrics.fold(totals, {"aux": 1}, 4))["aux"]) == pytest.approx(1)


def test_totals_keep_no_graph():
    loss = torch.ones((), requires_grad=True) * 2
    assert not any(leaf.requires_grad for leaf in tree.leaves(metrics.fold(None, {"loss": loss}, 1)) if isinstance(leaf, torch.Tensor))


def test_what_does_not_fit_is_refused():
    plain, fold = {"x": torch.tensor(1.0)}, {"x": metrics.sum(1)}
    for first, second in ((plain, fold), (fold, plain), ({"x": 1.0}, fold), (fold, {"x": 1.0})):
        with pytest.raises(TypeError, match="'x' is a Sum in one tick and a plain value in another"):
            metrics.fold(metrics.fold(None, first, 1), second, 1)
    with pytest.raises(TypeError, match="'x' is a Sum in one tick and a Mean in another"):
        metrics.fold(metrics.fold(None, fold, 1), {"x": metrics.mean(1.0)}, 1)
    with pytest.raises(TypeError, match="'x' is a str: a metric is a tensor, a number or a fold"):
        metrics.fold(None, {"x": "high"}, 1)
    with pytest.raises(ValueError, match=r"'x' has shape \(2,\), and had \(\) in the ticks before"):
        metrics.fold(metrics.fold(None, plain, 1), {"x": torch.ones(2)}, 1)


def test_values_are_those_of_one_tick():
    found = metrics.values({"loss": torch.tensor(1.0), "lr": 0.1, "top": metrics.max(torch.tensor([1, 3]))})
    assert tree.equal(found, {"loss": torch.tensor(1.0), "lr": 0.1, "top": torch.tensor(3)})


@tree.struct
class Range:
    """A fold that computes two values."""

    low: torch.Tensor
    high: torch.Tensor

    def merge(self, other):
        return Range(torch.minimum(self.low, other.low), torch.maximum(self.high, other.high))

    def compute(self):
        return {"low": self.low, "high": self.high}


def test_a_fold_of_several_values_is_named_by_each():
    ticks = [{"x": Range(torch.tensor(lo), torch.tensor(hi))} for lo, hi in ((1, 5), (0, 2))]
    assert {k: int(v) for k, v in metrics.values(ticks[0]).items()} == {"x/low": 1, "x/high": 5}
    totals = metrics.fold(metrics.fold(None, ticks[0], 1), ticks[1], 1)
    assert {k: int(v) for k, v in metrics.compute(totals).items()} == {"x/low": 0, "x/high": 5}


def test_examples_of_a_batch():
    assert metrics.examples({"id": torch.tensor(3), "x": torch.zeros(5, 2)}) == 5
    assert metrics.examples((np.zeros((4, 2)), torch.zeros(3))) == 4
    assert metrics.examples(torch.zeros(7)) == 7
    assert metrics.examples("text") == metrics.examples(None) == 1


def test_an_empty_batch_weighs_nothing():
    totals = metrics.fold(metrics.fold(None, {"x": torch.tensor(5.0)}, 0), {"x": torch.tensor(1.0)}, 2)
    assert float(metrics.compute(totals)["x"]) == 1


def test_a_nan_score_of_the_labels_own_class_is_a_miss_for_every_k():
    logits = torch.tensor([[float("nan"), 1.0, 0.0]])
    assert [metrics.accuracy(logits, torch.tensor([0]), k=k).compute().item() for k in (1, 2, 3)] == [0.0, 0.0, 0.0]


def test_an_int_keeps_its_bits_beside_a_float():
    first = {"a": torch.tensor(1.0), "b": torch.tensor(1.0)}
    totals = metrics.fold(metrics.fold(None, first, 1), {"a": torch.tensor(1.0), "b": torch.tensor(16777217)}, 1)
    assert metrics.compute(totals)["b"].item() == 8388609.0
