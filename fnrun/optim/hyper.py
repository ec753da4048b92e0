"""Hyperparameters: numbers and schedules are configuration; `in_state` makes one a tensor in the state."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import optree
import torch
from torch import Tensor

from fnrun.core.entering import check_uncut
from fnrun.core.tree import join, node, struct
from fnrun.core.words import bindable, kind, uncalled
from fnrun.optim.lists import host_value

Number = float | Tensor
Hyper = Any  # a number, a schedule `step -> number`, or an `in_state`


@dataclasses.dataclass(frozen=True, eq=False)
class Leaf:
    """A hyperparameter in the optimizer state, with its first `value`."""

    value: Tensor

    def __repr__(self) -> str:
        return f"in_state({self.value.item() if self.value.numel() == 1 else tuple(self.value.shape)})"


def in_state(value: Number) -> Leaf:
    """Make a hyperparameter a tensor in the optimizer state: it is saved, swept over (one value a member) and differentiable.

    A number becomes a float64 scalar; a tensor is copied. `hyperparams` reads it, `set_hyperparam` changes it.
    Raises ValueError for a tensor that requires grad.

    >>> from fnrun import optim
    >>> optimizer = optim.sgd(optim.in_state(0.1))
    >>> hyperparams(optimizer.init({"x": torch.zeros(1)}))
    {'lr': tensor(0.1000, dtype=torch.float64), 'lr_scale': tensor(1., dtype=torch.float64)}
    """
    if isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "optim.in_state: this tensor requires grad, and what enters a state is detached: give value.detach(). To differentiate by it "
            "call optimizer.update(grads, set_hyperparam(opt_state, name, value), params), and step.loss for the gradients"
        )
    return Leaf(value.detach().clone() if isinstance(value, Tensor) else torch.tensor(float(value), dtype=torch.float64))


@struct(name="fnrun.optim.Hyperparams")
class Hyperparams:
    """The count of applied updates, the argument of schedules, and the hyperparameters that are in the state."""

    count: Any
    leaves: dict[str, Tensor]

    def on_host(self) -> Any:
        """The part that stays on the CPU: numbers are read without waiting for a device."""
        return self.leaves


class Settings:
    """Named hyperparameters of one transform or optimizer, and their values at a state."""

    def __init__(self, **values: Hyper) -> None:
        self.constants = {name: value for name, value in values.items() if not callable(value) and not isinstance(value, Leaf)}
        self.schedules = [(name, value) for name, value in values.items() if callable(value)]
        self.leaves = {name: value.value for name, value in values.items() if isinstance(value, Leaf)}
        for name, schedule in self.schedules:
            if isinstance(schedule, type) or uncalled(schedule) or not bindable(schedule, 0):
                hint = f"call it, {uncalled(schedule)}(...)" if uncalled(schedule) else "a schedule is a function of one number, the step"
                raise TypeError(f"{name} is a number, a schedule or optim.in_state(number), not {kind(schedule)}: {hint}")
        for name, value in self.constants.items():
            if not isinstance(value, (int, float, Tensor)):
                raise TypeError(f"{name} is a number, a schedule or optim.in_state(number), not {value!r} ({type(value).__name__})")

    @property
    def fixed(self) -> bool:
        """Whether all are plain numbers, so that there is no state."""
        return not self.schedules and not self.leaves

    def init(self, **leaves: float) -> Hyperparams:
        """The first state; `leaves` are added to it."""
        always = {name: torch.tensor(value, dtype=torch.float64) for name, value in leaves.items()}
        return Hyperparams(0, {**{name: value.clone() for name, value in self.leaves.items()}, **always})

    def now(self, state: Any) -> tuple[dict[str, Any], Any]:
        """The present values, and the state after an update; if all are plain numbers `state` itself."""
        if self.fixed:
            return self.constants, state
        return self.at(state, host_value(state.count)), Hyperparams(state.count + 1, state.leaves)

    def at(self, state: Hyperparams, count: Any) -> dict[str, Any]:
        """The values at `count`: numbers where no device has to be waited for, else tensors."""
        check_uncut(state.leaves)
        values = dict(self.constants)
        for name, schedule in self.schedules:
            values[name] = schedule(count)
        for name, value in state.leaves.items():
            values[name] = host_value(value)
        return values


def check(values: Mapping[str, Hyper], *, below: float = math.inf) -> dict[str, Hyper]:
    """The hyperparameters. Raises ValueError where one that is a number lies outside `[0, below)`."""
    for name, value in values.items():
        if isinstance(value, (int, float)) and not 0 <= value < below:
            bounds = "at least 0" if below == math.inf else f"from 0 up to, but not, {below:g}"
            raise ValueError(f"{name} is {bounds}, not {value!r}")
    return dict(values)


def applied_updates(opt_state: Any) -> int | None:
    """The number of updates that the optimizer of this state has made, the largest of its parts' counts; None if it has no count.

    Accumulated batches and skipped updates do not count. Waits for a count on a device.

    >>> from fnrun import optim
    >>> optimizer = optim.chain(optim.accumulate(2), optim.sgd(1.0))
    >>> params = {"x": torch.tensor([0.0])}
    >>> state = optimizer.init(params)
    >>> for g in (1.0, 2.0, 3.0):
    ...     params, state = optimizer.update({"x": torch.tensor([g])}, state, params)
    ...     print(applied_updates(state))
    0
    1
    1
    """
    counts = [int(hyper.count) for hyper in optree.tree_leaves(opt_state, is_leaf=_of_optimizer) if _of_optimizer(hyper)]
    return max(counts, default=None)


def _of_optimizer(part: Any) -> bool:
    """Whether `part` belongs to an optimizer: a transform before it may count more than the updates."""
    return isinstance(part, Hyperparams) and "lr_scale" in part.leaves


# --- reaching leaves through chains and partitions ----------------------------------------------------------------------


def hyperparams(opt_state: Any) -> dict[str, Tensor]:
    """The hyperparameters in the state, by name: `lr_scale` of each optimizer, and those made with `in_state`.

    In a partition the label comes first (`decay/lr_scale`). The place in a chain (`0/...`) is added only to equal names.

    >>> from fnrun import optim
    >>> optimizer = optim.chain(optim.clip_by_global_norm(optim.in_state(1.0)), optim.adamw(1e-3))
    >>> sorted(hyperparams(optimizer.init({"x": torch.zeros(1)})))
    ['lr_scale', 'max_norm']
    """
    return {name: value for name, _, value in _named(opt_state)}


def set_hyperparam(opt_state: Any, path: str, value: Number) -> Any:
    """The state with another value for the hyperparameters whose name in `hyperparams` is `path`, or ends in it.

    The value is cast to dtype and device of the old one and broadcasts to its shape; a tensor's gradient flows through.
    Raises ValueError, with the available names, where none matches: only `in_state(number)` is in the state, a number or a schedule is not.

    >>> from fnrun import optim
    >>> state = optim.adamw(1e-3).init({"x": torch.zeros(1)})
    >>> hyperparams(set_hyperparam(state, "lr_scale", 0.1))
    {'lr_scale': tensor(0.1000, dtype=torch.float64)}
    """
    named = _named(opt_state)
    wanted = {place for name, place, _ in named if name == path or name.endswith("/" + path)}
    if not wanted:
        raise ValueError(
            f"set_hyperparam: no hyperparameter {path!r} in this state; there are: {', '.join(name for name, *_ in named) or 'none'}. "
            "A number or a schedule that an optimizer is made with is not in the state; optim.in_state(number) is: "
            "optim.sgd(optim.in_state(0.1))"
        )
    leaves, spec = optree.tree_flatten(opt_state)
    places = optree.treespec_paths(spec)
    changed = [_cast(value, old) if join(place) in wanted else old for place, old in zip(places, leaves, strict=True)]
    return optree.tree_unflatten(spec, changed)


def _cast(value: Number, old: Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value.to(old).expand_as(old).clone()
    return torch.full_like(old, value)


def _named(opt_state: Any) -> list[tuple[str, str, Tensor]]:
    found = list(_find(opt_state, (), (), ()))
    short = ["/".join(labels) for labels, *_ in found]
    return [
        (name if short.count(name) == 1 else "/".join(full), place, value)
        for name, (_, full, place, value) in zip(short, found, strict=True)
    ]


def _find(state: Any, labels: tuple[str, ...], full: tuple[str, ...], place: tuple[Any, ...]) -> Iterator[Any]:
    """For each hyperparameter: its labels, its labels with places in chains, its path in the state, its value."""
    if isinstance(state, Hyperparams):
        for name, value in state.leaves.items():
            yield (*labels, name), (*full, name), join((*place, "leaves", name)), value
        return
    at = node(state)
    if at is None:
        return
    for entry, child in zip(at.entries, at.children, strict=True):
        if isinstance(state, Mapping):
            yield from _find(child, (*labels, str(entry)), (*full, str(entry)), (*place, entry))
        elif at.kind.startswith("struct"):
            yield from _find(child, labels, full, (*place, entry))
        else:
            yield from _find(child, labels, (*full, str(entry)), (*place, entry))
