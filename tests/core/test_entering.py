"""What enters a state is detached; a gradient through a step is refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

import fnrun
from fnrun import TrainState, data, make_train_step, optim
from fnrun.core import tree


@fnrun.struct
class WithTemperature(TrainState):
    temperature: Tensor | None = None
    history: tuple[Tensor, ...] = ()


def model():
    with fnrun.Key(0).scope():
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))


def loss(model, x):
    return model(x).square().mean()


OPTIMIZER = optim.sgd(optim.in_state(0.1), momentum=0.9)
X = torch.linspace(-1, 2, 24).reshape(8, 3)


def fresh():
    return WithTemperature.create(model(), OPTIMIZER, temperature=torch.ones(()))


def computed(value):
    """The same values, with a graph."""
    return tree.map(lambda t: t.clone().requires_grad_() * 1 if isinstance(t, Tensor) and t.is_floating_point() else t, value)


FIELDS = {
    "params": lambda state: computed(state.params),
    "buffers": lambda state: computed(state.buffers),
    "opt_state": lambda state: computed(state.opt_state),
    "memory": lambda state: {"ema": {"params": computed(state.params), "updates": 3}},
    "temperature": lambda state: torch.ones((), requires_grad=True).exp(),
    "history": lambda state: (torch.ones(2), torch.ones(2, requires_grad=True)),
}
DOORS = {
    "replace": lambda state, **new: state.replace(**new),
    "dataclasses.replace": dataclasses.replace,
    "the class": lambda state, **new: type(state)(**{f.name: getattr(state, f.name) for f in dataclasses.fields(state)} | new),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("field", FIELDS)
def test_whatever_enters_a_state_by_whatever_door_is_detached(field, door):
    state = fresh()
    new = FIELDS[field](state)
    assert any(t.requires_grad for t in tree.leaves(new) if isinstance(t, Tensor))
    entered = DOORS[door](state, **{field: new})
    assert not any(t.requires_grad for t in tree.leaves(entered) if isinstance(t, Tensor))
    assert tree.paths(getattr(entered, field)) == tree.paths(new)
    assert all(
        torch.equal(a, b) for a, b in zip(tree.leaves(getattr(entered, field)), tree.leaves(new), strict=True) if isinstance(a, Tensor)
    )


def test_a_state_created_with_fields_of_its_own_holds_them_detached():
    assert not WithTemperature.create(model(), OPTIMIZER, temperature=torch.ones((), requires_grad=True)).temperature.requires_grad  # pyright: ignore[reportOptionalMemberAccess]


def test_what_holds_no_graph_enters_as_the_same_object():
    state = fresh()
    params, memory = dict(state.params), {"ema": {"params": dict(state.params)}}
    new = state.replace(params=params, memory=memory, step=3)
    assert new.params is params
    assert new.memory is memory
    assert new.opt_state is state.opt_state


@pytest.mark.parametrize("trains", [True, False])
def test_a_parameter_enters_as_a_copy_also_a_frozen_one(trains):
    module = model().requires_grad_(trains)
    state = fresh().replace(params=dict(module.named_parameters()))
    before = tree.snapshot(state.params)
    for p in module.parameters():
        p.data.add_(1)
    assert tree.equal(state.params, before)
    assert {type(p) for p in state.params.values()} == {Tensor}


def test_a_hook_that_puts_in_what_is_computed_with_a_graph_holds_none_of_it():
    """Each tick's tensors once were functions of all before."""
    factor = torch.ones((), requires_grad=True)

    def scaled(state, metrics):
        return state.replace(params={name: p * factor for name, p in state.params.items()}, memory={**state.memory, "factor": factor * 2})

    step = make_train_step(model(), loss, OPTIMIZER)
    state, _ = fnrun.epoch_loop(step, hooks=[scaled])(fresh(), data.arrays(X, 2))
    assert state.step == 4
    assert all(t.grad_fn is None and not t.requires_grad for t in tree.leaves(state) if isinstance(t, Tensor))


def trained(lr, *, compile=False, steps=2):
    step, state = make_train_step(model(), loss, OPTIMIZER, compile=compile), TrainState.create(model(), OPTIMIZER)
    state = state.replace(opt_state=optim.set_hyperparam(state.opt_state, "lr", lr))
    for _ in range(steps):
        state, _ = step(state, X)
    return step.loss(state.params, state.buffers, X)[0]


class TestGradientsThroughAStep:
    @pytest.mark.parametrize("compile", [False, True])
    def test_by_a_rate_that_was_put_into_the_state(self, compile):
        with pytest.raises(ValueError, match=r"hyperparameter lr required grad .* put in value\.detach\(\)"):
            trained(torch.tensor(0.1, requires_grad=True), compile=compile)
        with torch.no_grad():  # nothing is asked for
            assert trained(torch.tensor(0.1, requires_grad=True), compile=compile, steps=1).isfinite()

    def test_by_torch_func(self):
        step, begun = make_train_step(model(), loss, OPTIMIZER), fresh()

        def after(lr):
            state, _ = step(begun.replace(opt_state=optim.set_hyperparam(begun.opt_state, "lr", lr)), X)
            return step.loss(state.params, state.buffers, X)[0]

        with pytest.raises(ValueError, match=r"state\.opt_state: torch\.func differentiates"):
            torch.func.grad(after)(torch.tensor(0.1))

    @pytest.mark.parametrize("of", ["tensor", "schedule"])
    @pytest.mark.parametrize("wrap", [lambda step: step, fnrun.skip_nonfinite])
    def test_by_a_rate_that_the_optimizer_is_made_of(self, of, wrap):
        rate = torch.tensor(0.1, requires_grad=True)
        optimizer = optim.sgd(rate if of == "tensor" else lambda count: rate * 0.9**count)
        module = model()
        step = wrap(make_train_step(module, loss, optimizer))
        with pytest.raises(ValueError, match="a hyperparameter of the optimizer, or what its schedule returns, requires grad"):
            step(TrainState.create(module, optimizer), X)

    @pytest.mark.parametrize("options", [{}, {"microbatches": 2}, {"compile": True}])
    @pytest.mark.parametrize("shape", ["tensor", "dictionary", "tuple", "nested"])
    def test_by_the_batch(self, options, shape):
        x = X * torch.ones((), requires_grad=True)  # computed: a leaf that requires grad may be for a penalty within the loss
        batch, path = {
            "tensor": (x, "it itself"),
            "dictionary": ({"x": x, "n": 3}, "'x'"),
            "tuple": ((X, x), "'1'"),
            "nested": ({"a": [X, {"x": x}]}, "'a/1/x'"),
        }[shape]
        step = make_train_step(model(), lambda model, batch: loss(model, X), OPTIMIZER, **options)
        with pytest.raises(ValueError, match=f"a tensor of the batch, {path}, requires grad"):
            step(fresh(), batch)
        if shape == "tensor":
            with torch.no_grad():
                assert step(fresh(), batch)[0].step == 1

    def test_by_the_parameters_that_training_begins_with(self):
        state, step = fresh(), make_train_step(model(), loss, OPTIMIZER)
        state.params["0.weight"].requires_grad_()
        with pytest.raises(ValueError, match=r"a tensor of the state, 'params/0\.weight', requires grad"):
            step(state, X)

    @pytest.mark.parametrize("compile", [False, True])
    def test_by_leaves_that_are_put_into_a_state(self, compile):
        module = model()
        step, state = make_train_step(module, loss, OPTIMIZER, compile=compile), TrainState.create(module, OPTIMIZER)
        put = {name: p.clone().requires_grad_() for name, p in state.params.items()}
        with pytest.raises(ValueError, match=r"a tensor that was put into the state, 'params/.*', requires grad"):
            step(state.replace(params=put), X)
        assert step(state.replace(params=tree.map(torch.detach, put)), X)[0].step == 1
        assert step(state.replace(params=dict(module.named_parameters())), X)[0].step == 1, "a module's own are as everybody has them"

    @pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # of torch by torch
    def test_by_transforms_of_functions_and_forward(self):
        module = model()
        step, state = make_train_step(module, loss, OPTIMIZER), TrainState.create(module, OPTIMIZER)
        evaluate = fnrun.make_eval_step(module, loss)
        predict = fnrun.make_predict_step(module, lambda model, x: model(x).sum())
        for call in (lambda x: step(state, x)[1]["loss"], lambda x: evaluate(state, x)["loss"], lambda x: predict(state, x)):
            with pytest.raises(ValueError, match=r"within torch\.func\.grad, torch\.func\.jvp or forward differentiation"):
                torch.func.grad(call)(X)
            with pytest.raises(ValueError, match="within"):
                torch.func.jvp(call, (X,), (X,))
            with torch.autograd.forward_ad.dual_level(), pytest.raises(ValueError, match="within"):
                call(torch.autograd.forward_ad.make_dual(X, X))

    def test_a_loss_may_differentiate_by_its_inputs(self):
        def penalty(model, x):
            x = x.detach().requires_grad_()
            (grad,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
            return grad.square().sum(1).mean()

        module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        assert make_train_step(module, penalty, OPTIMIZER)(TrainState.create(module, OPTIMIZER), X)[0].step == 1

    def test_what_the_message_says_to_do_gives_the_gradient_of_finite_differences(self):
        module = model().double()
        step, begun = make_train_step(module, loss, OPTIMIZER), TrainState.create(module, OPTIMIZER)
        x = X.double()

        def reached(lr):
            params = {name: p.detach().requires_grad_() for name, p in begun.params.items()}
            memory = optim.set_hyperparam(begun.opt_state, "lr", lr)
            for _ in range(3):
                value, _ = step.loss(params, begun.buffers, x)
                grads = torch.autograd.grad(value, list(params.values()), create_graph=True)
                params, memory = OPTIMIZER.update(dict(zip(params, grads, strict=True)), memory, params)
            return step.loss(params, begun.buffers, x)[0]

        lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        (ours,) = torch.autograd.grad(reached(lr), lr)
        low, high = (reached(torch.tensor(0.1 + d, dtype=torch.float64)) for d in (-1e-6, 1e-6))
        assert ours.item() == pytest.approx(((high - low) / 2e-6).item(), rel=1e-5)


@pytest.mark.parametrize(
    "optimizer", [optim.sgd(0.1), optim.accumulate(2, optim.sgd(0.1)), optim.freeze()], ids=["sgd", "accumulate", "freeze"]
)
def test_gradients_that_require_grad_are_named_whatever_the_optimizer_does_with_them(optimizer: optim.Optimizer) -> None:
    model = nn.Linear(4, 3)
    step = fnrun.make_train_step(model, lambda model, x: model(x).square().mean(), optimizer)
    state = fnrun.TrainState.create(model, optimizer)
    params = {name: p.clone().requires_grad_() for name, p in state.params.items()}
    loss, _ = step.loss(params, state.buffers, torch.ones(2, 4))
    grads = dict(zip(params, torch.autograd.grad(loss, list(params.values()), create_graph=True), strict=True))
    with pytest.raises(ValueError, match=r"the gradient of '(weight|bias)' requires grad, .*Give it detached.*optimizer\.update"):
        step.update(state, grads)
    with pytest.raises(ValueError, match="the gradient of 'bias' requires grad"):
        step.update(state, {"weight": None, "bias": grads["bias"]})
    with torch.no_grad():
        new, _ = step.update(state, grads)
    detached, _ = step.update(state, {name: grad.detach() for name, grad in grads.items()})
    assert fnrun.tree.equal(new, detached)
