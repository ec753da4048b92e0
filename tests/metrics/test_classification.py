import pytest
import sklearn.metrics
import torch
import torchmetrics
from hypothesis import assume, given, strategies as st

from fnrun import metrics
from tests.metrics.folds import agree, generator, in_parts, scored, unhurried


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


# --- top-k, precision, recall, F1


@unhurried
@given(st.integers(0, 10**6), st.integers(1, 40))
def test_top_k_is_the_accuracy_of_each_k(seed, n):
    rows = scored(seed, n, classes=6)
    found = in_parts(lambda s, y: metrics.top_k(s, y, ks=(1, 3, 6)), rows, seed)
    for k in (1, 3, 6):
        agree(found[f"top{k}"], metrics.accuracy(*rows, k=k).compute())


def test_top_k_is_torchmetrics():
    scores, labels = torch.randn(50, 7, generator=generator(0)), torch.randint(0, 7, (50,), generator=generator(1))
    found = metrics.values({"accuracy": metrics.top_k(scores, labels)})
    for k in (1, 5):
        own = torchmetrics.functional.classification.multiclass_accuracy(scores, labels, 7, average="micro", top_k=k)
        assert float(found[f"accuracy/top{k}"]) == pytest.approx(float(own))


MEASURES = {
    "precision": (metrics.precision, sklearn.metrics.precision_score),
    "recall": (metrics.recall, sklearn.metrics.recall_score),
    "f1": (metrics.f1, sklearn.metrics.f1_score),
}


@pytest.mark.parametrize("average", ["macro", "micro", "weighted", None])
@pytest.mark.parametrize("measure", MEASURES)
@unhurried
@given(seed=st.integers(0, 10**6), n=st.integers(1, 30), classes=st.integers(2, 7))
def test_averages_are_scikit_learns(measure, average, seed, n, classes):
    ours, theirs = MEASURES[measure]
    scores, labels = scored(seed, n, classes)
    kept = labels >= 0
    assume(kept.any())
    predicted, actual = scores.argmax(1)[kept].numpy(), labels[kept].numpy()
    found = in_parts(lambda s, y: ours(s, y, average=average), (scores, labels), seed)
    expected = torch.as_tensor(theirs(actual, predicted, average=average, zero_division=0.0), dtype=torch.float64)
    if average is None:  # scikit-learn leaves out the classes that were not seen, here they are NaN
        assert found.shape == (classes,)
        found = found[~found.isnan()]
    agree(found, expected, exactly=False)
    agree(
        in_parts(lambda p, y: ours(p, y, classes, average=average), (scores.argmax(1), labels), seed),
        ours(scores, labels, average=average).compute(),
    )


@pytest.mark.parametrize("average", ["macro", "micro", "weighted"])
@pytest.mark.parametrize("measure", MEASURES)
def test_averages_are_torchmetrics(measure, average):
    own = getattr(torchmetrics.functional.classification, f"multiclass_{measure.replace('f1', 'f1_score')}")
    for seed in range(5):
        scores, labels = scored(seed, 40)
        expected = own(scores, labels, 4, average=average, ignore_index=-100).double()
        assert float(MEASURES[measure][0](scores, labels, average=average).compute()) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("measure", MEASURES)
@unhurried
@given(seed=st.integers(0, 10**6), n=st.integers(1, 30), threshold=st.sampled_from([0.0, 0.5]))
def test_binary_is_scikit_learns(measure, seed, n, threshold):
    ours, theirs = MEASURES[measure]
    scores, labels = torch.randn(n, generator=generator(seed)), torch.randint(0, 2, (n,), generator=generator(seed + 1))
    predicted = scores > threshold
    assume((predicted | (labels == 1)).any())
    expected = theirs(labels, predicted, zero_division=0.0)
    for given_labels in (labels, labels.bool()):
        found = in_parts(lambda s, y: ours(s, y, average="binary", threshold=threshold), (scores, given_labels), seed)
        assert float(found) == pytest.approx(expected)
    assert float(ours(predicted.int(), labels, average="binary").compute()) == pytest.approx(expected)


def test_what_was_never_seen():
    labels, wrong = torch.tensor([0, 0]), torch.tensor([1, 1])
    for ours, _ in MEASURES.values():
        assert float(ours(wrong, labels, 4).compute()) == 0  # all wrong
        assert ours(wrong, labels, 4, average=None).compute().isnan().tolist() == [False, False, True, True]
        for average in ("macro", "micro", "weighted", "binary"):
            assert ours(wrong, torch.full((2,), -100), 4, average=average).compute().isnan()
        assert ours(torch.tensor([0]), torch.tensor([0]), average="binary").compute().isnan()
    assert float(metrics.recall(torch.tensor([7, 1]), torch.tensor([1, 1]), 2, average=None).compute()[1]) == 0.5  # a miss, and no class


def test_three_at_once_are_each_alone():
    scores, labels = scored(0, 30)
    found = metrics.precision_recall_f1(scores, labels, average="weighted").compute()
    assert list(found) == list(MEASURES)
    for name, (ours, _) in MEASURES.items():
        agree(found[name], ours(scores, labels, average="weighted").compute())


@pytest.mark.parametrize("ignored", [-1, -100, 3, 255])
@pytest.mark.parametrize(
    "build",
    [
        metrics.accuracy,
        lambda x, y: metrics.accuracy(x, y, k=2),
        lambda x, y: metrics.top_k(x, y, ks=(1, 2)),
        metrics.perplexity,
        metrics.auroc,
        lambda x, y: metrics.auroc(x, y, exact=True),
        metrics.precision_recall_f1,
        metrics.mean_iou,
        lambda x, y: metrics.confusion(x, y, 3),
    ],
)
def test_a_label_that_is_no_class_leaves_its_example_out_of_every_metric(build, ignored):
    scores, labels = torch.randn(20, 3, generator=generator(0)), torch.randint(0, 3, (20,), generator=generator(1))
    some = torch.where(torch.arange(20) % 4 == 0, ignored, labels)
    kept = torch.arange(20) % 4 != 0
    agree(build(scores, some).compute(), build(scores[kept], labels[kept]).compute())


def test_narrow_labels_meet_more_classes_than_they_can_count():
    scores, labels = torch.randn(30, 300, generator=generator(0)), torch.randint(0, 256, (30,), generator=generator(1))
    for build in (
        lambda y: metrics.accuracy(scores, y, k=9),
        lambda y: metrics.top_k(scores, y),
        lambda y: metrics.f1(scores, y),
        lambda y: metrics.auroc(scores, y),
    ):
        agree(build(labels.to(torch.uint8)).compute(), build(labels).compute())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: metrics.top_k(torch.zeros(3, 4), torch.zeros(3, dtype=torch.long)), r"ks=\(1, 5\) of 4 classes"),
        (lambda: metrics.top_k(torch.zeros(3, 4), torch.zeros(3, dtype=torch.long), ks=()), "different numbers from 1 to 4"),
        (lambda: metrics.f1(torch.zeros(3, dtype=torch.long), torch.zeros(3, dtype=torch.long)), "give classes="),
        (
            lambda: metrics.f1(torch.zeros(3, 2), torch.zeros(3, dtype=torch.long), average="mean"),
            "average is one of 'macro', .*, None, not 'mean'",
        ),
        (lambda: metrics.f1(torch.zeros(3, 2), torch.zeros(3, dtype=torch.long), average="binary"), r"one score .*\(3, 2\) and .*\(3,\)"),
        (lambda: metrics.f1(torch.zeros(3), torch.zeros(3), average="binary"), "labels are class numbers, not torch.float32"),
        (
            lambda: metrics.f1(torch.zeros(3, 5, 2), torch.zeros(3, 5, dtype=torch.long)),
            r"classes last\? Then give scores.movedim\(-1, 1\)",
        ),
    ],
)
def test_what_cannot_be_counted_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
