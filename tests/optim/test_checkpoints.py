"""Every optimizer through real checkpoints and a made train step: the bits of the run that was never stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fnrun
from fnrun import optim
from fnrun.checkpoint import Checkpoints
from fnrun.testing import assert_same, states_seen

from . import cases


@pytest.mark.parametrize("accumulated", [False, True], ids=["plain", "accumulate(3)"])
@pytest.mark.parametrize("name", cases.OPTIMIZERS)
def test_resumes_from_disk_in_the_middle_of_a_run(name: str, accumulated: bool, tmp_path: Path) -> None:
    """Steps 4 and 8 of 12: between micro-steps where gradients are accumulated over three batches."""
    x = torch.linspace(-1, 1, 48).view(12, 4)

    def program() -> tuple[Any, Any]:
        with fnrun.Key(0).scope():
            layers = [nn.Linear(4, 8, bias=name != "muon"), nn.Dropout(0.3), nn.Linear(8, 2, bias=name != "muon")]
        model = nn.Sequential(*layers)
        inner = cases.OPTIMIZERS[name]()
        optimizer = optim.accumulate(3, inner) if accumulated else inner
        step = fnrun.make_train_step(model, lambda model, batch: model(batch).square().mean(), optimizer)
        return fnrun.step_loop(step, 12), fnrun.TrainState.create(model, optimizer, seed=1)

    loop, fresh = program()
    stream = fnrun.data.arrays(x, 2, shuffle=True)
    seen, end = states_seen(loop, fresh, stream)
    for state in (seen[3], seen[7]):
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(state)
        again, like = program()
        assert_same(again(Checkpoints(tmp_path).restore(like=like), stream), end, f"{name}, resumed at step {state.step}")
