"""What a module may do besides computing: each against the bare loop, or told by name in the first calls."""

# pyright: reportCallIssue=false, reportIndexIssue=false

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import fnrun
from fnrun import TrainState, make_eval_step, make_predict_step, make_train_step, optim, tree

X = torch.randn(6, 8, 4, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randint(0, 7, (6, 8), generator=torch.Generator().manual_seed(1))


def loss_fn(model: nn.Module, x: Any) -> torch.Tensor:
    return model(x).square().mean()


def bare(model: nn.Module, batches: Any, loss_fn: Any = loss_fn, lr: float = 0.1) -> dict[str, torch.Tensor]:
    """The loop that everybody writes by hand."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr)
    for i, batch in enumerate(batches):
        with fnrun.Key(0).fold_in("train", i).scope():
            loss = loss_fn(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {name: t.detach() for name, t in [*model.named_parameters(), *model.named_buffers()]}


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
def test_written_parameters_accumulate_and_donate(which: str) -> None:
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

    def halves(model: nn.Module, batch: Any) -> torch.Tensor:
        return (loss_fn(model, batch[:4]) + loss_fn(model, batch[4:])) / 2

    expected, found = bare(model, batches, halves), ours(model, batches, accumulate=2)
    torch.testing.assert_close(found, expected)


def test_an_update_that_is_skipped_leaves_a_written_parameter_alone() -> None:
    model = Writes(clip)
    step = fnrun.skip_nonfinite(make_train_step(model, loss_fn, optim.sgd(0.1)))
    state = TrainState.create(model, optim.sgd(0.1))
    for _ in range(4):
        after, metrics = step(state, torch.full((1, 4), float("nan")))
        assert metrics == {"skipped": 1.0}
        assert tree.equal(after.params, TrainState.create(model).params)


def test_written_parameters_compiled() -> None:
    torch.manual_seed(0)
    for which in ("max_norm", "clipped by .data", "momentum encoder"):
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
