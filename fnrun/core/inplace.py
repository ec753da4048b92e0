"""What is never written to: telling who did it all the same.

A state is shared: by its caller, by checkpoints that are being written, by hooks that remember it. A function that writes to its tensors or
puts another value into its dictionaries changes all of these at once. Tensors count the writes to them (`_version`), which costs nothing to
read; only what goes around that count (`.data`, `.numpy()`) needs a comparison of bits.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import optree
import torch

from fnrun.core import tree

#: So many calls of each function are looked at, besides those under `strictly`.
FIRST = 3
#: Bits are compared in the first call where a tree has at most so many bytes.
SMALL = 2**25

_strict: ContextVar[float | None] = ContextVar("strict", default=None)


class InPlaceError(RuntimeError):
    """A function wrote to a state or a batch that it was given."""


@contextlib.contextmanager
def strictly(bits: float = math.inf) -> Iterator[None]:
    """Within, every call is looked at, and bits are compared each time, of trees of at most so many bytes."""
    token = _strict.set(bits)
    try:
        yield
    finally:
        _strict.reset(token)


def strict() -> bool:
    """Whether every call is looked at."""
    return _strict.get() is not None


def version(tensor: torch.Tensor) -> int:
    """How often a tensor was written to; 0 for one of inference mode, which does not count."""
    return 0 if tensor.is_inference() else tensor._version


def _has_bits(leaf: Any) -> bool:
    """Whether bits can be compared."""
    plain = type(leaf) in (torch.Tensor, torch.nn.Parameter) and leaf.layout == torch.strided and not leaf.is_nested and not leaf.is_meta
    return plain and not _transformed(leaf)


#: Under `torch.func` a tensor stands for several, or for one whose bits nothing may read.
_transformed: Any = torch._C._functorch.is_functorch_wrapped_tensor  # pyright: ignore[reportAttributeAccessIssue]


class Marks:
    """What a tree holds now: `found()` says what was changed in it since then."""

    __slots__ = ("_copies", "_leaves", "_spec", "_tree", "_versions")

    def __init__(self, value: Any, *, bits: bool) -> None:
        self._tree = value
        self._leaves, self._spec = optree.tree_flatten(value)
        self._versions = [version(leaf) if isinstance(leaf, torch.Tensor) else 0 for leaf in self._leaves]
        self._copies: list[Any] | None = None
        if bits:
            self._copies = [leaf.detach().clone() if _has_bits(leaf) else None for leaf in self._leaves]

    def found(self) -> tuple[str, str] | None:
        """The path of the first leaf that is not as it was, and what was done; None if all are."""
        for i, (leaf, before) in enumerate(zip(self._leaves, self._versions, strict=True)):
            if isinstance(leaf, torch.Tensor) and version(leaf) != before:
                return self._path(i), "in place"
        for i, copy in enumerate(self._copies or ()):
            if copy is not None and not tree.equal(copy, self._leaves[i]):
                return self._path(i), "in place, past the count of writes that torch keeps (by .data or .numpy())"
        leaves, spec = optree.tree_flatten(self._tree)
        if len(leaves) == len(self._leaves) and all(a is b for a, b in zip(leaves, self._leaves, strict=True)):
            return None
        now, before = (
            {tree.join(path): leaf for path, leaf in zip(s.paths(), each, strict=True)}
            for s, each in ((spec, leaves), (self._spec, self._leaves))
        )
        names = [name for name in (*before, *now) if name not in now or name not in before or now[name] is not before[name]]
        return (names[0], "by putting another value into the container that holds it") if names else None

    def put_back(self) -> None:
        """Give tensors the bits that they had, where copies were made: the caller's own state may be among them."""
        for copy, leaf in zip(self._copies or (), self._leaves, strict=False):
            if copy is not None and not tree.equal(copy, leaf):
                leaf.data.copy_(copy)

    def _path(self, i: int) -> str:
        return tree.join(self._spec.paths()[i])


class Guard:
    """Looks at the first calls of a function: `who` says whose it is, in messages."""

    __slots__ = ("left", "who")

    def __init__(self, who: str) -> None:
        self.who, self.left = who, FIRST

    @property
    def on(self) -> bool:
        """Whether the next call is looked at."""
        return self.left > 0 or _strict.get() is not None

    def look(self, *given: Any) -> list[Marks]:
        """Marks of what a call is given; none where it is not looked at."""
        if not self.on:
            return []
        limit = _strict.get()
        if limit is None:
            limit = SMALL if self.left == FIRST else -1
        bits = limit >= 0 and sum(leaf.nbytes for leaf in tree.leaves(given) if _has_bits(leaf)) <= limit
        self.left = max(0, self.left - 1)
        return [Marks(each, bits=bits) for each in given]

    def check(self, marks: Sequence[Marks], who: Callable[[str], str] | None = None) -> None:
        """Raises InPlaceError, with the path, where the call changed something."""
        for each in marks:
            if (found := each.found()) is not None:
                path, how = found
                for marked in marks:
                    marked.put_back()
                raise InPlaceError(message(who(path) if who is not None else self.who, path, how))


@contextlib.contextmanager
def looked_at(who: str, given: Any) -> Iterator[None]:
    """One call that is looked at."""
    guard = Guard(who)
    marks = guard.look(given)
    yield
    guard.check(marks)


def message(who: str, path: str, how: str = "in place") -> str:
    return (
        f"{who} changed {path or 'what it was given'} {how}. What a function is given stays as it is, for others hold the same tensors: "
        "checkpoints, hooks, the caller. Make new ones: x.lerp(y, t) and not x.lerp_(y, t), state.replace(...) with a new dictionary"
    )
