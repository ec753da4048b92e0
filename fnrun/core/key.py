"""Keys: randomness as a function of data.

A key is never consumed. `fold_in` derives another from it, so what is random in step 17 follows from the seed and the number 17,
not from how often somebody drew before.
"""

from __future__ import annotations

import functools
import hashlib
import operator
import os
import random
import threading
from typing import Any

import numpy as np
import torch

from fnrun.core.counts import count
from fnrun.core.tree import struct
from fnrun.core.undisturbed import undisturbed

#: The ambient generators are one for the process, and so is the module that a step borrows: who uses them holds this lock.
ambient_lock = threading.RLock()


def _lock_of_a_fork() -> None:
    global ambient_lock
    ambient_lock = threading.RLock()  # the thread that held it is not in the child


os.register_at_fork(after_in_child=_lock_of_a_fork)


@struct(eq=True, name="fnrun.Key")
class Key:
    """128 bits that stand for a stream of randomness. `Key(seed)` takes any int.

    Derivation is blake2b over tagged data: the same on every machine, in every process and for ever.

    >>> key = Key(0)
    >>> key.fold_in("train", 17) == key.fold_in("train").fold_in(17) != key.fold_in("train", 18)
    True
    >>> with key.scope():
    ...     a = torch.rand(2)
    >>> with key.scope():
    ...     torch.equal(a, torch.rand(2))
    True
    """

    seed: int = 0
    path: bytes = b""

    def __post_init__(self) -> None:
        if not self.path:
            object.__setattr__(self, "seed", _integer(self.seed))
            object.__setattr__(self, "path", _hash(b"fnrun", self.seed))

    def fold_in(self, *data: int | str) -> Key:
        """The key for `data`: ints of any size or strings. `fold_in(a, b)` is `fold_in(a).fold_in(b)`."""
        return Key(self.seed, _folded(self.path, data))

    def fold_path(self, *data: int | str) -> bytes:
        """The `path` of `fold_in(*data)`, for what needs no key around it."""
        return _folded(self.path, data)

    def split(self, n: int) -> tuple[Key, ...]:
        """`n` independent keys."""
        return tuple(self.fold_in("split", i) for i in range(count("split: n", n, 0)))

    @property
    def bits(self) -> int:
        """The key as 64 bits, to seed a generator with. (torch's CPU generator uses the lower 32 of them, CUDA's all.)"""
        return _bits(self.path)

    def generator(self, device: torch.device | str = "cpu") -> torch.Generator:
        """A fresh `torch.Generator` on `device`, seeded from this key."""
        return torch.Generator(device).manual_seed(self.bits)

    def scope(self, *data: int | str, host: bool = False) -> Scope:
        """Within, the ambient generators are seeded from `fold_in(*data)`; afterwards they are as they were, also when the body raises.

        Other threads wait at their own scopes meanwhile: there is one set of generators.
        """
        return Scope(self.fold_path(*data), host)


class Scope:
    """What `Key.scope` returns; a class and not a generator function, for each training step opens one."""

    __slots__ = ("_generators", "_held", "_host", "_hosts", "_lock", "_path", "_saved")

    def __init__(self, path: bytes, host: bool) -> None:
        self._path, self._host = path, host

    @undisturbed
    def __enter__(self) -> Any:
        self._lock = ambient_lock
        self._saved: list[Any] = []
        self._held: Any = None
        self._hosts: Any = None
        try:
            self._held = self._lock.acquire()
            self._generators = ambient()
            self._saved = [generator.get_state() for generator in self._generators]
            if self._host:
                self._hosts = random.getstate(), np.random.get_state()
            _seed(self._generators, self._path, self._host)
        except BaseException:
            self._put_back()
            raise

    @undisturbed
    def __exit__(self, *exc: object) -> None:
        try:
            self._put_back()
        except BaseException:  # KeyboardInterrupt, outside of a program: once more, which does what was left
            self._put_back()
            raise

    def _put_back(self) -> None:
        try:
            if self._saved:
                for generator, state in zip(self._generators, self._saved, strict=True):
                    generator.set_state(state)
            if self._hosts is not None:
                random.setstate(self._hosts[0])
                np.random.set_state(self._hosts[1])
        finally:
            if self._held:
                self._held = self._lock.release()


def _seed(generators: tuple[torch.Generator, ...], path: bytes, host: bool) -> None:
    bits = _bits(path)
    for generator in generators:
        generator.manual_seed(bits)
    if host:
        random.seed(bits)
        np.random.seed(int.from_bytes(path[8:12], "little"))


def _bits(path: bytes) -> int:
    return int.from_bytes(path[:8], "little")


def ambient() -> tuple[torch.Generator, ...]:
    """torch's ambient generators: the CPU's and, once CUDA is in use, its devices'."""
    if torch.cuda.is_initialized():
        return (torch.default_generator, *torch.cuda.default_generators)
    return (torch.default_generator,)


def _integer(value: Any) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"a key takes ints and strings, not {value!r} ({type(value).__name__})")
    return operator.index(value)


def _folded(path: bytes, data: tuple[int | str, ...]) -> bytes:
    for datum in data:
        path = _labelled(path, datum) if type(datum) is str else _hash(path, datum if type(datum) is int else _integer(datum))
    return path


def _hash(path: bytes, datum: int | str) -> bytes:
    if isinstance(datum, str):
        tagged = b"s" + datum.encode()
    else:
        tagged = b"i" + datum.to_bytes(datum.bit_length() // 8 + 1, "little", signed=True)
    return hashlib.blake2b(path + tagged, digest_size=16).digest()


#: Labels come back at every step ("train", "data"), the numbers after them do not.
_labelled = functools.lru_cache(maxsize=256)(_hash)


class Unlocked(Scope):
    """A scope in which others may use the generators too, one after the other: for a function that runs whole loops."""

    __slots__ = ()

    @undisturbed
    def __enter__(self) -> Any:
        super().__enter__()
        try:
            self._held = self._lock.release()
        except BaseException:
            self._put_back()
            raise

    @undisturbed
    def __exit__(self, *exc: object) -> None:
        try:
            self._held = self._lock.acquire()
        finally:
            super().__exit__(*exc)
