"""What each transform does to gradients, what it reports, and what it leaves alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st

from fnrun import Key, optim, schedules
from fnrun.core import tree
from fnrun.core.reports import collect

from . import cases

PARAMS = cases.params()
TRANSFORMS = {
    "clip_by_global_norm": lambda: optim.clip_by_global_norm(0.5),
    "clip_by_norm": lambda: optim.clip_by_norm(0.5),
    "clip_by_value": lambda: optim.clip_by_value(0.1),
    "adaptive_clip": lambda: optim.adaptive_clip(0.01),
    "add_decayed_weights": lambda: optim.add_decayed_weights(0.1),
    "scale": lambda: optim.scale(2.0),
    "scale_by_schedule": lambda: optim.scale_by_schedule(schedules.linear(1.0, 0.0, 5)),
    "trace": lambda: optim.trace(0.9),
    "centralize": lambda: optim.centralize(),
    "add_noise": lambda: optim.add_noise(0.1),
    "zero_nonfinite": lambda: optim.zero_nonfinite(),
    "leaf": lambda: optim.chain(
        optim.clip_by_global_norm(optim.in_state(0.5)), optim.trace(optim.in_state(0.9)), optim.scale(optim.in_state(3.0))
    ),
}
every = pytest.mark.parametrize("name", TRANSFORMS)


@every
def test_transforms_are_pure_and_pass_over_missing_gradients(name: str) -> None:
    transform = TRANSFORMS[name]()
    state = transform.init(PARAMS)
    for step in range(3):
        grads = {**cases.grads(PARAMS, step), "b.bias": None}
        before = tree.snapshot((grads, state, PARAMS))
        once, twice = (transform.update(grads, state, PARAMS, key=Key(step), step=step) for _ in range(2))
        assert tree.equal(once, twice)
        assert tree.equal(before, (grads, state, PARAMS))
        new, state = once
        assert new["b.bias"] is None
        assert all(new[n].dtype == p.dtype and new[n].shape == p.shape for n, p in PARAMS.items() if n != "b.bias")


@every
def test_transforms_agree_under_vmap_and_where_gradients_flow(name: str) -> None:
    if name == "add_noise":
        pytest.skip("a generator draws for all members at once")
    transform = TRANSFORMS[name]()
    grads, state = cases.grads(PARAMS, 0), transform.init(PARAMS)
    expected, _ = transform.update(grads, state, PARAMS)
    stacked = {n: torch.stack([g, g]) for n, g in grads.items()}
    together = torch.func.vmap(lambda g: transform.update(g, state, PARAMS)[0])(stacked)
    assert cases.far({n: g[1] for n, g in together.items()}, expected) < 1e-6
    wanted = {n: g.clone().requires_grad_() for n, g in grads.items()}
    flowing, _ = transform.update(wanted, state, PARAMS)
    assert cases.far({n: g.detach() for n, g in flowing.items()}, expected) < 1e-6
    assert all(g.requires_grad for g in flowing.values())


def test_global_norm_is_clipped_together_and_reported_without_a_wait() -> None:
    grads = cases.grads(PARAMS, 0)
    norm = torch.cat([g.flatten() for g in grads.values()]).norm()
    with collect() as reports:
        clipped, _ = optim.clip_by_global_norm(0.5).update(grads, (), PARAMS)
    assert torch.cat([g.flatten() for g in clipped.values()]).norm() == pytest.approx(0.5)
    assert reports["grad_norm"] == pytest.approx(norm)
    assert reports["clipped"] == 1.0
    with collect() as reports:
        untouched, _ = optim.clip_by_global_norm(1e3).update(grads, (), PARAMS)
    assert all(torch.equal(untouched[n], g) for n, g in grads.items())
    assert reports["clipped"] == 0.0


def test_clip_by_norm_clips_each_leaf_for_itself() -> None:
    grads = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([0.3, 0.4])}
    with collect() as reports:
        clipped, _ = optim.clip_by_norm(1.0).update(grads, (), grads)
    assert torch.allclose(clipped["a"], torch.tensor([0.6, 0.8]))
    assert torch.equal(clipped["b"], grads["b"])
    assert reports["clipped"] == 0.5


def test_zero_gradients_pass_every_clip() -> None:
    zeros = {"a": torch.zeros(3, 2)}
    for transform in (optim.clip_by_global_norm(1.0), optim.clip_by_norm(1.0), optim.adaptive_clip()):
        assert tree.equal(transform.update(zeros, (), zeros)[0], zeros)


def test_zero_nonfinite_counts_what_it_zeroes() -> None:
    grads = {"a": torch.tensor([1.0, torch.nan, torch.inf]), "b": torch.tensor([-torch.inf, 2.0])}
    with collect() as reports:
        clean, _ = optim.zero_nonfinite().update(grads, (), grads)
    assert tree.equal(clean, {"a": torch.tensor([1.0, 0.0, 0.0]), "b": torch.tensor([0.0, 2.0])})
    assert reports["nonfinite"] == 3.0


def test_noise_is_a_function_of_the_key_and_shrinks() -> None:
    transform = optim.add_noise(1.0, gamma=1.0)
    zeros = {"a": torch.zeros(20_000)}
    state = transform.init(zeros)
    first, state = transform.update(zeros, state, zeros, key=Key(1))
    again, _ = transform.update(zeros, transform.init(zeros), zeros, key=Key(1))
    other, _ = transform.update(zeros, transform.init(zeros), zeros, key=Key(2))
    assert torch.equal(first["a"], again["a"])
    assert not torch.equal(first["a"], other["a"])
    assert first["a"].std() == pytest.approx(1.0, abs=0.02)
    for _ in range(2):
        later, state = transform.update(zeros, state, zeros, key=Key(1))
    assert later["a"].std() == pytest.approx(3**-0.5, abs=0.02)
    with pytest.raises(ValueError, match=r"give optimizer\.update the step's key"):
        transform.update(zeros, state, zeros)


def test_two_noises_of_one_chain_differ() -> None:
    zeros = {"a": torch.zeros(100)}
    one, two = optim.add_noise(1.0), optim.chain(optim.add_noise(1.0), optim.add_noise(1.0))
    single, _ = one.update(zeros, one.init(zeros), zeros, key=Key(0).fold_in("chain", 0))
    double, _ = two.update(zeros, two.init(zeros), zeros, key=Key(0))
    assert not torch.allclose(double["a"], 2 * single["a"])


@settings(deadline=None)
@given(st.sampled_from(sorted(TRANSFORMS)), st.sets(st.sampled_from(sorted(PARAMS))))
def test_masked_leaves_the_rest_untouched_bit_for_bit(name: str, chosen: set[str]) -> None:
    transform = optim.masked(TRANSFORMS[name](), lambda path, p: path in chosen)
    state = transform.init(PARAMS)
    for step in range(2):
        grads = cases.grads(PARAMS, step)
        new, state = transform.update(grads, state, PARAMS, key=Key(step))
        assert all(new[n] is grads[n] for n in PARAMS if n not in chosen)
    alone = TRANSFORMS[name]()
    inner = {n: p for n, p in PARAMS.items() if n in chosen}
    own = alone.init(inner)
    for step in range(2):
        expected, own = alone.update({n: cases.grads(PARAMS, step)[n] for n in inner}, own, inner, key=Key(step))
    assert all(torch.equal(new[n], expected[n]) for n in chosen)


def test_masked_takes_a_tree_of_bools_and_optimizers_too() -> None:
    params = {"a": torch.ones(2), "b": (torch.ones(3), torch.ones(1))}
    optimizer = optim.masked(optim.sgd(1.0), {"a": True, "b": (False, True)})
    new, _ = optimizer.update(params, optimizer.init(params), params)
    assert tree.equal(new, {"a": torch.zeros(2), "b": (params["b"][0], torch.zeros(1))})


def test_trace_before_sgd_is_momentum() -> None:
    traced = cases.last(optim.chain(optim.trace(0.9), optim.sgd(0.01)), PARAMS, 10)
    assert cases.far(traced, cases.last(optim.sgd(0.01, momentum=0.9), PARAMS, 10)) < 1e-6


def test_adaptive_clip_holds_the_norm_of_half_precision():
    """The row's norm is beyond float16: clipped it is small, but there."""
    grads, params = torch.full((2, 64), 60_000.0), torch.full((2, 64), 100.0)
    half, _ = optim.adaptive_clip(0.1).update({"x": grads.half()}, (), {"x": params.half()})
    whole, _ = optim.adaptive_clip(0.1).update({"x": grads}, (), {"x": params})
    assert half["x"].dtype == torch.float16
    torch.testing.assert_close(half["x"].float(), whole["x"], rtol=2e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_norm_that_the_gradients_dtype_cannot_hold_clips_them_all_the_same(dtype):
    grads = {"x": torch.full((100,), 3e4, dtype=dtype), "y": torch.full((2, 2), 100.0, dtype=dtype)}
    for transform in (optim.clip_by_global_norm(1.0), optim.clip_by_norm(1.0)):
        found, _ = transform.update(grads, transform.init(grads), grads)
        whole = {name: g.double() for name, g in grads.items()}
        expected, _ = transform.update(whole, transform.init(whole), whole)
        for name in grads:
            assert found[name].dtype == dtype
            torch.testing.assert_close(found[name].double(), expected[name], rtol=1e-2, atol=1e-7)


def test_float64_gradients_beyond_float32_are_finite():
    params = {"x": torch.zeros(2, dtype=torch.float64), "y": torch.zeros(2)}
    optimizer = optim.apply_if_finite(optim.sgd(1e-300))
    grads = {"x": torch.full((2,), 1e300, dtype=torch.float64), "y": torch.ones(2)}
    new, state = optimizer.update(grads, optimizer.init(params), params)
    assert new["x"].tolist() == [-1.0, -1.0]
    assert int(state.skipped) == 0
    _, state = optimizer.update({**grads, "y": torch.full((2,), torch.inf)}, state, params)
    assert int(state.skipped) == 1
