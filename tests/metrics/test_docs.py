"""The code of docs/metrics.md runs as it stands."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch

from fnrun import metrics, tree

PAGE = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()


@pytest.mark.filterwarnings("ignore:Metric .* will save all:UserWarning")
def test_the_code_of_the_page_runs():
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names: dict = {"__name__": "docs"}
    found = []
    for block in blocks:
        exec(compile(block, "docs/metrics.md", "exec", dont_inherit=True), names)
        found.append(sorted(names.get("results", ())))
    assert found[0] == [
        "accuracy/top1", "accuracy/top5", "auroc", "loss", "loss_of_examples/p50", "loss_of_examples/p90", "loss_of_examples/p99",
        "test/f1", "test/precision", "test/recall",
    ]  # fmt: skip
    assert found[-1] == ["calibration", "hinge", "several/MulticlassF1Score", "several/MulticlassMatthewsCorrCoef"]


def test_every_metric_is_on_the_page_and_in_its_code():
    functions = {name for name in metrics.__all__ if inspect.isfunction(getattr(metrics, name))} - {"values", "examples"}
    code = "\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL))
    assert [name for name in sorted(functions) if f"metrics.{name}(" not in code] == []


@pytest.mark.parametrize(("name", "size"), [("auroc", 41_024), ("quantiles", 81_968)])
def test_the_sizes_that_the_page_states(name, size):

    fold = {"auroc": lambda: metrics.auroc(torch.zeros(2), torch.tensor([0, 1])), "quantiles": lambda: metrics.quantiles(torch.zeros(2))}[
        name
    ]()
    assert sum(leaf.nbytes for leaf in tree.leaves(fold) if isinstance(leaf, torch.Tensor)) == size
