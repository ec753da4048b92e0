"""What the tests of streams share."""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from hypothesis import settings

from fnrun.core import tree
from fnrun.core.key import Key
from fnrun.core.position import Cursor
from fnrun.data import Batches

KEY = Key(7)

unhurried = settings(deadline=None)  # on a busy machine a draw may take its time


def take(stream: Batches, n: int, cursor: Cursor | None = None, key: Key = KEY, replay: bool = False) -> list[tuple[Any, Cursor]]:
    """The first `n` of the iteration from `cursor`, which is closed."""
    iterator = stream.iterate(key, cursor or Cursor(source=stream.source), replay=replay)
    found = list(itertools.islice(iterator, n))
    getattr(iterator, "close", lambda: None)()
    return found


def same(a: Any, b: Any) -> bool:
    return not tree.diff(a, b)


def generators() -> Any:
    return torch.get_rng_state(), random.getstate(), np.random.get_state(legacy=False)


@contextlib.contextmanager
def untouched() -> Iterator[None]:
    """The body leaves the global generators as they were."""
    before = generators()
    yield
    after = generators()
    assert torch.equal(before[0], after[0])
    assert before[1] == after[1]
    assert tree.equal(before[2], after[2])
