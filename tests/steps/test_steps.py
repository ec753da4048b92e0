"""Steps against the loop that everybody writes by hand: `loss.backward(); optimizer.step()`."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import gc
import itertools
import random
import warnings
import weakref

import numpy as np
import pytest
import torch
import torch.distributed.tensor
import torch.nn.functional as F
from hypothesis import example, given, settings, strategies as st
from torch import nn

import fnrun
from fnrun import metrics, optim
from fnrun.core import tree
from fnrun.steps.microbatches import PairwiseSum


class Everything(nn.Module):
    """Batch norm, dropout, tied weights, noise in the forward, a frozen and an unused parameter."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.a, self.norm, self.drop, self.b = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 4)
        self.b.weight = self.a.weight
        self.frozen = nn.Parameter(torch.full((4,), 0.5), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(4))
        self.to(dtype)

    def forward(self, x):
        return self.b(self.drop(self.norm(self.a(x)))) * self.frozen + 0.1 * torch.randn_like(x)


def loss_fn(model, batch):
    return F.mse_loss(model(batch), batch)


def by_hand(model, optimizer, batches, seed):
    """The plain loop, with the randomness of each step seeded as fnrun says that it is: from the run's key and the step's number."""
    model = copy.deepcopy(model)
    optimizer = optimizer([p for p in model.parameters() if p.requires_grad])
    for i, batch in enumerate(batches):
        with fnrun.Key(seed).fold_in("train", i).scope():
            loss = loss_fn(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return dict(model.named_parameters()), dict(model.named_buffers())


def by_fnrun(model, optimizer, batches, seed):
    step = fnrun.make_train_step(model, loss_fn, optimizer)
    state = fnrun.TrainState.create(model, optimizer, seed=seed)
    for batch in batches:
        state, _ = step(state, batch)
    return state.params, state.buffers


CASES = [
    # dtype, ours, torch's, how many units in the last place of the largest value they may differ (0: not a bit)
    (torch.float64, optim.sgd(0.1), lambda p: torch.optim.SGD(p, 0.1), 0),
    (torch.float64, optim.sgd(0.1, momentum=0.9, nesterov=True), lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True), 0),
    (torch.float32, optim.sgd(0.1, momentum=0.9), lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), 4),
    (torch.float32, optim.adamw(1e-2), lambda p: torch.optim.AdamW(p, 1e-2, fused=True), 4),
    (torch.float64, optim.adamw(1e-2), lambda p: torch.optim.AdamW(p, 1e-2), 32),
    (torch.bfloat16, optim.sgd(0.1, momentum=0.9), lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), 0),
]


@pytest.mark.parametrize(("dtype", "ours", "theirs", "ulps"), CASES)
def test_a_train_step_is_the_plain_loop(dtype, ours, theirs, ulps):
    torch.manual_seed(0)
    model, batches = Everything(dtype), [torch.randn(8, 4, dtype=dtype) for _ in range(10)]
    ours, theirs = by_fnrun(model, ours, batches, 5), by_hand(model, theirs, batches, 5)
    for one, other in zip(ours, theirs, strict=True):
        for name in one:
            a, b = one[name], other[name].detach()
            if ulps == 0 or not a.is_floating_point():
                assert tree.equal(a, b), name
            else:
                # A bias before batch norm has no gradient but rounding's, which Adam makes steps of: a floor for what that may come to.
                assert (a - b).abs().max() <= max(ulps * torch.finfo(dtype).eps * b.abs().max().clamp(min=1).item(), 1e-10), name
    assert torch.equal(ours[0]["frozen"], model.frozen)
    assert torch.equal(ours[0]["unused"], model.unused)


def test_frozen_parameters_have_no_optimizer_state():
    model = Everything()
    sizes = [t.shape for t in tree.leaves(optim.adamw(1e-2).init(dict(model.named_parameters()))) if isinstance(t, torch.Tensor) and t.ndim]
    state = fnrun.TrainState.create(model, optim.adamw(1e-2))
    held = [t.shape for t in tree.leaves(state.opt_state) if isinstance(t, torch.Tensor) and t.ndim]
    assert len(sizes) - len(held) == 2  # two moments of `frozen`


def test_accumulation_is_the_mean_gradient_of_the_whole_batch():
    """Also where the batch does not divide: each micro-batch counts by its examples. Without batch norm and dropout they are the same rule."""
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double()

    def loss_fn(model, batch):
        error = (model(batch["x"]) - batch["y"]).square()
        return error.mean(), {"worst": metrics.max(error), "seen": metrics.sum(torch.ones(len(error)))}

    optimizer = optim.sgd(0.5)
    state = fnrun.TrainState.create(model, optimizer)
    for n in (7, 8, 2):
        batch = {"x": torch.randn(n, 3).double(), "y": torch.randn(n, 1).double()}
        whole, metrics_whole = fnrun.make_train_step(model, loss_fn, optimizer)(state, batch)
        parts, metrics_parts = fnrun.make_train_step(model, loss_fn, optimizer, microbatches=4)(state, batch)
        for name in whole.params:
            torch.testing.assert_close(whole.params[name], parts.params[name], rtol=1e-12, atol=1e-12)
        a, b = metrics.values(metrics_whole), metrics.values(metrics_parts)
        assert b["seen"].item() == n
        assert b["worst"].item() == a["worst"].item()
        torch.testing.assert_close(b["loss"], a["loss"])


def test_micro_batches_cut_arrays_and_lists_too_and_fold_reports():
    model, seen = nn.Linear(1, 1), []

    def loss_fn(model, batch):
        seen.append((len(batch["x"]), batch["numpy"].tolist(), batch["text"], batch["scale"]))
        fnrun.report("mean", batch["x"].mean())
        return model(batch["x"]).mean()

    batch = {"x": torch.arange(4.0).view(4, 1), "numpy": np.arange(4), "text": list("abcd"), "scale": [1.0, 2.0]}
    state = fnrun.TrainState.create(model, optim.sgd(0.1))
    _, values = fnrun.make_train_step(model, loss_fn, optim.sgd(0.1), microbatches=2)(state, batch)
    assert seen == [(2, [0, 1], ["a", "b"], [1.0, 2.0]), (2, [2, 3], ["c", "d"], [1.0, 2.0])]
    assert metrics.values(values)["mean"].item() == 1.5


def test_an_evaluation_that_moves_numpys_generator_is_told_so():
    model = nn.Linear(1, 1)
    state = fnrun.TrainState.create(model)
    with pytest.warns(UserWarning, match="the evaluation of Linear draws from NumPy's global generator"):
        fnrun.make_eval_step(model, lambda model, x: {"r": np.random.rand()})(state, torch.ones(1, 1))
    step = fnrun.make_eval_step(model, lambda model, x: {"r": np.random.rand()}, host_random=True)
    assert step(state, torch.ones(1, 1)) == step(state, torch.ones(1, 1))


def test_reports_from_the_middle_of_a_forward_are_metrics():
    class Reports(nn.Linear):
        def forward(self, x):
            fnrun.report("norm", self.weight.norm())
            return super().forward(x)

    model = Reports(2, 1)
    state = fnrun.TrainState.create(model, optim.sgd(0.1))
    _, values = fnrun.make_train_step(model, lambda model, x: model(x).mean(), optim.sgd(0.1))(state, torch.ones(1, 2))
    assert values["norm"].item() == pytest.approx(model.weight.norm().item())
    assert not values["norm"].requires_grad
    assert fnrun.make_eval_step(model, lambda model, x: {"mean": model(x).mean()})(state, torch.ones(1, 2)).keys() == {"mean", "norm"}
    model(torch.ones(1, 2))  # outside a step a report goes nowhere


def test_an_eval_step_uses_the_weights_it_is_told():
    model = nn.Linear(1, 1, bias=False)
    state = fnrun.TrainState.create(model).replace(
        params={"weight": torch.tensor([[2.0]])}, memory={"ema": {"params": {"weight": torch.tensor([[3.0]])}}}
    )

    def seen(weights):
        return fnrun.make_eval_step(model, lambda model, x: {"y": model(x).sum()}, weights=weights)(state, torch.ones(1, 1))["y"].item()

    assert seen("params") == 2.0
    assert seen("ema") == 3.0
    assert seen(lambda state: {"weight": state.params["weight"] * 5}) == 10.0
    with pytest.raises(ValueError, match=r"weights='emma': no hook of this name .* \['ema'\]"):
        seen("emma")


def test_evaluation_runs_in_eval_mode_without_gradients():
    model = nn.Sequential(nn.Dropout(0.9), nn.Linear(4, 4))
    state = fnrun.TrainState.create(model)
    out = fnrun.make_predict_step(model, lambda model, x: model(x))(state, torch.ones(2, 4))
    assert not out.requires_grad
    assert torch.equal(out, model[1](torch.ones(2, 4)))
    assert model.training


def test_a_step_that_moves_pythons_generator_is_told_so_and_host_random_makes_it_lawful():
    model = nn.Linear(2, 1)

    def loss_fn(model, batch):
        return model(batch).mean() * random.random() * np.random.rand()

    state = fnrun.TrainState.create(model, optim.sgd(0.1))
    before = random.getstate()
    with pytest.warns(UserWarning, match="Python's global generator .* and NumPy's global generator .*host_random=True"):
        fnrun.make_train_step(model, loss_fn, optim.sgd(0.1))(state, torch.ones(1, 2))
    assert random.getstate() == before
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step = fnrun.make_train_step(model, loss_fn, optim.sgd(0.1), host_random=True)
        assert tree.equal(step(state, torch.ones(1, 2)), step(state, torch.ones(1, 2)))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_precision_is_autocast(precision):
    model = nn.Linear(8, 8)
    dtypes = []

    def loss_fn(model, batch):
        dtypes.append(model(batch).dtype)
        return model(batch).float().mean()

    state = fnrun.TrainState.create(model, optim.sgd(0.1))
    state, _ = fnrun.make_train_step(model, loss_fn, optim.sgd(0.1), precision=precision)(state, torch.ones(1, 8))
    assert dtypes == [{"bf16": torch.bfloat16, "fp16": torch.float16}[precision]]
    assert state.params["weight"].dtype == torch.float32


def test_skip_nonfinite_keeps_everything_but_the_step():
    model = nn.Linear(2, 1)
    step = fnrun.skip_nonfinite(fnrun.make_train_step(model, lambda model, x: model(x).mean(), optim.adamw(0.1)))
    state = fnrun.TrainState.create(model, optim.adamw(0.1))
    good, values = step(state, torch.ones(1, 2))
    assert values["skipped"] == 0.0
    bad, values = step(good, torch.full((1, 2), float("nan")))
    assert values == {"skipped": 1.0}
    assert tree.equal(bad, good.replace(step=2))


def test_value_and_grad():
    value, grads = fnrun.value_and_grad(lambda p: (p["x"] ** 3).sum())({"x": torch.tensor([1.0, 2.0]), "y": torch.ones(1)})
    assert value.item() == 9.0
    assert grads["x"].tolist() == [3.0, 12.0]
    assert grads["y"] is None
    (value, aux), _ = fnrun.value_and_grad(lambda p: (p.sum(), {"p": p * 2}), has_aux=True)(torch.ones(2))
    assert aux["p"].tolist() == [2.0, 2.0]
    assert not aux["p"].requires_grad


def test_gradients_with_respect_to_distributed_tensors():
    """In one process, for values that are distributed and for those that were gathered."""
    distributed = torch.distributed
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
        x = torch.arange(6.0).reshape(3, 2)
        leaf = distributed.tensor.distribute_tensor(x, mesh, [distributed.tensor.Shard(0)])
        for value in (lambda p: (p["x"] ** 3).sum(), lambda p: (p["x"].full_tensor() ** 3).sum()):
            _, grads = fnrun.value_and_grad(value)({"x": leaf})
            assert grads["x"].placements == leaf.placements
            assert torch.equal(grads["x"].to_local(), 3 * x**2)
    finally:
        distributed.destroy_process_group()


class TestErrors:
    def make(self, loss_fn):
        model = nn.Linear(2, 3)
        return fnrun.make_train_step(model, loss_fn, optim.sgd(0.1)), fnrun.TrainState.create(model, optim.sgd(0.1))

    @pytest.mark.parametrize(
        ("loss_fn", "message"),
        [
            (lambda model, x: model(x), r"scalar tensor, this one is a tensor of shape \(1, 3\)"),
            (lambda model, x: 1.0, "scalar tensor, this one is 1.0"),
            (lambda model, x: model(x).sum().to(torch.complex64), "a real number, this one is complex"),
            (lambda model, x: model(x).mean().detach(), "depends on no trained parameter"),
            (lambda model, x: (model(x).mean(), [1]), r"\(loss, metrics\) with metrics a dict"),
            (lambda model, x: (model(x).mean(), {"loss": 1.0}), "'loss' is the name of the loss itself"),
        ],
    )
    def test_a_loss_that_is_none_says_what_it_is(self, loss_fn, message):
        step, state = self.make(loss_fn)
        with pytest.raises(ValueError, match=message):
            step(state, torch.ones(1, 2))

    def test_a_model_with_nothing_to_train(self):
        with pytest.raises(ValueError, match="no parameter to train"):
            fnrun.make_train_step(nn.Linear(1, 1).requires_grad_(False), lambda model, x: 0, optim.sgd(0.1))

    def test_an_optimizer_that_is_none(self):
        with pytest.raises(TypeError, match=r"not an SGD: optim.sgd.* or optim.from_torch"):
            fnrun.make_train_step(nn.Linear(1, 1), lambda model, x: 0, torch.optim.SGD([torch.zeros(1)], 0.1))

    @pytest.mark.parametrize("other", [None, optim.adamw(0.1), optim.chain(optim.clip_by_global_norm(1.0), optim.sgd(0.1))])
    def test_a_state_of_another_optimizer(self, other):
        model = nn.Linear(2, 3)
        step = fnrun.make_train_step(model, lambda model, x: model(x).mean(), optim.sgd(0.1, momentum=0.5))
        with pytest.raises(ValueError, match=r"opt_state is not that of this optimizer.*missing"):
            step(fnrun.TrainState.create(model, other), torch.ones(1, 2))

    @pytest.mark.parametrize("chained", [False, True])
    def test_a_state_of_another_optimizer_where_the_last_one_lay_in_memory(self, chained):
        make = (lambda o: optim.chain(optim.clip_by_global_norm(1.0), o)) if chained else lambda o: o
        model, optimizer = nn.Linear(2, 3), make(optim.sgd(0.1, momentum=0.5))
        step = fnrun.make_train_step(model, lambda model, x: model(x).mean(), optimizer)
        state = fnrun.TrainState.create(model, optimizer)
        wrong = make(optim.adamw(0.1)).init(state.params)
        state, _ = step(state, torch.ones(1, 2))
        place, rest, others = id(state.opt_state), state.replace(opt_state=None), []
        del state
        while not others or (id(others[-1]) != place and len(others) < 1000):
            others.append((*wrong,) if chained else dataclasses.replace(wrong))
        assert id(others[-1]) == place
        with pytest.raises(ValueError, match=r"opt_state is not that of this optimizer"):
            step.update(rest.replace(opt_state=others[-1]), {name: torch.ones_like(p) for name, p in rest.params.items()})

    def test_a_step_keeps_no_optimizer_state_alive(self):
        model, optimizer = nn.Linear(2, 3), optim.chain(optim.clip_by_global_norm(1.0), optim.sgd(0.1, momentum=0.5))
        step = fnrun.make_train_step(model, lambda model, x: model(x).mean(), optimizer)
        state, _ = step(fnrun.TrainState.create(model, optimizer), torch.ones(1, 2))
        memory = weakref.ref(state.opt_state[1].slots["momentum_buffer"]["weight"])
        del state
        gc.collect()
        assert memory() is None

    def test_freezing_between_the_state_and_the_step(self):
        model = nn.Linear(2, 3)
        state = fnrun.TrainState.create(model, optim.adamw(0.1))
        model.bias.requires_grad_(False)
        with pytest.raises(ValueError, match="freeze parameters before both"):
            fnrun.make_train_step(model, lambda model, x: model(x).mean(), optim.adamw(0.1))(state, torch.ones(1, 2))

    def test_an_unknown_precision(self):
        with pytest.raises(ValueError, match="None, 'bf16' or 'fp16', not 'half'"):
            fnrun.make_train_step(nn.Linear(1, 1), lambda model, x: 0, optim.sgd(0.1), precision="half")

    def test_a_users_exception_keeps_its_traceback(self):
        def loss_fn(model, x):
            raise KeyError("mine")

        step, state = self.make(loss_fn)
        with pytest.raises(KeyError, match="mine") as caught:
            step(state, torch.ones(1, 2))
        assert caught.traceback[-1].name == "loss_fn"


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("compile", [False, True])
def test_activations_that_are_computed_again_are_those_of_the_state(reentrant, compile, monkeypatch):
    """Checkpointing runs a part of the forward once more during the backward, dropout and all."""
    from torch.utils.checkpoint import checkpoint

    class Net(nn.Module):
        def __init__(self, again):
            super().__init__()
            torch.manual_seed(0)
            self.zeroth, self.again = nn.Linear(3, 3), again
            p = 0.0 if compile else 0.3  # with dropout it is not compiled
            self.first, self.second = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Dropout(p)), nn.Linear(5, 1)

        def forward(self, x):
            x = self.zeroth(x)
            return self.second(checkpoint(self.first, x, use_reentrant=reentrant) if self.again else self.first(x))

    monkeypatch.setattr(torch._inductor, "compile", lambda graph, *args: graph)
    ends = []
    for again in (False, True):
        model = Net(again)
        step = fnrun.make_train_step(model, lambda model, x: model(x).square().mean(), optim.sgd(0.5), compile=compile)
        state = fnrun.TrainState.create(model, optim.sgd(0.5))
        for i in range(5):
            state, _ = step(state, torch.linspace(-1, 1, 12).view(4, 3) + i)
        ends.append(state.params)
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-6 * compile, atol=1e-6 * compile)


class Autoencoder(nn.Module):
    """Tied by memory, and not by being one parameter."""

    def __init__(self, tie):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(4, 2), nn.Linear(2, 4)
        self.decoder.weight.data = tie(self.encoder.weight.data)


@pytest.mark.parametrize("tie", [lambda w: w.t(), lambda w: w.view(4, 2), lambda w: w.view(-1).flip(0)[:8].view(4, 2).set_(w.view(-1)[4:])])
def test_tensors_that_share_their_memory_are_named(tie):
    with pytest.raises(ValueError, match=r"'encoder.weight' and 'decoder.weight' lie in the same memory"):
        fnrun.make_train_step(Autoencoder(tie), lambda model, x: x.sum(), optim.sgd(0.1))


def test_parts_of_one_memory_that_do_not_overlap_are_apart():
    both = torch.randn(2, 3)
    model = nn.ParameterDict({"a": nn.Parameter(both[0]), "b": nn.Parameter(both[1])})
    optimizer = optim.sgd(0.1)
    state, _ = fnrun.make_train_step(model, lambda model, x: (model["a"] * model["b"]).sum(), optimizer)(
        fnrun.TrainState.create(model, optimizer), 0
    )
    torch.testing.assert_close(state.params["a"], both[0] - 0.1 * both[1])


def test_a_loss_that_calls_backward_itself_is_refused():
    def loss(model, x):
        model(x).abs().mean().backward()
        return model(x).square().mean()

    model = nn.Linear(2, 1)
    step, state = fnrun.make_train_step(model, loss, optim.sgd(0.1)), fnrun.TrainState.create(model, optim.sgd(0.1))
    with pytest.raises(ValueError, match="the loss calls backward"):
        step(state, torch.ones(3, 2))


def test_a_lazy_model_is_told_to_be_run_once():
    with pytest.raises(ValueError, match="run the lazy module once"):
        fnrun.make_train_step(nn.LazyLinear(2), lambda model, x: model(x).sum(), optim.sgd(0.1))


def test_what_compile_takes():
    with pytest.raises(TypeError, match="compile= is True or False, and not 'no'"):
        fnrun.make_train_step(nn.Linear(2, 1), lambda model, x: model(x).sum(), optim.sgd(0.1), compile="no")  # pyright: ignore[reportArgumentType]


# --- the step as a value ------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Batch norm, dropout, and a buffer that nobody changes."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        with fnrun.Key(0).scope():
            self.first, self.norm, self.drop, self.last = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.4), nn.Linear(6, 4)
        self.register_buffer("table", torch.arange(4.0))
        self.to(dtype)

    def forward(self, x):
        return self.last(self.drop(self.norm(self.first(x)).tanh())) + 0.01 * self.table


def rows_of(n, seed=0):
    with fnrun.Key(seed).scope():
        return torch.randn(n, 4)


@pytest.fixture
def recorded(monkeypatch):
    """Graphs are called as they were recorded: what inductor makes of them takes seconds each, and is tested beside it."""
    monkeypatch.setattr(torch._inductor, "compile", lambda graph, *args, **kwargs: graph)


def made(optimizer=None, loss=loss_fn, model=None, **options):
    model, optimizer = model or Net(), optimizer or optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(1e-2))
    return fnrun.make_train_step(model, loss, optimizer, **options), fnrun.TrainState.create(model, optimizer, seed=3)


@pytest.mark.parametrize("microbatches", [1, 3])
@pytest.mark.parametrize("optimizer", [optim.adamw(1e-2), optim.dynamic_loss_scale(optim.sgd(0.1), init_scale=8.0)])
def test_a_step_is_the_composition_of_its_parts(optimizer, microbatches):
    step, state = made(optimizer, microbatches=microbatches)
    for i in range(2):
        g, b, m = step.gradients(state, rows_of(8, i))
        s, more = step.update(state.replace(buffers=b), g)
        state, seen = step(state, rows_of(8, i))
        assert tree.equal((state, seen), (s, {**m, **more}))
        assert set(g) == set(state.params)
        assert not any(t.requires_grad for t in g.values())


def test_gradients_are_of_the_loss_itself_also_where_it_is_scaled():
    plain, state = made(optim.sgd(0.1))
    scaled, scaled_state = made(optim.dynamic_loss_scale(optim.sgd(0.1), init_scale=2.0**12))
    assert tree.equal(plain.gradients(state, rows_of(8))[0], scaled.gradients(scaled_state, rows_of(8))[0])


def test_other_gradients_in_a_step_are_keyed_donated_compiled_and_detached(recorded):
    step, state = made()

    def noisy(state, batch):
        grads, buffers, metrics = step.gradients(state, batch)
        fnrun.report("noise", torch.ones(()))
        return {n: g + 0.01 * torch.randn_like(g).requires_grad_() for n, g in grads.items()}, buffers, metrics

    other = dataclasses.replace(step, gradients=noisy)
    end, seen = other(state, rows_of(8))
    assert tree.equal(end, other(state, rows_of(8))[0]), "two calls draw the same noise"
    assert not tree.equal(end.params, step(state, rows_of(8))[0].params)
    assert seen["noise"] == 1.0
    assert not any(p.requires_grad for p in end.params.values())
    assert other.donates
    batches = [rows_of(8, i) for i in range(4)]
    plain, _ = fnrun.epoch_loop(other)(state, batches)
    donated, _ = fnrun.epoch_loop(other, donate=True)(state, batches)
    assert tree.equal(plain, donated)
    compiled = dataclasses.replace(made(compile=True)[0], gradients=noisy)
    quick, _ = fnrun.epoch_loop(compiled)(state, batches)
    torch.testing.assert_close(dict(quick.params), dict(plain.params), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({}, r"missing \['a.bias'"),
        ({"more": torch.ones(1)}, r"unexpected \['more'\]"),
        (
            {"a.bias": torch.ones(3)},
            r"that of 'a.bias' is float32 of shape \(3,\) on cpu, and the parameter float32 of shape \(4,\) on cpu",
        ),
        ({"a.bias": torch.ones(4).double()}, "'a.bias' is float64"),
        ({"a.bias": torch.ones(4, device="meta")}, "on meta"),
        ({"a.bias": 1.0}, "'a.bias' is 1.0"),
    ],
)
def test_gradients_of_another_shape_or_name_are_refused(bad, message):
    """A kernel that writes in place does not look: it reads on behind a gradient that is too short."""
    step, state = made(optim.adamw(1e-2), model=Everything())

    def spoiled(state, batch):
        grads, buffers, found = step.gradients(state, batch)
        return ({**grads, **bad} if bad else {}), buffers, found

    with pytest.raises(ValueError, match=message):
        dataclasses.replace(step, gradients=spoiled)(state, rows_of(4))
    with pytest.raises(ValueError, match=message):
        step.update(state, spoiled(state, rows_of(4))[0])


def test_an_optimizer_state_of_other_shapes_is_refused():
    step, state = made(optim.adamw(1e-2), lambda model, x: model(x).square().mean(), nn.Linear(4, 4))
    other = optim.adamw(1e-2).init({"weight": torch.zeros(2, 4), "bias": torch.zeros(4)})
    with pytest.raises(
        ValueError, match=r"opt_state/slots/exp_avg/weight has the shape \(2, 4\), and for these parameters it would be \(4, 4\)"
    ):
        step(state.replace(opt_state=other), rows_of(4))
    with pytest.raises(ValueError, match=r"a gradient has the shape \(3,\), and its parameter \(4,\)"):
        optim.sgd(0.1).update({"bias": torch.ones(3)}, optim.sgd(0.1).init({"bias": torch.ones(4)}), {"bias": torch.ones(4)})


class Normed(nn.Linear):
    """A module that writes to its parameters."""

    def forward(self, x):
        with torch.no_grad():
            self.weight.div_(self.weight.norm(dim=1, keepdim=True))
        return super().forward(x)


def square(model, x):
    return model(x).square().mean()


def test_what_a_forward_writes_to_parameters_stands_among_the_buffers():
    step, state = made(optim.sgd(0.1), square, Normed(4, 4))
    kept = fnrun.snapshot(state.params)
    copied = dataclasses.replace(step, gradients=lambda s, b: (lambda g, b, m: (g, {**b}, m))(*step.gradients(s, b)))
    for _ in range(5):
        _, (buffers, _) = step.loss(state.params, state.buffers, rows_of(4))
        assert set(buffers) == {"weight"}
        assert tree.equal(copied(state, rows_of(4)), step(state, rows_of(4)))
    assert tree.equal(state.params, kept)
    own = dataclasses.replace(step, update=lambda s, g: step.update(s, g))
    assert tree.equal(own(state, rows_of(4)), step(state, rows_of(4)))


def noisy(step, size=1.0):
    def gradients(state, batch):
        grads, buffers, found = step.gradients(state, batch)
        return {name: grad + size * torch.randn_like(grad) for name, grad in grads.items()}, buffers, found

    return dataclasses.replace(step, gradients=gradients)


def watched(step):
    return dataclasses.replace(step, gradients=lambda state, batch: step.gradients(state, batch))


def test_transforms_that_draw_do_not_draw_the_same():
    step, state = made(optim.sgd(0.1), square, nn.Linear(4, 4))
    none, one, two, between = (
        s.gradients(state, rows_of(4))[0]["weight"] for s in (step, noisy(step), noisy(noisy(step)), watched(noisy(step)))
    )
    assert not torch.allclose(two - one, one - none, atol=1e-2)
    assert torch.equal(one, between), "what draws nothing changes nothing"
    assert repr(watched(noisy(step))) == "<watched(noisy(train_step(Linear)))>"


def test_a_transform_that_reads_the_position_sees_it_at_each_step():
    def by_ticks(step):
        def gradients(state, batch):
            grads, buffers, found = step.gradients(state, batch)
            return grads, buffers, {**found, "ticks": state.position.ticks}

        return dataclasses.replace(step, gradients=gradients)

    step, state = made(optim.sgd(0.1), square, nn.Linear(4, 4))
    _, found = fnrun.epoch_loop(by_ticks(step))(state, [rows_of(4)] * 5)
    assert found["ticks"] == 2


def test_a_compiled_step_with_other_gradients_follows_the_modules_structure(recorded):
    model = nn.Linear(4, 4)
    step, state = made(optim.sgd(0.1), square, model, compile=True)
    for _ in range(5):
        watched(step)(state, rows_of(4))
    model.bias.requires_grad_(False)
    with pytest.raises(ValueError, match="has changed since the step was made"):
        watched(step)(state, rows_of(4))


def test_a_number_that_python_reads_of_a_tensor_is_said_with_its_place(recorded):
    def clipped(step):
        def gradients(state, batch):
            grads, buffers, found = step.gradients(state, batch)
            factor = min(1.0, 1.0 / grads["weight"].norm().item())
            return {name: grad * factor for name, grad in grads.items()}, buffers, found

        return dataclasses.replace(step, gradients=gradients)

    step, state = made(optim.sgd(0.1), square, nn.Linear(4, 4), compile=True)
    with pytest.warns(UserWarning, match=r"Python reads a number of a tensor \(test_steps.py:\d+: factor = min.*: keep it a tensor"):
        clipped(step)(state, rows_of(4))


def test_buffers_of_other_names_are_refused():
    step, state = made(model=Everything())
    other = dataclasses.replace(step, gradients=lambda state, batch: (step.gradients(state, batch)[0], {}, {}))
    with pytest.raises(ValueError, match=r"returned other buffers than the state has: missing \['norm.num_batches_tracked'"):
        other(state, rows_of(4))


def test_an_update_of_ones_own_is_not_donated_and_said_so():
    step, state = made()

    def halved(state, grads):
        return step.update(state, {name: g / 2 for name, g in grads.items()})

    other = dataclasses.replace(step, update=halved)
    assert not other.donates
    with pytest.warns(UserWarning, match="donate=True: .* cannot write the new state over the old one"):
        loop = fnrun.epoch_loop(other, donate=True)
    end, _ = loop(state, [rows_of(8)])
    g, b, _ = step.gradients(state, rows_of(8))
    assert tree.equal(end.params, step.update(state.replace(buffers=b), {n: x / 2 for n, x in g.items()})[0].params)
    with pytest.raises(ValueError, match=r"leaves state\.step at 0, and it counts one more, 1"):
        dataclasses.replace(step, update=lambda state, grads: (state, {}))(state, rows_of(8))
    with pytest.raises(TypeError, match="its gradients are those of another loss"):
        dataclasses.replace(step, loss=lambda params, buffers, batch, *, key=None: None)


def test_the_loss_is_a_function_that_is_differentiable_in_anything():
    model = Net(torch.float64)
    step, state = made(optim.sgd(0.1), model=model)
    batch, key = rows_of(8).double(), state.rng.fold_in("train", 0)
    inputs = {n: p.clone().requires_grad_() for n, p in state.params.items()}
    loss, (buffers, seen) = step.loss(inputs, state.buffers, batch, key=key)
    grads = torch.autograd.grad(loss, list(inputs.values()))
    g, b, _ = step.gradients(state, batch)
    torch.testing.assert_close(dict(zip(inputs, grads, strict=True)), g, rtol=1e-12, atol=1e-12)
    assert tree.equal((buffers, seen), (b, {}))
    model.drop.eval()
    quiet, state = made(optim.sgd(0.1), model=model)
    x = batch.clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda w, x: quiet.loss({**state.params, "last.weight": w}, state.buffers, x)[0], (inputs["last.weight"], x)
    )


def test_a_loss_without_a_key_draws_nothing():
    step, state = made()
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match=r"train_step\(Net\): the loss draws random numbers \(\w+\), and was given no key"):
        step.loss(state.params, state.buffers, rows_of(8))
    assert torch.equal(torch.get_rng_state(), before)
    attention = nn.MultiheadAttention(4, 2, batch_first=True)
    step, state = made(model=attention, loss=lambda model, x: model(x, x, x, need_weights=False)[0].mean())
    step.loss(state.params, state.buffers, rows_of(8)[None])  # its kernel could, and does not


def test_what_wraps_a_step_is_a_function():
    step, state = made()
    wrapper = functools.wraps(step)(lambda state, batch: step(state, batch))
    assert not isinstance(wrapper, fnrun.steps.TrainStep)
    with pytest.warns(UserWarning, match=r"donate=True.*put what it does into a part, dataclasses.replace\(step, gradients=...\)"):
        fnrun.epoch_loop(wrapper, donate=True)
    with pytest.raises(TypeError, match=r"fused_steps.*dataclasses.replace\(step, gradients=...\)"):
        fnrun.step_loop(wrapper, 4, fused_steps=2)
    assert tree.equal(wrapper(state, rows_of(8)), step(state, rows_of(8)))


def test_a_compiled_step_skips_what_is_not_finite(recorded):
    step, state = made(compile=True)
    skipping = fnrun.skip_nonfinite(step)
    assert isinstance(skipping, fnrun.steps.TrainStep)
    bad = torch.full((8, 4), float("nan"))
    end, seen = skipping(skipping(state, rows_of(8))[0], bad)
    assert seen == {"skipped": 1.0}
    assert end.step == 2
    assert tree.equal(end.replace(step=1), skipping(state, rows_of(8))[0])


def test_a_compiled_step_lets_go_of_a_state_that_it_refused(recorded):
    step, state = made(optim.adamw(1e-2), square, nn.Linear(4, 4), compile=True)
    refused = state.replace(opt_state=optim.sgd(0.1, momentum=0.9).init(state.params))
    held = weakref.ref(refused)
    with contextlib.suppress(ValueError):
        step(refused, rows_of(4))
        raise AssertionError
    del refused
    gc.collect()
    assert held() is None


@pytest.mark.parametrize("microbatches", [1, 2])
def test_compiled_and_fused_steps_draw_the_masks_of_single_ones(microbatches, recorded):
    batches = [rows_of(8, i) for i in range(4)]
    step, state = made(optim.sgd(0.1), microbatches=microbatches)
    plain, _ = fnrun.step_loop(step, 4)(state, batches)
    compiled, _ = made(optim.sgd(0.1), microbatches=microbatches, compile=True)
    for k in (1, 2):
        end, _ = fnrun.step_loop(compiled, 4, fused_steps=k)(state, batches)
        torch.testing.assert_close(dict(end.params), dict(plain.params), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(dict(end.buffers), dict(plain.buffers), rtol=1e-5, atol=1e-5)


# --- microbatches -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fold", [lambda e, mask: metrics.mean(e, mask), lambda e, mask: metrics.sum(e * mask)], ids=["mean", "sum"])
@settings(max_examples=25, deadline=None)
@given(st.data())
def test_the_gradient_does_not_depend_on_the_cut(fold, drawn):
    rows, n = drawn.draw(st.integers(1, 9)), drawn.draw(st.integers(1, 12))
    mask = drawn.draw(st.lists(st.lists(st.sampled_from([0.0, 1.0, 0.3]), min_size=4, max_size=4), min_size=rows, max_size=rows))
    batch = {"mask": torch.tensor(mask).double(), "x": rows_of(rows).double()}
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    loss = lambda model, batch: fold(model(batch["x"]).square(), batch["mask"])  # noqa: E731
    step, state = made(optim.sgd(0.1, momentum=0.9), loss, model, microbatches=n)
    grads, _, seen = step.gradients(state, batch)
    value = fold(model(batch["x"]).square(), batch["mask"]).compute()
    if seen.get("skipped"):
        assert not batch["mask"].any()
        assert set(grads.values()) == {None}
        assert seen == {"skipped": 1.0}
        return
    torch.testing.assert_close(seen["loss"].compute(), value.detach(), rtol=1e-12, atol=1e-12)
    whole = torch.autograd.grad(value, list(model.parameters()))
    torch.testing.assert_close(list(grads.values()), list(whole), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("n", [1, 2])
def test_a_batch_of_weight_0_makes_no_update_counts_as_skipped_and_is_said_once(n, compile, caplog, recorded):
    loss = lambda model, b: metrics.mean(model(b["x"]).square(), b["mask"])  # noqa: E731
    step, state = made(
        optim.sgd(fnrun.schedules.linear(0.1, 0.0, 9), momentum=0.9, weight_decay=0.1),
        loss,
        nn.Linear(4, 4),
        microbatches=n,
        compile=compile,
    )
    state, seen = step(state, {"x": rows_of(4), "mask": torch.ones(4, 4)})
    assert seen["skipped"] == 0
    for _ in range(2):
        after, seen = step(state, {"x": rows_of(4), "mask": torch.zeros(4, 4)})
        assert after.step == 2
        assert seen["skipped"] == 1
        assert tree.equal((after.params, after.opt_state), (state.params, state.opt_state))
    assert caplog.text.count("every weight of the loss is 0 makes no update") == 1
    plain, _ = made(optim.sgd(fnrun.schedules.linear(0.1, 0.0, 9), momentum=0.9, weight_decay=0.1), loss, nn.Linear(4, 4), microbatches=n)
    batch = {"x": rows_of(4), "mask": torch.tensor([1.0, 0, 1, 1]).expand(4, 4)}
    one, other = step(after, batch)[0], plain(after, batch)[0]
    assert tree.equal(one.opt_state.hyper.count, other.opt_state.hyper.count)
    torch.testing.assert_close(one.params, other.params)


def test_a_loss_does_not_say_by_a_metric_that_its_batch_was_skipped():
    for loss in (lambda model, x: (model(x).mean(), {"skipped": 0.5}), lambda model, x: (fnrun.report("skipped", 1), model(x).mean())[1]):
        step, state = made(optim.sgd(0.1), loss, nn.Linear(4, 4))
        with pytest.raises(ValueError, match="'skipped' is the name of what says that a batch made no update"):
            step(state, rows_of(4))


def test_a_piece_of_weight_0_adds_nothing():
    loss = lambda model, b: metrics.mean(model(b["x"]).square(), b["mask"])  # noqa: E731
    model, mask = nn.Linear(4, 4), torch.ones(4, 4)
    mask[2:] = 0
    one, state = made(optim.sgd(0.1), loss, model)
    two, _ = made(optim.sgd(0.1), loss, model, microbatches=2)
    half = one.gradients(state, {"x": rows_of(4)[:2], "mask": mask[:2]})[0]
    assert tree.equal(two.gradients(state, {"x": rows_of(4), "mask": mask})[0], half)


def test_the_weight_of_a_loss_is_data():
    loss = lambda model, x: metrics.mean(model(x).square(), model(x))  # noqa: E731
    step, state = made(optim.sgd(0.1), loss, nn.Linear(4, 4))
    with pytest.raises(ValueError, match="the weight of a loss is data, and this one requires grad"):
        step(state, rows_of(4))


def aligned(start, end):
    """The complete subtrees of which a range of leaves consists."""
    while start < end:
        size = start & -start or 1 << 30
        while size > end - start:
            size //= 2
        yield start, start + size
        start += size


def test_a_sum_over_pieces_is_one_tree_however_they_are_grouped():
    values = [torch.tensor(v) for v in (1e8, 1.0, -1e8, 3.0, 1e-3, 7.0, 1e7, -2.5)]

    def tree_sum(values, at=0):
        total = PairwiseSum()
        for i, value in enumerate(values, at):
            total.add(i, value)
        return total.result()

    def recursive(parts, start, end):
        if (start, end) in parts:
            return parts[start, end]
        middle = (start + end) // 2
        return recursive(parts, start, middle) + recursive(parts, middle, end)

    whole = ((values[0] + values[1]) + (values[2] + values[3])) + ((values[4] + values[5]) + (values[6] + values[7]))
    assert sum(values[1:], values[0]) != whole, "the order is seen in the bits"
    for groups in ([1] * 8, [2] * 4, [4, 4], [3, 3, 2], [8]):
        ends = list(itertools.accumulate(groups))
        subtrees = [part for size, end in zip(groups, ends, strict=True) for part in aligned(end - size, end)]
        parts = {(start, end): tree_sum(values[start:end]) for start, end in subtrees}
        assert torch.equal(recursive(parts, 0, 8), whole), groups
    assert torch.equal(tree_sum(values), whole)
    assert torch.equal(tree_sum(values[2:4], at=2), values[2] + values[3]), "absent ones are skipped"
    assert torch.equal(tree_sum(values[:7]), ((values[0] + values[1]) + (values[2] + values[3])) + ((values[4] + values[5]) + values[6]))


def balanced(values):
    """The sum by its definition: over numbers, None is absent, an odd one is passed up."""
    while len(values) > 1:
        pairs = itertools.zip_longest(values[::2], values[1::2])
        values = [b if a is None else a if b is None else a + b for a, b in pairs]
    return values[0]


@given(
    values=st.lists(st.none() | st.floats(-(2.0**20), 2.0**20, width=32).map(torch.tensor), min_size=1, max_size=23),
    cuts=st.lists(st.integers(0, 23), max_size=5),
)
@example(values=[torch.tensor(v) for v in (1e8, 1.0, -1e8, 3.0, 1e-3, 7.0, 1e7, -2.5)], cuts=[3, 6])
def test_sums_of_groups_join_to_the_bits_of_the_whole(values, cuts):
    """Each group adds its own pieces, some of which are absent, and hands over complete subtrees."""
    edges = sorted({0, len(values), *(cut for cut in cuts if cut < len(values))})
    whole = PairwiseSum()
    for start, end in itertools.pairwise(edges):
        group = PairwiseSum(start)
        for i in range(start, end):
            if values[i] is not None:
                group.add(i, values[i])
        assert all(start <= place << level < (place + 1) << level <= end for level, place, _ in group.parts)
        whole.join(group.parts)
    expected, found = balanced(values), whole.result()
    assert (found is None) if expected is None else torch.equal(found, expected)


@pytest.mark.parametrize("sizes", [[1] * 8, [2] * 4, [4, 4], [3, 3, 2], [8]])
def test_pieces_add_to_the_same_bits_whoever_adds_which(sizes):
    values = [torch.randn(1000, generator=torch.Generator().manual_seed(i)) for i in range(8)]
    whole, at = PairwiseSum(), 0
    for size in sizes:
        group = PairwiseSum(at)
        for i in range(at, at + size):
            group.add(i, values[i])
            assert len(group.parts) <= 4
        at += size
        whole.join(group.parts)
        assert len(whole.parts) <= 4
    assert not torch.equal(sum(values[1:], values[0]), expected := balanced(values)), "the order is seen in the bits"
    assert torch.equal(whole.result(), expected)


def test_a_number_that_comes_too_late_is_refused():
    total = PairwiseSum()
    total.add(3, 1.0)
    with pytest.raises(ValueError, match="at number 4, and 2 comes too late"):
        total.join([(1, 1, 1.0)])


def test_microbatches_keep_no_more_gradients_than_their_tree():
    """log2(n) + 1 of them, that of the piece at hand with them."""
    model = torch.nn.Sequential(*(torch.nn.Linear(256, 256) for _ in range(8)))
    gradient = sum(p.nbytes for p in model.parameters())
    x, peaks = torch.randn(8, 256), {}
    for n in (1, 8):
        step = fnrun.make_train_step(model, lambda model, x: model(x).square().mean(), optim.sgd(0.1), microbatches=n)
        state = fnrun.TrainState.create(model, optim.sgd(0.1))
        for _ in range(3):  # which are looked at
            step.gradients(state, x)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            step.gradients(state, x)
        events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
        peaks[n] = max(itertools.accumulate(sizes)) / gradient
    assert 1 <= peaks[1] < 1.3
    assert 3.9 < peaks[8] < 4.3


def test_at_most_log2_and_one_partial_sums_live_at_a_time():
    class Counted:
        alive, most = 0, 0

        def __init__(self):
            Counted.alive += 1
            Counted.most = max(Counted.most, Counted.alive)

        def __del__(self):
            Counted.alive -= 1

        def __add__(self, other):
            return Counted()

    total = PairwiseSum()
    most = 0
    for i in range(16):
        total.add(i, Counted())
        most = max(most, Counted.alive)
    assert most <= 5
    assert Counted.most <= 7  # and while two join


def test_statistics_of_a_norm_written_by_hand_are_not_lost_in_pieces():
    """Its kernel writes to buffers and counts no write: a look at their values tells."""

    class Norm(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(4, 4)
            self.register_buffer("mean", torch.zeros(4))
            self.register_buffer("var", torch.ones(4))

        def forward(self, x):
            return F.batch_norm(self.layer(x), self.mean, self.var, training=True)

    model, x = Norm(), torch.randn(8, 4)
    state = fnrun.TrainState.create(model, optim.sgd(0.1))
    whole, pieces = (
        fnrun.make_train_step(model, lambda model, x: (model(x) - x).square().mean(), optim.sgd(0.1), microbatches=n) for n in (1, 2)
    )
    assert not torch.equal(whole(state, x)[0].buffers["mean"], state.buffers["mean"])
    with pytest.raises(ValueError, match=r"the buffer '(mean|var)' comes out of each microbatch with another value"):
        pieces(state, x)


def test_buffers_that_are_averages_are_averaged_by_examples():
    step, state = made(optim.sgd(0.1), microbatches=3)
    one, _ = made(optim.sgd(0.1))
    x = rows_of(8)
    pieces = [x[:2], x[2:5], x[5:]]
    _, buffers, _ = step.gradients(state, x)
    each = [one.gradients(state, piece)[1] for piece in pieces]
    for name in ("norm.running_mean", "norm.running_var"):
        expected = sum(b[name].double() * len(p) for b, p in zip(each, pieces, strict=True)) / 8
        torch.testing.assert_close(buffers[name], expected.float())
    assert buffers["norm.num_batches_tracked"] == 1
    assert buffers["table"] is state.buffers["table"]


def test_a_piece_of_one_row_under_batch_norm_is_refused_as_torch_does():
    step, state = made(microbatches=4)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        step(state, rows_of(5))


def test_another_buffer_that_differs_between_pieces_is_named():
    class Norms(nn.Linear):
        def __init__(self):
            super().__init__(4, 4)
            self.register_buffer("center", torch.zeros(4))

        def forward(self, x):
            self.center.mul_(0.9).add_(0.1 * x.mean(0))
            return super().forward(x - self.center)

    step, state = made(optim.sgd(0.1), model=Norms(), microbatches=2)
    with pytest.raises(ValueError, match="the buffer 'center' comes out of each microbatch with another value"):
        step(state, rows_of(4))
    made(optim.sgd(0.1), model=Norms())[0](state, rows_of(4))


def test_fewer_rows_than_pieces_leave_some_out():
    model = nn.Linear(4, 4).double()
    one, state = made(optim.sgd(0.1), model=model)
    many, _ = made(optim.sgd(0.1), model=model, microbatches=8)
    batch = rows_of(3).double()
    torch.testing.assert_close(many.gradients(state, batch)[0], one.gradients(state, batch)[0], rtol=1e-12, atol=1e-12)


def test_a_batch_without_examples_is_refused():
    step, state = made(model=nn.Linear(4, 4), microbatches=2)
    with pytest.raises(ValueError, match="the batch has no examples"):
        step(state, rows_of(0))


def test_accumulate_has_another_name():
    with pytest.raises(TypeError, match=r"accumulate'.*microbatches=n here.*masked means and sums"):
        made(accumulate=2)
    with pytest.raises(TypeError, match="unexpected keyword argument 'acumulate'"):
        made(acumulate=2)
