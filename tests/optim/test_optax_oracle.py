"""The same rule as optax on JAX's CPU, leaf by leaf over 30 steps, where the two libraries define the same rule."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import optax
import pytest
import torch

from fnrun import optim, schedules

from . import cases

#: Ours and optax's. Where they are not the same rule (nadam, amsgrad, rprop, adafactor, muon), torch is the oracle: docs/optim.md says how.
PAIRS: dict[str, tuple[Any, Any]] = {
    "sgd": (lambda: optim.sgd(0.01), lambda: optax.sgd(0.01)),
    "momentum": (lambda: optim.sgd(0.01, momentum=0.9), lambda: optax.sgd(0.01, momentum=0.9)),
    "nesterov": (lambda: optim.sgd(0.01, momentum=0.9, nesterov=True), lambda: optax.sgd(0.01, momentum=0.9, nesterov=True)),
    "adam": (lambda: optim.adam(0.01), lambda: optax.adam(0.01)),
    "adamw": (lambda: optim.adamw(0.01, weight_decay=0.1), lambda: optax.adamw(0.01, weight_decay=0.1)),
    "lion": (lambda: optim.lion(0.01, weight_decay=0.1), lambda: optax.lion(0.01, weight_decay=0.1)),
    "lamb": (lambda: optim.lamb(0.01, weight_decay=0.1), lambda: optax.lamb(0.01, weight_decay=0.1)),
    "rmsprop": (lambda: optim.rmsprop(0.001), lambda: optax.rmsprop(0.001, decay=0.99, eps_in_sqrt=False)),
    "adamax": (lambda: optim.adamax(0.01), lambda: optax.adamax(0.01)),
    "adadelta": (lambda: optim.adadelta(0.1), lambda: optax.adadelta(0.1, rho=0.9, eps=1e-6)),
    "radam": (lambda: optim.radam(0.01, (0.9, 0.95), eps=1e-30), lambda: optax.radam(0.01, b2=0.95, eps=1e-30)),
    "schedule_free": (
        lambda: optim.schedule_free_adamw(0.01, weight_decay=0.1),
        lambda: optax.contrib.schedule_free_adamw(0.01, weight_decay=0.1),
    ),
    "clip + adam": (
        lambda: optim.chain(optim.clip_by_global_norm(1.0), optim.adam(0.01)),
        lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.01)),
    ),
    "clip by value": (
        lambda: optim.chain(optim.clip_by_value(0.5), optim.sgd(0.01)),
        lambda: optax.chain(optax.clip(0.5), optax.sgd(0.01)),
    ),
    "decayed weights": (
        lambda: optim.chain(optim.add_decayed_weights(0.1), optim.sgd(0.01)),
        lambda: optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.01)),
    ),
    "trace": (lambda: optim.chain(optim.trace(0.9), optim.sgd(0.01)), lambda: optax.chain(optax.trace(0.9), optax.sgd(0.01))),
    "nesterov trace": (
        lambda: optim.chain(optim.trace(0.9, nesterov=True), optim.sgd(0.01)),
        lambda: optax.chain(optax.trace(0.9, nesterov=True), optax.sgd(0.01)),
    ),
    "centralize": (lambda: optim.chain(optim.centralize(), optim.sgd(0.01)), lambda: optax.chain(optax.centralize(), optax.sgd(0.01))),
    "scale": (lambda: optim.chain(optim.scale(0.5), optim.sgd(0.01)), lambda: optax.chain(optax.scale(0.5), optax.sgd(0.01))),
    "scale by schedule": (
        lambda: optim.chain(optim.scale_by_schedule(schedules.linear(1.0, 0.1, 20)), optim.sgd(0.01)),
        lambda: optax.chain(
            optax.scale_by_schedule(lambda count: schedules.linear(1.0, 0.1, 20)(int(count))),  # optax's own computes in float32
            optax.sgd(0.01),
        ),
    ),
    "masked decay": (
        lambda: optim.chain(optim.masked(optim.add_decayed_weights(0.1), lambda path, p: p.ndim > 1), optim.sgd(0.01)),
        lambda: optax.chain(optax.add_decayed_weights(0.1, mask=lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree)), optax.sgd(0.01)),
    ),
}
#: In float32 sums in another order (norms, means) and a division where the other multiplies; lamb's are four times clip + adam's.
ULPS = {"lamb": 64, "schedule_free": 64, "centralize": 32}


def run_optax(transform: Any, start: cases.Tensors, steps: int) -> list[dict[str, np.ndarray]]:
    params = {name: jax.numpy.asarray(p.numpy()) for name, p in start.items()}
    state, seen = transform.init(params), []
    for step in range(steps):
        grads = {name: jax.numpy.asarray(g.numpy()) for name, g in cases.grads(start, step).items()}
        updates, state = transform.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        seen.append({name: np.array(p) for name, p in params.items()})
    return seen


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_agrees_with_optax(name: str, dtype: torch.dtype) -> None:
    ours, theirs = PAIRS[name]
    start = cases.params(dtype=dtype)
    with jax.enable_x64(dtype == torch.float64):
        expected = run_optax(theirs(), start, 30)
    optimizer = ours()
    for step, (now, _) in enumerate(cases.steps(optimizer, start, optimizer.init(start), 30)):
        for leaf, p in now.items():
            reference = torch.from_numpy(expected[step][leaf])
            assert reference.dtype == p.dtype
            if dtype == torch.float64:
                assert (p - reference).abs().max() <= 1e-12, (leaf, step)
            else:
                assert cases.ulps(p, reference) <= ULPS.get(name, 16), (leaf, step)


def test_evaluation_weights_of_schedule_free_agree_with_optax() -> None:
    start = cases.params(dtype=torch.float64)
    with jax.enable_x64(True):
        transform = optax.contrib.schedule_free_adamw(0.01)
        params = {name: jax.numpy.asarray(p.numpy()) for name, p in start.items()}
        state = transform.init(params)
        for step in range(10):
            grads = {name: jax.numpy.asarray(g.numpy()) for name, g in cases.grads(start, step).items()}
            updates, state = transform.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        expected = {name: np.array(p) for name, p in optax.contrib.schedule_free_eval_params(state, params).items()}
    optimizer = optim.chain(optim.clip_by_global_norm(1e9), optim.schedule_free_adamw(0.01))
    *_, (now, ours) = cases.steps(optimizer, start, optimizer.init(start), 10)
    assert optimizer.eval_params is not None
    for leaf, p in optimizer.eval_params(ours, now).items():
        assert (p - torch.from_numpy(expected[leaf])).abs().max() <= 1e-12


def test_adaptive_clip_agrees_with_optax_where_units_are_stored_alike() -> None:
    """optax's units of a matrix are its columns, ours its rows: transposed, they are the same."""
    generator = torch.Generator().manual_seed(0)
    p, g = (torch.randn(5, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    with jax.enable_x64(True):
        transform = optax.adaptive_grad_clip(0.1)
        params = {"w": jax.numpy.asarray(p.t().numpy())}
        expected, _ = transform.update({"w": jax.numpy.asarray(g.t().numpy())}, transform.init(params), params)
        reference = torch.from_numpy(np.array(expected["w"]).T.copy())
    ours, _ = optim.adaptive_clip(0.1).update({"w": g}, (), {"w": p})
    assert torch.allclose(ours["w"], reference, rtol=1e-12)
