"""Side effects of a module's call, watched in the first calls of a step.

A functional step puts the state's tensors into a module, and takes its outputs and buffers. Anything else that a forward writes would be
lost, and anything else that it reads would be a hidden input. The first calls (`FirstCalls`) record every operation (`Operations`), and the
attributes of the submodules before and after (`Attributes`). Later calls are not watched.
"""

from __future__ import annotations

import dataclasses
import gc
import operator
import random
import warnings
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import BuiltinFunctionType, FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import Any

import numpy as np
import optree
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fnrun.core.key import ambient
from fnrun.core.reports import collect
from fnrun.core.undisturbed import undisturbed
from fnrun.data.ambient import restore_hosts, save_hosts


def memory(tensor: Tensor) -> int | None:
    """The identity of a tensor's memory, the same for all its views and for `.data`; None where it has no storage."""
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return None


# --- operations --------------------------------------------------------------------------------------------------------

#: They read a tensor's shape, dtype and device, and no value.
_SHAPES = ("empty_like", "full_like", "ones_like", "zeros_like", "rand_like", "randn_like", "randint_like", "new_")
_OVERWRITES = ("copy_", "zero_", "fill_", "normal_", "uniform_", "set_")


class Operations(TorchDispatchMode):
    """The memory that the operations of a call read and write, and the generators that they draw from.

    `guarded` tensors are copied before they are written to: `undo` restores them.
    """

    supports_higher_order_operators = True

    @classmethod
    def is_infra_mode(cls) -> bool:
        return True  # compiled parts of a model stay compiled, with the bits of later calls

    def __init__(self, guarded: Iterable[Tensor]) -> None:
        super().__init__()
        self.guarded: dict[int | None, list[Tensor]] = {}
        for tensor in guarded:
            self.guarded.setdefault(memory(tensor), []).append(tensor)
        self.kept: list[tuple[Tensor, Tensor, list[int] | None]] = []  # with their values and counts of writes
        self.read: set[int | None] = set()  # before it was overwritten
        self.written: set[int | None] = set()
        self.made: set[int | None] = set()
        self.moved: list[torch.Generator] = []  # used in this call and before it
        self._overwritten: set[int | None] = set()
        self._generators = {g._cdata for g in ambient()}  # pyright: ignore[reportAttributeAccessIssue]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        schema = getattr(func, "_schema", None)
        arguments = schema.arguments if schema else [None] * len(args)
        named = {argument.name: argument for argument in arguments if argument}
        inputs: set[int | None] = set()
        pairs = [*zip(arguments, args, strict=False), *((named.get(k), v) for k, v in kwargs.items())]
        name = schema.name.rpartition("::")[2] if schema else ""
        looks = getattr(func, "is_view", False) or name.startswith(_SHAPES)
        for argument, value in pairs:
            writes = argument and argument.alias_info and argument.alias_info.is_write
            for each in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(each, Tensor):
                    inputs.add(memory(each))
                    if writes:
                        self._write(each, whole=name in _OVERWRITES or argument.name == "out")
                    elif not looks:
                        self._read(memory(each))
                elif isinstance(each, torch.Generator):
                    self._draw(each)
        result = func(*args, **kwargs)
        for each in result if isinstance(result, (list, tuple)) else (result,):
            if isinstance(each, Tensor) and (memory(each) not in inputs or name == "lift_fresh"):
                self.made.add(memory(each))
        return result

    def undo(self) -> None:
        """Restore the values of the guarded tensors."""
        for tensor, value, version in self.kept:
            tensor.detach().copy_(value)
            if version is not None:
                torch._C._autograd._unsafe_set_version_counter((tensor,), tuple(version))  # pyright: ignore[reportAttributeAccessIssue]

    def _read(self, place: int | None) -> None:
        if place is not None and place not in self._overwritten:
            self.read.add(place)

    def _write(self, tensor: Tensor, whole: bool) -> None:
        place = memory(tensor)
        if place is None:
            return
        if place in self.guarded and place not in self.written:
            self.kept += [(t, t.detach().clone(), versions([t])) for t in self.guarded[place]]
        if whole and tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes():
            self._overwritten.add(place)
        else:
            self._read(place)
        self.written.add(place)

    def _draw(self, generator: torch.Generator) -> None:
        if generator._cdata in self._generators:  # each access makes another object  # pyright: ignore[reportAttributeAccessIssue]
            return
        self._generators.add(generator._cdata)  # pyright: ignore[reportAttributeAccessIssue]
        fresh = torch.Generator(generator.device).manual_seed(generator.initial_seed())
        if not torch.equal(generator.get_state(), fresh.get_state()):  # one that is made or seeded in the call is no state
            self.moved.append(generator)


# --- attributes --------------------------------------------------------------------------------------------------------

Place = tuple[str, str]  # a submodule's path and its attribute

_OURS = frozenset(nn.Module().__dict__)  # torch's own attributes of a module
_LISTS = frozenset({"_flat_weights", "_flat_weight_refs"})  # second lists of a recurrent layer's weights
_SIMPLE = (type(None), bool, int, str, bytes, complex, torch.dtype, torch.device, torch.Size, range, slice)
_DEPTH, _ENTRIES, _LOOKS = 4, 1000, 20_000


class Attributes:
    """The plain attributes of all submodules at one moment: numbers and structures in a form to compare, and their tensors.

    Included are non-persistent buffers whose names are not in `state`, which are caches. Excluded are tensors in the memory `own`.
    """

    def __init__(self, modules: Mapping[str, nn.Module], state: set[str], own: set[int | None]) -> None:
        self.values: dict[Place, Any] = {}
        self.numbers: dict[Place, Any] = {}
        self.tensors: dict[tuple[Any, ...], Tensor] = {}
        self._own, self._seen = own, {}
        for path, module in modules.items():
            caching = {f"{path}.{k}".lstrip(".") for k in module._non_persistent_buffers_set} - state
            lists = _LISTS if isinstance(module, nn.RNNBase) else frozenset()
            attributes = {k: v for k, v in module.__dict__.items() if k not in _OURS and k not in lists}
            caches = {
                k: v for k, v in module._buffers.items() if f"{path}.{k}".lstrip(".") in caching and (v is None or memory(v) not in own)
            }
            for name, value in (attributes | caches).items():
                self.values[path, name] = self._look(value, (path, name), 0)
                if isinstance(value, (bool, int, float, str)):
                    self.numbers[path, name] = value

    def _look(self, value: Any, place: tuple[Any, ...], depth: int) -> Any:
        if isinstance(value, Tensor):
            if memory(value) not in self._own:
                self.tensors[place] = value
            return "tensor"
        if isinstance(value, float):
            return f"{value:.5g}"
        if isinstance(value, _SIMPLE):
            return value
        if id(value) in self._seen:
            return self._seen[id(value)]
        self._seen[id(value)] = type(value).__name__
        self._seen[id(value)] = found = self._look_into(value, place, depth)
        return found

    def _look_into(self, value: Any, place: tuple[Any, ...], depth: int) -> Any:
        kind = type(value).__name__
        if isinstance(value, np.ndarray):
            return kind, value.shape, hash(value.tobytes()) if value.dtype != object else 0
        if isinstance(value, np.generic):
            return kind, repr(value)
        if isinstance(value, torch.Generator):
            return kind, hash(value.get_state().numpy().tobytes())
        if isinstance(value, random.Random):
            return kind, hash(value.getstate())
        if isinstance(value, (np.random.Generator, np.random.RandomState)):
            bits = value.bit_generator if isinstance(value, np.random.Generator) else value._bit_generator  # pyright: ignore[reportAttributeAccessIssue]
            return kind, repr(bits.state)
        if isinstance(value, nn.Module):
            for name, tensor in [*value.named_parameters(), *value.named_buffers()]:
                self._look(tensor, (*place, name), depth)
            return kind, id(value)
        if isinstance(value, type) or callable(value) or depth == _DEPTH or len(self._seen) > _LOOKS:
            return kind, id(value)
        if isinstance(value, Mapping):
            entries = list(value.items())[:_ENTRIES]
            return kind, len(value), [(str(k), self._look(v, (*place, str(k)), depth + 1)) for k, v in entries]
        if isinstance(value, (set, frozenset)):
            return kind, len(value), sorted(map(repr, value))[:_ENTRIES] if all(isinstance(v, _SIMPLE) for v in value) else None
        if isinstance(value, (list, tuple, deque)):
            return kind, len(value), [self._look(v, (*place, i), depth + 1) for i, v in enumerate(list(value)[:_ENTRIES])]
        if hasattr(value, "__dict__"):
            return kind, id(value), [(k, self._look(v, (*place, k), depth + 1)) for k, v in list(vars(value).items())[:_ENTRIES]]
        return kind, id(value)

    def changed(self, later: Attributes) -> set[Place]:
        """The attributes of which a number or the structure differs later."""
        return {place for place in self.values.keys() | later.values.keys() if self.values.get(place) != later.values.get(place)}

    def carried(self, later: Attributes, seen: Operations) -> set[Place]:
        """The attributes with a tensor that the call between read, and replaced or wrote to: its results depend on earlier calls."""
        return {
            (place[0], place[1])
            for place, tensor in self.tensors.items()
            if memory(tensor) in seen.read and (later.tensors.get(place) is not tensor or memory(tensor) in seen.written)
        }


# --- the loss's graph ---------------------------------------------------------------------------------------------------


def leaves(loss: Tensor) -> Iterator[Tensor]:
    """The tensors to which the loss has gradients."""
    if loss.grad_fn is None:
        yield loss
    yield from (node.variable for node in _nodes(loss) if hasattr(node, "variable"))


def reentrant(loss: Tensor) -> bool:
    """Whether the graph has a backward within the backward: `torch.utils.checkpoint(..., use_reentrant=True)`."""
    return any(node.name() == "CheckpointFunctionBackward" for node in _nodes(loss))


def _nodes(loss: Tensor) -> Iterator[Any]:
    nodes: list[Any] = [] if loss.grad_fn is None else [loss.grad_fn]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        yield node
        for after, _ in node.next_functions:
            if after is not None and after not in seen:
                seen.add(after)
                nodes.append(after)


def versions(tensors: Sequence[Tensor]) -> list[int] | None:
    """The tensors' counts of writes; None for tensors of inference mode, which do not count."""
    try:
        return list(map(_version, tensors))
    except RuntimeError:
        return None


_version = operator.attrgetter("_version")


def described(parameter: Tensor) -> str:
    """A parameter's name in the largest module that has it."""
    best: tuple[int, str] = (0, f"a tensor of shape {tuple(parameter.shape)}")
    for module in [o for o in gc.get_objects() if issubclass(type(o), nn.Module) and "_parameters" in o.__dict__]:
        named = dict(module.named_parameters())
        name = next((name for name, p in named.items() if p is parameter), None)
        if name is not None and len(named) > best[0]:
            best = len(named), f"{name!r} of {type(module).__name__}"
    return best[1]


# --- the first calls ----------------------------------------------------------------------------------------------------


_written: weakref.WeakKeyDictionary[nn.Module, set[str]] = weakref.WeakKeyDictionary()


class FirstCalls:
    """The first `left` calls of a functional module, each watched. Side effects are compensated (`written`, `keys`), refused, or warned of.

    - `originals`: the module's own tensors by name; the first `params` of them are parameters.
    - `slots`: the container, key and index of each tensor that a call puts into the module.
    """

    def __init__(
        self, whose: str, model: nn.Module, originals: Mapping[str, Tensor], params: int, slots: Sequence[tuple[Any, str, int]], left: int
    ) -> None:
        self.whose, self.model, self.remaining = whose, model, left
        self.originals, self.params, self.slots = originals, params, slots
        #: The parameters that calls write to, shared by all steps of the model: calls get copies, which become the new values.
        self.written: set[str] = _written.setdefault(model, set()) if left else set()
        #: Attributes that describe a module's cache, with their values before there was a cache.
        self.keys: list[tuple[dict[str, Any], str, Any]] = []
        #: The forward uses `torch.utils.checkpoint(..., use_reentrant=True)`: a backward within the backward computes some gradients.
        self.reentrant = False
        self._judged: set[Place] = set()
        self._named: set[int] = set()  # foreign parameters and generators that were warned of
        self._seen: Operations | None = None

    @property
    def watching(self) -> bool:
        """Whether a call is being watched."""
        return self._seen is not None

    def run(self, run: Callable[..., Any], fn: Callable[[], Any], tensors: list[Tensor], train: bool) -> Any:
        """`run(fn, tensors, train)`: the result, the buffers, and copies of the parameters that `fn` wrote to, which are restored."""
        params, buffers = tensors[: self.params], tensors[self.params :]
        names, places, aliases = list(self.originals), list(map(memory, params)), [p.detach() for p in params]
        new: dict[str, Tensor] = {}
        carried: set[Place] = set()

        @undisturbed
        def undo() -> None:
            for tensor, alias, place in zip(params, aliases, places, strict=True):
                if memory(tensor) != place:  # by `weight.data = ...`
                    tensor.data = alias
            seen.undo()

        def watched() -> Any:
            modules, placed = dict(self.model.named_modules()), set(map(memory, tensors))
            fresh, drawn = [b.clone() for b in buffers], _random()
            before = Attributes(modules, set(names), placed)
            result = fn()
            after = Attributes(modules, set(names), placed)
            self._check_slots(params)
            found = {i for i, (p, place) in enumerate(zip(params, places, strict=True)) if place in seen.written or memory(p) != place}
            new.update({names[i]: params[i].detach().clone() for i in found})
            changed = before.changed(after) - self._judged
            carried.update(before.carried(after, seen) - self._judged)
            if changed:  # a cache, or a dependence on earlier calls? The same call again shows it
                undo()
                again = _Again(self.model, set(names), self.slots, [*params, *fresh], drawn, after)
                carried.update(again.carried(fn, result, changed, may_differ=bool(seen.moved)) - self._judged)
                self._keep_keys(modules, before, after, changed - carried)
            self._judged |= changed | carried
            self.written.update(new)
            return result

        seen = self._seen = Operations(params)
        try:
            try:
                with seen:
                    result, after, written = run(watched, tensors, train)
            finally:
                undo()
        except KeyboardInterrupt:  # outside of a program it may have come in the middle of that
            undo()
            raise
        finally:
            self._seen = None
            self.written.update(name for name, place in zip(names, places, strict=False) if place in seen.written)
        self._check_originals(seen, {**dict(zip(names, tensors, strict=True)), **after}, set(map(memory, tensors)))
        self._warn(carried, seen.moved)
        self.remaining -= 1  # a call that raised does not count
        return result, after, {**written, **new}

    def check_graph(self, loss: Tensor, trained: Sequence[Tensor], batch: Any) -> None:
        """Warn of tensors outside the model that the loss has a gradient to; find out whether the graph is reentrant."""
        assert self._seen is not None
        self.reentrant |= reentrant(loss)
        passed = {memory(t) for t in [*optree.tree_leaves(batch), *self.originals.values()] if isinstance(t, Tensor)}  # pyright: ignore[reportArgumentType]
        known, internal = {*map(id, trained), *self._named}, self._seen.made | passed
        strange = [t for t in leaves(loss) if id(t) not in known and memory(t) not in internal]
        if strange:
            self._named.update(map(id, strange))
            names = ", ".join(map(described, strange[:5])) + ", ..." * (len(strange) > 5)
            warnings.warn(
                f"{self.whose}: the loss has a gradient to {names}, no part of {type(self.model).__name__}, so it is not trained. Make "
                "its module a submodule of the model before the state and the step are made; or, if it is to stay as it is, call "
                "requires_grad_(False) on it",
                stacklevel=2,
            )

    def _check_slots(self, params: list[Tensor]) -> None:
        names = list(self.originals)
        replaced = [names[i] for container, key, i in self.slots if i < self.params and container.get(key) is not params[i]]
        if replaced:
            raise RuntimeError(
                f"{self.whose}: the call put another parameter in the place of {replaced}, which no state would hold: write the new value "
                "into it, under torch.no_grad(), with copy_()"
            )

    def _check_originals(self, seen: Operations, now: Mapping[str, Tensor], given: set[int | None]) -> None:
        """Raise RuntimeError where the call used one of the module's own tensors in place of the state's."""
        touched = (seen.read | seen.written) - given - {None}
        stale = [name for name, t in self.originals.items() if memory(t) in touched and (t.requires_grad or not _equal(t, now[name]))]
        if stale:
            raise RuntimeError(
                f"{self.whose}: the call uses the module's own {', '.join(map(repr, stale))} and not the state's: a tensor that was taken "
                "from the module before (a list of parameters, an attribute or a closure that holds one) has its first value for ever, and "
                "no gradient reaches it. Take it from the module at each call, by its name: `model.get_parameter(name)`, "
                "`model.parameters()` of the model that the loss is given"
            )

    def _keep_keys(self, modules: Mapping[str, nn.Module], before: Attributes, after: Attributes, harmless: set[Place]) -> None:
        caching = {path for path, name in harmless if after.values.get((path, name)) == "tensor"}
        self.keys += [
            (modules[path].__dict__, name, before.numbers[path, name])
            for path, name in harmless
            if path in caching and (path, name) in before.numbers
        ]

    def _warn(self, carried: set[Place], moved: list[torch.Generator]) -> None:
        names = sorted(f"{path}.{name}".lstrip(".") for path, name in carried)
        if names:
            warnings.warn(
                f"{self.whose}: calls change {', '.join(map(repr, names))} of the module, on which later calls depend, and no state holds "
                "it: two calls with the same state differ or lose it, and a resumed run begins without it. Make it a buffer "
                "(register_buffer; a number as a 0-dim tensor), or a field of the state or batch",
                stacklevel=2,
            )
        moved = [generator for generator in moved if generator._cdata not in self._named]  # pyright: ignore[reportAttributeAccessIssue]
        if moved:
            self._named.update(generator._cdata for generator in moved)  # pyright: ignore[reportAttributeAccessIssue]
            kinds = ", ".join(str(generator.device) for generator in moved)
            warnings.warn(
                f"{self.whose} draws from a torch.Generator of its own ({kinds}), which is not keyed by the state: two calls differ and a "
                "resumed run is another run. Leave generator= out: within a step torch's own generators are keyed; or seed it in each call",
                stacklevel=2,
            )


class _Again:
    """The same call once more, from the contents that the first one left in the module; everything is restored afterwards."""

    def __init__(
        self, model: nn.Module, state: set[str], slots: Sequence[tuple[Any, str, int]], tensors: list[Tensor], drawn: Any, first: Attributes
    ) -> None:
        self.modules, self.slots, self.tensors = dict(model.named_modules()), slots, tensors
        self.state, self.drawn, self.first = state, drawn, first

    def carried(self, fn: Callable[[], Any], result: Any, changed: set[Place], *, may_differ: bool) -> set[Place]:
        """The attributes that a call depends on and changes; all of `changed` where the result differs."""
        own = set(map(memory, self.tensors))
        seen = Operations([*self.tensors, *self.first.tensors.values()])
        contents, after = Contents(self.modules.values()), _random()

        @undisturbed
        def put_back() -> None:
            seen.undo()
            contents.put_back()
            _set_random(after)

        try:
            _set_random(self.drawn)
            for container, key, i in self.slots:
                container[key] = self.tensors[i]
            with collect(), warnings.catch_warnings(action="ignore"), seen:
                second = fn()
            later = Attributes(self.modules, self.state, own)
        except Exception:  # the first call did not raise, so the step goes on
            return set()
        finally:
            put_back()
        found = self.first.carried(later, seen) | self.first.changed(later)
        return found if may_differ or seen.moved or found or _same(result, second) else changed


class Contents:
    """The contents of objects at one moment, recursively: attributes (also a module's parameters, buffers and mode), entries of containers.

    Submodules are included only where they are among `objects`.

    With a list `tensors`, tensors outside of modules are moved there, each once, and not kept alive; `put_back` takes their replacements.
    """

    def __init__(self, objects: Iterable[Any], tensors: list[Tensor] | None = None) -> None:
        self._held: list[tuple[Any, Any]] = []  # (dictionary of attributes or container, its entries)
        self._looked: set[int] = set()
        own = self._of_modules = []
        self.objects = tuple(objects)
        for each in self.objects:
            self._look(each, 0)
        self._held += own
        if tensors is not None:
            places: dict[int, _Place] = {}

            def place(tensor: Tensor) -> _Place:
                if id(tensor) not in places:
                    places[id(tensor)] = _Place(len(tensors))
                    tensors.append(tensor)
                return places[id(tensor)]

            kept = {id(holder) for holder, _ in own}
            self._held = [(holder, entries if id(holder) in kept else _mapped(entries, place)) for holder, entries in self._held]
            self.objects = _mapped(self.objects, place)
        del self._of_modules, self._looked

    @undisturbed
    def put_back(self, tensors: Sequence[Tensor] | None = None) -> Any:
        """Restore the contents, with `tensors` in place of those that were moved; returns the objects."""
        if tensors is None:
            for holder, entries in self._held:
                _refill(holder, entries)
            return self.objects

        def given(place: Any) -> Any:
            return tensors[place.index] if isinstance(place, _Place) else place

        for holder, entries in self._held:
            _refill(holder, _mapped(entries, given))
        return _mapped(self.objects, given)

    def now(self) -> Contents:
        """The contents of the same objects now."""
        found = Contents(())
        found._held = [(holder, _entries(holder)) for holder, _ in self._held]
        return found

    def _look(self, value: Any, depth: int) -> None:
        if type(value) in _ATOMS or isinstance(value, (Tensor, type)) or id(value) in self._looked:
            return
        if depth == _NESTED or len(self._looked) > _LOOKS:
            return
        self._looked.add(id(value))
        within: Any = ()
        if isinstance(value, nn.Module):
            held = value.__dict__
            self._of_modules += [(each, dict(each)) for each in (held, held["_parameters"], held["_buffers"], held["_modules"])]
            within = [v for k, v in held.items() if k not in _OURS and type(v) not in _ATOMS]
        elif isinstance(value, (tuple, frozenset)):
            within = value
        else:
            if isinstance(value, _CONTAINERS):
                entries = _entries(value)
                self._held.append((value, entries))
                within = [*(entries.values() if isinstance(entries, dict) else entries)][:_ENTRIES]
            for holder in _attributes(value):
                entries = _entries(holder)
                self._held.append((holder, entries))
                within = [*within, *entries.values()]
        for each in within:
            self._look(each, depth + 1)


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class _Place:
    """Stands for a tensor that was moved to the list `tensors`."""

    index: int


class _Slots:
    """The attributes of an object in its `__slots__`."""

    def __init__(self, value: Any, members: dict[str, Any]) -> None:
        self.value, self.members = value, members

    def entries(self) -> dict[str, Any]:
        return {name: member.__get__(self.value) for name, member in self.members.items() if _is_set(self.value, member)}

    def refill(self, entries: Mapping[str, Any]) -> None:
        for name, member in self.members.items():
            if name in entries:
                member.__set__(self.value, entries[name])
            elif _is_set(self.value, member):
                member.__delete__(self.value)


def _is_set(value: Any, member: Any) -> bool:
    try:
        member.__get__(value)
    except AttributeError:
        return False
    return True


def _attributes(value: Any) -> Iterator[Any]:
    """An object's `__dict__` and `__slots__`, if it has them."""
    attributes = getattr(value, "__dict__", None)
    if type(attributes) is dict:
        yield attributes
    members = {
        f"{cls.__qualname__}.{name}": member
        for cls in type(value).__mro__
        if "__slots__" in cls.__dict__
        for name, member in cls.__dict__.items()
        if type(member) is MemberDescriptorType
    }
    if members:
        yield _Slots(value, members)


def _entries(holder: Any) -> Any:
    if type(holder) is dict:
        return holder.copy()
    if isinstance(holder, _Slots):
        return holder.entries()
    if isinstance(holder, dict):
        return dict(_base(holder).items(holder))
    return list(_base(holder).__iter__(holder))


def _refill(holder: Any, entries: Any) -> None:
    if isinstance(holder, _Slots):
        holder.refill(entries)
    elif type(holder) is dict:
        holder.update(entries)
        for key in holder.keys() - entries.keys() if len(holder) > len(entries) else ():
            del holder[key]
    else:
        base = _base(holder)  # a subclass may override its methods
        base.clear(holder)
        if base in (dict, OrderedDict):
            for key, value in entries.items():
                base.__setitem__(holder, key, value)
        else:
            (base.update if base is set else base.extend)(holder, entries)


def _base(holder: Any) -> Any:
    return next(base for base in _CONTAINERS if isinstance(holder, base))


def _mapped(value: Any, fn: Callable[[Any], Any]) -> Any:
    """`value` with `fn` applied to the tensors, or places, in it: entries of a container, and of tuples in it."""
    if isinstance(value, dict):
        return {key: _mapped_within(each, fn) for key, each in value.items()}
    if isinstance(value, list):
        return [_mapped_within(each, fn) for each in value]
    return _mapped_within(value, fn)


def _mapped_within(value: Any, fn: Callable[[Any], Any]) -> Any:
    if isinstance(value, (Tensor, _Place)):
        return fn(value)
    if not isinstance(value, tuple):
        return value
    entries = [_mapped_within(each, fn) for each in value]
    if all(a is b for a, b in zip(entries, value, strict=True)):
        return value
    return type(value)(*entries) if hasattr(value, "_fields") else type(value)(entries)


#: The more special class first.
_CONTAINERS = (OrderedDict, dict, list, deque, set)
_ATOMS = frozenset({*_SIMPLE, float, FunctionType, MethodType, BuiltinFunctionType, ModuleType, np.ndarray, torch.Generator})
_NESTED = 10


def _random() -> Any:
    return [g.get_state() for g in ambient()], save_hosts()


def _set_random(states: Any) -> None:
    for generator, state in zip(ambient(), states[0], strict=False):
        generator.set_state(state)
    restore_hosts(states[1])


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


def _same(a: Any, b: Any) -> bool:
    """Whether two results of a call are the same up to rounding, which may differ from call to call."""
    ours, theirs = ([leaf.detach() for leaf in optree.tree_leaves(each) if isinstance(leaf, Tensor)] for each in (a, b))
    if [x.shape for x in ours] != [x.shape for x in theirs]:
        return False
    try:
        return all(torch.allclose(x.double(), y.double(), rtol=1e-3, atol=1e-6, equal_nan=True) for x, y in zip(ours, theirs, strict=True))
    except (RuntimeError, TypeError, NotImplementedError):  # a kind that cannot be compared
        return True
