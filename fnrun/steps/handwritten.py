"""Hand-written steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fnrun.core import tree
from fnrun.core.inplace import Guard
from fnrun.core.state import S, is_state, no_state
from fnrun.core.words import kind
from fnrun.steps.checks import check_function, detached, detached_all, reported
from fnrun.steps.kinds import Function, Metrics
from fnrun.steps.surroundings import Surroundings


def step(fn: Callable[[S, Any], tuple[S, Metrics]] | None = None, *, host_random: bool = False) -> Any:
    """Make a hand-written `(state, batch) -> (state, metrics)` a training step that keeps the laws.

    - torch's ambient generators are seeded from `state.rng.fold_in("train", state.step)`, and restored afterwards.
    - Values of `fnrun.report` join the metrics.
    - Tensors of the new state and of the metrics are detached.
    - `state.step` of the new state is one higher.

    `host_random=False`: seed Python's and NumPy's generators too (100 us a step).

    Raises TypeError where the function returns no `(state, metrics)`.

    >>> import torch
    >>> from fnrun import TrainState
    >>> @step
    ... def add_noise(state, batch):
    ...     noisy = {name: p + torch.randn_like(p) for name, p in state.params.items()}
    ...     return state.replace(params=noisy), {"size": len(batch)}
    >>> state = TrainState.create(torch.nn.Linear(2, 1))
    >>> once, twice = add_noise(state, [1, 2])[0], add_noise(state, [1, 2])[0]
    >>> tree.equal(once, twice), once.step
    (True, 1)
    """
    if fn is None:
        return lambda fn: step(fn, host_random=host_random)
    check_function("step", fn, 2, "(state, batch)", "(state, metrics)")
    name = getattr(fn, "__qualname__", repr(fn))
    within, guard = Surroundings(name, host_random), Guard(f"the step {name}")

    def lawful(state: Any, batch: Any) -> tuple[Any, Metrics]:
        marks = guard.look(state)
        try:
            count = state.step
            surroundings = within(state.rng, "train", count)
        except AttributeError:
            raise no_state(name, state, batch, "batch") from None
        with surroundings as reports:
            result: Any = fn(state, batch)
        guard.check(marks)
        if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[1], Mapping):
            raise TypeError(f"{name} returned {type(result).__name__}: a step returns (state, metrics), metrics a dict")
        new, metrics = result
        if not is_state(new):
            raise TypeError(
                f"{name} returned {kind(new)} in place of a state: a step returns (state, metrics), such as state.replace(...), {{}}"
            )
        metrics = {name: detached_all(value) for name, value in reported(metrics, reports).items()}
        new = tree.map(detached, new).replace(position=new.position)  # the same object: another one means that a loop ran
        return new.replace(step=count + 1), metrics

    return Function(lawful, like=fn)
