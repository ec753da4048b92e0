"""The ambient generators around the loading of data: seeded from keys, and back as they were.

Seeding all three costs 8 us, more than many a data set needs for an example. So the loader seeds those that are drawn from, and
looks at the others after each batch. Reading the state of Python's or NumPy's through its own `get_state` costs 9 and 32 us: where the
memory that holds its words is known, they are compared as they are.
"""

from __future__ import annotations

import ctypes
import functools
import random
import sys
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch

from fnrun.rng import Key


class Generator(Protocol):
    """An ambient generator."""

    what: str

    def save(self) -> Any:
        """The state, to `restore` and to compare."""
        ...

    def mark(self) -> Any:
        """The state just after `seed`, to compare only."""
        ...

    def moved(self, saved: Any) -> bool:
        """Whether it was drawn from (or seeded) since."""
        ...

    def restore(self, saved: Any) -> None: ...
    def seed(self, key: Key) -> None: ...


class Torch:
    """torch's CPU generator."""

    what = "torch's global generator"

    def save(self) -> Any:
        return torch.default_generator.get_state()

    mark = save

    def moved(self, saved: Any) -> bool:
        return torch.default_generator.get_state().numpy().tobytes() != saved.numpy().tobytes()

    def restore(self, saved: Any) -> None:
        torch.default_generator.set_state(saved)

    def seed(self, key: Key) -> None:
        torch.default_generator.manual_seed(key.bits)


class _Mersenne:
    """A Mersenne twister with a cache for the second of two normal numbers, which a draw may take without moving the words.

    The words are those of the state `known` while they are unchanged, if no number lies in its cache; otherwise the state is read anew.
    """

    words: Callable[[], bytes | None]
    read: Callable[[], Any]
    cached: Callable[[Any], bool]

    def __init__(self) -> None:
        self.known: tuple[bytes | None, Any] = (None, None)

    def save(self) -> Any:
        words = self.words()
        if words is None or words != self.known[0]:
            state = self.read()
            if words is None or self.cached(state):
                return None, state
            self.known = words, state
        return self.known

    def mark(self) -> Any:
        words = self.words()
        return words, None if words is not None else self.read()

    def moved(self, saved: Any) -> bool:
        words, state = saved
        return self.words() != words if words is not None else not _same(self.read(), state)


class Python(_Mersenne):
    """The generator of the module `random`."""

    what = "Python's global generator (random)"

    def __init__(self) -> None:
        super().__init__()
        self.address = _address(random.getstate()[1])

    def words(self) -> bytes | None:
        return ctypes.string_at(self.address, 625 * 4) if self.address else None

    def read(self) -> Any:
        return random.getstate()

    def cached(self, state: Any) -> bool:
        return state[2] is not None

    def restore(self, saved: Any) -> None:
        random.setstate(saved[1])

    def seed(self, key: Key) -> None:
        random.seed(key.bits)


class NumPy(_Mersenne):
    """The generator of `np.random`."""

    what = "NumPy's global generator (np.random)"

    def words(self) -> bytes | None:
        generator = np.random.get_bit_generator()  # pyright: ignore[reportAttributeAccessIssue]
        return ctypes.string_at(generator.ctypes.state_address, 625 * 4) if type(generator) is np.random.MT19937 else None

    def read(self) -> Any:
        return np.random.get_state(legacy=False)

    def cached(self, state: Any) -> bool:
        return bool(state["has_gauss"])

    def restore(self, saved: Any) -> None:
        np.random.set_state(saved[1])

    def seed(self, key: Key) -> None:
        np.random.seed(int.from_bytes(key.path[8:12], "little"))


@functools.cache
def generators() -> tuple[Generator, ...]:
    """torch's, Python's and NumPy's, in this process."""
    return Torch(), Python(), NumPy()


def _address(state: tuple[int, ...]) -> int | None:
    """Where CPython keeps the position and the words of Python's ambient generator; None if they are not found."""
    instance = getattr(random, "_inst", None)
    if sys.implementation.name != "cpython" or instance is None:
        return None
    memory = ctypes.string_at(id(instance), object.__sizeof__(instance))
    at = memory.find(np.array([state[-1], *state[:-1]], np.uint32).tobytes())
    return id(instance) + at if at >= 0 else None


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    return bool(np.array_equal(a, b)) if isinstance(a, np.ndarray) else a == b
