"""Random programs for the laws: nestings of every combinator up to depth 4, over tiny states whose every step is random."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st

import fnrun
from fnrun import hooks, observers as watching

START = torch.tensor([1.0, -1.0])


def fresh(seed: int = 0) -> fnrun.TrainState:
    return fnrun.TrainState(params={"x": START.clone()}, buffers={}, opt_state=None, rng=fnrun.Key(seed))


@fnrun.step
def train(state: Any, batch: torch.Tensor) -> Any:
    """A step with dropout-like noise: its result depends on the batch, the step and the whole history."""
    x = 0.9 * state.params["x"] + batch.mean() + 0.1 * torch.randn(2)
    return state.replace(params={"x": x}), {"loss": x.sum(), "size": float(len(batch))}


def evaluate(state: Any, batch: torch.Tensor) -> dict[str, Any]:
    return {"score": (state.params["x"] * batch.mean()).sum()}


def plain_hook(state: Any, metrics: dict[str, Any]) -> Any:
    """A hook without memory that changes what is trained."""
    return state.replace(params={"x": state.params["x"] * 0.99})


class Counter:
    """A hook with memory that asks to stop once, at a chosen step; a silent one only takes note that it would have."""

    def __init__(self, name: str, stop_at: int | None, silent: bool = False) -> None:
        self.name, self.stop_at, self.silent = name, stop_at, silent

    def init(self, state: Any) -> dict[str, Any]:
        return {"ticks": 0, "stopped": False}

    def before(self, state: Any, batch: Any) -> Any:
        return state.replace(params={"x": state.params["x"] + 0.01})

    def after(self, state: Any, metrics: dict[str, Any]) -> Any:
        memory = dict(state.memory[self.name])
        memory["ticks"] += 1
        stop = self.stop_at is not None and state.step >= self.stop_at and not memory["stopped"]
        memory["stopped"] = memory["stopped"] or stop
        state = state.replace(memory={**state.memory, self.name: memory})
        return state.replace(stop=f"{self.name} asked") if stop and not self.silent else state


def wrapped(step: Any) -> Any:
    """A wrapper that knows nothing of loops."""

    def call(state: Any, x: Any) -> Any:
        state, metrics = step(state, x)
        return state, metrics

    return call


_leaves = st.one_of(
    st.just(("epoch",)),
    st.tuples(st.just("steps"), st.integers(0, 5)),
    st.just(("eval",)),
    st.tuples(st.just("eval steps"), st.integers(1, 3), st.booleans()),
)
programs = st.recursive(
    _leaves,
    lambda inner: st.one_of(
        st.tuples(st.just("repeat"), inner, st.integers(0, 3)),
        st.tuples(st.just("until"), inner, st.integers(1, 3)),
        st.tuples(st.just("wrapped"), inner),
        st.tuples(st.just("told"), inner),
        st.tuples(st.just("sequence"), inner, inner),
        st.tuples(st.just("workflow"), inner, inner, st.integers(1, 2)),
        st.tuples(st.just("every"), inner, st.integers(1, 3), st.integers(1, 4)),
    ),
    max_leaves=4,
)
lengths = st.lists(st.integers(1, 4), min_size=6, max_size=6)


class Build:
    """The program that a drawn description stands for, and data for it."""

    def __init__(self, lengths: list[int], *, stop_at: int | None = None, silent: bool = False, observers: Any = ()) -> None:
        self.lengths, self.stop_at, self.silent = list(lengths), stop_at, silent
        self.observers = observers if callable(observers) else lambda: observers
        self.names = iter(f"counter {i}" for i in range(100))

    def __call__(self, program: Any) -> tuple[Any, Any]:
        kind, *rest = program
        common: dict[str, Any] = {"observers": list(self.observers())}
        training = {
            **common,
            "hooks": [plain_hook, Counter(next(self.names), self.stop_at, self.silent), hooks.ema(0.5, name=next(self.names))],
        }
        if kind == "epoch":
            return fnrun.epoch_loop(train, **training), self.stream()
        if kind == "steps":
            return fnrun.step_loop(train, rest[0], **training), self.stream()
        if kind == "eval":
            return fnrun.eval_loop(evaluate, **common), self.stream()
        if kind == "eval steps":
            return fnrun.eval_loop(evaluate, steps=rest[0], again=rest[1], **common), self.stream()
        inner, data = self(rest[0])
        if kind == "repeat":
            return fnrun.repeat(inner, rest[1], **training), data
        if kind == "until":
            ticks = rest[1]
            return fnrun.repeat(inner, until=lambda state: state.position.frames[-1].ticks >= ticks, **training), data
        if kind == "wrapped":
            return fnrun.repeat(wrapped(inner), 2), data
        if kind == "told":
            return fnrun.repeat(fnrun.wraps(inner)(wrapped(inner)), 2), data
        if kind == "every":
            step = fnrun.sequence(a=fnrun.every(rest[1], inner), **training)
            return fnrun.repeat(step, rest[2], observers=list(self.observers())), {"a": data}
        other, more = self(rest[1])
        if kind == "sequence":
            return fnrun.sequence(a=inner, b=other, **training), {"a": data, "b": more}
        return fnrun.workflow([("a", 2), ("b", 1)], times=rest[2], a=inner, b=other, **training), {"a": data, "b": more}

    def stream(self) -> list[torch.Tensor]:
        n = self.lengths.pop() if self.lengths else 2
        return [torch.full((1 + i % 2,), float(i)) for i in range(n)]


def logs() -> list[Any]:
    """Two logs for a loop, with windows over the line, over several and over the pass."""
    chosen = {"loss": ["mean", "last", ("max", "epoch")], "a/loss": ["last", "mean"]}
    return [watching.log(2, to=[], statistics=chosen), watching.log(3, to=[], window=5, name="five")]


def build(program: Any, lengths: list[int], **options: Any) -> tuple[Any, Any]:
    """A program and its data: the same for the same description, each time anew."""
    return Build(lengths, **options)(program)
