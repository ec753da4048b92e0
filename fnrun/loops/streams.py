"""The streams of a program at work: which data a loop reads, where a state stands in it, and the iterator that is alive there."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

from fnrun.core.inplace import InPlaceError
from fnrun.core.key import Key
from fnrun.core.position import Cursor
from fnrun.core.state import LoopState
from fnrun.core.waiting import asked
from fnrun.data import Batches, as_batches
from fnrun.loops.exits import ProgramError

logger = logging.getLogger("fnrun")


class OtherData(ProgramError):
    """The stream `name` is not what `state` counts its position in; `state.position.moved(name, source)` is the one to go on from."""

    def __init__(self, name: str, source: str, state: Any) -> None:
        cursor = state.position.streams[name]
        self.name, self.source, self.state = name, source, state
        self.what = (
            f"the data of {name!r} is not what the state's position (epoch {cursor.epoch}, batch {cursor.batch}) was counted in:\n"
            f"  the state: {cursor.source}\n  now:       {source}\n"
        )
        self.then = cursor.moved(source)[1]
        super().__init__(
            f"{self.what}To go on with it all the same, where {self.then}:\n"
            f"  state.replace(position=state.position.moved({name!r}, stream.source))"
        )


@dataclasses.dataclass(slots=True)
class _Live:
    """The iterator of a stream, and where it stands."""

    stream: Batches
    iterator: Iterator[tuple[Any, Cursor]]
    epoch: int
    batch: int

    def close(self) -> None:
        getattr(self.iterator, "close", lambda: None)()


class Streams:
    """Those of one program. `seconds` were waited for batches so far."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._by_place: dict[tuple[str, int], tuple[Any, Batches]] = {}  # by path and depth of a loop: its data, and the stream of that
        self._made: dict[int, tuple[Any, Any]] = {}  # by a function's id, which is its own as long as the function is held here
        self._live: dict[str, _Live] = {}

    def stream(self, value: Any, path: str, depth: int) -> tuple[str, Batches]:
        """The name and the stream of the data of the loop there; a function that makes the stream is called once."""
        known = self._by_place.get((path, depth))
        if known is None or known[0] is not value:
            made = self._make(value)
            try:
                stream = as_batches(made)
            except TypeError as error:
                raise TypeError(f"data at {path.removeprefix('/') or 'the top'!r}: {error}") from None
            known = self._by_place[path, depth] = (value, stream)
        return known[1].name or path.removeprefix("/") or "data", known[1]

    def _make(self, value: Any) -> Any:
        if not callable(value) or hasattr(value, "iterate"):
            return value
        if id(value) not in self._made:
            self._made[id(value)] = (value, value())
        return self._made[id(value)][1]

    def cursor(self, state: LoopState, name: str, stream: Batches) -> Cursor:
        """Where `state` stands in the stream. Raises ProgramError where the state's position was counted in other data."""
        cursor = state.position.streams.get(name)
        if cursor is None:
            return Cursor(source=stream.source)
        if cursor.source != stream.source:
            raise OtherData(name, stream.source, state)
        return cursor

    def next_batch(self, name: str, stream: Batches, state: LoopState, cursor: Cursor, *, replay: bool = False) -> tuple[Any, Cursor]:
        """The batch at `cursor` and the cursor after it, from the live iterator if that is where it stands."""
        live = self._live.get(name)
        if live is None or live.stream is not stream or (live.epoch, live.batch) != (cursor.epoch, cursor.batch):
            if live is not None:
                live.close()
            key = getattr(state, "rng", Key(0)).fold_in("data", name)
            live = self._live[name] = _Live(stream, stream.iterate(key, cursor, replay=replay), cursor.epoch, cursor.batch)
        began = time.perf_counter()
        try:
            batch, after = next(live.iterator)
        except StopIteration:
            raise ProgramError(
                f"the stream {name!r} ended at epoch {cursor.epoch}, batch {cursor.batch}: `iterate` goes on for ever"
            ) from None
        except Exception as error:
            if isinstance(error, InPlaceError) or (interrupted := asked()) is None:
                raise
            # Who ends this process ends others too, on which the data may depend: its workers, for one.
            logger.warning("%s, while a batch was waited for; so this is no error: %s: %s", interrupted, type(error).__name__, error)
            raise interrupted from error
        self.seconds += time.perf_counter() - began
        live.epoch, live.batch = cursor.epoch if replay and after.batch == 0 else after.epoch, after.batch
        return batch, after

    def closing(self) -> list[Callable[[], None]]:
        """What closes each iterator."""
        return [live.close for live in self._live.values()]
