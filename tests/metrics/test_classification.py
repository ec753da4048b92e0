import pytest
import sklearn.metrics
import torch
from hypothesis import assume, given, strategies as st

from fnrun import metrics
from tests.metrics.folds import unhurried


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


def test_a_nan_score_of_the_labels_own_class_is_a_miss_for_every_k():
    logits = torch.tensor([[float("nan"), 1.0, 0.0]])
    assert [metrics.accuracy(logits, torch.tensor([0]), k=k).compute().item() for k in (1, 2, 3)] == [0.0, 0.0, 0.0]
