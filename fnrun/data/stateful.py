"""Streams of iterables that save and restore their own state."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Generator, Iterator
from typing import Any, Protocol

from torch.utils.data import default_collate

from fnrun.core import tree
from fnrun.core.examples import attach_count
from fnrun.core.key import Key
from fnrun.core.position import Cursor
from fnrun.core.words import a
from fnrun.data.content import fingerprint
from fnrun.data.stream import Stream


class SaysWhere(Protocol):
    """An iterable whose iteration is one pass, from the state of `load_state_dict` on."""

    def __iter__(self) -> Iterator[Any]: ...
    def state_dict(self) -> Any: ...
    def load_state_dict(self, state: Any, /) -> Any: ...


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Stateful(Stream):
    """See `stateful`."""

    iterable: SaysWhere
    name: str | None
    first: list[Any] = dataclasses.field(default_factory=list)  # the iterable's state before its first use

    def brief(self) -> str:
        return f"stateful {type(self.iterable).__name__}"

    @property
    def content(self) -> Any:
        return fingerprint(self.iterable)

    def iterate(self, key: Key, cursor: Cursor, *, replay: bool = False) -> Iterator[tuple[Any, Cursor]]:
        with key.fold_in("enter").scope(host=True):
            begin = self._enter(cursor)
        if replay and cursor.batch:
            if cursor.epoch:
                raise ValueError(
                    f"a stateful stream cannot go back to the beginning of epoch {cursor.epoch} from batch {cursor.batch} of it"
                )
            begin = self.first[0]
        epoch, batch, source = cursor.epoch, cursor.batch, self.source
        columns = getattr(self.iterable, "collate_fn", None) is default_collate
        while True:
            items = self._pass(key.fold_in(epoch), batch)
            try:
                for item, last, loader_state in items:
                    batch += 1
                    item = attach_count(item, None, columns=True) if columns else item
                    yield item, Cursor(epoch + 1, 0, source, loader_state) if last else Cursor(epoch, batch, source, loader_state)
            finally:
                items.close()
            if replay:
                self.iterable.load_state_dict(tree.snapshot(begin))
            epoch, batch = epoch + (not replay), 0

    def _enter(self, cursor: Cursor) -> Any:
        """Move the iterable to the cursor; returns its state there."""
        untouched = not self.first
        if untouched:
            self.first.append(tree.snapshot(self.iterable.state_dict()))
        if cursor.loader_state is None:
            if cursor.epoch or cursor.batch:
                raise ValueError(
                    f"the position (epoch {cursor.epoch}, batch {cursor.batch}) does not say in which state the stream was there"
                )
            if untouched:
                return self.first[0]
        state = self.first[0] if cursor.loader_state is None else cursor.loader_state
        self.iterable.load_state_dict(tree.snapshot(state))
        return state

    def _pass(self, key: Key, batch: int) -> Generator[tuple[Any, bool, Any]]:
        """The items of a pass, each with whether it is the last, and the iterable's state after it. The next item is fetched first."""
        live: Any = None
        none = object()

        def following(at: int) -> Any:
            with key.fold_in("batch", at).scope(host=True):
                return next(live, none)

        try:
            for _ in range(2):  # an iterable at the end of a pass may end it once more
                with key.fold_in("pass").scope(host=True):
                    live = iter(self.iterable)
                item = following(batch)
                if item is not none:
                    break
            else:
                raise ValueError(f"{self.source} has no batch in a pass")
            last = False
            while not last:
                loader_state = tree.snapshot(self.iterable.state_dict())
                batch += 1
                ahead = following(batch)
                last = ahead is none
                yield item, last, tree.snapshot(self.iterable.state_dict()) if last else loader_state
                item = ahead
        finally:
            for end in ("close", "_shutdown_workers"):  # a generator's; a DataLoader iterator's
                getattr(live, end, lambda: None)()


def _own_state(sampler: Any) -> bool:
    """Whether a sampler has a state, and is not one of torchdata's, which its loader resumes."""
    return hasattr(sampler, "state_dict") and type(sampler).__module__.partition(".")[0] != "torchdata"


def stateful(iterable: SaysWhere, *, name: str | None = None) -> Stateful:
    """The stream of an iterable with `state_dict` and `load_state_dict`, such as torchdata's `StatefulDataLoader`: an iteration is a pass.

    - The position of each batch holds a copy of the iterable's state, which is a pytree of tensors and plain values.
    - The next batch is fetched before one is returned, to find the end of the pass.
    - The iterable is live: it has one iteration at a time.
    - In this process the ambient generators are seeded for each batch from the key, and restored. The iterable's workers are not seeded.
    - `fingerprint`, an attribute or a method of the iterable, identifies its content in the stream's source.

    A resumed run is as exact as the iterable's state. That of torchdata's loader is complete if the order comes from a sampler with a
    generator, and workers draw no random numbers. Otherwise, after a resume:

    - with `shuffle=True` the passes differ;
    - with workers, or a data set without state, its counts differ;
    - with workers and a sampler with `state_dict`, the pass after a resume at the end of a pass differs (with a warning).

    For map-style data use `data.loader`.

    >>> class Count:
    ...     at = 0
    ...     def __iter__(self):
    ...         while self.at < 2:
    ...             self.at += 1
    ...             yield self.at
    ...         self.at = 0
    ...     def state_dict(self):
    ...         return {"at": self.at}
    ...     def load_state_dict(self, state):
    ...         self.at = state["at"]
    >>> batch, after = next(stateful(Count()).iterate(Key(0), Cursor()))
    >>> batch, after.loader_state, next(stateful(Count()).iterate(Key(0), after))[0]
    (1, {'at': 1}, 2)
    """
    if not (hasattr(iterable, "state_dict") and hasattr(iterable, "load_state_dict")):
        raise TypeError(f"{a(type(iterable).__name__)} has no state_dict() and load_state_dict(): it cannot say where it is")
    if getattr(iterable, "num_workers", 0) and any(
        map(_own_state, (getattr(iterable, name, None) for name in ("sampler", "batch_sampler")))
    ):
        warnings.warn(
            f"{type(iterable).__name__} with workers starts a sampler that has a state of its own once too often where it is resumed at "
            "the end of a pass: the next pass is then another one. Give it num_workers=0, a sampler without state_dict() that draws from a "
            "generator, or take data.loader",
            stacklevel=2,
        )
    return Stateful(iterable, name)
