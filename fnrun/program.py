"""A program at work: what lives for the length of one call and is nobody's state.

Live iterators, open observers and the interrupt belong here. Where the program *stands* is in the state, and only there.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple, Protocol, runtime_checkable

from fnrun.data import Batches, as_batches
from fnrun.donation import Owner, why_dead
from fnrun.inplace import Guard, InPlaceError, looked_at
from fnrun.reports import collecting
from fnrun.rng import Key
from fnrun.state import Cursor, LoopState
from fnrun.waiting import Interrupted, asked

logger = logging.getLogger("fnrun")


@runtime_checkable
class Hook(Protocol):
    """What transforms the state between ticks: `(state, metrics) -> state`, pure.

    A plain function of that type is a hook that remembers nothing. A hook with memory is an object with a `name`, under which
    `state.memory` holds what `init(state)` returned until `after` replaces it, and if it needs it `before(state, batch) -> state`.
    """

    name: str

    def init(self, state: Any, /) -> Any: ...
    def after(self, state: Any, metrics: dict[str, Any], /) -> Any: ...


class Observer(Protocol):
    """What watches: `(state, metrics) -> None`, after the hooks of the tick, with the finished state and computed metrics.

    It may have, each optional:

    - `open(program, state)`, before the first batch is worked on, and `close(state, reason)` at the end: None for a program that came to its end, the text
      of the stop or interrupt, or the exception; `state` is that of the last tick that every observer has seen, its frames still open.
    - `name` and `fold(folded, before, metrics, examples) -> folded`, a pytree that the loop keeps in its frame
      (`state.position.frames[-1].folds[name]`), so that what is gathered over ticks survives a kill. It gets None at first, the state before
      the tick, the step's metrics uncomputed and the batch's number of examples.
    - `carry(folded) -> folded`, of an observer that folds in a loop of training steps: what the loop's next round begins with instead of None.
    - `every = n` and `idle_between = True`: in a loop of training steps it does nothing in ticks that are not due. Then ticks in which nothing is
      due follow each other without a pause; if it folds, `fold_each(folded, before, ticks)` gets them all, as `[(metrics, examples), ...]`, and
      of the state before the first one the step, the position of the loops and the memory.
    - `flush()`: what was written must be on disk when it returns. `saves = True`: it acts last in a tick, after every flush.
    """

    def __call__(self, state: Any, metrics: dict[str, Any], /) -> None: ...


class Here(NamedTuple):
    """Where in a program a call happens."""

    program: Program
    depth: int = 0
    path: str = ""
    round: tuple[int, int | None] | None = None  # of the nearest repeat: its index, and how many there are where that is known
    over_batch: bool = False  # within a loop over data: what comes down is one of its batches
    source: tuple[str, Batches] | None = None  # of a loop over data: the name and the stream
    owner: Owner | None = (
        None  # of the loops down to here, if one of them donates and no wrapper stands between, which may want the old state
    )
    opened: list[str] | None = None  # the loops that this one call has opened so far; a wrapper may open several, one after the other


#: None outside of every program; where a hook, an observer or a lawful step of a program runs, `ASIDE`.
here: ContextVar[Here | None] = ContextVar("here", default=None)
ASIDE: Any = Here(None)  # pyright: ignore[reportArgumentType]


#: Called with the finished state of every tick, at every depth: for `fnrun.testing`, which must see loops that it was not given.
spy: ContextVar[Callable[[Any], None] | None] = ContextVar("spy", default=None)


class Unwind(BaseException):
    """A stop or an interrupt on its way through the open loops. Not an Exception: a user's `except Exception` is not meant for it."""

    def __init__(self, state: Any, reason: str) -> None:
        super().__init__(reason)
        self.state, self.reason = state, reason


class ProgramError(ValueError):
    """The state and the program, or the state and the data, do not belong together."""


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
class Live:
    stream: Batches
    iterator: Iterator[tuple[Any, Cursor]]
    epoch: int
    batch: int


class Program:
    """One call of a loop, from the outside: `loop` is the outermost one."""

    def __init__(self, loop: Any, state: LoopState, interrupt: Callable[[], str | None] | None) -> None:
        self.loop = loop
        self.interrupt = interrupt
        self.latest: Any = state
        self.data_seconds = 0.0  # waited for batches in this call
        self.unknown: dict[
            int, Any
        ] = {}  # functions that may hold loops of the program: which hooks these bring shows when they are called
        self.asked: set[int] = set()  # the steps that were called, but for those that are known to hold no loop
        self.examples = 0  # that went through the loops in this call
        self.lengths: dict[str, int | None] = {}  # how many ticks a frame's loop will have, by the frame's name, where that is known
        self.reports = collecting()
        self._guards: dict[tuple[int, str], Guard] = {}  # by the id of a part, which its loop holds, and its method
        self._spy = spy.get()
        self._streams: dict[tuple[str, int], tuple[Any, Batches]] = {}  # by path and depth: the data of a loop
        self._made: dict[int, tuple[Any, Any]] = {}  # by a function's id, which is its own as long as the function is held here
        self._live: dict[str, Live] = {}
        self._begun: dict[int, Any] = {}
        self._hooks: dict[str, Any] = {}
        self._observers: list[Any] = []
        self._unopened: list[tuple[Any, Any]] = []

    @property
    def unspied(self) -> bool:
        return self._spy is None

    def ended(self, interrupted: Interrupted, state: Any) -> BaseException:
        """What an interrupt in the wait for a batch does where `state` stands: it ends this program, or goes on to the one that it is meant for."""
        return Unwind(state, interrupted.text) if interrupted.by is self.interrupt else interrupted

    def seen(self, state: Any) -> None:
        """`state` is the finished state of a tick, and every observer has seen it."""
        self.latest = state
        if self._spy is not None:
            self._spy(state)

    # --- hooks and observers

    def guard(self, part: Any, method: str, who: str) -> Guard:
        """What looks at the first calls of a function in this program."""
        guard = self._guards.get((id(part), method))
        if guard is None:
            guard = self._guards[id(part), method] = Guard(who)
        return guard

    def begin(self, loops: Iterable[Any], state: Any) -> Any:
        """Give each new hook its first memory, and note each new observer. Safe to call again: what has begun is left alone."""
        for loop in loops:
            if id(loop) not in self._begun:
                self._begun[id(loop)] = loop
                for hook in loop.hooks:
                    if isinstance(hook, Hook):
                        state = self._remember(hook, state)
        for observer in [observer for loop in loops for observer in loop.observers]:
            if not any(observer is known for known in self._observers):
                self._observers.append(observer)
                self._unopened.append((observer, state))
        return state

    def open(self) -> None:
        """Open the observers that are not open yet. Not before the first batch: a program that refuses its data must not cut a log."""
        while self._unopened:
            observer, state = self._unopened.pop(0)
            if hasattr(observer, "open"):
                with looked_at(f"`open` of an observer ({type(observer).__name__})", state):
                    observer.open(self, state)

    def _remember(self, hook: Hook, state: Any) -> Any:
        if self._hooks.setdefault(hook.name, hook) is not hook:
            raise ProgramError(f"two hooks are named {hook.name!r}: they would share one memory; give one of them another name=")
        if hook.name in state.memory:
            return state
        key = getattr(state, "rng", None) or Key(0)
        with looked_at(f"`init` of the hook {hook.name}", state), key.scope("init", hook.name):
            memory = hook.init(state)
        return state.replace(memory={**state.memory, hook.name: memory})

    @property
    def trained(self) -> bool:
        """Whether a loop of training steps has begun so far."""
        return any(loop.trains for loop in self._begun.values())

    def unclaimed(self, state: LoopState) -> None:
        """Say which memory of the state belongs to no hook of the program."""
        names = sorted(set(state.memory) - set(self._hooks))
        if names:
            warnings.warn(
                f"the state remembers hooks that the program does not show: {', '.join(names)}; their memory is kept. "
                "(A function that calls a loop says so by fnrun.wraps(loop))",
                stacklevel=5,
            )

    def flush(self) -> None:
        for observer in self._observers:
            if hasattr(observer, "flush"):
                observer.flush()

    def close(self, state: Any, reason: str | BaseException | None) -> None:
        """Close observers, those that save last, and streams; every one is closed, and what goes wrong there is raised (or noted on `reason`)."""
        failures: list[BaseException] = []

        def attempt(action: Callable[[], Any]) -> None:
            try:
                action()
            except BaseException as failure:
                failures.append(failure)

        if not isinstance(reason, BaseException):
            attempt(self.open)  # a program with nothing left to do
        unopened = [observer for observer, _ in self._unopened]
        opened = [observer for observer in self._observers if not any(observer is other for other in unopened)]
        for observer in sorted(opened, key=lambda o: getattr(o, "saves", False)):
            if getattr(observer, "saves", False):
                attempt(self.flush)
            if hasattr(observer, "close"):
                attempt(functools.partial(self._close, observer, state, reason))
        for live in self._live.values():  # when the state is saved: a worker that hangs may take its time
            attempt(getattr(live.iterator, "close", lambda: None))
        if not failures:
            return
        if not isinstance(reason, BaseException):
            raise failures[0]
        for failure in failures:
            reason.add_note(f"and while closing: {type(failure).__name__}: {failure}")

    def _close(self, observer: Any, state: Any, reason: Any) -> None:
        alive = state if why_dead(state) is None else None
        with looked_at(f"`close` of an observer ({type(observer).__name__})", alive):
            observer.close(state, reason)

    # --- streams

    def stream(self, value: Any, at: Here) -> tuple[str, Batches]:
        """The name and the stream of the data of the loop at `at`; a function that makes the stream is called once."""
        known = self._streams.get((at.path, at.depth))
        if known is None or known[0] is not value:
            made = self._make(value)
            try:
                stream = as_batches(made)
            except TypeError as error:
                raise TypeError(f"data at {at.path.removeprefix('/') or 'the top'!r}: {error}") from None
            known = self._streams[at.path, at.depth] = (value, stream)
        return known[1].name or at.path.removeprefix("/") or "data", known[1]

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
                getattr(live.iterator, "close", lambda: None)()
            key = getattr(state, "rng", Key(0)).fold_in("data", name)
            live = self._live[name] = Live(stream, stream.iterate(key, cursor, replay=replay), cursor.epoch, cursor.batch)
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
        self.data_seconds += time.perf_counter() - began
        live.epoch, live.batch = cursor.epoch if replay and after.batch == 0 else after.epoch, after.batch
        return batch, after
