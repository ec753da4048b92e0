"""Hyperparameters: numbers and schedules are configuration, `in_state` makes one a tensor in the state."""

from __future__ import annotations

import dataclasses
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
Hyper = Any  # a number, a schedule `step -> number`, or one in the state


@dataclasses.dataclass(frozen=True, eq=False)
class Leaf:
    """A hyperparameter that lives in the optimizer state, beginning at `value`."""

    value: Tensor

    def __repr__(self) -> str:
        return f"in_state({self.value.item() if self.value.numel() == 1 else tuple(self.value.shape)})"


def in_state(value: Number) -> Leaf:
    """Make a hyperparameter a tensor in the optimizer state: one that is saved, swept over (one value a member) and differentiated.

    A number becomes a float64 scalar; a tensor is taken as it is (a copy). Read it with `hyperparams`, change it with `set_hyperparam`.
    Raises ValueError for one that requires grad.

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
    """The part of a state that hyperparameters need: how many updates were applied, which schedules are functions of, and the leaves."""

    count: Any
    leaves: dict[str, Tensor]

    def on_host(self) -> Any:
        """Numbers to be read without waiting for a device."""
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
        """Whether all are plain numbers, so that nothing needs to be remembered."""
        return not self.schedules and not self.leaves

    def init(self, **leaves: float) -> Hyperparams:
        """The memory at the beginning; `leaves` are further ones that are always there."""
        always = {name: torch.tensor(value, dtype=torch.float64) for name, value in leaves.items()}
        return Hyperparams(0, {**{name: value.clone() for name, value in self.leaves.items()}, **always})

    def now(self, state: Any) -> tuple[dict[str, Any], Any]:
        """The values now, and the memory one update on; without schedules and leaves there is none, and `state` stays as it is."""
        if self.fixed:
            return self.constants, state
        return self.at(state, host_value(state.count)), Hyperparams(state.count + 1, state.leaves)

    def at(self, state: Hyperparams, count: Any) -> dict[str, Any]:
        """The values now: numbers where they can be known without waiting for a device, else tensors."""
        check_uncut(state.leaves)
        values = dict(self.constants)
        for name, schedule in self.schedules:
            values[name] = schedule(count)
        for name, value in state.leaves.items():
            values[name] = host_value(value)
        return values


def constant(name: str, value: Hyper, *, below: float = float("inf")) -> None:
    """Raise ValueError where a hyperparameter that is a number lies outside `[0, below)`."""
    if isinstance(value, (int, float)) and not 0 <= value < below:
        bounds = "at least 0" if below == float("inf") else f"from 0 up to, but not, {below:g}"
        raise ValueError(f"{name} is {bounds}, not {value!r}")


def applied_updates(opt_state: Any) -> int | None:
    """How many updates the optimizer of this state has made: the most of its parts' counts. None where it has no count.

    Batches that were only accumulated and updates that were skipped do not count. It waits for a count that lies on a device.

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
    """Whether these are the hyperparameters of an optimizer, and not of a transform before it, which may see more than the updates."""
    return isinstance(part, Hyperparams) and "lr_scale" in part.leaves


# --- reaching leaves through chains and partitions ----------------------------------------------------------------------


def hyperparams(opt_state: Any) -> dict[str, Tensor]:
    """The hyperparameters that live in the state, by name: `lr_scale` of each optimizer, and those made with `in_state`.

    In a partition the label comes first (`decay/lr_scale`). The place in a chain is named (`0/...`) only where names would be the same.

    >>> from fnrun import optim
    >>> optimizer = optim.chain(optim.clip_by_global_norm(optim.in_state(1.0)), optim.adamw(1e-3))
    >>> sorted(hyperparams(optimizer.init({"x": torch.zeros(1)})))
    ['lr_scale', 'max_norm']
    """
    return {name: value for name, _, value in _named(opt_state)}


def set_hyperparam(opt_state: Any, path: str, value: Number) -> Any:
    """The state with one hyperparameter changed: `path` is a name of `hyperparams`, or its end, which then means all that end so.

    The new value takes dtype and device of the old one and broadcasts to its shape; a tensor's gradient flows through.
    Raises ValueError, with the names that there are, where nothing matches: a number or a schedule is none, `in_state(number)` is one.

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
    """Each leaf: its labels, its labels with the places in chains, its path in the state, its value."""
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
