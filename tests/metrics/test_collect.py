import pytest
import torch

from fnrun import metrics
from fnrun.core import tree
from tests.metrics.folds import agree


def test_rows_are_copied_rarely_and_held_in_few_chunks():
    fold = metrics.collect(torch.tensor([0]))
    copied = 0
    for i in range(1, 1000):
        before = {id(leaf) for leaf in tree.leaves(fold)}
        fold = fold.merge(metrics.collect(torch.tensor([i])))
        copied += sum(len(leaf) for leaf in tree.leaves(fold) if id(leaf) not in before)
    assert len(fold.chunks) <= 10
    assert copied < 1000 * 11
    agree(fold.compute(), torch.arange(1000))


def test_a_batch_may_be_freed_and_written_to():
    batch = torch.zeros(100, 3, requires_grad=True)
    fold = metrics.collect(batch[:1])
    with torch.no_grad():
        batch += 1
    assert fold.compute().tolist() == [[0, 0, 0]]
    assert fold.compute().untyped_storage().nbytes() == 12
    assert not fold.compute().requires_grad


def test_scalars_are_rows_and_names_stay():
    fold = metrics.collect({"a": 1.0, "b": torch.tensor([[1, 2]])}).merge(metrics.collect({"a": 2.0, "b": torch.tensor([[3, 4]])}))
    found = metrics.values({"it": fold})
    assert found["it/a"].tolist() == [1, 2]
    assert found["it/b"].tolist() == [[1, 2], [3, 4]]


def test_rows_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"as many rows, not \{'a': 2, 'b': 3\}"):
        metrics.collect({"a": torch.zeros(2), "b": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"rows of shape \(3,\) came after rows of shape \(2,\)"):
        metrics.collect(torch.zeros(1, 2)).merge(metrics.collect(torch.zeros(1, 3)))
