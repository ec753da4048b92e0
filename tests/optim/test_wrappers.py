"""When an update happens: accumulation, skipping, looking ahead, unfreezing, loss scaling."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import fnrun
from fnrun import data, optim, schedules
from fnrun.core import tree
from fnrun.core.reports import collect
from fnrun.optim.lists import all_finite

from . import cases

P = cases.params()


def mean_of(like: cases.Tensors, steps: range) -> cases.Tensors:
    parts = [cases.grads(like, step) for step in steps]
    return {name: (parts[0][name] + parts[1][name] + parts[2][name]) / 3 for name in like}


def test_accumulation_is_one_update_with_the_mean_gradient() -> None:
    """Schedules count the updates, and the parameters stand still in between."""
    optimizer = optim.chain(optim.accumulate(3), optim.adamw(cases.CURVE))
    plain, now = optim.adamw(cases.CURVE), P
    state = plain.init(P)
    micro = list(cases.steps(optimizer, P, optimizer.init(P), 12))
    for update in range(4):
        assert all(micro[3 * update + i][0] is (micro[3 * update - 1][0] if update else P) for i in range(2))
        now, state = plain.update(mean_of(P, range(3 * update, 3 * update + 3)), state, now)
        assert tree.equal(now, micro[3 * update + 2][0])
        assert tree.equal(state, micro[3 * update + 2][1].inner)


def test_accumulation_treats_a_missing_gradient_as_zero_unless_it_is_always_missing() -> None:
    def fn(like: Any, step: int) -> Any:
        return {n: None if n == "c" or (n == "b.bias" and step % 2) else g for n, g in cases.grads(like, step).items()}

    optimizer = optim.accumulate(2, optim.sgd(1.0, weight_decay=0.1))
    now = cases.last(optimizer, P, 2, fn)
    assert now["c"] is P["c"]
    g = cases.grads(P, 0)["b.bias"] / 2
    assert torch.allclose(now["b.bias"], P["b.bias"] - g - 0.1 * P["b.bias"])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_an_update_that_is_not_finite_never_happened(bad: float) -> None:
    """The run is bit for bit that without the bad steps, counts and schedules included."""

    def fn(like: Any, step: int) -> Any:
        grads = cases.grads(like, step if step < 3 else step - 1)
        if step == 3:
            grads["a.conv"].view(-1)[5] = bad
        return grads

    optimizer = optim.apply_if_finite(optim.adamw(cases.CURVE))
    whole = list(cases.steps(optimizer, P, optimizer.init(P), 9, fn=fn))
    clean = list(cases.steps(optimizer, P, optimizer.init(P), 8))
    assert tree.equal(whole[3][0], whole[2][0])
    assert tree.equal(whole[-1][0], clean[-1][0])
    assert tree.equal(whole[-1][1].inner, clean[-1][1].inner)
    assert (int(whole[-1][1].skipped), int(clean[-1][1].skipped)) == (1, 0)
    with collect() as reports:
        optimizer.update(fn(P, 3), optimizer.init(P), P)
    assert reports["skipped"] == 1.0


def test_lookahead_moves_slow_weights_each_period() -> None:
    optimizer = optim.lookahead(optim.sgd(0.1), sync_period=2, slow_step_size=0.5)
    one = {"x": torch.tensor([1.0])}
    state, now, seen = optimizer.init(one), one, []
    for _ in range(4):
        now, state = optimizer.update({"x": torch.tensor([1.0])}, state, now)
        seen.append(round(now["x"].item(), 4))
    assert seen == [0.9, 0.9, 0.8, 0.8]


def test_frozen_parameters_begin_as_if_new_while_schedules_went_on() -> None:
    optimizer = optim.freeze_until(4, optim.adamw(cases.CURVE))
    whole = list(cases.steps(optimizer, P, optimizer.init(P), 8))
    assert all(tree.equal(now, P) for now, _ in whole[:4])
    late = optim.adamw(lambda step: cases.CURVE(step + 4))
    *_, (expected, _) = cases.steps(late, P, late.init(P), 4, begin=4)
    assert tree.equal(whole[-1][0], expected)


def test_freeze_changes_and_remembers_nothing() -> None:
    optimizer = optim.freeze()
    assert optimizer.update(P, optimizer.init(P), P) == (P, ())


def test_scaled_loss_trains_as_the_plain_one() -> None:
    """A power of two changes no bit of a float32 gradient."""
    optimizer = optim.dynamic_loss_scale(optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(1e-2)), growth_interval=4)
    plain = optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(1e-2))
    now, state = P, optimizer.init(P)
    assert optimizer.loss_scale is not None
    for step in range(10):
        leaves = {n: p.clone().requires_grad_() for n, p in now.items()}
        loss = sum((leaves[n] * g).sum() for n, g in cases.grads(P, step).items())
        scale = optimizer.loss_scale(state)
        grads = [g / scale for g in torch.autograd.grad(loss * scale, list(leaves.values()))]
        now, state = optimizer.update(dict(zip(leaves, grads, strict=True)), state, now)
    assert tree.equal(now, cases.last(plain, P, 10))
    assert state.scale == 2.0**18


def test_the_scale_follows_torchs_gradscaler() -> None:
    optimizer = optim.dynamic_loss_scale(optim.sgd(0.1), init_scale=8.0, growth_interval=3)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3)
    p = torch.nn.Parameter(torch.ones(2))
    reference, params = torch.optim.SGD([p], lr=0.1), {"x": torch.ones(2)}
    state = optimizer.init(params)
    for overflow in [0, 0, 0, 0, 1, 0, 0, 1, 1, 0, 0, 0, 0]:
        gradient = torch.tensor([torch.inf if overflow else 0.5, 1.0])
        scale = scaler.get_scale()
        assert state.scale == scale
        p.grad = gradient * scale
        params, state = optimizer.update({"x": gradient}, state, params)
        scaler.scale(torch.ones(()))  # which makes the scaler ready
        scaler.step(reference)
        scaler.update()
        assert torch.equal(params["x"], p.detach())


def test_loss_scaling_goes_with_accumulation_on_either_side() -> None:
    inside = optim.accumulate(2, optim.dynamic_loss_scale(optim.adamw(1e-2), init_scale=4.0))
    outside = optim.dynamic_loss_scale(optim.accumulate(2, optim.adamw(1e-2)), init_scale=4.0)
    plain = optim.accumulate(2, optim.adamw(1e-2))
    expected = cases.last(plain, P, 6)
    for optimizer in (inside, outside):
        assert optimizer.loss_scale is not None
        assert optimizer.loss_scale(optimizer.init(P)) == 4.0
        assert tree.equal(cases.last(optimizer, P, 6), expected)


def test_wrappers_nest() -> None:
    curve = schedules.linear(1e-2, 1e-3, 4)
    optimizer = optim.chain(
        optim.dynamic_loss_scale(init_scale=1.0), optim.apply_if_finite(), optim.accumulate(2), optim.lookahead(), optim.freeze_until(1), optim.adamw(curve)
    )  # fmt: skip
    whole = list(cases.steps(optimizer, P, optimizer.init(P), 6))
    again = list(cases.steps(optimizer, cases.rebuilt(whole[2][0]), cases.rebuilt(whole[2][1]), 3, begin=3))
    assert tree.equal(whole[-1], again[-1])
    assert not tree.equal(whole[-1][0], P)


def test_apply_if_finite_around_loss_scaling_is_refused() -> None:
    """The scale would never see the overflow that it has to fall for."""
    with pytest.raises(ValueError, match="skips what is not finite by itself"):
        optim.chain(optim.apply_if_finite(), optim.dynamic_loss_scale(), optim.sgd(1.0))
    with pytest.raises(ValueError, match="skips what is not finite by itself"):
        optim.apply_if_finite(optim.dynamic_loss_scale(optim.sgd(1.0)))


def accumulating(*wrappers: Any) -> tuple[Any, fnrun.TrainState]:
    model, optimizer = torch.nn.Linear(3, 1), optim.chain(*wrappers, optim.accumulate(4), optim.sgd(0.1))
    step = fnrun.make_train_step(model, lambda model, x: model(x).square().mean(), optimizer)
    return step, fnrun.TrainState.create(model, optimizer)


@pytest.mark.parametrize("wrappers", [(), (optim.dynamic_loss_scale(),), (optim.lookahead(),)], ids=["alone", "on a device", "within"])
@pytest.mark.parametrize("donate", [False, True])
def test_a_program_that_ends_between_two_updates_says_how_much_is_in_none(
    wrappers: Any, donate: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """The call after it goes on with what waits, and makes the update that one call of all makes."""
    step, state = accumulating(*wrappers)
    batches = data.batches([torch.randn(4, 3, generator=torch.Generator().manual_seed(i)) for i in range(6)])
    first, _ = fnrun.step_loop(step, 6, donate=donate)(state, batches)
    assert "between two updates of optim.accumulate: the last 2 batches are in the state" in caplog.text
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    caplog.clear()
    second, _ = fnrun.step_loop(step, 2, donate=donate)(first.rewind(), batches)
    whole, _ = fnrun.step_loop(step, 8)(state, batches)
    assert tree.equal(second.params, whole.params)
    assert not caplog.records


def test_neither_an_interrupt_nor_an_evaluation_ends_a_training(caplog: pytest.LogCaptureFixture) -> None:
    step, state = accumulating()
    batches = [torch.ones(4, 3)] * 6
    polls = iter([None, None])
    part, _ = fnrun.epoch_loop(step)(state, batches, interrupt=lambda: next(polls, "enough"))
    assert part.step % 4
    model = torch.nn.Linear(3, 1)
    fnrun.eval_loop(fnrun.make_eval_step(model, lambda model, x: {"y": model(x).mean()}))(part.rewind(), batches)
    assert not caplog.records


def test_a_stop_between_two_updates_is_an_end(caplog: pytest.LogCaptureFixture) -> None:
    step, state = accumulating()

    def stop(state: Any, metrics: Any) -> Any:
        return state.replace(stop="enough") if state.step == 3 else state

    fnrun.epoch_loop(step, hooks=[stop])(state, [torch.ones(4, 3)] * 8)
    assert "the last 3 batches" in caplog.text


@pytest.mark.parametrize(
    ("leaves", "finite"),
    [
        ([None, 3, 1.0, "a", torch.zeros(0), torch.tensor([2**62, -1])], True),
        ([torch.tensor([6e4, -6e4], dtype=torch.float16), torch.tensor([1e300], dtype=torch.float64), torch.ones(2)], True),
        ([torch.tensor([3e38 + 3e38j]).conj()], True),  # whose magnitude is more than float32 holds
        ([torch.ones(2), torch.tensor([1.0, -math.inf], dtype=torch.bfloat16)], False),
        ([torch.ones(2), torch.tensor([complex(1, math.nan)])], False),
        ([torch.ones(2), complex(0, math.inf)], False),
    ],
)
def test_what_is_finite_is_finite_element_by_element(leaves: list[object], finite: bool) -> None:
    assert all_finite(leaves) is finite
