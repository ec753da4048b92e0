"""What holds for every optimizer: it is pure, resumes to the same bits, leaves alone what has no gradient, and computes the same on every path."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import torch.utils._pytree as torch_pytree
from hypothesis import given, settings, strategies as st

from fnrun import Key, TrainState, make_train_step, optim
from fnrun.core import tree
from fnrun.core.donation import Owner
from fnrun.core.reports import collect

from . import cases
from .cases import OPTIMIZERS

every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
RULES = [n for n in OPTIMIZERS if n not in ("chain", "partition", "lookahead", "finite", "loss_scale", "freeze_until", "from_torch")]
every_rule = pytest.mark.parametrize("name", RULES)


@every_optimizer
def test_update_is_pure(name: str) -> None:
    optimizer, params = OPTIMIZERS[name](), cases.params(name)
    state = optimizer.init(params)
    for step in range(6):
        arguments = (cases.grads(params, step), state, params)
        before, generator = tree.snapshot(arguments), torch.get_rng_state()
        results = [optimizer.update(*arguments, key=cases.Key(step), step=step) for _ in range(2)]
        assert tree.equal(*results)
        assert tree.equal(before, arguments)
        assert torch.equal(generator, torch.get_rng_state())
        params, state = results[0]


@every_optimizer
def test_new_tensors_share_no_memory_with_what_came_in_nor_with_each_other(name: str) -> None:
    optimizer, params = OPTIMIZERS[name](), cases.params(name)
    state = optimizer.init(params)
    for step in range(7):
        before = {x.data_ptr() for x in tree.leaves((state, params)) if isinstance(x, torch.Tensor) and x.numel()}
        kept = {id(x) for x in tree.leaves((state, params))}
        grads = cases.grads(params, step)
        given_in = before | {g.data_ptr() for g in grads.values()}
        params, state = optimizer.update(grads, state, params, key=cases.Key(1), step=step)
        fresh = [x for x in tree.leaves((params, state)) if isinstance(x, torch.Tensor) and x.numel() and id(x) not in kept]
        assert all(x.data_ptr() not in given_in for x in fresh)
        assert len({x.data_ptr() for x in fresh}) == len(fresh)


@every_optimizer
def test_state_keeps_its_structure_dtypes_and_shapes(name: str) -> None:
    optimizer, params = OPTIMIZERS[name](), cases.params(name)
    fresh = optimizer.init(params)

    def shape(state: Any) -> Any:
        return tree.map(lambda x: str((x.dtype, tuple(x.shape))) if isinstance(x, torch.Tensor) else type(x).__name__, state)

    for now, state in cases.steps(optimizer, params, fresh, 7):
        assert tree.equal(shape(fresh), shape(state))
        assert tree.equal(shape(params), shape(now))


@every_optimizer
@pytest.mark.parametrize("accumulated", [False, True])
def test_resume_is_exact_from_every_step(name: str, accumulated: bool) -> None:
    def make() -> optim.Optimizer:
        return optim.chain(optim.accumulate(3), OPTIMIZERS[name]()) if accumulated else OPTIMIZERS[name]()

    optimizer, params = make(), cases.params(name)
    whole = list(cases.steps(optimizer, params, optimizer.init(params), 12))
    for step, (now, state) in enumerate(whole[:-1], start=1):
        *_, end = cases.steps(make(), cases.rebuilt(now), cases.rebuilt(state), 12 - step, begin=step)
        assert tree.equal(end, whole[-1]), f"resumed after update {step}"


@every_optimizer
def test_nested_params_and_other_order_give_the_same_bits(name: str) -> None:
    flat = cases.params(name)
    nested = {"x": (flat["b.weight"], [flat["a.weight"]])}
    renamed = {"1": flat["a.weight"], "0": flat["b.weight"]}

    def fn(like: Any, step: int) -> Any:
        g = cases.grads(flat, step)
        return {"x": (g["b.weight"], [g["a.weight"]])} if "x" in like else {"0": g["b.weight"], "1": g["a.weight"]}

    a, b = cases.last(OPTIMIZERS[name](), nested, 8, fn), cases.last(OPTIMIZERS[name](), renamed, 8, fn)
    assert tree.equal([a["x"][0], a["x"][1][0]], [b["0"], b["1"]])


@every_optimizer
def test_a_leaf_without_gradient_is_left_alone_and_its_age_stands_still(name: str) -> None:
    """A leaf that the loss reaches only now and then trains as one whose missing steps had never been."""
    seen = [0, 1, 3, 4, 7]
    if name in ("lookahead", "chain"):
        pytest.skip("lookahead moves on by itself; what is clipped together is one")

    def fn(like: Any, step: int) -> Any:
        return {n: g if n != "b.weight" or step in seen else None for n, g in cases.grads(like, step).items()}

    make = {  # constant rates: a schedule goes on for all
        "sgd": lambda: optim.sgd(1e-2), "momentum": lambda: optim.sgd(1e-2, momentum=0.9, dampening=0.1),
        "adamw": lambda: optim.adamw(1e-2), "partition": lambda: optim.partition(lambda n, p: "a", {"a": optim.adam(1e-2)}),
        "adam": lambda: optim.adam(1e-2), "nadam": lambda: optim.nadam(1e-2), "radam": lambda: optim.radam(1e-2, (0.9, 0.95)),
        "adamax": lambda: optim.adamax(1e-2), "adagrad": lambda: optim.adagrad(1e-2, lr_decay=0.1), "adadelta": lambda: optim.adadelta(),
        "rmsprop": lambda: optim.rmsprop(1e-2), "lion": lambda: optim.lion(1e-2), "lamb": lambda: optim.lamb(1e-2),
        "adafactor": lambda: optim.adafactor(1e-2), "muon": lambda: optim.muon(1e-2),
        "schedule_free_adamw": lambda: optim.schedule_free_adamw(1e-2), "finite": lambda: optim.apply_if_finite(optim.adamw(1e-2)),
        "loss_scale": lambda: optim.dynamic_loss_scale(optim.adamw(1e-2)), "freeze_until": lambda: optim.freeze_until(0, optim.adamw(1e-2)),
        "from_torch": lambda: optim.from_torch(torch.optim.NAdam, lr=1e-2),
    }.get(name, OPTIMIZERS[name])  # fmt: skip
    optimizer, params = make(), cases.params(name)
    whole = list(cases.steps(optimizer, params, optimizer.init(params), 8, fn=fn))
    for step in (2, 5, 6):
        assert whole[step][0]["b.weight"] is whole[step - 1][0]["b.weight"] or torch.equal(
            whole[step][0]["b.weight"], whole[step - 1][0]["b.weight"]
        )
    alone, start = make(), {"b.weight": params["b.weight"]}
    state, now = alone.init(start), start
    for step in seen:
        now, state = alone.update({"b.weight": cases.grads(params, step)["b.weight"]}, state, now)
    assert torch.equal(now["b.weight"], whole[-1][0]["b.weight"])


@every_rule
def test_the_differentiable_path_agrees_to_rounding_and_passes_gradients(name: str) -> None:
    optimizer, params = OPTIMIZERS[name](), cases.params(name)
    fast = cases.last(optimizer, params, 8)
    start = {n: p.clone().requires_grad_() for n, p in params.items()}
    slow = cases.last(optimizer, start, 8)
    assert cases.far(slow, fast) < 2e-6
    gradients = torch.autograd.grad([p.sum() for p in slow.values()], list(start.values()), allow_unused=name == "rprop")
    assert all(g is not None and bool(torch.isfinite(g).all()) for g in gradients)


@every_rule
def test_vmap_over_members_agrees_with_separate_runs(name: str) -> None:
    optimizer = OPTIMIZERS[name]()
    members = [cases.params(name, seed=seed) for seed in range(3)]
    separate = [cases.last(optimizer, params, 6) for params in members]
    together = stacked_run(optimizer, members, 6)
    for i, alone in enumerate(separate):
        tolerance = 2e-3 if name == "muon" else 2e-6  # bfloat16 products in another order
        assert cases.far({n: p[i] for n, p in together.items()}, alone) < tolerance


@pytest.mark.parametrize("name", ["adamw", "clipped", "partition", "finite", "loss_scale"])
def test_what_members_report_under_vmap_comes_back_as_values(name: str) -> None:
    """Each member's as alone: from `step.update` by its metrics, from `optimizer.update` to whoever collects around it."""
    clipped = lambda: optim.chain(optim.clip_by_global_norm(1.0), optim.accumulate(2), optim.adamw(1e-2))  # noqa: E731
    optimizer = OPTIMIZERS.get(name, clipped)()
    model = torch.nn.Linear(3, 4, bias=False)
    step = make_train_step(model, lambda model, x: model(x).square().mean(), optimizer)
    state, scales = TrainState.create(model, optimizer), torch.tensor([0.1, 1.0, 10.0])
    params = {"weight": torch.stack([state.params["weight"] + i for i in range(3)])}
    grads = {"weight": torch.stack([torch.ones(4, 3) * scale for scale in scales])}

    def update(params: Any, grads: Any) -> Any:
        new, metrics = step.update(state.replace(params=params), grads)
        return new.params, metrics

    for _ in range(5):  # some of them looked at for writes in place, some not
        with collect() as around:
            new, metrics = torch.func.vmap(update)(params, grads)
        assert around == {}
    with collect() as around:
        torch.func.vmap(lambda params, grads: optimizer.update(grads, state.opt_state, params, step=0)[0])(params, grads)
    for i in range(3):
        own, alone = update({"weight": params["weight"][i]}, {"weight": grads["weight"][i]})
        assert cases.far({"weight": new["weight"][i]}, own) < 2e-6
        assert metrics.keys() == around.keys() == alone.keys()
        for key, value in alone.items():
            assert float(metrics[key][i]) == pytest.approx(float(value), rel=1e-6)
            assert float(torch.as_tensor(around[key]).expand(3)[i]) == pytest.approx(float(value), rel=1e-6)


def test_a_report_from_nested_transforms_is_a_value_outside() -> None:
    def inner(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        watch({"x": x * y}, (), {"x": x})
        return x * y

    def watch(grads: Any, state: Any, params: Any) -> None:
        optim.clip_by_global_norm(1.0).update(grads, state, params)

    x, y = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 5.0])
    with collect() as around:
        torch.func.vmap(torch.func.vmap(torch.func.grad(inner), (None, 0)), (0, None))(x, y)
    assert torch.equal(around["grad_norm"], x[:, None] * y)
    assert not around["grad_norm"].requires_grad


def stacked_run(optimizer: optim.Optimizer, members: list[Any], count: int) -> Any:
    """All members as one: the leaves of parameters and state stacked, the update under vmap."""
    states = [optimizer.init(params) for params in members]
    state = torch_pytree.tree_map(lambda *xs: torch.stack(xs) if isinstance(xs[0], torch.Tensor) else xs[0], *states)
    params = {name: torch.stack([m[name] for m in members]) for name in members[0]}
    for step in range(count):
        grads = {name: torch.stack([cases.grads(members[0], step)[name]] * len(members)) for name in params}
        params, state = mapped(optimizer, grads, state, params)
    return params


def mapped(optimizer: optim.Optimizer, grads: Any, state: Any, params: Any) -> Any:
    leaves, spec = torch_pytree.tree_flatten(state)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    after: list[Any] = []

    def one(grads: Any, params: Any, *tensors: Any) -> Any:
        whole = list(leaves)
        for i, tensor in zip(places, tensors, strict=True):
            whole[i] = tensor
        new, changed = optimizer.update(grads, torch_pytree.tree_unflatten(whole, spec), params)
        flat, after_spec = torch_pytree.tree_flatten(changed)
        after[:] = [flat, after_spec]
        return new, [x for x in flat if isinstance(x, torch.Tensor)]

    params, tensors = torch.func.vmap(one)(grads, params, *[leaves[i] for i in places])
    flat, after_spec = after
    rest = iter(tensors)
    return params, torch_pytree.tree_unflatten([next(rest) if isinstance(x, torch.Tensor) else x for x in flat], after_spec)


@pytest.mark.parametrize("name", ["adamw", "momentum", "nadam", "radam", "schedule_free_adamw", "adafactor", "rprop"])
def test_what_only_a_device_knows_gives_the_same_numbers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts, factors and conditions that must not be read, as on an accelerator: no path asks for their value."""
    start = cases.params(name)
    make = lambda: optim.dynamic_loss_scale(optim.chain(optim.accumulate(2), OPTIMIZERS[name]()), init_scale=8.0, growth_interval=3)  # noqa: E731

    def fn(like: Any, step: int) -> Any:
        return {n: g * (torch.inf if step == 5 else 8.0) for n, g in cases.grads(like, step).items()}

    expected = list(cases.steps(make(), start, make().init(start), 12, fn=fn))
    for module in [m for n, m in sys.modules.items() if n.startswith("fnrun.optim.")]:
        monkeypatch.setattr(module, "host_value", lambda value: value, raising=False)
        monkeypatch.setattr(module, "host_values", lambda values, like: list(values.unbind()), raising=False)
    monkeypatch.setattr(torch.Tensor, "item", _waits)
    monkeypatch.setattr(torch.Tensor, "tolist", _waits)
    monkeypatch.setattr(torch.Tensor, "__bool__", _waits)
    unseen = list(cases.steps(make(), start, make().init(start), 12, fn=fn))
    monkeypatch.undo()
    for (a, _), (b, _) in zip(expected, unseen, strict=True):
        assert cases.far(b, a) < 3e-6


def _waits(*_: Any) -> Any:
    raise AssertionError("this waits for the device")


@pytest.mark.parametrize("name", ["sgd", "momentum", "adam", "amsgrad", "adamw", "adagrad"])
def test_donation_changes_only_memory(name: str) -> None:
    optimizer, params = OPTIMIZERS[name](), cases.params(name)
    kept = list(cases.steps(optimizer, params, optimizer.init(params), 8))[-1]
    now = TrainState(tree.snapshot(params), {}, optimizer.init(params), Key(0))
    owner = Owner.of(now)
    for step in range(8):
        pointers = {n: p.data_ptr() for n, p in now.params.items()}
        grads, memory, params = cases.grads(now.params, step), now.opt_state, now.params
        after, memory = owner.update(
            (step, "a step"), now, lambda grads=grads, memory=memory, params=params: optimizer.update(grads, memory, params)
        )
        now = TrainState(after, {}, memory, Key(0))
        owner.accept(now)
        assert pointers == {n: p.data_ptr() for n, p in after.items()}
    now, state = now.params, now.opt_state
    assert tree.equal(kept, (now, state))


@settings(deadline=None)
@given(st.lists(st.sampled_from(["clip", "decay", "trace", "noise", "scale"]), min_size=0, max_size=4), st.data())
def test_chain_is_associative(names: list[str], data: Any) -> None:
    transforms = {
        "clip": lambda: optim.clip_by_global_norm(0.5), "decay": lambda: optim.add_decayed_weights(0.1), "trace": lambda: optim.trace(0.9),
        "noise": lambda: optim.add_noise(0.1), "scale": lambda: optim.scale(0.5),
    }  # fmt: skip
    members = [*(transforms[name]() for name in names), optim.adamw(1e-2)]
    wrapped = data.draw(st.booleans())
    if wrapped:
        members.insert(data.draw(st.integers(0, len(names))), optim.accumulate(2))
    cut = data.draw(st.integers(0, len(members) - 1))
    left = optim.chain(*members)
    right = optim.chain(*members[:cut], optim.chain(*members[cut:]))
    other = optim.chain(optim.chain(*members[:cut]), *members[cut:]) if cut else left
    start = cases.params()
    ends = [list(cases.steps(o, start, o.init(start), 4)) for o in (left, right, other)]
    assert tree.equal(ends[0], ends[1])
    assert tree.equal(ends[0], ends[2])
