"""The table of docs/steps.md."""

from __future__ import annotations

import functools
import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import fnrun
from fnrun import metrics, optim
from tests.docs import pages


def test_the_folds_of_the_table_have_the_gradient_of_the_loss_that_they_stand_for() -> None:
    torch.manual_seed(0)
    model, weights = nn.Linear(4, 3).double(), torch.tensor([0.5, 1.0, 3.0]).double()
    batch = torch.randn(7, 4).double(), torch.tensor([0, -100, -100, 1, 2, -100, 1])
    optimizer = optim.sgd(0.1)
    state = fnrun.TrainState.create(model, optimizer)
    names = {"F": F, "metrics": metrics}
    rows = re.findall(r"^\| `(F\..*?)` \| `(metrics\..*?)` \|$", pages.text("steps.md"), re.MULTILINE)
    assert len(rows) == 3
    for scalar, fold in rows:
        y = batch[1] if "ignore_index" in scalar else batch[1].clamp(min=0)

        def loss(text: str, model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> Any:
            return eval(text, {**names, "z": model(batch[0]), "y": batch[1], "w": weights})

        (expected,) = torch.autograd.grad(loss(scalar, model, (batch[0], y)), [model.weight])
        for n in (1, 3):
            step = fnrun.make_train_step(model, functools.partial(loss, fold), optimizer, microbatches=n)
            torch.testing.assert_close(step.gradients(state, (batch[0], y))[0]["weight"], expected)
