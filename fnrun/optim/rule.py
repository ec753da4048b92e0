"""From a rule to an optimizer: its state, its kernels, and parameters without a gradient."""

from __future__ import annotations

import dataclasses
import itertools
import operator
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import optree
import torch
from torch import Tensor

from fnrun.core.donation import writable
from fnrun.core.key import Key
from fnrun.core.tree import struct
from fnrun.optim.base import Optimizer
from fnrun.optim.hyper import Hyperparams, Settings
from fnrun.optim.lists import Flat, Ops, flows, foreach, host_value, is_none, is_zero, kernels_apply, leafwise, report_as

Lists = dict[str, Any]  # slots: a list with an entry for each parameter; scalars: a vector

#: The dtypes of torch's fused kernels.
FUSED = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})


class Rule(NamedTuple):
    """The mathematics of one optimizer.

    - `slots`: by name, the function `param -> tensor` that makes a slot, None for none.
    - `update(ops, params, grads, slots, values, t)`: the new parameters, and slots and scalars by name. `t` is 1 at the first update of
      these parameters. It writes only to tensors that it has made.
    - `fused(params, grads, slots, values, t)`: the same in place, by a fused kernel of torch.
    - `scalars`: by name, the function `params -> vector` of a number for each parameter.
    - `fusable(values, t)`: whether the fused kernel can be used.
    - `on_cpu`: the dtypes for which it can be used on a CPU.
    """

    slots: Mapping[str, Callable[..., Tensor | None]]
    update: Callable[[Ops, list[Tensor], list[Tensor], Lists, dict[str, Any], Any], tuple[list[Tensor], Lists]]
    fused: Callable[[list[Tensor], list[Tensor], Lists, dict[str, Any], Any], None] | None = None
    scalars: Mapping[str, Callable[[list[Tensor]], Tensor]] = MappingProxyType({})
    fusable: Callable[[dict[str, Any], Any], bool] = lambda values, t: True
    on_cpu: frozenset[torch.dtype] = FUSED


@struct(name="fnrun.optim.Misses")
class Misses:
    """The number of updates that each leaf has missed, for lack of a gradient: with one count of updates, torch's count of each leaf.

    `each` is read only if `total` is not 0.
    """

    total: Any
    each: Tensor

    def on_host(self) -> Any:
        return self.each

    @classmethod
    def none(cls, leaves: int) -> Misses:
        return cls(0, torch.zeros(leaves, dtype=torch.int64))

    def record(self, grads: Sequence[Any]) -> Misses:
        absent = [int(g is None) for g in grads]
        return Misses(self.total + sum(absent), self.each + torch.tensor(absent, dtype=torch.int64, device=self.each.device))

    def fitted(self, places: Sequence[int | None], age: Any) -> Misses:
        """For other leaves: `places` are their former places, None for a new one, which has missed all `age` updates."""
        each = torch.zeros(len(places), dtype=torch.int64, device=self.each.device)
        for i, place in enumerate(places):
            each[i] = age if place is None else self.each[place]
        return Misses(self.total + age * list(places).count(None), each)

    def always(self, times: int) -> list[bool]:
        """For each leaf, whether it was missed all of `times` times."""
        if is_zero(host_value(self.total)):
            return [False] * len(self.each)
        return (self.each == times).tolist()


@struct(name="fnrun.optim.RuleState")
class RuleState:
    """The state of an optimizer: count and hyperparameters; slots with the structure of the parameters; a vector for each scalar."""

    hyper: Hyperparams
    slots: dict[str, Any]
    scalars: dict[str, Tensor]
    misses: Misses

    #: The fields that are indexed by a leaf's number, and the path of those that are indexed by its name.
    numbered: ClassVar = ("scalars", "misses")
    named: ClassVar = ("slots", "*")

    def on_host(self) -> Any:
        return self.scalars

    def fitted(self, fresh: RuleState, places: Sequence[int | None]) -> RuleState:
        """For the parameters of the `fresh` state, at former `places`: a new one has the age 0, as in torch."""
        if not self.slots:
            return dataclasses.replace(self, misses=fresh.misses, scalars=fresh.scalars)
        scalars = {
            name: torch.stack([fresh.scalars[name][i] if place is None else values[place] for i, place in enumerate(places)])
            for name, values in self.scalars.items()
        }
        return dataclasses.replace(self, scalars=scalars, misses=self.misses.fitted(places, self.hyper.count))


class _Constants:
    """The values of the step before, while they cannot have changed: there is no schedule, and the leaves are the same."""

    def __init__(self, settings: Settings) -> None:
        self._settings, self._fixed = settings, not settings.schedules
        self._leaves: Any = None
        self._values: dict[str, Any] = {}

    def at(self, hyper: Hyperparams, count: Any) -> dict[str, Any]:
        """The values at `count`, with `lr` multiplied by `lr_scale`."""
        if hyper.leaves is self._leaves:
            return self._values
        values = self._settings.at(hyper, count)
        values["lr"] = values["lr"] * values.pop("lr_scale")
        if (
            self._fixed
            and not any(isinstance(value, Tensor) for value in values.values())
            and not any(leaf.requires_grad for leaf in hyper.leaves.values())
        ):
            self._leaves, self._values = hyper.leaves, values
        return values


def optimizer(rule: Rule, settings: Settings, eval_params: Callable[[Any, Any], Any] | None = None) -> Optimizer:
    """The optimizer of a rule; `lr_scale` is added to its hyperparameters."""

    flatten, constants, owner = Flat(), _Constants(settings), object()

    def init(params: Any, /) -> RuleState:
        leaves, spec = optree.tree_flatten(params, none_is_leaf=True)
        with torch.no_grad():
            slots = {name: spec.unflatten([None if p is None else begin(p) for p in leaves]) for name, begin in rule.slots.items()}
            scalars = {name: begin(leaves) for name, begin in rule.scalars.items()}
        return RuleState(settings.init(lr_scale=1.0), slots, scalars, Misses.none(len(leaves)))

    def update(grads: Any, state: RuleState, params: Any, /, *, key: Key | None = None, step: int | None = None) -> tuple[Any, RuleState]:
        leaves, spec = flatten(params)
        flat: list[Any] = spec.flatten_up_to(grads)
        slots: Lists = {name: spec.flatten_up_to(tree) for name, tree in state.slots.items()}
        slots.update(state.scalars)
        count = host_value(state.hyper.count)
        values = constants.at(state.hyper, count)
        report_as("lr", values["lr"], owner)
        misses = state.misses
        missing = any(map(is_none, flat))
        if missing or not is_zero(host_value(misses.total)):
            groups = list(_by_age(flat, misses))
            misses = misses.record(flat) if missing else misses
            new, slots = _grouped(rule, groups, leaves, flat, slots, values, count)
        else:
            new, slots = run(rule, leaves, flat, slots, values, count + 1)
        hyper = Hyperparams(state.hyper.count + 1, state.hyper.leaves)
        scalars = {name: slots[name] for name in rule.scalars}
        return spec.unflatten(new), RuleState(hyper, {name: spec.unflatten(slots[name]) for name in rule.slots}, scalars, misses)

    return Optimizer(init, update, eval_params=eval_params, donatable=True, keyed=False)


def _by_age(grads: list[Any], misses: Misses) -> Iterator[tuple[Any, list[int]]]:
    """The places of the leaves with a gradient, grouped by missed updates; one by one if only a device knows these."""
    groups: dict[int, list[int]] = defaultdict(list)
    missed = [host_value(m) for m in misses.each.unbind()]
    for i, grad in enumerate(grads):
        if grad is not None and isinstance(missed[i], int):
            groups[missed[i]].append(i)
        elif grad is not None:
            yield missed[i], [i]
    yield from groups.items()


def _grouped(
    rule: Rule, groups: list[tuple[Any, list[int]]], params: list[Any], grads: list[Any], slots: Lists, values: dict[str, Any], count: Any
) -> tuple[list[Any], Lists]:
    params, slots = list(params), {name: list(slot) for name, slot in slots.items()}
    for missed, members in groups:
        chosen = {name: [slot[i] for i in members] for name, slot in slots.items()}
        chosen = {name: torch.stack(slot) if name in rule.scalars else slot for name, slot in chosen.items()}
        new, changed = run(rule, [params[i] for i in members], [grads[i] for i in members], chosen, values, count + 1 - missed)
        for place, i in enumerate(members):
            params[i] = new[place]
            for name, slot in changed.items():
                slots[name][i] = slot[place]
    return params, {name: torch.stack(slot) if name in rule.scalars and slot else slot for name, slot in slots.items()}


# --- which kernels ------------------------------------------------------------------------------------------------------


def run(rule: Rule, params: list[Tensor], grads: list[Tensor], slots: Lists, values: dict[str, Any], t: Any) -> tuple[list[Any], Lists]:
    """One update of leaves of one age, for each dtype and device: by a fused kernel, foreach kernels, or leaf by leaf out of place."""
    if not params:
        return params, slots
    if list(map(_shape, grads)) != list(map(_shape, params)):  # a fused kernel would read beyond a short gradient
        shapes = next((tuple(g.shape), tuple(p.shape)) for g, p in zip(grads, params, strict=True) if g.shape != p.shape)
        raise ValueError("a gradient has the shape {}, and its parameter {}".format(*shapes))
    if len(set(map(_dtype, params))) > 1 or len(set(map(Tensor.get_device, params))) > 1:
        return _grouped(rule, [(0, members) for members in _kinds(params)], params, grads, slots, values, t - 1)
    if params[0].dtype.is_complex:
        return _as_real(rule, params, grads, slots, values, t)
    tensors = [name for name, value in values.items() if isinstance(value, Tensor)]
    if kernels_apply([*params, *grads, *(itertools.chain.from_iterable(slots.values()) if rule.fused is not None else ())]):
        if rule.fused is not None and _takes(rule, params[0], tensors, values, t):
            return _fused(rule, params, grads, slots, values, t)
        if not tensors and not isinstance(t, Tensor):
            new, slots = rule.update(foreach, params, grads, slots, values, t)
            return list(new), slots
    return _out_of_place(rule, params, grads, slots, values, t)


_dtype, _shape = operator.attrgetter("dtype"), operator.attrgetter("shape")


def _kinds(params: list[Tensor]) -> Iterable[list[int]]:
    """The places of the leaves, grouped by dtype and device."""
    kinds: dict[Any, list[int]] = defaultdict(list)
    for i, p in enumerate(params):
        kinds[p.dtype, p.device].append(i)
    return kinds.values()


def _takes(rule: Rule, like: Tensor, tensors: list[str], values: dict[str, Any], t: Any) -> bool:
    """Whether the fused kernel takes leaves like this one, and these values, of which `tensors` are tensors."""
    if like.dtype not in (rule.on_cpu if like.is_cpu else FUSED if like.is_cuda else ()):
        return False
    return (not tensors or (tensors == ["lr"] and not flows([values["lr"]]))) and rule.fusable(values, t)


def _fused(rule: Rule, params: list[Tensor], grads: list[Tensor], slots: Lists, values: dict[str, Any], t: Any) -> tuple[list[Any], Lists]:
    assert rule.fused is not None
    owned, n = writable([*params, *itertools.chain.from_iterable(slots.values())]), len(params)  # no rule with a fused kernel has scalars
    new, slots = owned[:n], {name: owned[n * i : n * (i + 1)] for i, name in enumerate(slots, start=1)}
    if False in map(Tensor.is_contiguous, (*owned, *grads)):
        grads, slots = _like(new, grads), {name: _like(new, slot) for name, slot in slots.items()}
    rule.fused(new, grads, slots, values, t)
    return new, slots


def steps(params: list[Tensor], t: Any) -> list[Tensor]:
    """`t` for fused kernels: a float32 scalar for each parameter, here one for all."""
    device = params[0].device
    scalar = t.to(device, torch.float32) if isinstance(t, Tensor) else torch.full((), t, dtype=torch.float32, device=device)
    return [scalar] * len(params)


def _like(params: list[Tensor], tensors: list[Tensor]) -> list[Tensor]:
    """The tensors with the strides of the parameters: fused kernels walk over memory and not over indices."""
    return [x if x.stride() == p.stride() else torch.empty_like(p).copy_(x) for p, x in zip(params, tensors, strict=True)]


def _out_of_place(
    rule: Rule, params: list[Tensor], grads: list[Tensor], slots: Lists, values: dict[str, Any], t: Any
) -> tuple[list[Any], Lists]:
    """Leaf by leaf; numbers that are tensors are float64, and results are cast to the former dtypes."""
    device = params[0].device
    values = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in values.items()}
    t = t.to(device, torch.float64) if isinstance(t, Tensor) else t
    new, changed = rule.update(leafwise, params, grads, slots, values, t)
    scalars = {name: changed.pop(name) for name in rule.scalars}
    return _cast(new, params), {**{name: _cast(slot, slots[name]) for name, slot in changed.items()}, **scalars}


def _cast(new: list[Any], old: list[Any]) -> list[Any]:
    return [x if x is None or x.dtype == y.dtype else x.to(y.dtype) for x, y in zip(new, old, strict=True)]


def _as_real(
    rule: Rule, params: list[Tensor], grads: list[Tensor], slots: Lists, values: dict[str, Any], t: Any
) -> tuple[list[Any], Lists]:
    """Complex leaves as pairs of real numbers, as in torch."""
    is_complex = [p.dtype.is_complex for p in params]
    real = {name: slot if name in rule.scalars else _real(slot) for name, slot in slots.items()}
    new, changed = run(rule, _real(params), _real(grads), real, values, t)
    for name in rule.slots:
        changed[name] = _complex(changed[name], [x is not None and x.dtype.is_complex for x in slots[name]])
    return _complex(new, is_complex), changed


def _real(tensors: list[Any]) -> list[Any]:
    return [torch.view_as_real(x) if x is not None and x.dtype.is_complex else x for x in tensors]


def _complex(tensors: list[Any], is_complex: list[bool]) -> list[Any]:
    return [torch.view_as_complex(x.contiguous()) if pair else x for x, pair in zip(tensors, is_complex, strict=True)]
