"""Averages against torch's own `AveragedModel`."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fnrun
from fnrun import hooks, tree


def walked(model, steps, hook):
    """The state after so many ticks of a loop whose step moves the parameters at random, and the parameters at each."""
    seen = []

    @fnrun.step
    def move(state, batch):
        params = {name: p + torch.randn_like(p) if p.is_floating_point() else p for name, p in state.params.items()}
        seen.append(params)
        return state.replace(params=params), {}

    state, _ = fnrun.step_loop(move, steps, hooks=[hook])(fnrun.TrainState.create(model), [torch.zeros(1)])
    return state, seen


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.999])
@pytest.mark.parametrize("every", [1, 3])
def test_ema_is_torchs(decay, every):
    model = nn.Linear(3, 2)
    state, seen = walked(model, 10, hooks.ema(decay, every=every))
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
    for i, params in enumerate(seen, start=1):
        if i % every == 0:
            with torch.no_grad():
                for name, p in model.named_parameters():
                    p.copy_(params[name])
            theirs.update_parameters(model)
    for name, p in theirs.module.named_parameters():
        torch.testing.assert_close(state.memory["ema"]["params"][name], p.detach(), rtol=1e-6, atol=1e-6)


def test_the_first_update_copies_and_memory_owns_its_tensors():
    state, seen = walked(nn.Linear(3, 2), 1, hooks.ema(0.9))
    assert tree.equal(state.memory["ema"]["params"], seen[0])
    start = fnrun.TrainState.create(nn.Linear(3, 2))
    memory = hooks.ema(0.9).init(start)["params"]
    assert all(memory[name].data_ptr() != p.data_ptr() for name, p in start.params.items())


def test_every_holds_a_hook_with_memory_back():
    state, seen = walked(nn.Linear(1, 1), 5, hooks.every(2, hooks.ema(0.5)))
    expected = {name: (seen[1][name] + seen[3][name]) / 2 for name in seen[0]}
    for name, value in expected.items():
        torch.testing.assert_close(state.memory["ema"]["params"][name], value)


@pytest.mark.parametrize("bad", [-0.1, 1.0, 2.0])
def test_a_decay_that_is_none(bad):
    with pytest.raises(ValueError, match="decay is in"):
        hooks.ema(bad)
    with pytest.raises(ValueError, match="every is at least 1"):
        hooks.ema(0.5, every=0)
    with pytest.raises(ValueError, match="a whole number of at least 1"):
        hooks.every(0, hooks.ema(0.5))
