"""The trained model out of a state, and a state on another device."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from torch import nn

import fnrun
from fnrun import TrainState, data, hooks, make_eval_step, make_train_step, optim
from fnrun.core import tree
from tests.optim.cases import OPTIMIZERS


class Tied(nn.Module):
    def __init__(self, width: int = 4, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.encoder = nn.Linear(width, width, dtype=dtype)
        self.norm = nn.BatchNorm1d(width, dtype=dtype)
        self.decoder = nn.Linear(width, width, dtype=dtype)
        self.decoder.weight = self.encoder.weight
        self.register_buffer("cache", torch.zeros(width), persistent=False)

    def forward(self, x):
        return self.decoder(self.norm(self.encoder(x)))


def loss(model, x):
    return model(x).square().mean()


X = torch.linspace(-1, 1, 64).reshape(16, 4)


def trained(model=None, optimizer=None):
    model, optimizer = model or Tied(), optimizer or optim.adamw(0.1)
    step = make_train_step(model, loss, optimizer)
    return fnrun.epoch_loop(step, hooks=[hooks.ema(0.5)])(TrainState.create(model, optimizer), data.arrays(X, 4))[0]


@pytest.mark.parametrize("weights", ["params", "ema", lambda state: state.memory["ema"]["params"], lambda state: state.weights("ema")])
def test_a_model_that_was_loaded_computes_what_evaluation_with_these_weights_does(weights):
    state, model = trained(), Tied()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    tensors = {name: id(t) for name, t in model.state_dict(keep_vars=True).items()}
    assert state.load_into(model, weights=weights) is model
    assert {name: id(t) for name, t in model.state_dict(keep_vars=True).items()} == tensors
    assert model.decoder.weight is model.encoder.weight is optimizer.param_groups[0]["params"][0]
    expected = make_eval_step(Tied(), loss, weights=weights)(state, X)["loss"]
    with torch.no_grad():
        assert torch.equal(loss(model.eval(), X), expected)
    before = tree.snapshot(state)
    loss(model.train(), X).backward()
    optimizer.step()
    assert tree.equal(state, before)  # the model's are copies


def test_weights_are_what_a_call_takes():
    state, model = trained(), Tied()
    assert torch.equal(state.weights("ema").params["norm.weight"], state.memory["ema"]["params"]["norm.weight"])
    outputs, _ = fnrun.call(model, *state.weights("ema"), X, train=False)
    with torch.no_grad():
        assert torch.equal(outputs, state.load_into(model, "ema").eval()(X))
    assert state.weights().params is state.params
    with pytest.raises(ValueError, match=r"'swa': no hook of this name .* \['ema'\]"):
        state.weights("swa")


class Other(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.head = nn.Linear(4, 4, bias=False), nn.Linear(4, 2)


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (Other, ["missing head.weight", "missing head.bias", "unexpected encoder.bias", "unexpected norm.running_mean"]),
        (lambda: Tied(5), [r"encoder.weight has the shape \(4, 4\), and in the model \(5, 5\)", r"cache has the shape \(4,\)"]),
        (lambda: Tied(dtype=torch.float64), [r"decoder.bias is float32, and in the model float64: .*model.to\(torch.float32\)"]),
        (lambda: Tied().to("meta"), [r"encoder.bias is on the device meta in the model: .*to_empty"]),
    ],
)
def test_what_does_not_fit_is_told_by_name_and_nothing_is_loaded(model, told):
    model = model()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match="nothing is") as raised:
        trained().load_into(model)
    for text in told:
        assert re.search(text, str(raised.value)), str(raised.value)
    assert model.encoder.weight.is_meta or tree.equal(dict(model.state_dict()), before)


def test_a_tensor_that_cannot_be_written_to_is_told_before_another_is_written():
    model = Tied()
    model.norm.running_var = torch.ones(1).expand(4)
    before = model.encoder.weight.clone()
    with pytest.raises(ValueError, match=r"norm\.running_var is expanded in the model"):
        trained().load_into(model)
    assert torch.equal(model.encoder.weight, before)


def test_what_is_no_module_is_refused():
    with pytest.raises(TypeError, match=r"state\.load_into takes a model"):
        trained().load_into({})  # pyright: ignore[reportArgumentType]


# --- on another device --------------------------------------------------------------------------------------------------


def devices(value):
    return {
        path: leaf.device.type for path, leaf in zip(tree.paths(value), tree.leaves(value), strict=True) if isinstance(leaf, torch.Tensor)
    }


def on_meta(optimizer):
    """Where everything is in a state that was created of a model that is there."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 2, bias=False))
    return devices(TrainState.create(model, optimizer).opt_state)


@pytest.mark.parametrize("name", [n for n in OPTIMIZERS if n not in ("from_torch",)])
def test_a_state_that_was_moved_is_where_one_that_was_created_there_is(name):
    optimizer = OPTIMIZERS[name]()
    try:
        there = on_meta(optimizer)
    except (NotImplementedError, RuntimeError, AttributeError):
        pytest.skip("its memory is learned from values, and meta tensors have none")
    state = TrainState.create(nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 2, bias=False)), optimizer)
    assert devices(state.to("meta").opt_state) == there


@fnrun.struct
class WithField(TrainState):
    table: torch.Tensor | None = None


def test_all_fields_go_and_numbers_and_keys_stay():
    begun = trained()
    state = WithField(**{f.name: getattr(begun, f.name) for f in dataclasses.fields(begun)}, table=begun.params["norm.weight"])
    moved = state.to(torch.device("meta"))
    assert type(moved) is WithField
    where = devices({"params": moved.params, "buffers": moved.buffers, "memory": moved.memory, "table": moved.table})
    assert set(where.values()) == {"meta"}
    assert moved.table is moved.params["norm.weight"]  # what was one stays one
    assert (moved.rng, moved.step, moved.position.ticks) == (state.rng, state.step, state.position.ticks)
    assert state.params["norm.weight"].device.type == "cpu"


def test_training_goes_on_with_the_same_bits_in_a_state_that_was_moved_to_where_it_is():
    state, step = trained(), make_train_step(Tied(), loss, optim.adamw(0.1))
    assert tree.equal(step(state.to("cpu"), X), step(state, X))


@pytest.mark.parametrize("wrong", [(torch.float16,), ("cpu", torch.float16), (torch.ones(1),), (True,)])
def test_a_dtype_is_no_device(wrong):
    with pytest.raises(TypeError, match="takes a device and nothing else"):
        trained().to(*wrong)
    with pytest.raises(TypeError, match=r"TrainState\.create\(model\.to\(dtype\), optimizer\)"):
        trained().to("cpu", dtype=torch.float16)
