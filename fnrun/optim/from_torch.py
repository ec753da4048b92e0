"""Any `torch.optim.Optimizer` class as a pure optimizer: each step copies the state into a fresh object, and out of it."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import optree
import torch
from torch import Tensor

from fnrun.core.key import Key
from fnrun.core.tree import join, struct
from fnrun.core.words import a
from fnrun.optim.base import Optimizer
from fnrun.optim.hyper import Hyperparams, Leaf, Settings
from fnrun.optim.lists import eager, host_value, report_as

# The code of an entry of torch's state in ours, whose structure never changes: absent (yet), present, None.
ABSENT, PRESENT, NOTHING = 0, 1, 2
#: Empty containers, and their codes.
_EMPTY: dict[type, int] = {list: 3, dict: 4, tuple: 5}
#: Python's numbers, and their codes and dtypes: the entry is always a scalar tensor.
_NUMBERS: dict[type, tuple[int, torch.dtype]] = {bool: (6, torch.bool), int: (7, torch.int64), float: (8, torch.float64)}


@functools.cache  # torch imports its compiler for its first optimizer, which takes a second
def _machinery() -> frozenset[str]:
    """Attributes of every torch optimizer, which are no state."""
    return frozenset(vars(torch.optim.SGD([torch.zeros(1)])))


@struct(name="fnrun.optim.TorchState")
class TorchState:
    """The state of a torch optimizer: `entries` by owner (a parameter's path, a group, the object) and name, and their codes."""

    hyper: Hyperparams
    entries: dict[str, dict[str, Any]]
    there: Tensor

    #: As in RuleState.
    numbered: ClassVar = ("there",)
    named: ClassVar = ("entries",)

    def on_host(self) -> Any:
        """The part that stays on the CPU: codes and counts of steps, as in torch (`Optimizer.load_state_dict`)."""
        return self.there, [entry.get("step") for entry in self.entries.values()]

    def fitted(self, fresh: TorchState, places: Sequence[int | None]) -> TorchState:
        """For other parameters: the entries of a new one are absent."""
        codes = [fresh.there[i] if place is None else self.there[place] for i, place in enumerate(places)]
        return dataclasses.replace(self, there=torch.stack(codes) if codes else fresh.there)


def from_torch(cls: Callable[..., torch.optim.Optimizer], /, **kwargs: Any) -> Optimizer:
    """The pure optimizer with the bits of `cls(params, **kwargs)`, for any `torch.optim.Optimizer` class.

    Each update makes an object of `cls` over copies of the parameters and of the state: none is kept between calls. `lr` and other numbers
    in `kwargs` may be schedules or `in_state`. `init` finds the structure of the state by two steps on copies. A class that draws random
    numbers draws them from torch's ambient generator, which a training step seeds.

    - TypeError: the class needs a closure (LBFGS), or its state is no data.
    - RuntimeError: under `torch.func` transforms, in a compiled step, and where a gradient should flow through the update.
    - ValueError: an `lr_scale` other than 1 for a class that changes its rate (SWATS), or ignores it after the first steps (Rprop).

    >>> optimizer = from_torch(torch.optim.NAdam, lr=0.1)
    >>> params = {"x": torch.tensor([1.0])}
    >>> params, state = optimizer.update({"x": torch.tensor([2.0])}, optimizer.init(params), params)
    >>> params
    {'x': tensor([0.8944])}
    """
    moving = {name: value for name, value in kwargs.items() if isinstance(value, Leaf) or (callable(value) and not isinstance(value, type))}
    settings = Settings(**moving)
    fixed = {name: value for name, value in kwargs.items() if name not in moving}

    def build(params: dict[str, Tensor], values: Mapping[str, Any]) -> tuple[torch.optim.Optimizer, dict[str, Tensor]]:
        """A fresh torch optimizer over copies of the parameters."""
        copies = {path: p.detach().clone().requires_grad_() for path, p in params.items()}
        return cls(list(copies.values()), **fixed, **values), copies

    me, follows = object(), False

    def init(params: Any, /) -> TorchState:
        hyper = settings.init(lr_scale=1.0)
        named = _named(params)
        if not named:
            return TorchState(hyper, {}, torch.zeros(0, dtype=torch.int8))
        if not eager():
            raise _refused(cls)
        values = {name: value for name, value in settings.at(hyper, 0).items() if name != "lr_scale"}
        with Key(0).scope():
            trial, copies = build(named, values)
            before = _snapshot(_memory(trial, copies), {})
            for _ in range(2):
                _step(trial, copies, list(map(torch.ones_like, copies.values())))
        entries: dict[str, dict[str, Any]] = {}
        for owner, fields in _memory(trial, copies).items():
            old = before.get(owner, {})
            # In groups and the object the caller's arguments are configuration, unless the steps have changed them.
            configured = kwargs if owner.startswith(("group", "object")) else {}
            kept = {
                name: old[name] if name in old and (value is None or _is_empty(value)) else value
                for name, value in fields.items()
                if not (name in old and _same(old[name], value) and (name.partition("/")[0] in configured or not _holdable(value)))
            }
            if kept:
                entries[owner] = {name: _blank(value, f"{cls.__name__}: {owner}/{name}") for name, value in kept.items()}
        return TorchState(hyper, entries, torch.zeros(sum(map(len, entries.values())), dtype=torch.int8))

    def update(grads: Any, state: TorchState, params: Any, /, *, key: Any = None, step: int | None = None) -> Any:
        nonlocal follows
        leaves, spec = optree.tree_flatten(params, none_is_leaf=True)
        flat: list[Any] = spec.flatten_up_to(grads)
        values = settings.at(state.hyper, host_value(state.hyper.count))
        scale = values.pop("lr_scale")
        hyper = Hyperparams(state.hyper.count + 1, state.hyper.leaves)
        named = _named(params)
        if not named or all(g is None for g in flat):
            return params, TorchState(hyper, state.entries, state.there)
        if not eager() or (torch.is_grad_enabled() and any(g is not None and g.requires_grad for g in flat)):
            raise _refused(cls)
        torch_optimizer, copies = build(named, values)
        fresh = _rates(torch_optimizer)
        _put(torch_optimizer, copies, state)
        before = _snapshot(_memory(torch_optimizer, copies), state.entries)
        scale = scale.item() if isinstance(scale, Tensor) else scale
        rates = unscaled = _rates(torch_optimizer)
        if scale != 1.0:
            _check_unmoved(cls, fresh, unscaled)
            if not follows:
                _check_follows(cls, lambda: build(named, values))
                follows = True
            rates = [rate * scale for rate in unscaled]
            _set_rates(torch_optimizer, rates)
        for i, rate in enumerate(rates):
            if rate is not None:
                report_as("lr", rate, (me, i))
        _step(torch_optimizer, copies, flat)
        if scale != 1.0:
            _check_unmoved(cls, rates, _rates(torch_optimizer))
            _set_rates(torch_optimizer, unscaled)
        new = [old if g is None else p.detach() for p, old, g in zip(copies.values(), leaves, flat, strict=True)]
        return spec.unflatten(new), TorchState(hyper, *_take(torch_optimizer, copies, state, before))

    return Optimizer(init, update, donatable=True, keyed=False)


def _named(params: Any) -> dict[str, Tensor]:
    leaves, spec = optree.tree_flatten(params, none_is_leaf=True)
    return {join(path): p for path, p in zip(optree.treespec_paths(spec), leaves, strict=True)}


def _step(optimizer: torch.optim.Optimizer, copies: Mapping[str, Tensor], grads: list[Any]) -> None:
    for p, g in zip(copies.values(), grads, strict=True):
        p.grad = None if g is None else torch.empty_like(p).copy_(g)
    try:
        with torch.enable_grad():
            optimizer.step()
    except TypeError as error:
        if "closure" in str(error):
            raise TypeError(f"from_torch({type(optimizer).__name__}): its steps need a closure, which a pure update has not") from error
        raise


def _refused(cls: Any) -> RuntimeError:
    return RuntimeError(
        f"from_torch({cls.__name__}): torch's own code runs in place: take an optimizer of fnrun.optim under torch.func, in a compiled "
        "step and where a gradient should flow through the update"
    )


# --- the learning rate --------------------------------------------------------------------------------------------------

#: The number of trial steps that show whether a class changes its rate, or ignores it.
_TRIAL = 12


def _rates(optimizer: torch.optim.Optimizer) -> list[Any]:
    return [_copy(group.get("lr")) for group in optimizer.param_groups]


def _set_rates(optimizer: torch.optim.Optimizer, rates: list[Any]) -> None:
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = _copy(rate)


def _check_unmoved(cls: Any, before: list[Any], after: list[Any]) -> None:
    """Raise ValueError where the class has changed a rate."""
    if not all(map(_same, before, after)):
        raise ValueError(f"from_torch({cls.__name__}): the class moves its own learning rate, and lr_scale {_ONLY}")


def _check_follows(cls: Any, build: Callable[[], tuple[torch.optim.Optimizer, dict[str, Tensor]]]) -> None:
    """Raise ValueError where the steps do not depend on the rate: tried on copies, with half the rate from the second step on."""
    ends: list[Any] = []
    for scale in (1.0, 0.5):
        with Key(0).scope():
            trial, copies = build()
            rates = _rates(trial)
            for i in range(_TRIAL):
                if i == 1 and None not in rates:
                    rates = [rate * scale for rate in rates]
                    _set_rates(trial, rates)
                _step(trial, copies, list(map(torch.ones_like, copies.values())))
                _check_unmoved(cls, rates, _rates(trial))
        ends.append(list(copies.values()))
    if None in rates or all(map(torch.equal, *ends)):
        raise ValueError(f"from_torch({cls.__name__}): the steps of the class do not depend on the learning rate, and lr_scale {_ONLY}")


_ONLY = (
    "other than 1 has no meaning for it: leave out what changes lr_scale (reduce_on_plateau, rollback's lr_factor, set_hyperparam), or "
    "give the class arguments that leave the rate to you"
)


# --- torch's state as named entries -------------------------------------------------------------------------------------


def _owners(optimizer: torch.optim.Optimizer, copies: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """The state itself, no copy: a dictionary for each parameter and each group, and the attributes of the object."""
    names = {id(p): path for path, p in copies.items()}
    owners: dict[str, dict[str, Any]] = {}
    for owner, fields in optimizer.state.items():
        if isinstance(owner, Tensor):
            owners[f"param {names[id(owner)]}"] = fields
        else:
            owners.setdefault("shared", {})[str(owner)] = fields
    for i, group in enumerate(optimizer.param_groups):
        owners[f"group {i}"] = {name: value for name, value in group.items() if name != "params"}
    owners["object"] = {name: value for name, value in vars(optimizer).items() if name not in _machinery() and _is_data(value, names)}
    return owners


def _is_data(value: Any, params: Mapping[int, str]) -> bool:
    """Whether `value` consists of numbers, texts and tensors that are no parameters."""
    paths, leaves, _ = optree.tree_flatten_with_path(value, none_is_leaf=True)
    return all(leaf is None or (isinstance(leaf, (int, float, str, Tensor)) and id(leaf) not in params) for leaf in leaves) and all(
        isinstance(entry, (str, int)) for path in paths for entry in path
    )


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _snapshot(memory: Mapping[str, dict[str, Any]], held: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The entries of groups and the object, without the values of those that are `held` in the state."""
    return {
        owner: {name: None if name in held.get(owner, {}) else _copy(value) for name, value in fields.items()}
        for owner, fields in memory.items()
        if owner.startswith(("group", "object"))
    }


def _memory(optimizer: torch.optim.Optimizer, copies: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """The state as entries by owner and name; nested entries have slashes in their names."""
    owners = _owners(optimizer, copies)
    return {
        owner: {name: leaf for field, value in fields.items() for name, leaf in _flat(field, value)} for owner, fields in owners.items()
    }


def _flat(field: str, value: Any) -> list[tuple[str, Any]]:
    paths, leaves, _ = optree.tree_flatten_with_path(value, none_is_leaf=True, is_leaf=_is_empty)
    return [(join((field, *path)), leaf) for path, leaf in zip(paths, leaves, strict=True)]


def _is_empty(value: Any) -> bool:
    return type(value) in _EMPTY and not value


def _blank(value: Any, where: str) -> Any:
    """The value of an absent entry."""
    if isinstance(value, Tensor):
        return torch.zeros_like(value.detach())
    if value is None or _is_empty(value):
        return None
    if isinstance(value, str):
        return ""
    if (number := _number(value)) is not None:
        return torch.zeros((), dtype=number[1])
    raise TypeError(f"{where} is {a(type(value).__name__)}, which is no data that a state can hold")


def _holdable(value: Any) -> bool:
    return value is None or isinstance(value, Tensor) or _is_empty(value) or _number(value) is not None


def _number(value: Any) -> tuple[int, torch.dtype] | None:
    return next((number for kind, number in _NUMBERS.items() if isinstance(value, kind)), None)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | ((a != a) & (b != b))).all())
    if isinstance(a, Tensor) or isinstance(b, Tensor) or type(a) is not type(b):
        return False
    return a is b or bool(a == b) or (isinstance(a, float) and a != a and b != b)


def _put(optimizer: torch.optim.Optimizer, copies: Mapping[str, Tensor], state: TorchState) -> None:
    """Copy the entries that are not absent into a fresh torch optimizer."""
    codes = iter(state.there.tolist())
    nested: dict[tuple[str, str], dict[str, Any]] = {}
    for owner in sorted(state.entries):
        for name in sorted(state.entries[owner]):
            code = next(codes)
            if code != ABSENT:
                field, _, rest = name.partition("/")
                nested.setdefault((owner, field), {})[rest] = _value(code, state.entries[owner][name])
    for (owner, field), values in nested.items():
        kind, _, rest = owner.partition(" ")
        fields: Any = vars(optimizer) if kind == "object" else optimizer.state
        if kind == "param":
            fields = optimizer.state[copies[rest]]
        elif kind == "group":
            fields = optimizer.param_groups[int(rest)]
        fields[field] = values[""] if set(values) == {""} else _like(fields.get(field), values)


def _stored(value: Any, blank: Any, where: str) -> tuple[int, Any]:
    """The code and the entry of a value, of the kind that `init` found."""
    if value is None:
        return NOTHING, blank
    if _is_empty(value):
        return _EMPTY[type(value)], blank
    if (isinstance(value, Tensor) and isinstance(blank, Tensor)) or (isinstance(value, str) and isinstance(blank, str)):
        return PRESENT, value.detach() if isinstance(value, Tensor) else value
    number = _number(value)
    if number is not None and isinstance(blank, Tensor) and blank.dim() == 0:
        dtype = number[1] if blank.dtype == number[1] else blank.dtype
        entry = torch.tensor(value, dtype=dtype) if dtype == number[1] or math.isfinite(float(value)) else blank
        if dtype == number[1] or _same(type(value)(entry.item()), value):
            return number[0], entry
    raise TypeError(f"{where} became {value!r}, for which its first two steps left no place in the state")


def _value(code: int, entry: Any) -> Any:
    if code == PRESENT:
        return _copy(entry)
    for kind, (its_code, _) in _NUMBERS.items():
        if its_code == code:
            return kind(entry.item())
    return next((kind() for kind, its_code in _EMPTY.items() if its_code == code), None)


def _like(fresh: Any, values: dict[str, Any]) -> Any:
    """Flat entries in the containers of a fresh optimizer, if these have the same names."""
    paths, _, spec = optree.tree_flatten_with_path(fresh, none_is_leaf=True, is_leaf=_is_empty)
    names = [join(path) for path in paths]
    return optree.tree_unflatten(spec, [values[name] for name in names]) if set(names) == set(values) else _nest(values)


def _nest(values: dict[str, Any]) -> Any:
    """A list or a dictionary from its flat entries."""
    children: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        first, _, rest = name.partition("/")
        children.setdefault(first, {})[rest] = value
    built = {name: child[""] if set(child) == {""} else _nest(child) for name, child in children.items()}
    return [built[str(i)] for i in range(len(built))] if all(name.isdigit() for name in built) else built


def _take(
    optimizer: torch.optim.Optimizer, copies: Mapping[str, Tensor], state: TorchState, before: Mapping[str, dict[str, Any]]
) -> tuple[dict[str, dict[str, Any]], Tensor]:
    """The entries after a step, in the structure that `init` found, and their codes."""
    memory, who = _memory(optimizer, copies), f"from_torch({type(optimizer).__name__})"
    for owner, fields in memory.items():
        old, held = before.get(owner, {}), state.entries.get(owner, {})
        unknown = [name for name in fields if name not in held and name not in old]
        if unknown:
            raise TypeError(f"{who}: {owner} now remembers {unknown}, which it did not after its first two steps")
        moved = [name for name, value in fields.items() if name not in held and not _same(old[name], value)]
        if moved:
            raise TypeError(f"{who}: {owner} has changed {moved}, which its first two steps did not: its arguments are no memory")
        still = {name.partition("/")[0] for name in fields}
        gone = [name for name in old if name.partition("/")[0] not in still]
        if gone:
            raise TypeError(f"{who}: {owner} has lost {gone}, which a fresh one has")
    entries, codes = {}, []
    for owner in sorted(state.entries):
        entries[owner] = {}
        for name in sorted(state.entries[owner]):
            code, entry = ABSENT, state.entries[owner][name]
            if name in memory.get(owner, {}):
                code, entry = _stored(memory[owner][name], entry, f"{who}: {owner}/{name}")
            codes.append(code)
            entries[owner][name] = entry
    return entries, torch.tensor(codes, dtype=torch.int8)
