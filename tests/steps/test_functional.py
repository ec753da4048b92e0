"""A module as a function of its tensors."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

import fnrun
from fnrun.steps.functional import FunctionalModule


def tensors(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}, {n: b.clone() for n, b in model.named_buffers()}


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_use_the_tensors_they_are_given(kind):
    """They keep a second list of their weights."""
    model, other = kind(3, 4, num_layers=2), kind(3, 4, num_layers=2)
    x = torch.randn(5, 2, 3)
    params, buffers = tensors(other)
    outputs, _ = fnrun.call(model, params, buffers, x)
    assert torch.equal(outputs[0], other(x)[0])
    leaves = {name: p.requires_grad_() for name, p in params.items()}
    grads = torch.autograd.grad(fnrun.call(model, leaves, buffers, x)[0][0].sum(), list(leaves.values()))
    assert all(g.abs().sum() > 0 for g in grads)
    assert all(a is b for a, b in zip(model._flat_weights, model.parameters(), strict=True))


def test_tied_weights_stay_tied():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    out, _ = fnrun.call(model, {"0.weight": torch.eye(3) * 2}, {}, torch.ones(1, 3))
    assert out.tolist() == [[4.0, 4.0, 4.0]]


def test_buffers_come_back_new_and_what_was_passed_in_is_untouched():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2, track_running_stats=False))
    model.register_buffer("constant", torch.ones(1))
    params, buffers = tensors(model)
    _, after = fnrun.call(model, params, buffers, torch.randn(8, 2))
    assert torch.equal(after["constant"], buffers["constant"])
    assert not torch.equal(after["0.running_mean"], buffers["0.running_mean"])
    assert int(buffers["0.num_batches_tracked"]) == 0
    _, after = fnrun.call(model, params, buffers, torch.randn(8, 2), train=False)
    assert all(torch.equal(after[name], buffers[name]) for name in buffers)


def test_a_buffer_that_is_assigned_anew_is_collected():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("n", torch.zeros(()))

        def forward(self, x):
            self.n = self.n + 1
            return x

    model = Counts()
    original = model.n
    _, after = fnrun.call(model, {}, {"n": torch.tensor(4.0)}, torch.ones(1))
    assert after["n"].item() == 5
    assert model.n is original


def test_the_module_is_put_back_also_when_it_raises():
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))
            self.register_buffer("seen", torch.zeros(1))
            self.register_buffer("none", None)
            self.cache = None

        def forward(self, x):
            self.cache = self.weight * 3
            self.seen.add_(1)
            self.none = torch.ones(1)
            self.register_buffer("new", torch.ones(1))
            self.kept = self.weight * 2
            raise RuntimeError("in the forward")

    model = Fails()
    weight, seen = model.weight, model.seen
    with pytest.raises(RuntimeError, match="in the forward"):
        fnrun.call(model, {"weight": torch.ones(1)}, {"seen": torch.ones(1)}, 0)
    assert model.weight is weight
    assert model.seen is seen
    assert model.seen.item() == 0
    assert model.none is None
    assert not hasattr(model, "new")
    assert not hasattr(model, "kept")
    assert model.cache is None


def test_modes_are_those_of_when_the_step_was_made():
    model = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2))
    model[1].eval()
    functional = FunctionalModule(model)
    model.eval()
    seen = []
    functional.run(lambda: seen.append((model.training, model[0].training, model[1].training)), functional.tensors("params", tensors(model)[0]), tensors(model)[1], train=True)  # fmt: skip
    assert seen == [(True, True, False)]
    assert not model.training


def test_names_that_do_not_match_are_named():
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"missing \['bias'\], unexpected \['biass'\]"):
        fnrun.call(model, {"weight": torch.ones(2, 2), "biass": torch.ones(2)}, {}, torch.ones(1, 2))


class Strays(nn.Module):
    def __init__(self, do):
        super().__init__()
        self.do = do
        self.register_buffer("seen", torch.zeros(1))
        self.register_buffer("none", None)

    def forward(self, x):
        self.do(self)
        return x


@pytest.mark.parametrize(
    ("do", "name"),
    [
        (lambda m: setattr(m, "none", torch.ones(1)), "none"),
        (lambda m: m.register_buffer("new", torch.ones(1)), "new"),
        (lambda m: setattr(m, "seen", None), "seen"),
    ],
)
def test_a_buffer_that_a_call_makes_or_takes_away_is_named(do, name):
    model = Strays(do)
    with pytest.raises(ValueError, match=rf"made or took away the buffers \['0.{name}'\].*run the module once"):
        fnrun.call(nn.Sequential(model), {}, {"0.seen": torch.ones(1)}, 0)
    assert set(model._buffers) == {"seen", "none"}
    assert model.none is None


def test_a_buffer_that_is_a_parameter_is_the_parameter():
    model = nn.Linear(2, 2, bias=False)
    model.register_buffer("alias", model.weight)
    optimizer = fnrun.optim.sgd(0.5)
    state = fnrun.TrainState.create(model, optimizer)
    assert state.buffers == {}
    after, _ = fnrun.make_train_step(model, lambda model, x: model.alias.sum() + model(x).sum() * 0, optimizer)(state, torch.ones(1, 2))
    assert torch.equal(after.params["weight"], state.params["weight"] - 0.5)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_old_weight_norm_leaves_no_graph_behind():
    model = torch.nn.utils.weight_norm(nn.Linear(2, 2))
    with torch.no_grad():
        model(torch.ones(1, 2))
    params, buffers = tensors(model)
    fnrun.call(model, {n: p.requires_grad_() for n, p in params.items()}, buffers, torch.ones(1, 2))
    assert not model.weight.requires_grad


def test_two_threads_may_call_one_module():
    model = nn.Linear(4, 4, bias=False)
    results = {}

    def work(i):
        for _ in range(50):
            out, _ = fnrun.call(model, {"weight": torch.eye(4) * i}, {}, torch.ones(1, 4))
            results.setdefault(i, set()).add(out.sum().item())

    threads = [threading.Thread(target=work, args=(i,)) for i in (1, 2, 3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert results == {1: {4.0}, 2: {8.0}, 3: {12.0}}


def test_two_threads_give_the_bits_of_one():
    """Steps of two modules that share a layer, with dropout: the generators are one for the process."""
    shared = nn.Linear(4, 4)
    models = [nn.Sequential(shared, nn.Dropout(0.5)), nn.Sequential(shared, nn.Dropout(0.5), nn.Linear(4, 4))]
    optimizer = fnrun.optim.sgd(0.1)
    steps = [fnrun.make_train_step(m, lambda m, x: m(x).square().mean(), optimizer) for m in models]
    states = [fnrun.TrainState.create(m, optimizer, seed=i) for i, m in enumerate(models)]
    expected = [fnrun.tree.fingerprint(step(state, torch.ones(2, 4))[0]) for step, state in zip(steps, states, strict=True)]
    before, weight, found = torch.get_rng_state(), shared.weight, [set(), set()]

    def work(i):
        for _ in range(60):
            found[i].add(fnrun.tree.fingerprint(steps[i](states[i], torch.ones(2, 4))[0]))

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert found == [{expected[0]}, {expected[1]}]
    assert torch.equal(torch.get_rng_state(), before)
    assert shared.weight is weight
