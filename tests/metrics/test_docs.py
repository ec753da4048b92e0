"""The sizes that docs/metrics.md states."""

from __future__ import annotations

import pytest
import torch

from fnrun import metrics
from fnrun.core import tree


@pytest.mark.parametrize(
    ("fold", "size"), [(metrics.auroc(torch.zeros(2), torch.tensor([0, 1])), 41_024), (metrics.quantiles(torch.zeros(2)), 81_968)]
)
def test_the_sizes_that_the_page_states(fold, size):
    assert sum(leaf.nbytes for leaf in tree.leaves(fold) if isinstance(leaf, torch.Tensor)) == size
