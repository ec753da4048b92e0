"""What a stream is, and what all streams can do: `.to(device)`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import cached_property
from typing import Any, NoReturn, Protocol, runtime_checkable

import torch

from fnrun.core import tree
from fnrun.core.examples import keep_count
from fnrun.core.inplace import Guard
from fnrun.core.key import Key
from fnrun.core.position import Cursor
from fnrun.core.words import a, kind
from fnrun.data.content import digest


@runtime_checkable
class Batches(Protocol):
    """A stream: a function from a position to the batches after it.

    It has no state: two programs may iterate it at once. A stream whose passes have a known length also has `len(batches)`.
    """

    @property
    def name(self) -> str | None:
        """The name of its position in the state; None names it by its place in the data."""
        ...

    @property
    def source(self) -> str:
        """A text that identifies the batches: rows, batch size, order, a digest of the content."""
        ...

    def iterate(self, key: Key, cursor: Cursor, *, replay: bool = False) -> Iterator[tuple[Any, Cursor]]:
        """The batches from `cursor` on, endlessly, each with the cursor after it: pass e + 1 follows pass e.

        - `key`: the stream's key.
        - `replay`: each pass repeats pass `cursor.epoch`. The cursor after its last batch is still `(epoch + 1, 0)`.

        Closing the iterator ends its workers.
        """
        ...


def as_batches(value: Any) -> Batches:
    """`value` if it is a stream; the stream of a list or tuple of batches. Raises TypeError, with a remedy, for anything else."""
    if isinstance(value, Batches):
        return value
    if isinstance(value, (list, tuple)):
        return batches(value)
    kind = type(value).__name__
    if isinstance(value, torch.utils.data.DataLoader):
        raise TypeError(f"{a(kind)} does not know where it stands: use data.loader(dataset, batch_size, ...), which runs the same workers")
    if hasattr(value, "state_dict") and hasattr(value, "load_state_dict"):
        raise TypeError(f"{a(kind)} can say where it is: use data.stateful(it)")
    if hasattr(value, "__getitem__") and hasattr(value, "__len__") and not isinstance(value, (dict, str, torch.Tensor)):
        raise TypeError(f"{a(kind)} has examples, not batches: use data.loader(it, batch_size)")
    raise TypeError(
        f"{a(kind)} is not a stream of batches: use data.arrays(tensors, batch_size), data.loader(dataset, batch_size), "
        "data.stateful(iterable), or a list of batches"
    )


def walk(cursor: Cursor, length: int, replay: bool) -> Iterator[tuple[int, int, tuple[int, int]]]:
    """`epoch, batch, (epoch, batch) after it`, from the cursor on, endlessly, for passes of `length` batches."""
    epoch, batch = cursor.epoch, cursor.batch
    if not 0 <= batch < length:
        raise ValueError(f"the position is batch {batch} of epoch {epoch}, and a pass has {length} batches")
    while True:
        if batch + 1 < length:
            yield epoch, batch, (epoch, batch + 1)
            batch += 1
        else:
            yield epoch, batch, (epoch + 1, 0)
            epoch, batch = epoch + (not replay), 0


class Stream:
    """The base of the streams of this package."""

    name: str | None
    #: What identifies the content; None if nothing does.
    content: Any = None

    def __repr__(self) -> str:
        return f"<stream{f' {self.name}' if self.name else ''}: {self.brief()}>"

    def brief(self) -> str:
        """What the batches are made of, without the content."""
        raise NotImplementedError

    @property
    def source(self) -> str:
        return self.brief() if self.content is None else f"{self.brief()}, content {self.content}"

    def __iter__(self) -> NoReturn:
        raise TypeError(
            f"{self!r} is iterated by a loop, which knows the position: fnrun.epoch_loop(step)(state, stream). "
            "To look at one batch: next(stream.iterate(fnrun.Key(0), fnrun.Cursor()))[0]"
        )

    def to(self: Batches, device: torch.device | str) -> OnDevice:
        """The stream with each batch copied to `device`, one batch ahead; name, source and positions are the same."""
        return OnDevice(self, _available(device))


def _available(device: Any) -> torch.device:
    """The device. Raises ValueError, with the available ones, where this machine does not have it."""
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    available = ", ".join(["cpu", *(f"cuda:{i}" for i in range(cards))])
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"to(device): {kind(device)} is no device here; there are: {available}") from None
    if found.type == "cuda" and not (found.index or 0) < cards:
        raise ValueError(f"to(device): there is no {found} on this machine, or torch does not see it; there are: {available}")
    return found


@dataclasses.dataclass(frozen=True, repr=False)
class Listed(Stream):
    """See `batches`."""

    items: tuple[Any, ...]
    name: str | None = None

    def brief(self) -> str:
        return f"{len(self)} batches in a list"

    @cached_property
    def content(self) -> str:
        return digest(self.items)

    def __len__(self) -> int:
        return len(self.items)

    def iterate(self, key: Key, cursor: Cursor, *, replay: bool = False) -> Iterator[tuple[Any, Cursor]]:
        guard, source = Guard("a step, a hook or an observer"), self.source
        for _, batch, after in walk(cursor, len(self), replay):
            marks = guard.look({f"batch {batch} of the list": self.items[batch]}) if guard.on else None
            yield self.items[batch], Cursor(*after, source)
            if marks is not None:
                guard.check(marks)  # in the next pass it would be changed again


def batches(items: Sequence[Any], *, name: str | None = None) -> Listed:
    """The stream of a list of batches: a pass is all of them, in order. Loops make it of a plain list.

    Raises ValueError for an empty list.

    >>> import itertools
    >>> stream = batches([torch.zeros(2), torch.ones(2)])
    >>> [(int(b[0]), after.epoch, after.batch) for b, after in itertools.islice(stream.iterate(Key(0), Cursor()), 3)]
    [(0, 0, 1), (1, 1, 0), (0, 1, 1)]
    """
    if not len(items):
        raise ValueError("the list of batches is empty: a stream needs at least one batch")
    return Listed(tuple(items), name)


@dataclasses.dataclass(frozen=True, repr=False)
class OnDevice(Stream):
    """`inner` with its batches copied to `device`, one batch ahead."""

    inner: Batches
    device: torch.device

    @property
    def name(self) -> str | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.inner.name

    def brief(self) -> str:
        inner = self.inner
        return f"{inner.brief() if isinstance(inner, Stream) else inner}, on {self.device}"

    @property
    def source(self) -> str:
        return self.inner.source

    def __len__(self) -> int:
        return len(self.inner)  # pyright: ignore[reportArgumentType]

    def iterate(self, key: Key, cursor: Cursor, *, replay: bool = False) -> Iterator[tuple[Any, Cursor]]:
        inner = self.inner.iterate(key, cursor, replay=replay)
        copy = _Copy(self.device)
        try:
            ready = None
            while True:
                try:
                    batch, after = next(inner)
                    copied = copy(batch), after
                except Exception:  # of the next batch: the one that is ready comes first
                    if ready is not None:
                        yield copy.arrived(ready[0]), ready[1]
                    raise
                if ready is not None:
                    yield copy.arrived(ready[0]), ready[1]
                ready = copied
        finally:
            getattr(inner, "close", lambda: None)()


class _Copy:
    """Copies batches to a device; on CUDA from pinned memory and in a separate stream, beside the computation."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batch: Any) -> Any:
        def copy(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return leaf
            if self.stream is None:
                return leaf.to(self.device)
            return (leaf.pin_memory() if leaf.device.type == "cpu" else leaf).to(self.device, non_blocking=True)

        with torch.cuda.stream(self.stream) if self.stream is not None else nullcontext():
            return keep_count(tree.map(copy, batch), batch)

    def arrived(self, batch: Any) -> Any:
        """The batch, ready for the current stream."""
        if self.stream is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self.stream)
            for leaf in tree.leaves(batch):
                if isinstance(leaf, torch.Tensor):
                    leaf.record_stream(current)
        return batch
