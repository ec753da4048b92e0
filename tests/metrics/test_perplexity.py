import math

import pytest
import torch
import torchmetrics
from hypothesis import given, strategies as st

from fnrun import metrics
from tests.metrics.folds import generator, in_parts, unhurried


def text(seed, n, vocabulary=11):
    labels = torch.randint(-1, vocabulary, (n, 6), generator=generator(seed + 1))
    labels[0, 0] = 1
    return torch.randn(n, vocabulary, 6, generator=generator(seed)) * 3, torch.where(labels < 0, -100, labels)


@unhurried
@given(st.integers(0, 10**6), st.integers(1, 12))
def test_it_is_torchmetrics_and_the_exponential_of_the_cross_entropy(seed, n):
    logits, labels = text(seed, n)
    found = in_parts(metrics.perplexity, (logits, labels), seed)
    assert float(found) == pytest.approx(math.exp(torch.nn.functional.cross_entropy(logits.double(), labels)), rel=1e-5)
    own = torchmetrics.functional.text.perplexity(logits.transpose(1, 2), labels, ignore_index=-100)
    assert float(found) == pytest.approx(float(own), rel=1e-4)


def test_it_is_no_mean_of_perplexities():
    sure, unsure = torch.tensor([[0.0, 100.0]]), torch.tensor([[0.0, 0.0]] * 3)
    ones = torch.ones(4, dtype=torch.long)
    folded = metrics.perplexity(sure, ones[:1]).merge(metrics.perplexity(unsure, ones[:3]))
    assert float(folded.compute()) == pytest.approx(2 ** (3 / 4))


def test_corners():
    logits = torch.zeros(2, 5, requires_grad=True)
    assert not metrics.perplexity(logits, torch.tensor([1, 2])).nll.requires_grad
    assert metrics.perplexity(logits, torch.tensor([-100, -1])).compute().isnan()
    assert float(metrics.perplexity(logits, torch.tensor([1, 5])).compute()) == pytest.approx(5)
    half = torch.randn(4, 50, generator=generator(0)).bfloat16()
    labels = torch.arange(4, dtype=torch.uint8)
    assert float(metrics.perplexity(half, labels).compute()) == pytest.approx(float(metrics.perplexity(half.double(), labels).compute()))
    with pytest.raises(ValueError, match=r"classes last\? Then give scores.movedim\(-1, 1\)"):
        metrics.perplexity(torch.zeros(2, 6, 11), torch.zeros(2, 6, dtype=torch.long))
