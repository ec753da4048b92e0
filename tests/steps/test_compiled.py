"""A compiled step: one graph for each shape, eager's numbers, the same bits from run to run."""

from __future__ import annotations

import contextlib
import gc
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fnrun
from fnrun import TrainState, data, hooks, metrics, observers, optim
from fnrun.core import tree
from fnrun.testing import assert_pure, assert_resumable, assert_same
from tests.optim import cases

X = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
BATCHES = data.arrays({"x": X, "y": torch.arange(40) % 3}, 8, shuffle=True)


class Net(nn.Module):
    """Batch norm and its buffers, tied weights, a frozen parameter, one that no loss reaches, a report in the forward."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.tied = nn.Linear(6, 6), nn.Linear(6, 6, bias=False)
        self.tied.weight = self.first.weight
        self.norm, self.dropout, self.head = nn.BatchNorm1d(6), nn.Dropout(dropout), nn.Linear(6, 3)
        self.scale = nn.Parameter(torch.full((6,), 2.0), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.tied(F.relu(self.first(x))))
        fnrun.report("hidden", hidden.abs().mean())
        return self.head(self.dropout(hidden * self.scale))


DECAYS = {
    "sgd": ({"momentum": 0.9, "nesterov": True}, torch.optim.SGD),
    "adam": ({}, torch.optim.Adam),
    "adagrad": ({}, torch.optim.Adagrad),
    "rmsprop": ({}, torch.optim.RMSprop),
}


@pytest.mark.parametrize("name", DECAYS)
def test_weight_decay_in_the_gradient_is_that_of_torch(name):
    """A sum with a factor beside a matrix product, which the compiler would lose; in the loss too."""
    options, theirs = DECAYS[name]
    model, x, other = nn.Linear(4, 4), torch.randn(8, 4), torch.randn(4, 4)

    def loss(model, x):
        return torch.add(x @ other, model(x), alpha=0.3).square().mean()

    optimizer = getattr(optim, name)(0.1, weight_decay=0.5, **options)
    state, step = fnrun.TrainState.create(model, optimizer), fnrun.make_train_step(model, loss, optimizer, compile=True)
    for _ in range(5):
        state, _ = step(state, x)
    optimizer = theirs(model.parameters(), 0.1, weight_decay=0.5, **options)
    for _ in range(5):
        optimizer.zero_grad()
        loss(model, x).backward()
        optimizer.step()
    torch.testing.assert_close(state.params, dict(model.named_parameters()), rtol=1e-4, atol=1e-5)


def loss_fn(model: nn.Module, batch: Any) -> Any:
    logits = model(batch["x"])
    return F.cross_entropy(logits, batch["y"]), {"accuracy": metrics.accuracy(logits, batch["y"]), "rows": float(len(logits))}


def optimizer() -> optim.Optimizer:
    return optim.chain(optim.clip_by_global_norm(0.5), optim.adamw(lambda step: 1e-2 / (1 + step)))


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What inductor is given to compile."""
    given: list[Any] = []
    compile = torch._inductor.compile

    def counting(graph: Any, *args: Any, **options: Any) -> Any:
        given.append(graph)
        return compile(graph, *args, **options)

    monkeypatch.setattr(torch._inductor, "compile", counting)
    return given


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is given to inductor runs as it is: whether inductor keeps the numbers is its own matter, and it takes seconds each time."""
    given: list[Any] = []
    monkeypatch.setattr(torch._inductor, "compile", lambda graph, *args: given.append(graph) or graph)
    return given


def test_it_follows_eager_with_one_graph_for_each_shape(graphs: list[Any]) -> None:
    model = Net()
    eager, compiled = (fnrun.make_train_step(model, loss_fn, optimizer(), compile=c) for c in (False, True))
    state = TrainState.create(model, optimizer())
    seen: dict[bool, list[Any]] = {False: [], True: []}
    ragged = data.arrays({"x": X[:36], "y": torch.arange(36) % 3}, 8, shuffle=True)  # the last batch of a pass has 4 rows
    for compile, step in ((False, eager), (True, compiled)):
        loop = fnrun.repeat(fnrun.epoch_loop(step, observers=[lambda s, m, c=compile: seen[c].append((s, m))]), 4)
        loop(state, ragged)
    assert len(graphs) == 2
    for (a, ours), (b, theirs) in zip(seen[False], seen[True], strict=True):
        assert tree.paths((a.params, a.opt_state)) == tree.paths((b.params, b.opt_state))
        assert type(b.opt_state[-1].hyper.count) is int
        assert b.opt_state[-1].hyper.count == a.opt_state[-1].hyper.count
        torch.testing.assert_close(dict(b.params), dict(a.params), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(dict(b.buffers), dict(a.buffers), rtol=1e-4, atol=1e-6)
        assert set(ours) == set(theirs) >= {"loss", "lr", "grad_norm", "hidden", "accuracy", "rows"}
        for name in ours:
            assert float(theirs[name]) == pytest.approx(float(ours[name]), rel=1e-4, abs=1e-6), name


def test_the_laws_hold_compiled_and_donated(graphs: list[Any]) -> None:
    """With dropout, kills and fresh graphs: the same bits. Other learning rates, other epochs: the same graph."""
    model = Net(dropout=0.3)
    state = TrainState.create(model, optimizer())

    def loop(step: Any, donate: bool) -> Any:
        train = fnrun.epoch_loop(step, hooks=[hooks.ema(0.9)], observers=[observers.log(2, to=[])], donate=donate)
        return fnrun.repeat(train, 2)

    step = fnrun.make_train_step(model, loss_fn, optimizer(), compile=True)
    assert_pure(step, state, {"x": X[:8], "y": torch.arange(8) % 3}, model=model)
    end = loop(step, False)(state, BATCHES)
    assert len(graphs) == 1
    assert_resumable(loop(step, False), state, BATCHES, limit=3)
    assert_same(loop(step, True)(state, BATCHES), end, "donated, the program ends differently")
    assert_resumable(loop(step, True), state, BATCHES, limit=3)
    assert len(graphs) == 2
    assert not tree.equal(loop(step, False)(TrainState.create(model, optimizer(), seed=1), BATCHES)[0].params, end[0].params)
    again = fnrun.make_train_step(Net(dropout=0.3), loss_fn, optimizer(), compile=True)
    assert_same(loop(again, False)(state, BATCHES), end, "another process's graph gives other bits")


def test_accumulation_and_loss_scaling_are_part_of_the_graph(graphs: list[Any]) -> None:
    model = nn.Linear(6, 3)
    make = lambda: optim.dynamic_loss_scale(optim.chain(optim.accumulate(2), optim.adamw(1e-2)), init_scale=8.0, growth_interval=3)  # noqa: E731

    def loss(model: nn.Module, batch: Any) -> Any:
        return F.cross_entropy(model(batch["x"]), batch["y"])

    state = TrainState.create(model, make())
    ends = [
        fnrun.epoch_loop(fnrun.make_train_step(model, loss, make(), microbatches=2, compile=compile))(state, BATCHES)[0]
        for compile in (False, True)
    ]
    assert len(graphs) == 1
    torch.testing.assert_close(ends[1].params, ends[0].params, rtol=1e-4, atol=1e-6)
    assert float(ends[1].opt_state.scale) == float(ends[0].opt_state.scale) > 8.0


CURVE = cases.CURVE


def by_label(make: Any) -> optim.Optimizer:
    return optim.partition(optim.decay_labels, {"decay": make(), "no_decay": optim.sgd(CURVE, momentum=0.9)})


#: Beside the optimizers: what goes around and before them, and an optimizer of somebody's own, of which nobody said that it draws nothing.
PARTS: dict[str, Any] = {
    **{name: make for name, make in cases.OPTIMIZERS.items() if name not in ("chain", "from_torch")},
    "scaled_lr": lambda: optim.scaled_lr(optim.adamw, CURVE, optim.name_multipliers({"0": 0.1})),
    "groups of groups": lambda: by_label(lambda: optim.scaled_lr(optim.adamw, CURVE, optim.name_multipliers({"0": 0.1}))),
    "a chain in a partition": lambda: by_label(lambda: optim.chain(optim.clip_by_global_norm(0.1), optim.trace(0.9), optim.sgd(CURVE))),
    "one's own": lambda: by_label(lambda: optim.Optimizer(optim.adamw(CURVE).init, optim.adamw(CURVE).update)),
    "masked": lambda: optim.masked(optim.adamw(CURVE), lambda path, p: p.ndim > 1),
    "accumulate": lambda: optim.chain(optim.accumulate(2), by_label(lambda: optim.adamw(CURVE))),
    "all wrappers": lambda: optim.chain(
        optim.dynamic_loss_scale(),
        optim.accumulate(2),
        optim.freeze_until(1),
        optim.lookahead(sync_period=2),
        optim.scaled_lr(optim.adamw, CURVE, optim.name_multipliers({"0": 0.1})),
    ),
    "all transforms": lambda: optim.chain(
        optim.zero_nonfinite(),
        optim.centralize(),
        optim.clip_by_value(1.0),
        optim.clip_by_norm(0.5),
        optim.adaptive_clip(0.1),
        optim.clip_by_global_norm(0.3),
        optim.scale(0.5),
        optim.scale_by_schedule(CURVE),
        optim.masked(optim.add_decayed_weights(0.1), lambda path, p: p.ndim > 1),
        optim.trace(0.9),
        optim.sgd(10.0),
    ),
}


@pytest.mark.parametrize("name", PARTS)
def test_every_optimizer_that_draws_nothing_is_captured(name: str, recorded: list[Any]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5, bias=name != "muon"), nn.Tanh(), nn.Linear(5, 3, bias=name != "muon"))
    ends = []
    for compile in (False, True):
        step = fnrun.make_train_step(model, lambda m, b: m(b).square().mean(), PARTS[name](), compile=compile)
        state = TrainState.create(model, PARTS[name]())
        for i in range(6):
            state, _ = step(state, X[i : i + 8])
        ends.append(state)
    assert recorded
    assert tree.paths(ends[1].opt_state) == tree.paths(ends[0].opt_state)
    assert not tree.equal(ends[1].params, dict(model.named_parameters()))
    close = {"rtol": 1e-2, "atol": 1e-3} if name == "muon" else {"rtol": 1e-4, "atol": 1e-6}  # which computes in bfloat16
    torch.testing.assert_close(dict(ends[1].params), dict(ends[0].params), **close)


def test_groups_are_compiled_too(graphs: list[Any]) -> None:
    model = Net()
    step = fnrun.make_train_step(model, loss_fn, by_label(lambda: optim.adamw(CURVE)), compile=True)
    end, seen = fnrun.epoch_loop(step)(TrainState.create(model, by_label(lambda: optim.adamw(CURVE))), BATCHES)
    whole, theirs = fnrun.epoch_loop(fnrun.make_train_step(model, loss_fn, by_label(lambda: optim.adamw(CURVE))))(
        TrainState.create(model, by_label(lambda: optim.adamw(CURVE))), BATCHES
    )
    assert len(graphs) == 1
    torch.testing.assert_close(dict(end.params), dict(whole.params), rtol=1e-4, atol=1e-6)
    assert seen.keys() == theirs.keys() >= {"decay/lr", "no_decay/lr"}


def by_value(model: nn.Module, batch: Any) -> Any:
    loss = model(batch["x"]).square().mean()
    return loss * 2 if loss > 1 else loss


def by_python_random(model: nn.Module, batch: Any) -> Any:
    import random

    return model(batch["x"]).square().mean() * (1 + random.random())


@pytest.mark.parametrize(
    ("loss", "make", "why"),
    [
        (by_value, lambda: optim.sgd(0.1), "value"),
        (by_python_random, lambda: optim.sgd(0.1), "Python's or NumPy's generator"),
        (lambda m, b: m(b["x"]).square().mean(), lambda: optim.chain(optim.add_noise(0.1), optim.sgd(0.1)), "step's key"),
        (lambda m, b: m(b["x"]).square().mean(), lambda: by_label(lambda: optim.chain(optim.add_noise(0.1), optim.sgd(0.1))), "step's key"),
    ],
    ids=["by value", "python random", "noise", "noise in a group"],
)
def test_what_cannot_be_captured_goes_on_without_and_says_why(loss: Any, make: Any, why: str) -> None:
    model = nn.Linear(6, 3)
    state, batch = TrainState.create(model, make()), {"x": X[:8]}
    step = fnrun.make_train_step(model, loss, make(), compile=True, host_random=loss is by_python_random)
    with pytest.warns(UserWarning, match=f"is not compiled and goes on without: .*{why}"):
        first = step(state, batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = step(state, batch)
    assert_same(first, second, "two calls differ")
    eager = fnrun.make_train_step(model, loss, make(), host_random=loss is by_python_random)
    assert_same(first, eager(state, batch), "without the compiler the step differs")


def test_an_error_of_the_step_itself_is_not_the_compilers() -> None:
    def loss(model: nn.Module, batch: Any) -> Any:
        return model(batch["y"]).mean()

    model = nn.Linear(6, 3)
    step = fnrun.make_train_step(model, loss, optim.sgd(0.1), compile=True)
    with pytest.raises(KeyError, match="y"):
        step(TrainState.create(model, optim.sgd(0.1)), {"x": X[:8]})


def test_texts_that_change_in_each_batch_end_compilation_before_there_is_a_graph_for_each() -> None:
    model = nn.Linear(6, 3)
    step = fnrun.make_train_step(model, lambda m, b: m(b["x"]).square().mean(), optim.sgd(0.1), compile=True)
    state = TrainState.create(model, optim.sgd(0.1))
    for i in range(4):
        state, _ = step(state, {"x": X[:8], "file": f"{i}.png"})
    with pytest.warns(UserWarning, match="change from one to the next"):
        state, _ = step(state, {"x": X[:8], "file": "4.png"})
    assert step(state, {"x": X[:8], "file": "5.png"})[0].step == 6


def test_several_steps_in_one_call(graphs: list[Any]) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    state = TrainState.create(model, optim.adamw(1e-2))
    steps = [fnrun.make_train_step(model, loss_fn, optim.adamw(1e-2), compile=c) for c in (False, True)]
    seen: list[int] = []
    single, single_metrics = fnrun.step_loop(steps[0], 7)(state, BATCHES)
    fused = fnrun.step_loop(steps[1], 7, fused_steps=2, observers=[lambda s, m: seen.append(s.step)])
    end, end_metrics = fused(state, BATCHES)
    assert seen == [2, 4, 6, 7]
    assert end.step == single.step
    assert tree.equal(end.position, single.position)
    assert len(graphs) == 2, "two at a time, and the one that was left"
    torch.testing.assert_close(dict(end.params), dict(single.params), rtol=1e-4, atol=1e-6)
    for name, value in single_metrics.items():
        assert float(end_metrics[name]) == pytest.approx(float(value), rel=1e-4), name
    assert_resumable(fused, state, BATCHES, limit=3)
    until = fnrun.step_loop(steps[1], 7, fused_steps=2, until_step=5)
    assert until(state, BATCHES)[0].step == 5
    assert len(graphs) == 2


def test_fused_steps_refuse_what_would_act_in_between() -> None:
    model = nn.Linear(6, 3)
    compiled = fnrun.make_train_step(model, loss_fn, optim.sgd(0.1), compile=True)
    with pytest.raises(ValueError, match="log acts every 6 steps"):
        fnrun.step_loop(compiled, 8, fused_steps=4, observers=[observers.log(6, to=[])])
    with pytest.raises(TypeError, match="compile=True"):
        fnrun.step_loop(fnrun.make_train_step(model, loss_fn, optim.sgd(0.1)), 8, fused_steps=4)


def test_many_shapes_are_said(graphs: list[Any], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    model, optimizer = nn.Linear(6, 3), optim.sgd(0.1)
    step = fnrun.make_train_step(model, lambda m, b: m(b).square().mean(), optimizer, compile=True)
    state = TrainState.create(model, optimizer)
    for rows in range(1, 9):
        state, _ = step(state, X[:rows])
    with pytest.warns(UserWarning, match="compiled for 8 shapes.*Pad or crop"):
        step(state, X[:9])
    assert len(graphs) == 9
    assert caplog.text.count("compiling, for a shape of batch that is new") == 9


def test_a_parameter_that_only_some_shapes_reach() -> None:
    """How many updates it missed is no constant of the graph that was there first."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.always, self.wide = nn.Linear(6, 3), nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.always(x) + self.wide(x) if len(x) > 4 else self.always(x)

    ends = []
    for compile in (False, True):
        model, optimizer = Net(), optim.adamw(1e-2)
        step = fnrun.make_train_step(model, lambda m, b: m(b).square().mean(), optimizer, compile=compile)
        state = TrainState.create(model, optimizer)
        for rows in (8, 8, 4, 8, 4, 4, 8, 8):
            state, _ = step(state, X[:rows])
        ends.append(state)
    assert ends[0].opt_state.misses.total == ends[1].opt_state.misses.total == 6
    torch.testing.assert_close(dict(ends[1].params), dict(ends[0].params), rtol=1e-4, atol=1e-6)


class Segmented(nn.Module):
    """A part of it is computed again in the backward."""

    def __init__(self, p: float, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.dropout, self.last, self.options = nn.Linear(6, 64), nn.Dropout(p), nn.Linear(64, 3), options

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(checkpoint(lambda x: self.dropout(torch.tanh(self.first(x))), x, **self.options))


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_what_is_computed_again_has_the_same_dropout(p: float, recorded: list[Any]) -> None:
    model, ends = Segmented(p, use_reentrant=False), []
    for compile in (False, True):
        step = fnrun.make_train_step(model, lambda m, b: m(b).square().mean(), optim.sgd(0.1), compile=compile)
        state = TrainState.create(model, optim.sgd(0.1))
        for i in range(3):
            state, _ = step(state, X[i : i + 8])
        ends.append(state.params)
    assert recorded
    torch.testing.assert_close(dict(ends[1]), dict(ends[0]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_attention_is_in_the_graph(p: float, recorded: list[Any]) -> None:
    """Its kernels could draw, and do not where there is no dropout."""
    model, ends = nn.MultiheadAttention(6, 2, dropout=p, batch_first=True), []
    for compile in (False, True):
        step = fnrun.make_train_step(model, lambda m, b: m(b, b, b, need_weights=False)[0].square().mean(), optim.sgd(0.1), compile=compile)
        ends.append(step(TrainState.create(model, optim.sgd(0.1)), X[:8].view(2, 4, 6))[0].params)
    assert recorded
    torch.testing.assert_close(dict(ends[1]), dict(ends[0]), rtol=1e-5, atol=1e-6)


def test_a_graph_keeps_no_mask_of_the_call_that_it_was_recorded_in(recorded: list[Any]) -> None:
    model = nn.Sequential(nn.Linear(6, 37), nn.Dropout(0.5), nn.Linear(37, 1))
    step = fnrun.make_train_step(model, lambda m, b: m(b).square().mean(), optim.sgd(0.1), compile=True)
    state = TrainState.create(model, optim.sgd(0.1))
    for _ in range(4):  # of which one is compared with what the step's Python does then
        state, _ = step(state, X[:7])
    assert recorded
    gc.collect()
    plain = (each for each in gc.get_objects() if type(each) is torch.Tensor and not each.is_nested)  # other tests leave theirs
    assert not [tensor for tensor in plain if tensor.shape == (7, 37)]


def test_a_generator_of_the_loss_is_in_no_graph(recorded: list[Any]) -> None:
    model = nn.Linear(6, 3)

    def loss(model: nn.Module, batch: Any) -> Any:
        noise = torch.randn(batch.shape, generator=torch.Generator().manual_seed(5))  # the same at each step
        return model(batch + noise).square().mean()

    steps = [fnrun.make_train_step(model, loss, optim.sgd(0.1), compile=compile) for compile in (True, False)]
    state = TrainState.create(model, optim.sgd(0.1))
    with pytest.warns(UserWarning, match="draws from a torch.Generator of its own"):
        first = steps[0](state, X[:8])
    assert_same(first, steps[1](state, X[:8]), "without the compiler the step differs")
    assert not recorded


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.head = nn.LSTM(6, 5, batch_first=True), nn.Linear(5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(x)[0])


@pytest.mark.parametrize("donate", [False, True])
def test_a_graph_that_fails_when_it_is_called_is_none(donate: bool) -> None:
    """Whether inductor can run a kernel (an LSTM's on the CPU, today, it cannot) shows in the first call."""
    model, ends = Recurrent(), []
    for compile in (False, True):
        step = fnrun.make_train_step(model, lambda m, b: m(b["x"][:, None]).square().mean(), optim.adamw(1e-2), compile=compile)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*goes on without: its graph fails when it is called")
            end, _ = fnrun.epoch_loop(step, donate=donate)(TrainState.create(model, optim.adamw(1e-2)), BATCHES)
        ends.append(end.params)
    torch.testing.assert_close(dict(ends[1]), dict(ends[0]), rtol=1e-4, atol=1e-6)


def test_a_failing_graph_is_said_also_of_fused_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(graph: Any, *args: Any) -> Any:
        def run(*inputs: Any) -> Any:
            raise TypeError("no such kernel")

        return run

    monkeypatch.setattr(torch._inductor, "compile", refuse)
    model = nn.Linear(6, 3)
    steps = [fnrun.make_train_step(model, loss_fn, optim.adamw(1e-2), compile=c) for c in (False, True)]
    state = TrainState.create(model, optim.adamw(1e-2))
    with pytest.warns(UserWarning, match="goes on without: its graph fails when it is called: TypeError: no such kernel"):
        end, _ = fnrun.step_loop(steps[1], 4, fused_steps=2, donate=True)(state, BATCHES)
    assert_same(end.params, fnrun.step_loop(steps[0], 4)(state, BATCHES)[0].params, "without the compiler the steps differ")


class Reversed(torch.autograd.Function):
    """The same value, and a gradient that is turned around: a number that no loss shows."""

    @staticmethod
    def forward(ctx: Any, x: Any, by: float) -> Any:
        ctx.by = by
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return -ctx.by * grads[0], None


OUTSIDE: dict[str, Any] = {}
READERS: dict[str, tuple[Any, Any, str]] = {
    "loss": (lambda m, b: m(b["x"]).square().mean() + OUTSIDE["by"] * m(b["x"]).mean(), optim.adamw, r"loss was [\d.]+, is [\d.]+"),
    "gradient": (lambda m, b: m[1](Reversed.apply(m[0](b["x"]), OUTSIDE["by"])).square().mean(), optim.adamw, "the update of the state"),
    "branch": (lambda m, b: m(b["x"]).square().mean() if OUTSIDE["by"] < 3 else m(b["x"]).abs().mean(), optim.adamw, "loss was"),
    "rate": (lambda m, b: m(b["x"]).square().mean(), lambda: optim.sgd(lambda step: OUTSIDE["by"] + 0 * step), "lr was 1.0, is 3.0"),
    "metric": (lambda m, b: (m(b["x"]).square().mean(), {"by": OUTSIDE["by"]}), optim.adamw, "by was 1.0, is 3.0"),
    "names": (lambda m, b: (m(b["x"]).square().mean(), {f"by{OUTSIDE['by']}": 1.0}), optim.adamw, "metrics have other names"),
    "a rate of dropout": (lambda m, b: F.dropout(m(b["x"]), OUTSIDE["by"] / 10).square().mean(), optim.adamw, "loss was"),
}


@pytest.mark.parametrize(("name", "donate"), [*((name, False) for name in READERS), ("loss", True)])
def test_a_number_from_outside_that_has_changed_is_seen_and_the_step_goes_on_without_a_graph(
    name: str, donate: bool, recorded: list[Any]
) -> None:
    loss, make, what = READERS[name]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    OUTSIDE["by"] = 1.0
    batches = [{"x": X[i : i + 8]} for i in range(4)]

    def changing(state: Any, metrics: Any) -> Any:
        OUTSIDE["by"] += 1.0
        return state

    step = fnrun.make_train_step(model, loss, make(), compile=True)
    before: list[Any] = []
    kept = [changing, lambda state, metrics: before.append(fnrun.snapshot(state)) or state]
    loop = fnrun.epoch_loop(step, hooks=kept, donate=donate)
    with pytest.warns(UserWarning, match=f"goes on without: its Python computes something else.*{what}.*tensor") as caught:
        loop(TrainState.create(model, make()), batches)
    assert len(caught) == len(recorded) == 1
    OUTSIDE["by"] = 3.0
    third, _ = fnrun.make_train_step(model, loss, make())(before[1], batches[2])
    torch.testing.assert_close(dict(before[2].params), dict(third.params), rtol=0, atol=0)


def test_python_that_computes_the_same_in_another_way_is_no_matter(recorded: list[Any]) -> None:
    """A cache that fills up, a normalizing optimizer where the gradient is rounding alone: no word."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(0.2), nn.Linear(5, 3))
    cache: list[torch.Tensor] = []

    def loss(model: nn.Module, batch: Any) -> Any:
        if len(recorded) == 0:
            return (model(batch["x"]) * torch.arange(1.0, 4.0)).square().mean()
        cache[:] = cache or [torch.arange(1.0, 4.0)]
        return (model(batch["x"]) * cache[0]).square().mean()

    step = fnrun.make_train_step(model, loss, optim.adamw(1e-2), compile=True)
    end, _ = fnrun.epoch_loop(step)(TrainState.create(model, optim.adamw(1e-2)), [{"x": X[i : i + 8]} for i in range(4)])
    assert cache
    assert len(recorded) == 1
    assert end.step == 4


class Normalized(nn.Linear):
    """Writes to its weight in a way that is no operation of torch's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.weight.data = self.weight.data / self.weight.data.norm()
        return super().forward(x)


def test_what_a_recording_would_miss_is_not_compiled():
    model, optimizer = Normalized(4, 4), optim.sgd(0.1)
    loss = lambda model, x: model(x).square().mean()  # noqa: E731
    ends = []
    for compile in (False, True):
        step, state = fnrun.make_train_step(model, loss, optimizer, compile=compile), TrainState.create(model, optimizer)
        with pytest.warns(UserWarning, match="what is no operation of torch's") if compile else contextlib.nullcontext():
            for _ in range(3):
                state, _ = step(state, X[:8, :4])
        ends.append(state.params)
    assert tree.equal(*ends)
