"""Law 1: a step's outputs are a function of its arguments, which stay as they are. Also for whole programs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from torch import nn

import fnrun
from fnrun import optim
from fnrun.testing import assert_pure
from tests.programs import build, fresh, lengths, programs


class Noisy(nn.Module):
    """Everything that tempts a step to be impure: batch norm, dropout, tied weights, noise, a frozen and an unused parameter."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.drop, self.b = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 4)
        self.b.weight = self.a.weight
        self.frozen = nn.Parameter(torch.ones(4), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return self.b(self.drop(self.norm(self.a(x)))) * self.frozen + 0.1 * torch.randn_like(x)


def loss_fn(model, batch):
    fnrun.report("noise", torch.rand(()))
    return F.mse_loss(model(batch), batch), {"mean": model(batch).mean()}


@pytest.mark.parametrize("optimizer", [optim.sgd(0.1, momentum=0.9, nesterov=True), optim.adamw(1e-2)])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_made_train_step_is_pure(optimizer, accumulate):
    model = Noisy()
    step = fnrun.make_train_step(model, loss_fn, optimizer, microbatches=accumulate)
    state = fnrun.TrainState.create(model, optimizer, seed=3)
    for _ in range(3):
        batch = torch.randn(8, 4)
        assert_pure(step, state, batch, model=model)
        state, _ = step(state, batch)


def test_made_eval_and_predict_steps_are_pure():
    model = Noisy()
    state = fnrun.TrainState.create(model, seed=3)
    assert_pure(fnrun.make_eval_step(model, loss_fn), state, torch.randn(8, 4), model=model)
    assert_pure(fnrun.make_predict_step(model, lambda model, x: model(x)), state, torch.randn(8, 4), model=model)


@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(programs, lengths)
def test_a_program_is_pure(program, lens):
    loop, data = build(program, lens)
    assert_pure(loop, fresh(), data)


def test_impurity_is_found():
    def step(state, batch):
        state.params["x"].add_(1.0)
        return state.replace(step=state.step + 1), {}

    with pytest.raises(AssertionError, match="changed its arguments"):
        assert_pure(step, fresh(), None)
    with pytest.raises(AssertionError, match="moved a global generator"):
        assert_pure(lambda state, batch: (state, {"r": torch.rand(1)}), fresh(), None)
    count = iter(range(10))
    with pytest.raises(AssertionError, match="two calls"):
        assert_pure(lambda state, batch: (state, {"n": next(count)}), fresh(), None)
