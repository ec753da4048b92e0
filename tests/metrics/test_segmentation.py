import pytest
import sklearn.metrics
import torch
import torchmetrics
from hypothesis import given, strategies as st

from fnrun import metrics
from tests.metrics.folds import agree, generator, in_parts, unhurried


def pictures(seed, n, classes):
    labels = torch.randint(0, classes + 1, (n, 3, 5), generator=generator(seed + 1))
    return torch.randn(n, classes, 3, 5, generator=generator(seed)), torch.where(labels == classes, 255, labels)


@unhurried
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(2, 30))
def test_iou_is_scikit_learns_jaccard_score(seed, n, classes):
    scores, labels = pictures(seed, n, classes)
    predictions, kept = scores.argmax(1), labels < 255
    expected = sklearn.metrics.jaccard_score(labels[kept], predictions[kept], average=None, zero_division=0.0)
    for pair in ((scores, labels), (predictions, labels)):
        found = in_parts(lambda p, y: metrics.iou(p, y, classes), pair, seed)
        assert found.shape == (classes,)
        agree(found[~found.isnan()], torch.as_tensor(expected), exactly=False)
        agree(in_parts(lambda p, y: metrics.mean_iou(p, y, classes), pair, seed), torch.tensor(expected.mean()), exactly=False)


@pytest.mark.parametrize("ignored", [0, 2, 255])
def test_an_ignored_class_is_left_out_as_in_torchmetrics(ignored):
    scores, labels = pictures(0, 4, 3)
    labels = labels.where(labels < 255, ignored)
    own = torchmetrics.classification.MulticlassJaccardIndex(3, average="none", ignore_index=ignored)
    expected = own(scores, labels).double()
    found = metrics.iou(scores, labels, ignore_index=ignored).compute()
    others = [c for c in range(3) if c != ignored]
    agree(found[others].float(), expected[others].float(), exactly=False)


def test_all_wrong_and_all_ignored():
    wrong, labels = torch.zeros(1, 2, 2, dtype=torch.long), torch.ones(1, 2, 2, dtype=torch.long)
    assert metrics.iou(wrong, labels, 3).compute().tolist()[:2] == [0, 0]
    assert metrics.iou(wrong, labels, 3).compute()[2].isnan()
    assert float(metrics.mean_iou(wrong, labels, 3).compute()) == 0
    assert metrics.mean_iou(wrong, labels + 254, 3).compute().isnan()
    with pytest.raises(ValueError, match=r"mean_iou: predictions of shape \(1, 2, 2\) and labels of shape \(1, 4\) differ"):
        metrics.mean_iou(wrong, labels.view(1, 4), 3)
