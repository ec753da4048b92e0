"""Donation: a loop that owns the state it works on writes the next one over it.

A step that keeps what came in must write into new memory. A loop with `donate=True` lets fused kernels write over the old parameters and
moments instead, with a `Lease` that says which tensors these are: only those that an update under this lease made itself, as long as
the state carries them on unchanged and nothing else in the state shares their memory. So the first update of a program always copies, and
what the caller, a wrapper or a hook's memory holds is never written to. The states that the program made of them are dead from then on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, Self

import torch

from fnrun import tree
from fnrun.undisturbed import undisturbed
from fnrun.words import kind

#: What donation writes over; other fields of a dead state's last moment are still readable by the observers that fold over its tick.
DONATED = ("params", "opt_state")


class DonatedStateError(RuntimeError):
    """A state was used after a loop with `donate=True` had written the next one over it."""


#: What is meant by attributes that a state has not.
_INSTEAD = {
    "to cuda cpu half float double bfloat16 type": "a state is immutable. Create it of a model that is there already: "
    "TrainState.create(model.to(device), optimizer). To move this one, fnrun.tree.map(lambda leaf: leaf.to(device) "
    "if isinstance(leaf, torch.Tensor) else leaf, state)",
    "state_dict named_parameters parameters weights": "its tensors are in state.params and state.buffers, dictionaries by name",
    "load_state_dict": "fnrun.checkpoint.load_from(path, state) and state.replace(params=...) give another state",
    "train eval model module forward": "it holds tensors and no module: steps have the model, and fnrun.call(model, state.params, state.buffers, ...) calls it",
    "optimizer lr": "what the optimizer remembers is in state.opt_state; fnrun.optim.hyperparams(state.opt_state) reads numbers of it",
    "epoch epochs batch": "where each stream of data stands is in state.position.streams[name].epoch",
    "steps global_step": "it is state.step",
    "seed key": "its randomness is state.rng",
}


class Donatable:
    """The base of states that may be donated: its fields are gone when it is dead."""

    __slots__ = ("__weakref__", "_fate", "_lease")

    _fate: str
    _lease: Lease | None

    def __new__(cls, *args: Any, **options: Any) -> Self:  # and not `__post_init__`, which a subclass may have for itself
        self = object.__new__(cls)
        for lease in _active:
            lease.enlist(self)
        return self

    def __getattr__(self, name: str) -> Any:
        if name not in fields(type(self)):
            hint = next((hint for names, hint in _INSTEAD.items() if name in names.split()), f"it has {', '.join(fields(type(self)))}")
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}: {hint}", name=name, obj=self)
        raise DonatedStateError(
            f"state.{name}: {fate(self)}. Use the state that came out of it; in a hook or an observer that keeps states, keep "
            "fnrun.snapshot(state); after an exception, restore the last checkpoint"
        )

    def __repr__(self) -> str:
        """In one line, whatever its leaves are."""
        if (by := fate(self)) is not None:
            return f"{type(self).__name__}({by})"
        return f"{type(self).__name__}({', '.join(f'{name}={_brief(getattr(self, name))}' for name in fields(type(self)))})"

    def donate(self) -> Self:
        """This state, to be written over: `fit(state.donate(), data)` spares the copy that a loop with `donate=True` begins with.

        What is returned is for the next call of a loop and holds the same tensors; this object is dead at once.
        """
        given = type(self)(**{name: getattr(self, name) for name in fields(type(self))})
        lease = Lease.of(given)
        lease.enlist(given)
        object.__setattr__(given, "_lease", lease)
        bury(self, "this state was given away by state.donate()")
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


def fate(state: Any) -> str | None:
    """What became of a dead state, None for one that is alive (or was never donatable)."""
    try:
        return object.__getattribute__(state, "_fate")
    except AttributeError:
        return None


def bury(state: Any, by: str) -> None:
    """Take a state's fields away: touching one says what `by`."""
    for name in fields(type(state)):
        with contextlib.suppress(AttributeError):  # gone already
            object.__delattr__(state, name)
    object.__setattr__(state, "_fate", by)


def husk(state: Any) -> Any:
    """A state as it will be readable after it was donated: without parameters and optimizer state."""
    if not isinstance(state, Donatable):
        return state
    kept = unlisted(state, without=DONATED)
    object.__setattr__(kept, "_fate", "an observer that folds sees the state before the tick without what the tick wrote over")
    return kept


def unlisted(state: Any, without: tuple[str, ...] = ()) -> Any:
    """The same state as another object, which outlives the donation of its tensors: for the step that gets them."""
    copy = object.__new__(type(state))
    for name in fields(type(state)):
        if name not in without:
            object.__setattr__(copy, name, getattr(state, name))
    return copy


def given_lease(state: Any) -> Lease | None:
    """The lease of a state that its owner gave away with `donate`; None for others."""
    try:
        return object.__getattribute__(state, "_lease")
    except AttributeError:
        return None


class Lease:
    """Which tensors the loops of one call may write over, and which states carry them."""

    def __init__(self) -> None:
        self.params: Any = None  # as the last update left them: the same objects, or somebody has put other tensors in
        self.opt_state: Any = None
        self._owned: dict[int, torch.Tensor] = {}
        self._granted = self._copied = False
        self._written: list[list[torch.Tensor]] = []
        self._storages: frozenset[int] | None = None
        self._seen: dict[str, Any] = {}  # what else was in the state when it was last found to share nothing
        self._states: list[weakref.ref[Any]] = []

    @classmethod
    def of(cls, state: Any) -> Lease:
        """The lease of a state that its owner gives away: all its tensors, but for those of which two are in the same memory."""
        lease = cls()
        lease.params, lease.opt_state = state.params, state.opt_state
        times = Counter(map(storage, _tensors([getattr(state, name) for name in fields(type(state))])))
        lease._owned = {id(t): t for t in _tensors([state.params, state.opt_state]) if times[storage(t)] == 1}
        lease._seen = {name: getattr(state, name) for name in fields(type(state))}
        return lease

    @undisturbed
    def __enter__(self) -> Lease:
        _active.append(self)
        return self

    @undisturbed
    def __exit__(self, *exc: object) -> None:
        _active.remove(self)

    def enlist(self, state: Any) -> None:
        """Note a state that is made while the lease lasts: if it carries the tensors, it dies when they are written over."""
        self._states.append(weakref.ref(state))
        if len(self._states) > 64:
            self._states = [ref for ref in self._states if ref() is not None]

    @property
    def storages(self) -> frozenset[int]:
        """The memory that the next update may write over."""
        if self._storages is None:
            self._storages = frozenset(map(storage, self._owned.values()))
        return self._storages

    def grants(self, state: Any) -> bool:
        """Whether the next update may write over the parameters and optimizer state of `state`."""
        self._granted = state.params is self.params and state.opt_state is self.opt_state and self._apart(state)
        if not self._granted:
            self._owned, self._storages, self._states = {}, None, []
        return self._granted

    def _apart(self, state: Any) -> bool:
        """Whether nothing else in the state shares memory with what would be written over.

        The position is not looked into: it holds what loops fold, and metrics are made to share nothing.
        """
        for name in fields(type(state)):
            if name in DONATED or name == "position":
                continue
            value = getattr(state, name)
            if value is not self._seen.get(name, self):
                if self.shares(value):
                    return False
                self._seen[name] = value
        return True

    def shares(self, value: Any) -> bool:
        """Whether a tensor in `value` lies in memory that may be written over."""
        return any(storage(tensor) in self.storages for tensor in _tensors(value))

    def apart(self, value: Any) -> Any:
        """`value` with copies of the tensors in it that lie in such memory, one of each."""
        if isinstance(value, (int, float)):
            return value
        if isinstance(value, torch.Tensor):
            return value.clone() if storage(value) in self.storages else value
        made: dict[int, torch.Tensor] = {}

        def own(leaf: Any) -> Any:
            if isinstance(leaf, torch.Tensor) and id(leaf) not in made:
                made[id(leaf)] = self.apart(leaf)
            return made.get(id(leaf), leaf)

        return tree.map(own, value)

    def update(self, by: str, update: Callable[..., tuple[Any, Any]], *args: Any, **options: Any) -> tuple[Any, Any]:
        """The optimizer's update. Where it was granted to write over what comes in, the states that carry that are dead before it begins."""
        if self._granted:
            states, self._states = self._states, []
            for ref in states:
                if (state := ref()) is not None and fate(state) is None and state.params is self.params:
                    bury(state, f"this state was donated: {by} wrote the next one over it")
        self._written, self._copied = [], False
        token = _writing.set(self)
        try:
            return update(*args, **options)
        finally:
            _writing.reset(token)

    def settle(self, params: Any, opt_state: Any, buffers: Any) -> None:
        """The new state will carry these; the buffers share no memory with the rest."""
        self.params, self.opt_state, self._seen["buffers"] = params, opt_state, buffers
        if self._copied:
            self._owned, self._storages = {id(t): t for tensors in self._written for t in tensors}, None

    def own(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """Tensors for a kernel to write over: those of the lease as they are, copies of all others, which then are the lease's."""
        owned = self._owned
        if not self._granted:
            tensors, self._copied = copies(tensors), True
        elif not owned.keys() >= set(map(id, tensors)):
            tensors, self._copied = [t if id(t) in owned else t.clone() for t in tensors], True
        self._written.append(tensors)
        return tensors


#: Of the programs that are running: several where a hook runs one, or threads do.
_active: list[Lease] = []
_writing: ContextVar[Lease | None] = ContextVar("writing", default=None)


def own(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Tensors to write over: copies, or these themselves where they are donated. Every kernel that works in place gets its tensors here."""
    lease = _writing.get()
    if not tensors:
        return tensors
    return copies(tensors) if lease is None else lease.own(tensors)


def copies(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return list(torch._foreach_clone(tensors))  # pyright: ignore[reportPrivateImportUsage]


class keeping:
    """`with keeping():` no update writes over what comes in, whatever encloses it: for who needs the old values afterwards."""

    __slots__ = ("_token",)

    @undisturbed
    def __enter__(self) -> None:
        self._token = _writing.set(None)

    @undisturbed
    def __exit__(self, *exc: object) -> None:
        _writing.reset(self._token)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in tree.leaves(value) if isinstance(leaf, torch.Tensor))


def storage(tensor: torch.Tensor) -> int:
    """Where a tensor's memory begins: the same for all views of it. Empty ones share nothing."""
    return tensor.untyped_storage().data_ptr() or -id(tensor)


def secured(value: Any) -> Any:
    """`value` with copies of the tensors that a running loop is going to write over: what may be kept, or read by another thread."""
    for lease in list(_active):
        if lease.shares(value):
            value = lease.apart(value)
    return value
