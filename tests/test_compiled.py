"""A compiled step: one graph for each shape, eager's numbers, the same bits from run to run."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fnrun
from fnrun import TrainState, data, hooks, metrics, observers, optim, tree
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
        fnrun.epoch_loop(fnrun.make_train_step(model, loss, make(), accumulate=2, compile=compile))(state, BATCHES)[0]
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
def test_every_optimizer_that_draws_nothing_is_captured(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was recorded is run as it is: whether inductor keeps the numbers is its own matter, and it takes seconds each time."""
    captured: list[Any] = []
    monkeypatch.setattr(torch._inductor, "compile", lambda graph, *args: captured.append(graph) or graph)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5, bias=name != "muon"), nn.Tanh(), nn.Linear(5, 3, bias=name != "muon"))
    ends = []
    for compile in (False, True):
        step = fnrun.make_train_step(model, lambda m, b: m(b).square().mean(), PARTS[name](), compile=compile)
        state = TrainState.create(model, PARTS[name]())
        for i in range(6):
            state, _ = step(state, X[i : i + 8])
        ends.append(state)
    assert captured
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
