"""Activation checkpointing: the bits of the step without it, the module as it was, and words for what cannot be."""

from __future__ import annotations

import gc
import random
import types
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fnrun
from fnrun import optim
from fnrun.core import tree
from fnrun.steps.recompute import chosen
from fnrun.testing import assert_same

X = torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(0))


def mean_square(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).square().mean()


class Block(nn.Module):
    """What a block may have: dropout, batch norm, keyword arguments, reports, an attribute that it keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.dropout, self.down = nn.Linear(8, 16), nn.BatchNorm1d(5), nn.Dropout(0.3), nn.Linear(16, 8)
        self.seen: Any = None

    def forward(self, x: torch.Tensor, *, scale: float = 0.5) -> torch.Tensor:
        h = self.dropout(F.gelu(self.norm(self.up(x))))
        self.seen = h
        fnrun.report("h", h.mean())
        return x + scale * self.down(h)


class Spectral(nn.Module):
    """Buffers that are read, and written to, before they are used."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))
        self.second = nn.utils.spectral_norm(nn.Linear(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.second(self.first(x).tanh())


class Counting(nn.Module):
    """Buffers in place and anew, a number that is no buffer, and what is kept for the length of a call."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.cached, self.length, self.doubled = nn.Linear(8, 8), None, 0, None
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("average", torch.zeros(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.cached is None or self.length != x.shape[1]:
            self.cached, self.length = torch.arange(x.shape[1]).cos()[:, None], x.shape[1]
        if self.doubled is None:
            self.doubled = self.layer.weight.sin()
        self.count += 1
        y = F.linear(x, self.doubled) * self.count.clone() * self.cached
        self.average = 0.9 * self.average + 0.1 * y.detach().mean((0, 1))
        return y + self.average


class Passing(nn.Module):
    """Takes and gives dictionaries, tuples and None; adds to a list that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.dropout = nn.Linear(8, 8), nn.Dropout(0.3)

    def forward(self, given: dict[str, Any], losses: list[torch.Tensor]) -> Any:
        y = self.dropout(self.layer(given["x"]).tanh())
        losses.append(y.square().mean())
        return {"x": y}, (y, None)


class Passed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Passing() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        given, losses = {"x": x}, []
        for layer in self.layers:
            given, _ = layer(given, losses=losses)
        return given["x"] + sum(losses)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.LSTM(8, 8, 2, dropout=0.3, batch_first=True) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = (torch.zeros(2, len(x), 8), torch.zeros(2, len(x), 8))
        for layer in self.layers:
            x, hidden = layer(x, hidden)
        return x


class Drawing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x).tanh() * random.random() * np.random.rand()


def twice(make: Callable[[], nn.Module]) -> nn.Module:
    return nn.Sequential(make(), make())


def shared() -> nn.Module:
    block = Spectral()
    return nn.Sequential(nn.Linear(8, 8), block, block)


def hooked() -> nn.Module:
    model = twice(Block)
    model[0].register_forward_hook(lambda module, inputs, output: 2 * output)  # pyright: ignore[reportArgumentType]
    model[1].up.register_full_backward_hook(lambda module, inputs, outputs: (2 * inputs[0],))  # pyright: ignore[reportArgumentType]
    return model


def penalty(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    x = x.detach().requires_grad_()
    loss = mean_square(model, x)
    return loss + torch.autograd.grad(loss, x, create_graph=True)[0].square().sum()


def encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True), 2)


def end(make: Callable[[], nn.Module], loss_fn: Any, which: Any, scaled: bool = False, **options: Any) -> Any:
    torch.manual_seed(0)
    model, optimizer = make(), optim.adamw(1e-2)
    optimizer = optim.dynamic_loss_scale(optimizer) if scaled else optimizer
    step = fnrun.make_train_step(model, loss_fn, optimizer, checkpoint_activations=which, **options)
    before = [dict(module.__dict__) for module in model.modules()]
    state, metrics = fnrun.TrainState.create(model, optimizer), {}
    for _ in range(5):
        state, metrics = step(state, X)
    assert [m.__dict__.keys() for m in model.modules()] == [held.keys() for held in before]
    return state.params, state.buffers, state.opt_state, metrics


@pytest.mark.parametrize(
    ("make", "which", "options"),
    [
        (lambda: twice(Block), "blocks", {}),
        (lambda: twice(Block), ["1.up", "norm"], {}),
        (lambda: twice(Block), "blocks", {"microbatches": 3}),
        (lambda: twice(Block), "blocks", {"precision": "bf16"}),
        (lambda: twice(Block), "blocks", {"scaled": True}),
        (lambda: twice(Spectral), "blocks", {}),
        (lambda: twice(Counting), "blocks", {}),
        (shared, ["1"], {}),
        (Passed, "blocks", {}),
        (Recurrent, "blocks", {}),
        (encoder, "blocks", {}),
        (hooked, "blocks", {}),
        (lambda: twice(Drawing), "blocks", {"host_random": True}),
    ],
)
def test_the_bits_are_those_of_the_step_that_keeps_its_activations(make: Any, which: Any, options: dict[str, Any]) -> None:
    assert_same(end(make, mean_square, None, **options), end(make, mean_square, which, **options), "checkpointing changes the step")


def test_a_loss_that_takes_gradients_itself_may_be_checkpointed() -> None:
    assert_same(
        end(lambda: twice(Spectral), penalty, None), end(lambda: twice(Spectral), penalty, "blocks"), "checkpointing changes the step"
    )


def test_activations_are_not_kept_until_the_backward() -> None:
    alive: list[int] = []
    kept: list[weakref.ref[torch.Tensor]] = []

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.layer(x)
            y = h.sin()  # whose backward wants h
            kept.append(weakref.ref(h))
            return y

    def loss_fn(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        kept.clear()
        loss = mean_square(model, x)
        alive.append(sum(ref() is not None for ref in kept))
        return loss

    for which in (None, "blocks"):
        model = nn.Sequential(*(Wide() for _ in range(4)))
        step = fnrun.make_train_step(model, loss_fn, optim.sgd(0.1), checkpoint_activations=which)
        state = fnrun.TrainState.create(model, optim.sgd(0.1))
        for _ in range(4):
            state, _ = step(state, X)
    assert (alive[3], alive[-1]) == (4, 0)


def test_hooks_on_a_block_act_once() -> None:
    model, calls = twice(Block), []
    model[1].register_forward_hook(lambda *_: calls.append("forward"))  # pyright: ignore[reportArgumentType]
    model[1].register_full_backward_hook(lambda *_: calls.append("backward"))  # pyright: ignore[reportArgumentType]
    step = fnrun.make_train_step(model, mean_square, optim.sgd(0.1), checkpoint_activations="blocks")
    state = fnrun.TrainState.create(model, optim.sgd(0.1))
    for _ in range(4):  # the first calls are looked at, and may be made twice
        calls.clear()
        step(state, X)
    assert calls == ["forward", "backward"]


@pytest.mark.parametrize("own", [False, True])
def test_the_module_has_its_own_forward_again_also_after_an_error(own: bool) -> None:
    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise KeyError("mine")

    model = twice(Failing)
    if own:
        model[1].forward = forward = lambda x: 1 / 0  # pyright: ignore[reportIndexIssue]
    step = fnrun.make_train_step(model, mean_square, optim.sgd(0.1), checkpoint_activations="blocks")
    with pytest.raises(KeyError, match="mine"):
        step(fnrun.TrainState.create(model, optim.sgd(0.1)), X)
    assert "forward" not in model[0].__dict__
    assert not own or model[1].__dict__["forward"] is forward


class Writing(nn.Module):
    def __init__(self, what: str) -> None:
        super().__init__()
        self.layer, self.what, self.others = nn.Linear(8, 8), what, []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            (self.layer.weight if self.what == "parameter" else self.others[0]).mul_(0.5)
        return self.layer(x).tanh()


class Counted(nn.Module):
    """Its blocks write to a buffer of its own."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Writing(what) for _ in range(2))
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            block.others = [self.scale]
            x = block(x)
        return x


@pytest.mark.parametrize(("what", "name"), [("parameter", "blocks.1.layer.weight"), ("buffer", "scale")])
def test_a_part_that_would_write_twice_to_what_is_not_its_buffer_is_refused(what: str, name: str) -> None:
    model = Counted(what)
    step = fnrun.make_train_step(model, mean_square, optim.sgd(0.1), checkpoint_activations="blocks")
    state = fnrun.TrainState.create(model, optim.sgd(0.1))
    before = tree.fingerprint(state)
    with pytest.raises(ValueError, match=rf"the forward of 'blocks.1' writes to '{name}'.*leave it out"):
        step(state, X)
    assert tree.fingerprint(state) == before


# --- what a part reads and writes besides its own ---------------------------------------------------------------------------


class Plain:
    def __init__(self, x: torch.Tensor) -> None:
        self.x = x


class Slotted:
    __slots__ = ("x",)

    def __init__(self, x: torch.Tensor) -> None:
        self.x = x


class Data:
    """As torch_geometric's: what looks like attributes is in a dictionary of an object that it holds."""

    def __init__(self, x: torch.Tensor) -> None:
        self.__dict__["store"] = Plain(x)
        self.store.x = {"pair": (x, 1)}

    def __getattr__(self, name: str) -> Any:
        return self.__dict__["store"].x["pair"][0]

    def __setattr__(self, name: str, value: Any) -> None:
        self.__dict__["store"].x["pair"] = value, 2


class Net(nn.Module):
    """`blocks` of one class, whose forward is `fn(block, x)`, with a module around them; `between` acts before each."""

    def __init__(self, fn: Any, wrap: Any, between: Any) -> None:
        super().__init__()
        self.stem, self.scale = nn.Linear(8, 8), None
        self.blocks = nn.ModuleList(Reading(fn, self) for _ in range(3))
        self.wrap, self.between = wrap, between
        self.register_buffer("buffer", torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        held = self.wrap(self.stem(x))
        for i, block in enumerate(self.blocks):
            self.between(self, i)
            held = block(held)
        return held if isinstance(held, torch.Tensor) else held.x


class Reading(nn.Module):
    def __init__(self, fn: Any, top: nn.Module) -> None:
        super().__init__()
        self.layer, self.fn, self.around = nn.Linear(8, 8), fn, weakref.ref(top)

    def forward(self, held: Any) -> Any:
        return self.fn(self, held)


def replacing(block: Any, held: Any) -> Any:
    held.x = held.x + block.layer(held.x).tanh()
    return held


def overwriting(block: Any, held: Any) -> Any:
    held.x.relu_()
    return replacing(block, held)


def nothing(top: Any, i: int) -> None: ...


def rescaled(top: Any, i: int) -> None:
    top.scale = torch.tensor(0.5 * (i + 1))


def rebound(top: Any, i: int) -> None:
    top.buffer = top.buffer * 1.1


def by(read: Callable[[Any], Any]) -> Any:
    return lambda block, x: x + block.layer(x).tanh() * read(block.around())


@pytest.mark.parametrize("wrap", [Plain, Slotted, Data, lambda x: types.SimpleNamespace(x=x)])
@pytest.mark.parametrize("fn", [replacing, overwriting])
def test_objects_that_a_part_is_given_and_changes_are_what_they_were(wrap: Any, fn: Any) -> None:
    ends = [end(lambda: Net(fn, wrap, nothing), mean_square, which) for which in (None, "blocks")]
    assert_same(*ends, "checkpointing changes the step")


@pytest.mark.parametrize(
    ("fn", "between"),
    [
        (by(lambda top: top.scale), rescaled),
        (by(lambda top: top.buffer), rebound),
        (lambda block, x: Reversed.apply(block.layer(x).tanh(), block.around().scale), rescaled),
    ],
)
def test_a_part_reads_from_the_modules_around_it_what_they_held(fn: Any, between: Any) -> None:
    ends = [end(lambda: Net(fn, lambda x: x, between), mean_square, which) for which in (None, "blocks")]
    assert_same(*ends, "checkpointing changes the step")


class Reversed(torch.autograd.Function):
    """Its scale changes the gradient and no value."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(scale)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return -grad * ctx.saved_tensors[0], None


@pytest.mark.parametrize("fn", [lambda x, s: x * s, Reversed.apply, lambda x, s: x.roll(1) if s > 1.2 else x.exp()])
def test_a_part_that_reads_what_nobody_can_put_back_is_refused(fn: Any) -> None:
    elsewhere: list[torch.Tensor] = []
    model = Net(
        lambda block, x: fn(block.layer(x).tanh(), elsewhere[-1]), lambda x: x, lambda top, i: elsewhere.append(torch.tensor(0.5 + i))
    )
    step = fnrun.make_train_step(model, mean_square, optim.sgd(0.1), checkpoint_activations="blocks")
    with pytest.raises(
        ValueError, match=r"the second computation of 'blocks\.\d' does not find what the first one found.*checkpoint_activations="
    ):
        step(fnrun.TrainState.create(model, optim.sgd(0.1)), X)


class Adding(nn.Module):
    """What comes after a part writes to the part's input."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Linear(8, 8), nn.ModuleList(nn.Sequential(nn.Sigmoid(), nn.Linear(8, 8)) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x += block(x)
        return x


def heads(head: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Linear(8, 8), nn.Sequential(*(nn.Sequential(head(), nn.Linear(8, 8)) for _ in range(3))))


@pytest.mark.parametrize(
    "make",
    [heads(lambda: nn.ReLU(inplace=True)), heads(lambda: nn.Dropout(0.3, inplace=True)), heads(lambda: nn.ELU(inplace=True)), Adding],
)
@pytest.mark.parametrize("options", [{}, {"microbatches": 2}, {"precision": "bf16"}])
def test_inputs_that_are_written_to_in_place_are_copied(make: Any, options: dict[str, Any]) -> None:
    ends = [end(make, mean_square, which, **options) for which in (None, "blocks")]
    assert_same(*ends, "checkpointing changes the step")


def test_a_part_that_begins_to_write_to_its_input_is_refused() -> None:
    calls = iter(range(1000))
    model = Net(lambda block, x: block.layer(x.relu_() if next(calls) > 60 else x.relu()), lambda x: x, nothing)
    step = fnrun.make_train_step(model, mean_square, optim.sgd(0.1), checkpoint_activations="blocks")
    state = fnrun.TrainState.create(model, optim.sgd(0.1))
    while next(calls) < 60:
        state, _ = step(state, X)
    with pytest.raises(ValueError, match=r"an input of 'blocks\.\d' was written to in place.*checkpoint_activations="):
        step(state, X)


def test_what_a_part_is_given_is_freed_after_the_step_without_the_collector() -> None:
    held: list[weakref.ref[Any]] = []

    def kept(x: torch.Tensor) -> Plain:
        held.append(weakref.ref(data := Plain(x)))
        return data

    model = Net(replacing, kept, nothing)
    step = fnrun.make_train_step(model, mean_square, optim.sgd(0.1), checkpoint_activations="blocks")
    state = fnrun.TrainState.create(model, optim.sgd(0.1))
    gc.collect()
    gc.disable()
    try:
        for _ in range(4):
            state, _ = step(state, X)
        assert held[-1]() is None
    finally:
        gc.enable()


def test_a_part_that_is_compiled_by_itself_stays_one_graph() -> None:
    def run(which: Any) -> tuple[Any, list[str]]:
        graphs: list[str] = []

        def backend(graph: Any, inputs: Any) -> Any:
            graphs.append(graph.code)
            return graph.forward

        def make() -> nn.Module:
            model = twice(lambda: nn.Sequential(nn.Linear(8, 8), nn.GELU()))
            for block in model.children():
                block.compile(backend=backend)
            return model

        torch.compiler.reset()
        return end(make, mean_square, which), graphs

    assert_same(run(None), run("blocks"), "checkpointing changes the step, or the graphs")


def test_a_backward_through_a_part_after_the_step_is_refused() -> None:
    kept: list[torch.Tensor] = []

    def loss_fn(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        kept.append(model(x).sum())
        return mean_square(model, x)

    model = twice(Block)
    step = fnrun.make_train_step(model, loss_fn, optim.sgd(0.1), checkpoint_activations="blocks")
    step(fnrun.TrainState.create(model, optim.sgd(0.1)), X)
    with pytest.raises(RuntimeError, match="a backward through '1' after the step is over"):
        kept[-1].backward()


# --- which parts --------------------------------------------------------------------------------------------------------


class Heads(nn.Module):
    """A block with a list of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(2))


def several(make: Callable[[], nn.Module], n: int = 2) -> list[nn.Module]:
    return [make() for _ in range(n)]


@pytest.mark.parametrize(
    ("model", "which", "paths"),
    [
        (nn.Sequential(nn.Linear(2, 2), *several(Heads), nn.Linear(2, 2)), "blocks", ["1", "2"]),
        (nn.Sequential(*(nn.Sequential(*several(Heads)) for _ in range(2))), "blocks", ["0.0", "0.1", "1.0", "1.1"]),
        (nn.ModuleDict({"layers": nn.ModuleList(several(Heads, 1))}), "blocks", ["layers.0"]),
        (nn.ModuleList(several(lambda: nn.GRU(2, 2))), "blocks", ["0", "1"]),
        (nn.Sequential(*[Heads()] * 2), "blocks", ["1"]),  # one block, twice
        (nn.ModuleDict({"a": nn.ModuleList(several(Heads)), "b": Heads()}), ["a"], ["a.0", "a.1"]),
        (nn.ModuleDict({"a": nn.ModuleList(several(Heads)), "b": Heads()}), ("a.0", "heads.1"), ["a.0", "a.1.heads.1", "b.heads.1"]),
        (nn.ModuleDict({"a": nn.ModuleList(several(Heads)), "b": Heads()}), ["*.heads"], ["a.0.heads.0", "a.0.heads.1", "a.1.heads.0"]),
    ],
)
def test_blocks_are_found_and_patterns_matched(model: nn.Module, which: Any, paths: list[str]) -> None:
    assert [path for path, _ in chosen("", model, which)][: len(paths)] == paths


@pytest.mark.parametrize(
    ("which", "error", "words"),
    [
        ("blocks", ValueError, "finds no blocks in Sequential.*there are: '0', '1', '2'"),
        (["0", "encoder"], ValueError, "pattern 'encoder' matches no module; there are: '0', '1', '2'"),
        ([""], ValueError, "pattern '' matches no module"),
        ([], ValueError, "has no pattern"),
        ("0", TypeError, "None, 'blocks' or a list of patterns.*not '0'"),
        (True, TypeError, "not True"),
    ],
)
def test_what_names_no_parts_is_refused_when_the_step_is_made(which: Any, error: type[Exception], words: str) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    with pytest.raises(error, match=words):
        fnrun.make_train_step(model, mean_square, optim.sgd(0.1), checkpoint_activations=which)


# --- a backward that comes later ----------------------------------------------------------------------------------------


def test_the_loss_alone_has_the_gradient_of_the_step() -> None:
    torch.manual_seed(0)
    model, optimizer = twice(Block), optim.sgd(0.1)
    step = fnrun.make_train_step(model, mean_square, optimizer, checkpoint_activations="blocks")
    state = fnrun.TrainState.create(model, optimizer)
    state = state.replace(params={name: p + 0.1 for name, p in state.params.items()})  # not what the module holds
    params = {name: p.detach().requires_grad_() for name, p in state.params.items()}
    loss, _ = step.loss(params, state.buffers, X, key=state.rng.fold_in("train", state.step))
    grads = torch.autograd.grad(loss, list(params.values()))
    assert_same(step.gradients(state, X)[0], dict(zip(params, grads, strict=True)), "another gradient")


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch, of a checkpoint under no_grad
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_module_that_checkpoints_by_itself_gives_no_gradient_after_the_call(reentrant: bool) -> None:
    class Again(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(lambda x: self.last(x).tanh(), self.first(x), use_reentrant=reentrant)  # pyright: ignore[reportReturnType]

    model, optimizer = Again(), optim.sgd(0.1)
    step, state = fnrun.make_train_step(model, mean_square, optimizer), fnrun.TrainState.create(model, optimizer)
    params = {name: p.detach().requires_grad_() for name, p in state.params.items()}
    with pytest.raises(RuntimeError, match=r"train_step\(Again\): the forward uses torch.utils.checkpoint.*step.gradients"):
        step.loss(params, {}, X)
    with pytest.raises(RuntimeError, match=r"Again: the forward uses torch.utils.checkpoint"):
        fnrun.call(model, params, {}, X)
    with torch.no_grad():
        assert torch.equal(fnrun.call(model, params, {}, X)[0], model(X))
    assert step(state, X)[0].step == 1
