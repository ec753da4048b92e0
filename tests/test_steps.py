"""Steps against the loop that everybody writes by hand: `loss.backward(); optimizer.step()`."""

from __future__ import annotations

import copy
import random
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fnrun
from fnrun import metrics, optim, tree


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
    with pytest.warns(UserWarning, match="the evaluation of Linear draws from the global generator of NumPy"):
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
    with pytest.warns(UserWarning, match="generator of Python and NumPy.*host_random=True"):
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


class TestErrors:
    def make(self, loss_fn):
        model = nn.Linear(2, 3)
        return fnrun.make_train_step(model, loss_fn, optim.sgd(0.1)), fnrun.TrainState.create(model, optim.sgd(0.1))

    @pytest.mark.parametrize(
        ("loss_fn", "message"),
        [
            (lambda model, x: model(x), r"scalar tensor, this one is a tensor of shape \(1, 3\)"),
            (lambda model, x: 1.0, "scalar tensor, this one is a float"),
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
