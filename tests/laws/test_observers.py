"""Law 3: observers do not matter."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings
from torch import nn

import fnrun
from fnrun import data, hooks, observers, optim
from fnrun.testing import assert_observers_do_not_matter, assert_same
from tests.programs import build, fresh, lengths, programs


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(programs, lengths)
def test_observers_do_not_matter(program, lens):
    watching = [observers.log(2, to=[]), lambda state, metrics: torch.rand(1)]
    loop, data = build(program, lens, observers=watching[1:])
    assert_observers_do_not_matter(loop, fresh(), data)


def trained(*, validate: int | None, log: int | None, tmp_path):
    """The state after 4 epochs with dropout, shuffling and EMA."""
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(torch.linspace(-1, 1, p.numel()).view_as(p) * (i + 1))
    x = torch.linspace(-1, 1, 80).view(20, 4)

    def loss_fn(model, batch):
        return (model(batch["x"]) - batch["y"]).square().mean()

    optimizer = optim.adamw(1e-2)
    watching = [] if log is None else [observers.log(log, to=[observers.jsonl(tmp_path / f"{validate}-{log}.jsonl")])]
    steps = {"train": fnrun.epoch_loop(fnrun.make_train_step(model, loss_fn, optimizer), hooks=[hooks.ema(0.9)], observers=watching)}
    if validate is not None:
        steps["val"] = fnrun.every(validate, fnrun.eval_loop(fnrun.make_eval_step(model, loss_fn, weights="ema")))
    batches = data.arrays({"x": x, "y": x.sum(1, keepdim=True)}, 3, shuffle=True)
    state = fnrun.TrainState.create(model, optimizer, seed=1)
    state, _ = fnrun.repeat(fnrun.sequence(**steps), 4)(state, {"train": batches, "val": batches})
    return state.params, state.buffers, state.opt_state, state.memory, state.step


def test_validating_and_logging_change_no_bit(tmp_path):
    plain = trained(validate=None, log=None, tmp_path=tmp_path)
    for validate, log in [(1, None), (3, None), (None, 1), (None, 7), (1, 1)]:
        assert_same(trained(validate=validate, log=log, tmp_path=tmp_path), plain, f"validate={validate}, log={log}")
