"""The code of docs/steps.md runs as it stands, and its SAM is the one that everybody writes by hand."""

from __future__ import annotations

import copy
import functools
import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import fnrun
from fnrun import metrics, optim
from tests import pages


def test_the_code_runs_and_sam_is_sam() -> None:
    sam = pages.names("steps.md")["sam"]
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1)).double()
    x, y = torch.randn(6, 3).double(), torch.randn(6, 1).double()
    loss_fn = lambda model, batch: (model(batch[0]) - batch[1]).square().mean()  # noqa: E731
    step = sam(fnrun.make_train_step(model, loss_fn, optim.sgd(0.1, momentum=0.9)), rho=0.1)
    state = fnrun.TrainState.create(model, optim.sgd(0.1, momentum=0.9))

    theirs = copy.deepcopy(model)
    optimizer = torch.optim.SGD(theirs.parameters(), 0.1, momentum=0.9)
    for _ in range(4):
        state, _ = step(state, (x, y))

        loss_fn(theirs, (x, y)).backward()
        statistics = [b.clone() for b in theirs.buffers()]
        with torch.no_grad():
            start = [p.clone() for p in theirs.parameters()]
            norm = torch.stack([p.grad.norm() for p in theirs.parameters()]).norm()  # pyright: ignore[reportOptionalMemberAccess]
            for p in theirs.parameters():
                p.add_(p.grad, alpha=(0.1 / norm).item())  # pyright: ignore[reportArgumentType]
        optimizer.zero_grad()
        loss_fn(theirs, (x, y)).backward()
        with torch.no_grad():
            for p, before in zip(theirs.parameters(), start, strict=True):
                p.copy_(before)
            for b, before in zip(theirs.buffers(), statistics, strict=True):
                b.copy_(before)
        optimizer.step()
        optimizer.zero_grad()

    torch.testing.assert_close(state.params, dict(theirs.named_parameters()))
    torch.testing.assert_close(state.buffers, dict(theirs.named_buffers()))


def test_the_folds_of_the_table_have_the_gradient_of_the_loss_that_they_stand_for() -> None:
    torch.manual_seed(0)
    model, weights = nn.Linear(4, 3).double(), torch.tensor([0.5, 1.0, 3.0]).double()
    batch = torch.randn(7, 4).double(), torch.tensor([0, -100, -100, 1, 2, -100, 1])
    optimizer = optim.sgd(0.1)
    state = fnrun.TrainState.create(model, optimizer)
    names = {"F": F, "metrics": metrics}
    rows = re.findall(r"^\| `(F\..*?)` \| `(metrics\..*?)` \|$", (pages.DOCS / "steps.md").read_text(), re.MULTILINE)
    assert len(rows) == 3
    for scalar, fold in rows:
        y = batch[1] if "ignore_index" in scalar else batch[1].clamp(min=0)

        def loss(text: str, model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> Any:
            return eval(text, {**names, "z": model(batch[0]), "y": batch[1], "w": weights})

        (expected,) = torch.autograd.grad(loss(scalar, model, (batch[0], y)), [model.weight])
        for n in (1, 3):
            step = fnrun.make_train_step(model, functools.partial(loss, fold), optimizer, microbatches=n)
            torch.testing.assert_close(step.gradients(state, (batch[0], y))[0]["weight"], expected)
