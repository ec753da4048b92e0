"""What a module may do besides computing: each against the bare loop, or told by name in the first calls."""

# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportIndexIssue=false, reportIncompatibleMethodOverride=false, reportOptionalSubscript=false

from __future__ import annotations

import copy
from collections import deque
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fnrun
from fnrun import TrainState, make_eval_step, make_predict_step, make_train_step, optim
from fnrun.core import tree

X = torch.randn(6, 8, 4, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randint(0, 7, (6, 8), generator=torch.Generator().manual_seed(1))


def loss_fn(model: nn.Module, x: Any) -> torch.Tensor:
    return model(x).square().mean()


def bare(model: nn.Module, batches: Any, loss_fn: Any = loss_fn, lr: float = 0.1) -> dict[str, torch.Tensor]:
    """The loop that everybody writes by hand."""
    model = copy.deepcopy(model)
    names = [name for name, _ in [*model.named_parameters(), *model.named_buffers()]]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr)
    for i, batch in enumerate(batches):
        with fnrun.Key(0).fold_in("train", i).scope():
            loss = loss_fn(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {name: t.detach() for name, t in [*model.named_parameters(), *model.named_buffers()] if name in names}


def ours(model: nn.Module, batches: Any, loss_fn: Any = loss_fn, lr: float = 0.1, **options: Any) -> dict[str, torch.Tensor]:
    step = make_train_step(model, loss_fn, optim.sgd(lr), **options)
    state = TrainState.create(model, optim.sgd(lr))
    for batch in batches:
        before, held = state, tree.snapshot(state)
        state, _ = step(state, batch)
        assert tree.equal(before, held), "the step wrote to the state that it was given"
    return {**state.params, **state.buffers}


def assert_as_bare(model: nn.Module, batches: Any, loss_fn: Any = loss_fn, **options: Any) -> None:
    expected, found = bare(model, batches, loss_fn), ours(model, batches, loss_fn, **options)
    assert expected.keys() == found.keys()
    for name in expected:
        assert torch.equal(expected[name], found[name]), name


# --- a forward that writes to parameters ---


class MaxNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(7, 4, max_norm=0.5), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.embed(x))


class MaxNormBag(MaxNorm):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.EmbeddingBag(7, 4, max_norm=0.5)


class Writes(nn.Module):
    """A layer whose forward does something to its weight first."""

    def __init__(self, write: Any) -> None:
        super().__init__()
        self.lin, self.out, self.write = nn.Linear(4, 4), nn.Linear(4, 2), write

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.write(self.lin)
        return self.out(self.lin(x))


def normalize(lin: nn.Linear) -> None:
    with torch.no_grad():
        lin.weight.div_(lin.weight.norm(dim=1, keepdim=True))


def clip(lin: nn.Linear) -> None:
    lin.weight.data.clamp_(-0.1, 0.1)


def clip_not_yet(lin: nn.Linear) -> None:
    lin.weight.data.clamp_(-0.6, 0.6)


def assign(lin: nn.Linear) -> None:
    lin.weight.data = lin.weight.data / 2


def rows(lin: nn.Linear) -> None:
    lin.weight.detach()[0].zero_()


def shrink(lin: nn.Linear) -> None:
    with torch.no_grad():
        torch._foreach_mul_(list(lin.parameters()), 0.9)  # pyright: ignore[reportPrivateImportUsage]


def from_a_vector(lin: nn.Linear) -> None:
    vector = nn.utils.parameters_to_vector(lin.parameters()).detach()
    nn.utils.vector_to_parameters(vector / vector.norm(), lin.parameters())


class Momentum(nn.Module):
    """A momentum encoder inside the module: its parameters get no gradient, and move in every forward."""

    def __init__(self) -> None:
        super().__init__()
        self.student = nn.Linear(4, 3)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            for slow, fast in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                slow.mul_(0.9).add_(fast, alpha=0.1)
        return self.student(x) - self.teacher(x).detach() + 1


WRITING = {
    "max_norm": (MaxNorm, TOKENS),
    "max_norm of a bag": (MaxNormBag, TOKENS.view(6, 4, 2)),
    "normalized": (lambda: Writes(normalize), X),
    "clipped by .data": (lambda: Writes(clip), X),
    "clipped later": (lambda: Writes(clip_not_yet), X),
    ".data =": (lambda: Writes(assign), X),
    "a row": (lambda: Writes(rows), X),
    "several": (lambda: Writes(shrink), X),
    "from a vector": (lambda: Writes(from_a_vector), X),
    "momentum encoder": (Momentum, X),
}


@pytest.mark.parametrize("which", WRITING)
def test_what_a_forward_writes_to_a_parameter_is_its_new_value(which: str) -> None:
    torch.manual_seed(0)
    make, batches = WRITING[which]
    model = make()
    assert_as_bare(model, batches)
    own = copy.deepcopy(model.state_dict())
    eval_step, state = make_eval_step(model, loss_fn), TrainState.create(model)
    held, twin = tree.snapshot(state), copy.deepcopy(model).eval()
    for batch in batches:
        twin.load_state_dict(own)
        with torch.no_grad():
            assert torch.equal(eval_step(state, batch)["loss"], loss_fn(twin, batch))
        assert tree.equal(state, held), "an evaluation wrote to the state"
    assert tree.equal(model.state_dict(), own)


@pytest.mark.parametrize("which", ["max_norm", "clipped by .data", "momentum encoder"])
def test_written_parameters_donate_and_are_refused_in_microbatches(which: str) -> None:
    torch.manual_seed(0)
    make, batches = WRITING[which]
    model, optimizer = make(), optim.sgd(0.1, momentum=0.9)
    state = TrainState.create(model, optimizer)
    plain, _ = fnrun.epoch_loop(make_train_step(model, loss_fn, optimizer))(state, list(batches))
    donated, _ = fnrun.epoch_loop(make_train_step(model, loss_fn, optimizer), donate=True)(state, list(batches))
    assert tree.equal(plain, donated)
    again, _ = fnrun.epoch_loop(make_train_step(model, loss_fn, optimizer), donate=True)(
        TrainState.create(model, optimizer).donate(), list(batches)
    )
    assert tree.equal(plain, again)
    with pytest.raises(ValueError, match=r"changes the parameters \['(embed|lin|teacher)\..*each microbatch would change them"):
        fnrun.epoch_loop(make_train_step(model, loss_fn, optimizer, microbatches=2))(state, list(batches))


def test_an_update_that_is_skipped_leaves_a_written_parameter_alone() -> None:
    model = Writes(clip)
    step = fnrun.skip_nonfinite(make_train_step(model, loss_fn, optim.sgd(0.1)))
    state = TrainState.create(model, optim.sgd(0.1))
    for _ in range(4):
        after, metrics = step(state, torch.full((1, 4), float("nan")))
        assert metrics == {"skipped": 1.0}
        assert tree.equal(after.params, TrainState.create(model).params)


def test_an_evaluation_knows_what_the_training_found_and_never_touches_the_state() -> None:
    """Not even for a moment, for a checkpoint of it may be being written."""
    model = Momentum()
    seen: list[tuple[int, int]] = []

    def compare(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        seen.append((model.teacher.weight.data_ptr(), state.params["teacher.weight"].data_ptr()))
        return loss_fn(model, x)

    evaluate, step, state = (
        make_eval_step(model, compare),
        make_train_step(model, loss_fn, optim.sgd(0.1)),
        TrainState.create(model, optim.sgd(0.1)),
    )
    state, _ = step(state, X[0])
    evaluate(state, X[0])
    assert len(seen) == 1
    assert seen[0][0] != seen[0][1]


def test_written_parameters_compiled() -> None:
    torch.manual_seed(0)
    for which in ("max_norm", "momentum encoder"):
        make, batches = WRITING[which]
        model = make()
        torch.testing.assert_close(ours(model, batches, compile=True), bare(model, batches))


def test_a_write_that_begins_late_is_an_error_that_names_the_parameter() -> None:
    calls = iter(range(100))
    model = Writes(lambda lin: clip(lin) if next(calls) == 5 else None)
    model.write = lambda lin: lin.weight.detach().clamp_(-0.1, 0.1) if next(calls) == 5 else None
    with pytest.raises(RuntimeError, match=r"wrote to \['lin.weight'\] in place, which the first ones did not"):
        ours(model, [X[0]] * 7)


def test_a_parameter_that_is_replaced_in_a_forward_is_named() -> None:
    model = Writes(lambda lin: setattr(lin, "weight", nn.Parameter(lin.weight * 2)))
    weight = model.lin.weight
    with pytest.raises(RuntimeError, match=r"another parameter in the place of \['lin.weight'\]"):
        ours(model, X)
    assert model.lin.weight is weight


def test_a_plain_call_writes_to_nothing_that_is_passed_in() -> None:
    model = MaxNorm()
    params = {name: p.detach().clone() for name, p in model.named_parameters()}
    held = tree.snapshot(params)
    out, _ = fnrun.call(model, params, {}, TOKENS[0], train=False)
    twin = copy.deepcopy(model)
    assert torch.equal(out, twin(TOKENS[0]))
    with pytest.raises(ValueError, match=r"writes to \['embed.weight'\] in place"):
        fnrun.call(model, params, {}, TOKENS[0])
    assert tree.equal(params, held)


# --- gradients that go elsewhere ---


def test_gradient_hooks_on_parameters_act() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
    seen = []
    model[0].weight.register_hook(lambda grad: grad * 0.5)
    model[0].weight.register_hook(lambda grad: grad.clamp(-0.01, 0.01))
    handle = model[2].bias.register_hook(lambda grad: seen.append(grad.clone()))
    found = ours(model, X)
    twin = copy.deepcopy(model)  # without hooks
    twin[0].weight.register_hook(lambda grad: grad * 0.5)
    twin[0].weight.register_hook(lambda grad: grad.clamp(-0.01, 0.01))
    optimizer = torch.optim.SGD(twin.parameters(), 0.1)
    for x in X:
        optimizer.zero_grad()
        loss_fn(twin, x).backward()
        optimizer.step()
    for name, p in twin.named_parameters():
        assert torch.equal(p, found[name]), name
    assert len(seen) == len(X)
    step, state = make_train_step(model, loss_fn, optim.sgd(0.1)), TrainState.create(model, optim.sgd(0.1))
    for i in range(6):
        if i == 4:
            handle.remove()
        state, _ = step(state, X[i])
    assert len(seen) == len(X) + 4


def test_a_hook_that_waits_for_grad_is_refused() -> None:
    model = nn.Linear(4, 1)
    step, state = make_train_step(model, loss_fn, optim.sgd(0.1)), TrainState.create(model, optim.sgd(0.1))
    model.bias.register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(ValueError, match=r"\['bias'\] have hooks of register_post_accumulate_grad_hook"):
        step(state, X[0])
    with pytest.raises(ValueError, match=r"\['bias'\] have hooks"):
        make_train_step(model, loss_fn, optim.sgd(0.1))


class Aliases(nn.Module):
    def __init__(self, hold: Any) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.held = hold(self.lin.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        held = self.held() if callable(self.held) else self.held[0] if isinstance(self.held, list) else self.held["w"]
        return self.lin(x) @ held


@pytest.mark.parametrize(
    "hold", [lambda w: [w], lambda w: {"w": w}, lambda w: lambda: w, lambda w: [w.detach()], lambda w: {"w": w.data.t()}]
)
def test_an_alias_of_a_parameter_inside_the_module_is_named(hold: Any) -> None:
    model = Aliases(hold)
    with pytest.raises(RuntimeError, match=r"uses the module's own 'lin.weight' and not the state's"):
        ours(model, X)
    with pytest.raises(RuntimeError, match=r"the evaluation of Aliases: the call uses the module's own 'lin.weight'"):
        make_predict_step(model, lambda model, x: model(x))(TrainState.create(model), X[0])


def test_parameters_captured_by_the_loss_are_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    ps = list(model.parameters())
    for penalty in (lambda: sum(p.square().sum() for p in ps), lambda: sum(p.detach().abs().sum() for p in ps)):
        with pytest.raises(RuntimeError, match=r"uses the module's own '0.weight', '0.bias', '1.weight', '1.bias'"):
            ours(model, X, lambda model, x, penalty=penalty: loss_fn(model, x) + penalty())
    shapes = [torch.zeros_like(p) for p in ps]
    assert_as_bare(
        model, X, lambda model, x: loss_fn(model, x) + sum((p - z).square().sum() for p, z in zip(model.parameters(), shapes, strict=True))
    )


def test_a_captured_tensor_that_never_changes_is_nothing_to_name() -> None:
    """A frozen parameter, and a constant buffer, are what the state holds."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4).requires_grad_(False))
    model.register_buffer("mask", torch.ones(4))
    mask, frozen, mean = model.mask, model[2].weight, model[1].running_mean
    assert_as_bare(model, X, lambda model, x: (model(x) * mask @ frozen).square().mean())
    with pytest.raises(RuntimeError, match=r"the module's own '1.running_mean'"):
        ours(model, X, lambda model, x: (model(x) - mean).square().mean())


def test_a_loss_that_reaches_nothing_is_an_error() -> None:
    model, other = nn.Linear(4, 1), nn.Linear(4, 1)
    step, state = make_train_step(model, lambda model, x: loss_fn(other, x), optim.sgd(0.1)), TrainState.create(model, optim.sgd(0.1))
    with (
        pytest.warns(UserWarning, match=r"the loss has a gradient to 'weight' of Linear, 'bias' of Linear, no part of Linear"),
        pytest.raises(
            ValueError, match=r"reaches no trained parameter of Linear: does it call the model that it is given\?.*'weight' of Linear"
        ),
    ):
        step(state, X[0])


class Criterion(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x.square() * self.log_scale.exp()).mean()


def test_a_criterion_with_parameters_of_its_own_is_told_once() -> None:
    model, criterion = nn.Linear(4, 1), Criterion()
    with pytest.warns(UserWarning, match=r"gradient to 'log_scale' of Criterion, no part of Linear, so it is not trained") as told:
        ours(model, X, lambda model, x: criterion(model(x)))
    assert len(told) == 1
    ours(model, X, lambda model, x: criterion.requires_grad_(False)(model(x)))
    scale = torch.zeros((), requires_grad=True)
    with pytest.warns(UserWarning, match=r"gradient to a tensor of shape \(\)"):
        ours(model, X, lambda model, x: loss_fn(model, x) * scale.exp())

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.criterion = nn.Linear(4, 1), Criterion()

    assert_as_bare(Whole(), X, lambda model, x: model.criterion(model.net(x)))


def test_gradients_to_the_batch_are_nothing_to_tell_of() -> None:
    def penalized(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        x = x.clone().requires_grad_()
        between = (0.5 * x.detach()).requires_grad_()
        (grad,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        return (grad.norm() - 1) ** 2 + model(between).square().mean()

    assert_as_bare(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1)), X, penalized)
    ours(nn.Linear(4, 1), [x.clone().requires_grad_() for x in X])


# --- a module that changes after the step was made ---


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1)).requires_grad_(False))


def parametrize(model: nn.Module) -> None:
    torch.nn.utils.parametrizations.weight_norm(model[0])


CHANGES = {
    "a layer replaced": (lambda m: setattr(m[2], "1", nn.Linear(4, 2)), "layers replaced: '2.1'"),
    "a layer without parameters": (lambda m: m.__setitem__(1, nn.ReLU()), "layers replaced: '1'"),
    "unfrozen": (lambda m: m[2][0].requires_grad_(True), "unfrozen: '2.0.weight', '2.0.bias'"),
    "frozen": (lambda m: m[0].bias.requires_grad_(False), "frozen: '0.bias'"),
    "parametrized": (parametrize, "new: '0.parametrizations.weight.original0', '0.parametrizations.weight.original1'; gone: '0.weight'"),
    "a layer added": (lambda m: m.append(nn.Linear(1, 1)), "new: '3.weight', '3.bias'"),
    "a parameter added": (lambda m: m[0].register_parameter("lora", nn.Parameter(torch.zeros(1))), "new: '0.lora'"),
    "another shape": (
        lambda m: setattr(m[2][1], "weight", nn.Parameter(torch.zeros(3, 4), False)),
        "of another shape or dtype: '2.1.weight'",
    ),
    "a layer removed": (lambda m: m[2].__delitem__(1), "gone: '2.1.weight', '2.1.bias'"),
}


@pytest.mark.parametrize("after", [0, 1, 5])
@pytest.mark.parametrize("which", CHANGES)
def test_a_module_that_changes_after_the_step_was_made_is_an_error(which: str, after: int) -> None:
    change, message = CHANGES[which]
    model = net()
    step, evaluate = make_train_step(model, loss_fn, optim.sgd(0.1)), make_eval_step(model, loss_fn)
    state = TrainState.create(model, optim.sgd(0.1))
    for x in X[:after]:
        state, _ = step(state, x)
        evaluate(state, x)
    change(model)
    with pytest.raises(ValueError, match=rf"train_step\(Sequential\): Sequential has changed since the step was made \({message}"):
        step(state, X[0])
    if "frozen" not in which:
        with pytest.raises(ValueError, match=rf"the evaluation of Sequential: Sequential has changed since the step was made \({message}"):
            evaluate(state, X[0])


def test_another_dtype_before_the_first_call_is_an_error() -> None:
    model = net()
    step, state = make_train_step(model, loss_fn, optim.sgd(0.1)), TrainState.create(model, optim.sgd(0.1))
    model.double()
    with pytest.raises(ValueError, match=r"of another shape or dtype: '0.weight', '0.bias'"):
        step(state, X[0])


def test_a_change_is_seen_by_a_compiled_step_too() -> None:
    model = net()
    step, state = make_train_step(model, loss_fn, optim.sgd(0.1), compile=True), TrainState.create(model, optim.sgd(0.1))
    state, _ = step(state, X[0])
    model[2][0].requires_grad_(True)
    with pytest.raises(ValueError, match=r"unfrozen: '2.0.weight'"):
        step(state, X[0])


def test_weights_of_the_same_kind_in_their_places_change_nothing() -> None:
    """The state has the values: a module may be loaded from it on the way, or have none."""
    model = net()
    expected = ours(model, X)
    step, state = make_train_step(model, loss_fn, optim.sgd(0.1)), TrainState.create(model, optim.sgd(0.1))
    for i, x in enumerate(X):
        state, _ = step(state, x)
        if i == 1:
            model.load_state_dict({**state.params}, assign=True)
            model.requires_grad_(False)[0].requires_grad_(True)
        if i == 3:
            model.to("meta")
    assert tree.equal(dict(state.params), expected)


# --- what a module keeps besides parameters and buffers ---


class Keeps(nn.Module):
    """A layer whose forward does something with an attribute that is neither parameter nor buffer."""

    def __init__(self, keep: Any, **attributes: Any) -> None:
        super().__init__()
        self.lin, self.keep = nn.Linear(4, 4), keep
        for name, value in attributes.items():
            setattr(self, name, value)
        if keep is rotary_in_buffers:
            self.register_buffer("cos", None, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.keep(self, self.lin(x))


def keeping(keep: Any, **attributes: Any) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), Keeps(keep, **attributes))


def running_mean(m: Any, x: torch.Tensor) -> torch.Tensor:
    m.mean = 0.9 * m.mean + 0.1 * x.detach().mean(0)
    return x - m.mean


def running_mean_in_place(m: Any, x: torch.Tensor) -> torch.Tensor:
    m.mean.mul_(0.9).add_(0.1 * x.detach().mean(0))
    return x - m.mean


def running_mean_from_none(m: Any, x: torch.Tensor) -> torch.Tensor:
    m.mean = x.detach().mean(0) if m.mean is None else 0.9 * m.mean + 0.1 * x.detach().mean(0)
    return x - m.mean


def running_mean_made(m: Any, x: torch.Tensor) -> torch.Tensor:
    m.mean = 0.9 * getattr(m, "mean", torch.zeros(4)) + 0.1 * x.detach().mean(0)
    return x - m.mean


def running_mean_in_a_buffer(m: Any, x: torch.Tensor) -> torch.Tensor:
    m.register_buffer("mean", 0.9 * getattr(m, "mean", 0) + 0.1 * x.detach().mean(0), persistent=False)
    return x - m.mean


def recurrent(m: Any, x: torch.Tensor) -> torch.Tensor:
    m.hidden = torch.zeros_like(x) if m.hidden is None else m.hidden
    out = torch.tanh(x + m.hidden)
    m.hidden = out.detach()
    return out


def warm_up(m: Any, x: torch.Tensor) -> torch.Tensor:
    m.calls += 1
    return x * min(1.0, m.calls / 100)


def grows(m: Any, x: torch.Tensor) -> torch.Tensor:
    m.past.append(x.detach().mean())
    return x - sum(m.past)


def grows_a_dict(m: Any, x: torch.Tensor) -> torch.Tensor:
    m.past[len(m.past)] = x.detach().mean()
    return x - sum(m.past.values())


def replaces_in_a_list(m: Any, x: torch.Tensor) -> torch.Tensor:
    m.past[0] = 0.9 * m.past[0] + 0.1 * x.detach().mean()
    return x - m.past[0]


def queue(m: Any, x: torch.Tensor) -> torch.Tensor:
    m.bank[m.at : m.at + len(x)] = x.detach()
    m.at = (m.at + len(x)) % len(m.bank)
    return x - m.bank.mean()


def initialized(m: Any, x: torch.Tensor) -> torch.Tensor:
    """Parameters from the data of the first call, as ActNorm has them."""
    if not m.ready:
        m.lin.bias.data.copy_(-x.detach().mean(0))
        m.ready = True
    return x + m.lin.bias


class Meter:
    def __init__(self) -> None:
        self.total = 0.0


def meter(m: Any, x: torch.Tensor) -> torch.Tensor:
    m.meter.total += 1
    return x * m.meter.total


def teaches(m: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        m.hidden[0].weight.lerp_(m.lin.weight, 0.1)
    return x - m.hidden[0](x)


def numpys(m: Any, x: torch.Tensor) -> torch.Tensor:
    return x * m.random.random()


CARRIED = {
    "a running mean": (running_mean, {"mean": torch.zeros(4)}, ["1.mean"]),
    "in place": (running_mean_in_place, {"mean": torch.zeros(4)}, ["1.mean"]),
    "from None": (running_mean_from_none, {"mean": None}, ["1.mean"]),
    "made in the call": (running_mean_made, {}, ["1.mean"]),
    "in a buffer that is not saved": (running_mean_in_a_buffer, {}, ["1.mean"]),
    "a hidden state": (recurrent, {"hidden": None}, ["1.hidden"]),
    "a warm-up": (warm_up, {"calls": 0}, ["1.calls"]),
    "a list": (grows, {"past": []}, ["1.past"]),
    "a dict": (grows_a_dict, {"past": {}}, ["1.past"]),
    "a deque": (grows, {"past": deque(maxlen=10)}, ["1.past"]),
    "in a list": (replaces_in_a_list, {"past": [torch.zeros(())]}, ["1.past"]),
    "a memory bank": (queue, {"bank": torch.zeros(64, 4), "at": 0}, ["1.at", "1.bank"]),
    "initialized by data": (initialized, {"ready": False}, ["1.ready"]),
    "a module in a list": (teaches, {"hidden": [nn.Linear(4, 4).requires_grad_(False)]}, ["1.hidden"]),
    "an object": (meter, {"meter": Meter()}, ["1.meter"]),
    "a generator": (numpys, {"random": np.random.default_rng(0)}, ["1.random"]),
}


@pytest.mark.parametrize("which", CARRIED)
def test_what_a_module_carries_from_call_to_call_is_told_once(which: str) -> None:
    keep, attributes, names = CARRIED[which]
    model = keeping(keep, **copy.deepcopy(attributes))
    with pytest.warns(UserWarning, match="calls change") as told:
        ours(model, X)
    assert len(told) == 1
    assert f"train_step(Sequential): calls change {', '.join(map(repr, names))} of the module" in str(told[0].message)
    model = keeping(keep, **copy.deepcopy(attributes))
    step, state = make_train_step(model, loss_fn, optim.sgd(0.1)), TrainState.create(model, optim.sgd(0.1))
    with pytest.warns(UserWarning, match="calls change"):  # in the very first call
        step(state, X[0])
    with pytest.warns(UserWarning, match="the evaluation of Sequential: calls change"):
        make_eval_step(keeping(keep, **copy.deepcopy(attributes)), loss_fn)(state, X[0])


def test_as_buffers_they_are_right() -> None:
    class Right(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(4, 4)
            self.register_buffer("mean", torch.zeros(4))
            self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
            self.register_buffer("bank", torch.zeros(2, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.lin(x)
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
            self.calls += 1
            self.bank = torch.cat([self.bank, x.detach()])  # of another shape from call to call
            return (x - self.mean - self.bank.mean()) * (self.calls / 10)

    assert_as_bare(Right(), X)


def rotary(m: Any, x: torch.Tensor) -> torch.Tensor:
    if len(x) > m.length:
        m.length = len(x)
        m.cos = torch.arange(len(x)).float().cos()[:, None]
    return x * m.cos[: len(x)]


def rotary_by_name(m: Any, x: torch.Tensor) -> torch.Tensor:
    if not hasattr(m, "cos") or len(m.cos) < len(x):
        m.cos = torch.arange(len(x)).float().cos()[:, None]
    return x * m.cos[: len(x)]


def masks(m: Any, x: torch.Tensor) -> torch.Tensor:
    if len(x) not in m.masks:
        m.masks[len(x)] = torch.arange(len(x)).float()[:, None] / len(x)
    return x * m.masks[len(x)]


def shows(m: Any, x: torch.Tensor) -> torch.Tensor:
    m.last, m.size, m.mean = x, x.shape, x.mean().item()
    m.outputs = [x.detach()]
    return x


def rotary_in_buffers(m: Any, x: torch.Tensor) -> torch.Tensor:
    if m.cos is None or len(x) > m.length:
        m.length = len(x)
        m.register_buffer("cos", torch.arange(len(x)).float().cos()[:, None], persistent=False)
        m.register_buffer("sin", torch.arange(len(x)).float().sin()[:, None], persistent=False)
    return x * m.cos[: len(x)] + m.sin[: len(x)]


def scratch(m: Any, x: torch.Tensor) -> torch.Tensor:
    m.room.copy_(x.detach())
    return x - m.room


def auxiliary(m: Any, x: torch.Tensor) -> torch.Tensor:
    m.aux = x.square().mean()
    return x + m.aux


HARMLESS = {
    "a cache and its length": (rotary, {"length": 0, "cos": None}),
    "a cache that is made": (rotary_by_name, {}),
    "a cache in buffers that are not saved": (rotary_in_buffers, {"length": 0}),
    "a cache by length": (masks, {"masks": {}}),
    "what others look at": (shows, {"last": None, "outputs": []}),
    "room": (scratch, {"room": torch.zeros(8, 4)}),
    "a term of the loss": (auxiliary, {"aux": None}),
}


@pytest.mark.parametrize("which", HARMLESS)
def test_caches_and_what_is_kept_for_a_look_are_nothing_to_tell_of(which: str) -> None:
    keep, attributes = HARMLESS[which]
    assert_as_bare(keeping(keep, **copy.deepcopy(attributes)), X)
    short = [*X[:2], X[2][:5], *X[3:]] if which != "room" else X
    assert_as_bare(keeping(keep, **copy.deepcopy(attributes)), short)
    model = keeping(keep, **copy.deepcopy(attributes))
    state, evaluate = TrainState.create(model), make_eval_step(model, loss_fn)
    for x in short:
        assert torch.equal(evaluate(state, x)["loss"], loss_fn(model.eval(), x))


def test_the_first_call_is_made_twice_only_where_the_module_changes() -> None:
    """And what the second one leaves behind is taken back."""
    calls = []

    def counted(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return loss_fn(model, x)

    ours(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)), X, counted)
    assert len(calls) == len(X)
    model = keeping(warm_up, calls=0)
    expected = bare(model, X)
    with pytest.warns(UserWarning, match=r"'1.calls'"):
        found = ours(model, X)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert model[1].calls == len(X)


# --- generators ---


def test_a_generator_of_the_losses_own_is_told_of() -> None:
    generator = torch.Generator().manual_seed(5)

    def noisy(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return loss_fn(model, x + torch.empty_like(x).normal_(generator=generator))

    with pytest.warns(UserWarning, match=r"train_step\(Linear\) draws from a torch.Generator of its own \(cpu\)") as told:
        ours(nn.Linear(4, 1), X, noisy)
    assert len(told) == 1


def test_a_generator_that_is_seeded_in_the_call_is_a_function_of_it() -> None:
    kept = torch.Generator()

    def noisy(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        key = fnrun.Key(int(x[0, 0] * 1000))
        kept.manual_seed(key.bits)
        return loss_fn(
            model,
            x + torch.rand(x.shape, generator=key.generator()) + torch.rand(x.shape, generator=kept) + torch.rand(x.shape, generator=kept),
        )

    assert_as_bare(nn.Linear(4, 1), X, noisy)


# --- modes ---


class LoRA(nn.Linear):
    """As in loralib: evaluation has the low-rank part merged into the weight, training has it apart."""

    def __init__(self, n: int, m: int) -> None:
        super().__init__(n, m)
        self.a, self.b, self.merged = nn.Parameter(torch.randn(2, n)), nn.Parameter(torch.randn(m, 2)), False
        self.weight.requires_grad_(False)

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        if mode == self.merged:
            self.weight.data += (-1 if mode else 1) * self.b.data @ self.a.data
            self.merged = not mode
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return y if self.merged else y + x @ self.a.T @ self.b.T


class Prepared(nn.Module):
    """`eval` alone is its own: it makes what the forward of an evaluation needs."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.drop = nn.Linear(4, 4), nn.Dropout(0.5)
        self.ready: Any = None

    def eval(self) -> Any:
        super().eval()
        self.ready = self.lin.weight.detach().t() * 2
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(self.lin(x)) if self.training else x @ self.ready


@pytest.mark.parametrize("make", [lambda: nn.Sequential(LoRA(4, 4), nn.Tanh(), LoRA(4, 1)), Prepared])
def test_a_modules_own_train_and_eval_are_called(make: Any) -> None:
    torch.manual_seed(0)
    model = make()
    assert_as_bare(model, X)
    step, state, evaluate = (
        make_train_step(model, loss_fn, optim.sgd(0.1)),
        TrainState.create(model, optim.sgd(0.1)),
        make_eval_step(model, loss_fn),
    )
    own = copy.deepcopy(model.state_dict())
    for x in X:
        state, _ = step(state, x)
        held = tree.snapshot(state)
        found = evaluate(state, x)["loss"]
        twin = copy.deepcopy(model)
        twin.load_state_dict(dict(state.params))
        assert torch.equal(found, loss_fn(twin.eval(), x))
        assert tree.equal(state, held)
    assert tree.equal(model.state_dict(), own)
    assert all(m.training for m in model.modules())
    assert not any(getattr(m, "merged", False) or getattr(m, "ready", None) is not None for m in model.modules())
    model.eval()  # what somebody does to the module in between changes nothing
    after, _ = step(state, X[0])
    assert not model.training
    model.train()
    assert tree.equal(after, step(state, X[0])[0])


def test_modes_are_put_back_also_when_an_evaluation_raises() -> None:
    def fails(model: nn.Module, x: torch.Tensor) -> Any:
        model(x)
        raise KeyError("mine")

    model = nn.Sequential(LoRA(4, 4), nn.Sequential(nn.Dropout(), nn.Dropout().eval()))
    own, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    evaluate, state = make_eval_step(model, fails), TrainState.create(model)
    for _ in range(5):
        with pytest.raises(KeyError, match="mine"):
            evaluate(state, X[0])
        assert modes == [m.training for m in model.modules()]
        assert not model[0].merged
        assert tree.equal(model.state_dict(), own)
        assert tree.equal(state, TrainState.create(model))


def test_a_model_in_eval_mode_is_told_of_when_its_step_is_made() -> None:
    dropout = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.BatchNorm1d(4))
    with pytest.warns(UserWarning, match="the model is in eval mode, and so it is trained: BatchNorm1d, Dropout work as in evaluation"):
        make_train_step(dropout.eval(), loss_fn, optim.sgd(0.1))

    class Attends(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.dropout(super().forward(x), 0.1, self.training)

    with pytest.warns(UserWarning, match="in eval mode, and so it is trained: Attends work"):
        make_train_step(Attends(4, 4).eval(), loss_fn, optim.sgd(0.1))


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Dropout(0.0)).eval(),
        lambda: nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 4), nn.MultiheadAttention(4, 2)).eval(),
        lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4).eval(), nn.Dropout().eval()),  # parts are frozen on purpose
        lambda: nn.TransformerEncoderLayer(4, 2, dropout=0.0).eval(),
    ],
)
def test_where_modes_make_no_difference_or_are_chosen_nothing_is_told(make: Any) -> None:
    make_train_step(make(), loss_fn, optim.sgd(0.1))
