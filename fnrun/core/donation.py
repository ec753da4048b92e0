"""Donation: a loop that owns the state it works on writes the next one over it.

A step that keeps what came in must write into new memory. A loop with `donate=True` lets kernels write over the old parameters and moments
instead. Its `Owner` says which tensors these are: only those that an update of its own made, as long as the state carries them on unchanged
and nothing else in the state shares their memory. So the first update of a program always copies, and what the caller, a wrapper or a
hook's memory holds is never written to. The states that the program made of them are dead from then on.

An owner has three verbs: it accepts a state as its own, makes tensors writable for a kernel, and shares a value with who will keep it. The
loop hands it to the step, and the step for the length of its update to the kernels (`writable`).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import operator
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from fnrun.core import tree
from fnrun.core.undisturbed import undisturbed
from fnrun.core.words import kind

T = TypeVar("T")

#: What donation writes over; other fields of a dead state's last moment are still readable by the observers that fold over its tick.
DONATED = ("params", "opt_state")


class DonatedStateError(RuntimeError):
    """A state was used after a loop with `donate=True` had written the next one over it."""


#: What is meant by attributes that a state has not.
_INSTEAD = {
    "cuda cpu": "a state is immutable: state.to(device) is another one, on that device",
    "half float double bfloat16 type": "a state of another dtype is that of another model: TrainState.create(model.to(dtype), optimizer)",
    "state_dict named_parameters parameters": "its tensors are in state.params and state.buffers, dictionaries by name; "
    "state.load_into(model) writes them into a module",
    "load_state_dict": "fnrun.checkpoint.load_from(path, state) and state.replace(params=...) give another state",
    "train eval model module forward": "it holds tensors and no module: state.load_into(model) gives a module its weights, steps have the "
    "model, and fnrun.call(model, state.params, state.buffers, ...) calls it",
    "optimizer lr": "what the optimizer remembers is in state.opt_state; fnrun.optim.hyperparams(state.opt_state) reads numbers of it",
    "epoch epochs batch": "where each stream of data stands is in state.position.streams[name].epoch",
    "steps global_step": "it is state.step",
    "seed key": "its randomness is state.rng",
}


class Donatable:
    """The base of states that may be donated: its fields are gone when it is dead."""

    __slots__ = ("__weakref__", "_deleted_reason", "_donor", "_owner")

    _deleted_reason: str | tuple[int, str]
    _owner: Owner

    def __new__(cls, *args: Any, **options: Any) -> Self:  # and not `__post_init__`, which a subclass may have for itself
        self = object.__new__(cls)
        for owner in _owners.get():
            owner.enlist(self)
        return self

    def __getattr__(self, name: str) -> Any:
        if name not in fields(type(self)):
            hint = next((hint for names, hint in _INSTEAD.items() if name in names.split()), f"it has {', '.join(fields(type(self)))}")
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}: {hint}", name=name, obj=self)
        raise DonatedStateError(
            f"state.{name}: {deleted_reason(self)}. Use the state that came out of it; in a hook or an observer that keeps states, keep "
            "fnrun.snapshot(state); after an exception, restore the last checkpoint"
        )

    def __repr__(self) -> str:
        """In one line, whatever its leaves are."""
        if (by := deleted_reason(self)) is not None:
            return f"{type(self).__name__}({by})"
        return f"{type(self).__name__}({', '.join(f'{name}={_brief(getattr(self, name))}' for name in fields(type(self)))})"

    def donate(self) -> Self:
        """This state, to be written over: `fit(state.donate(), data)` spares the copy that a loop with `donate=True` begins with.

        What is returned is for the next call of a loop and holds the same tensors; this object is dead at once. What somebody else holds
        too, another state with the same parameters, is not written over.
        """
        kept = contents(self)
        _mark_deleted(self, "this state was given away by state.donate()")
        given = type(self)(**kept)
        del kept  # which holds all of it too
        object.__setattr__(given, "_owner", Owner.of(given))
        return given


def _brief(value: Any) -> str:
    """A field of a state in few words."""
    leaves = tree.leaves(value)
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    if hasattr(value, "brief"):
        return f"<{value.brief()}>"
    if isinstance(value, torch.Tensor):
        return f"<{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')} on {value.device}>"
    if value is None or (len(leaves) == 1 and leaves[0] is value):
        text = kind(value)
        return text if len(text) < 60 else f"{text[:57]}..."
    if isinstance(value, dict) and value and all(isinstance(each, (dict, list, tuple)) for each in value.values()):
        return f"<{', '.join(map(str, value))}>"
    if not isinstance(value, (dict, list, tuple)) and len(leaves) < 2:
        text = repr(value)
        return text if len(text) < 60 else type(value).__name__
    name = "" if isinstance(value, (dict, list, tuple)) else f"{type(value).__name__} of "
    if not tensors:
        return f"<{name}{f'{len(leaves)} leaves' if leaves else 'nothing'}>"
    kinds = sorted({f"{str(t.dtype).removeprefix('torch.')} on {t.device}" for t in tensors})
    size = sum(t.numel() for t in tensors)
    return f"<{name}{len(tensors)} tensor{'s' * (len(tensors) > 1)}, {size:,} elements, {', '.join(kinds)}>"


@functools.cache
def fields(cls: Any) -> tuple[str, ...]:
    """The names of a dataclass's fields."""
    return tuple(field.name for field in dataclasses.fields(cls))


@functools.cache
def _values(cls: Any) -> Any:
    return operator.attrgetter(*fields(cls))


def contents(state: Any) -> dict[str, Any]:
    """A state's fields by name."""
    return dict(zip(fields(type(state)), _values(type(state))(state), strict=True))


def deleted_reason(state: Any) -> str | None:
    """What became of a dead state, None for one that is alive (or was never donatable)."""
    try:
        why = object.__getattribute__(state, "_deleted_reason")
    except AttributeError:
        return None
    return why if isinstance(why, str) else "this state was donated: step {} ({}) wrote the next one over it".format(*why)


def _mark_deleted(state: Any, why: str | tuple[int, str]) -> None:
    """Take a state's fields away: touching one says why, or which step it was, by number and name."""
    delete = object.__delattr__
    for name in fields(type(state)):
        try:  # noqa: SIM105 -- at a third of the time
            delete(state, name)
        except AttributeError:  # gone already
            pass
    object.__setattr__(state, "_deleted_reason", why)


def without_donated(state: Any) -> Any:
    """A state as it will be readable after it was donated: without parameters and optimizer state."""
    if not isinstance(state, Donatable):
        return state
    kept = object.__new__(type(state))  # no owner knows it
    for name in fields(type(state)):
        if name not in DONATED:
            object.__setattr__(kept, name, getattr(state, name))
    object.__setattr__(kept, "_deleted_reason", "an observer that folds sees the state before the tick without what the tick wrote over")
    return kept


def owner_of(state: Any) -> Owner | None:
    """The owner of a state that was given away with `donate`; None for others."""
    try:
        return object.__getattribute__(state, "_owner")
    except AttributeError:
        return None


# --- the owner ----------------------------------------------------------------------------------------------------------


class Owner:
    """Who may write over which tensors, for one call of a loop; within `with owner:` states that carry them are noted."""

    def __init__(self) -> None:
        self._params: Any = None  # as accepted: the same objects, or somebody has put other tensors in
        self._opt_state: Any = None
        self._apart: tuple[Any, ...] = ()  # what else is in the state that was accepted: none of it shares the memory
        self._tensors: dict[int, Tensor] = {}
        self._memory: frozenset[int] = frozenset()  # where they lie
        self._states: list[weakref.ref[Any]] = []
        self._owning = self._copied = False  # of the update under way: whether it may write over the state, and whether it needed copies
        self._given: list[Tensor] = []
        self._ref, self._works = weakref.ref(self), False

    @classmethod
    def of(cls, state: Any) -> Owner:
        """The owner of a state that is given away: of its tensors, but for those that others hold and those that share memory."""
        owner = cls()
        times = Counter(map(storage, tensors_of(contents(state))))
        owner._given, owner._copied = [t for t in _held_here([state.params, state.opt_state]) if times[storage(t)] == 1], True
        owner.accept(state)
        owner.enlist(state)
        return owner

    @undisturbed
    def __enter__(self) -> Owner:
        self._token, self._works = _owners.set((*_owners.get(), self)), True
        return self

    @undisturbed
    def __exit__(self, *exc: object) -> None:
        _owners.reset(self._token)
        self._works = False

    def enlist(self, state: Any) -> None:
        """Note a state: if it carries the tensors, it dies when they are written over."""
        object.__setattr__(state, "_donor", self._ref)
        self._states.append(weakref.ref(state))
        if len(self._states) > 64:
            self._states = [ref for ref in self._states if ref() is not None]

    def accept(self, state: Any) -> None:
        """Own the state that an update made, with the tensors that the update was given. Nothing else in it shares their memory."""
        self._params, self._opt_state, self._apart = state.params, state.opt_state, _rest(type(state))(state)
        if self._copied:
            self._tensors = {id(t): t for t in self._given}
            self._memory = frozenset(map(storage, self._given))

    def share(self, value: Any) -> Any:
        """`value` with copies of the tensors in it that lie in this owner's memory, one of each: for who keeps it."""
        if isinstance(value, Tensor):
            return value.clone() if storage(value) in self._memory else value
        if type(value) is dict and _PLAIN.issuperset(map(type, value.values())):  # what metrics and buffers are: no look at a tree
            if self._memory.isdisjoint(map(storage, value.values())):
                return value
        elif self._memory.isdisjoint(map(storage, tensors_of(value))):
            return value
        made: dict[int, Tensor] = {}

        def own(leaf: Any) -> Any:
            if isinstance(leaf, Tensor) and id(leaf) not in made:
                made[id(leaf)] = self.share(leaf)
            return made.get(id(leaf), leaf)

        return tree.map(own, value)

    def update(self, by: tuple[int, str], state: Any, kernels: Callable[[], T]) -> T:
        """`kernels()`, which are handed this owner.

        Where they may write over `state`, whoever carries its tensors is dead before they begin. `by` holds the number of the step and its
        name.
        """
        self._owning, self._copied, self._given = self._owns(state), False, []
        if self._owning:
            states, self._states = self._states, []
            for ref in states:
                if (each := ref()) is not None and self._carries(each):
                    _mark_deleted(each, by)
        else:
            self._tensors, self._memory, self._states = {}, frozenset(), []
        token = _writes.set(self)
        try:
            return kernels()
        finally:
            _writes.reset(token)

    def _owns(self, state: Any) -> bool:
        """Whether it is the state that was accepted, and what was put into it since shares no memory with what would be written over.

        The position is not looked into: it holds what loops fold, and metrics are made to share nothing.
        """
        if state.params is not self._params or state.opt_state is not self._opt_state:
            return False
        rest = _rest(type(state))(state)
        if all(map(operator.is_, rest, self._apart)):
            return True
        pairs = itertools.zip_longest(rest, self._apart)
        changed = [now for now, before in pairs if now is not before and not isinstance(now, (int, str))]
        return not changed or self._memory.isdisjoint(map(storage, tensors_of(changed)))

    def _carries(self, state: Any) -> bool:
        try:
            if state.params is self._params or state.opt_state is self._opt_state:
                return True
        except DonatedStateError:  # dead already
            return False
        return not self._memory.isdisjoint(map(storage, tensors_of([state.params, state.opt_state])))

    def writable(self, tensors: list[Tensor]) -> list[Tensor]:
        """Tensors for a kernel to write over: this owner's as they are, copies of all others, which will be its own."""
        owned = self._tensors
        if not self._owning:
            tensors, self._copied = copies(tensors), True
        elif not all(map(owned.__contains__, map(id, tensors))):
            tensors, self._copied = [t if id(t) in owned else t.clone() for t in tensors], True
        self._given += tensors
        return tensors


def _held_here(parts: list[Any]) -> Iterator[Tensor]:
    """The tensors that nothing holds but these parts, which their own containers hold."""
    for part in parts:
        if sys.getrefcount(part) > 4:  # held by its container, by the list, by the loop and by the question
            continue
        if isinstance(part, Tensor):
            yield part
        elif isinstance(part, dict):
            yield from _held_here(list(part.values()))
        elif isinstance(part, (tuple, list)):
            yield from _held_here(list(part))
        elif dataclasses.is_dataclass(part):
            yield from _held_here([getattr(part, name) for name in fields(type(part))])


@functools.cache
def _rest(cls: Any) -> Callable[[Any], tuple[Any, ...]]:
    """What gets the fields of a state that are not written over."""
    return operator.attrgetter(*(name for name in fields(cls) if name not in DONATED and name != "position"))


_PLAIN = frozenset({Tensor})


#: Of the programs at work here: several where a hook runs one.
_owners: ContextVar[tuple[Owner, ...]] = ContextVar("owners", default=())
#: Of the update under way.
_writes: ContextVar[Owner | None] = ContextVar("writes", default=None)


def writable(tensors: list[Tensor]) -> list[Tensor]:
    """Tensors to write over: copies, or these themselves where they are donated. Every kernel that works in place gets its tensors here."""
    owner = _writes.get()
    if not tensors:
        return tensors
    return copies(tensors) if owner is None else owner.writable(tensors)


def copies(tensors: list[Tensor]) -> list[Tensor]:
    return list(torch._foreach_clone(tensors))  # pyright: ignore[reportPrivateImportUsage]


class keeping:
    """`with keeping():` no update writes over what comes in, whatever encloses it: for who needs the old values afterwards."""

    __slots__ = ("_token",)

    @undisturbed
    def __enter__(self) -> None:
        self._token = _writes.set(None)

    @undisturbed
    def __exit__(self, *exc: object) -> None:
        _writes.reset(self._token)


def check_thread(state: Any) -> None:
    """Raise DonatedStateError where a loop in another thread is going to write over `state`: nobody here knows when."""
    try:
        owner = object.__getattribute__(state, "_donor")()
    except AttributeError:
        return
    if owner is not None and owner._works and owner not in _owners.get():
        raise DonatedStateError(
            "a loop with donate=True in another thread writes over this state while it is read here: take fnrun.snapshot(state) in the "
            "hook or the observer itself, and hand that over"
        )


def shared(value: Any) -> Any:
    """`value` with copies of the tensors that a loop at work is going to write over: what may be kept, or read by another thread."""
    for owner in _owners.get():
        value = owner.share(value)
    return value


def tensors_of(value: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree.leaves(value) if isinstance(leaf, Tensor))


def storage(tensor: Tensor) -> int:
    """Where a tensor's memory begins: the same for all views of it. Empty ones share nothing."""
    return tensor.untyped_storage().data_ptr() or -id(tensor)
