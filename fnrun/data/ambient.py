"""The ambient generators around the loading of data: seeded from keys, and back as they were.

Seeding three generators costs 8 us, more than many a data set needs to fetch an example. So a generator is seeded only where
it is drawn from, and looked at after each batch: whether something drew, it can tell for less than a microsecond.
"""

from __future__ import annotations

import ctypes
import random
from typing import Any

import numpy as np
import torch

from fnrun.rng import Key


class Torch:
    """torch's CPU generator."""

    def save(self) -> Any:
        return torch.default_generator.get_state()

    def moved(self, saved: Any) -> bool:
        return torch.default_generator.get_state().numpy().data != saved.numpy().data

    def restore(self, saved: Any) -> None:
        torch.default_generator.set_state(saved)

    def seed(self, key: Key) -> None:
        torch.default_generator.manual_seed(key.bits)


class Python:
    """The generator of the module `random`."""

    def save(self) -> Any:
        return random.getstate()

    def moved(self, saved: Any) -> bool:
        now = random.getstate()
        # The position moves with each draw, and when it comes around every word is another.
        return now[1][-1] != saved[1][-1] or now[1][0] != saved[1][0] or now[2] != saved[2]

    def restore(self, saved: Any) -> None:
        random.setstate(saved)

    def seed(self, key: Key) -> None:
        random.seed(key.bits)


class NumPy:
    """The generator of `np.random`.

    Its `get_state` costs 32 us, so the raw words are compared where that is enough: while they are those of a known state in which no
    second normal number lies ready (which a draw could take without moving them), the known state is the state.
    """

    def __init__(self) -> None:
        self.known: tuple[bytes, Any] | None = None

    def _words(self) -> bytes | None:
        generator = np.random.get_bit_generator()  # pyright: ignore[reportAttributeAccessIssue]
        if type(generator) is not np.random.MT19937:
            return None
        return ctypes.string_at(generator.ctypes.state_address, 625 * 4)  # 624 words and the position

    def save(self) -> Any:
        words = self._words()
        if words is None or self.known is None or self.known[0] != words:
            state = np.random.get_state(legacy=False)
            if words is None or state["has_gauss"]:  # pyright: ignore[reportCallIssue, reportArgumentType]
                return None, state
            self.known = words, state
        return self.known

    def moved(self, saved: Any) -> bool:
        words, state = saved
        return self._words() != words if words is not None else not _same(np.random.get_state(legacy=False), state)

    def restore(self, saved: Any) -> None:
        np.random.set_state(saved[1])

    def seed(self, key: Key) -> None:
        np.random.seed(int.from_bytes(key.path[8:12], "little"))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    return bool(np.array_equal(a, b))
