import pytest
import sklearn.metrics
import torch
import torchmetrics
from hypothesis import given, strategies as st

from fnrun import metrics
from tests.metrics.folds import agree, generator, in_parts, scored, unhurried


def binary(seed, n, ties):
    scores = torch.randn(n, generator=generator(seed), dtype=torch.float64) * 3
    labels = torch.randint(0, 2, (n,), generator=generator(seed + 1))
    labels[:2] = torch.tensor([0, 1])
    return scores.round() if ties else scores, labels


@unhurried
@given(seed=st.integers(0, 10**6), n=st.integers(2, 60), ties=st.booleans())
def test_exact_is_scikit_learns(seed, n, ties):
    scores, labels = binary(seed, n, ties)
    expected = sklearn.metrics.roc_auc_score(labels, scores)
    found = in_parts(lambda s, y: metrics.auroc(s, y, exact=True), (scores, labels), seed)
    assert float(found) == pytest.approx(expected, abs=1e-12)
    assert float(metrics.auroc(scores, labels.bool(), exact=True).compute()) == pytest.approx(expected, abs=1e-12)


@unhurried
@given(seed=st.integers(0, 10**6), n=st.integers(2, 200), scale=st.sampled_from([1e-6, 1e-2, 1.0, 1e6]), ties=st.booleans())
def test_bins_are_off_by_less_than_their_bound(seed, n, scale, ties):
    scores, labels = binary(seed, n, ties)
    folded = metrics.auroc(scores * scale, labels)
    apart = abs(float(folded.compute()) - sklearn.metrics.roc_auc_score(labels, scores))
    assert apart <= float(folded.bound()) + 1e-12


def test_the_bound_of_logits_is_small():
    scores, labels = binary(0, 20_000, ties=False)
    assert float(metrics.auroc(scores + labels, labels).bound()) < 2e-3
    assert float(metrics.auroc(torch.sigmoid(scores + labels), labels).bound()) < 1e-2


@pytest.mark.parametrize("average", ["macro", "weighted", None])
@unhurried
@given(seed=st.integers(0, 10**6), n=st.integers(30, 80))
def test_one_against_the_rest_is_scikit_learns(average, seed, n):
    logits = torch.randn(n, 3, generator=generator(seed), dtype=torch.float64)
    labels = torch.randint(0, 3, (n,), generator=generator(seed + 1))
    labels[:3] = torch.arange(3)
    expected = sklearn.metrics.roc_auc_score(labels, logits.softmax(1), multi_class="ovr", average=average)
    found = in_parts(lambda s, y: metrics.auroc(s, y, average=average, exact=True), (logits, labels), seed)
    agree(found, torch.as_tensor(expected, dtype=torch.float64), exactly=False)
    binned = metrics.auroc(logits, labels, average=average)
    assert ((binned.compute() - found).abs() <= binned.bound() + 1e-12).all()
    of_probabilities = metrics.auroc(logits.softmax(1).log(), labels, average=average, exact=True)
    torch.testing.assert_close(of_probabilities.compute(), found, rtol=0, atol=1e-3)


def test_it_is_torchmetrics_with_ignored_labels():
    logits, labels = torch.randn(200, 4, generator=generator(0)), scored(0, 200)[1]
    expected = torchmetrics.functional.classification.multiclass_auroc(logits, labels, 4, ignore_index=-100)
    assert float(metrics.auroc(logits, labels, exact=True).compute()) == pytest.approx(float(expected), abs=1e-6)
    assert float(metrics.auroc(logits, labels).compute()) == pytest.approx(float(expected), abs=2e-3)


def test_pixels_are_examples():
    logits, labels = torch.randn(2, 3, 4, 5, generator=generator(0)), torch.randint(0, 3, (2, 4, 5), generator=generator(1))
    flat = logits.movedim(1, -1).reshape(-1, 3), labels.reshape(-1)
    agree(metrics.auroc(logits, labels).compute(), metrics.auroc(*flat).compute())


def test_near_certain_classes_are_told_apart():
    """Their probabilities would all be 1."""
    logits = torch.tensor([[50.0, 0, 0], [60.0, 0, 0], [70.0, 0, 0]])
    for exact in (False, True):
        found = metrics.auroc(logits, torch.tensor([1, 0, 0]), average=None, exact=exact).compute()
        assert float(found[0]) == 1
        assert float(found[1]) == 1
        assert found[2].isnan()  # no label of its own


@pytest.mark.parametrize("exact", [False, True])
def test_the_worst_the_best_and_what_cannot_be_said(exact):
    def area(scores, labels):
        return metrics.auroc(torch.tensor(scores), torch.tensor(labels), exact=exact).compute()

    assert float(area([3.0, 2, -1], [0, 0, 1])) == 0
    assert float(area([-3.0, -2, 1], [0, 0, 1])) == 1
    assert float(area([0.0, 0, 0], [0, 1, 1])) == 0.5
    assert float(area([float("-inf"), float("inf"), 1e30, -1e30], [0, 1, 1, 0])) == 1
    assert float(area([1.0, 2, 9], [0, 1, -100])) == 1
    assert area([1.0, 2], [1, 1]).isnan()
    assert area([float("nan"), 2, 3], [1, 0, 1]).isnan()
    assert float(area([float("nan")] * 9 + [2, 3, 4], [-100] * 9 + [0, 1, 0])) == 0.5


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: metrics.auroc(torch.zeros(3, dtype=torch.long), torch.zeros(3, dtype=torch.long)), "scores are floats, not torch.int64"),
        (lambda: metrics.auroc(torch.zeros(3), torch.zeros(3)), "labels are class numbers, not torch.float32"),
        (lambda: metrics.auroc(torch.zeros(3, 1), torch.zeros(3, dtype=torch.long)), r"shape of the labels, \(3,\), not \(3, 1\)"),
        (lambda: metrics.auroc(torch.zeros(3, 2), torch.zeros(4, dtype=torch.long)), r"want labels of shape \(3,\), not \(4,\)"),
        (
            lambda: metrics.auroc(torch.zeros(3, 2), torch.zeros(3, dtype=torch.long), average="micro"),
            "'macro', 'weighted', None, not 'micro'",
        ),
    ],
)
def test_what_has_no_area_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("classes", [3, 7])
def test_equal_probabilities_are_ties(classes, dtype):
    """Logs of probabilities, and logits that are permuted and shifted, against scikit-learn's areas of the probabilities."""
    g = generator(classes)
    labels = torch.cat([torch.arange(classes), torch.randint(0, classes, (60,), generator=g)])
    counts = torch.randint(1, 4, (len(labels), classes), generator=g).to(dtype)
    probabilities = counts / counts.sum(1, keepdim=True)
    shifts = torch.randint(-3, 4, (len(labels), 1), generator=g).to(dtype)
    softmax = (counts.double() - 2).softmax(1).numpy().round(12)
    for scores, ordered in ((probabilities.log(), probabilities.numpy()), (counts + shifts, softmax)):
        found = metrics.auroc(scores, labels, average=None, exact=True).compute()
        areas = [sklearn.metrics.roc_auc_score(labels == c, ordered[:, c]) for c in range(classes)]
        assert found.tolist() == pytest.approx(areas, abs=1e-12)
