"""The ambient generators of torch, Python and NumPy: seeded from keys, compared and restored.

Seeding all three takes 8 us, more than many data sets need for an example. So the loader seeds those that are drawn from, and compares the
others after each batch. NumPy takes 32 us to return its state: its words are compared in place (`BitGenerator.ctypes`).
"""

from __future__ import annotations

import ctypes
import functools
import random
from typing import Any, Protocol

import numpy as np
import torch

from fnrun.core import tree
from fnrun.core.key import Key


class Generator(Protocol):
    """An ambient generator."""

    what: str

    def save(self) -> Any:
        """The state, for `restore` and `moved`."""
        ...

    def mark(self) -> Any:
        """The state just after `seed`, for `moved` alone."""
        ...

    def moved(self, saved: Any) -> bool:
        """Whether it has been drawn from, or seeded, since."""
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


class Python:
    """The generator of the module `random`."""

    what = "Python's global generator (random)"

    def save(self) -> Any:
        return random.getstate()

    mark = save

    def moved(self, saved: Any) -> bool:
        return random.getstate() != saved

    def restore(self, saved: Any) -> None:
        random.setstate(saved)

    def seed(self, key: Key) -> None:
        random.seed(key.bits)


class NumPy:
    """The generator of `np.random`: a Mersenne twister, with a cache for the second of two normal numbers.

    A draw from the cache does not change the words. So the words identify the state only while the cache is empty, as after a seed. A state
    that was read with an empty cache is `known` while the words are the same.
    """

    what = "NumPy's global generator (np.random)"

    def __init__(self) -> None:
        self.known: tuple[bytes | None, Any] = (None, None)

    def words(self) -> bytes | None:
        generator = np.random.get_bit_generator()  # pyright: ignore[reportAttributeAccessIssue]
        return ctypes.string_at(generator.ctypes.state_address, 625 * 4) if type(generator) is np.random.MT19937 else None

    def save(self) -> Any:
        words = self.words()
        if words is None or words != self.known[0]:
            state = np.random.get_state(legacy=False)
            if words is None or state["has_gauss"]:  # pyright: ignore[reportArgumentType,reportCallIssue]
                return None, state
            self.known = words, state
        return self.known

    def mark(self) -> Any:
        words = self.words()
        return words, None if words is not None else np.random.get_state(legacy=False)

    def moved(self, saved: Any) -> bool:
        words, state = saved
        return self.words() != words if words is not None else not tree.equal(np.random.get_state(legacy=False), state)

    def restore(self, saved: Any) -> None:
        np.random.set_state(saved[1])

    def seed(self, key: Key) -> None:
        np.random.seed(int.from_bytes(key.path[8:12], "little"))


@functools.cache
def generators() -> tuple[Generator, ...]:
    """torch's, Python's and NumPy's, in this process."""
    return Torch(), Python(), NumPy()


def save_hosts() -> list[tuple[Generator, Any]]:
    """Python's and NumPy's, each with its state."""
    return [(generator, generator.save()) for generator in generators()[1:]]


def restore_hosts(saved: list[tuple[Generator, Any]]) -> list[str]:
    """Restore those that have moved; returns their names."""
    moved = [(generator, state) for generator, state in saved if generator.moved(state)]
    for generator, state in moved:
        generator.restore(state)
    return [generator.what for generator, _ in moved]
