"""A program at work: one call of a loop from outside, the lives of its hooks and observers in it, and where in it a loop is called."""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

from fnrun.core.context import tick_listener
from fnrun.core.donation import Owner, deleted_reason
from fnrun.core.inplace import Guard, looked_at
from fnrun.core.key import Key, Unlocked
from fnrun.core.state import LoopState
from fnrun.core.waiting import Interrupted
from fnrun.data import Batches
from fnrun.loops.contracts import HookContract, ObserverContract
from fnrun.loops.exits import ProgramError, ProgramExit
from fnrun.loops.streams import Streams


class Program:
    """One call of a loop by itself. What an observer's `open` is given.

    - `loop`: the outermost one.
    - `examples`: how many went through the loops in this call.
    - `data_seconds`: waited for batches in this call.
    - `lengths`: how many ticks an open loop will have, by `frame.name`; None where that is not known. It is at its last tick where
      `frame.ticks == program.lengths[frame.name]`.
    """

    def __init__(self, loop: Any, state: LoopState, interrupt: Callable[[], str | None] | None) -> None:
        self.loop = loop
        self.interrupt = interrupt
        self.latest: Any = state  # the finished state of the newest tick that every observer has seen
        self.examples = 0
        self.lengths: dict[str, int | None] = {}
        self.streams = Streams()
        self.observers = ObserverLives()
        self.opaque: dict[int, Any] = {}  # functions by their ids: the loops that they call show when they are called
        self.called: set[int] = set()  # the ids of the steps that were called, but for those that are known to hold no loop
        self._hooks: dict[str, Any] = {}  # by the name of their memory
        self._begun: dict[int, Any] = {}  # the loops, by id
        self._guards: dict[tuple[int, str], Guard] = {}  # by the id of a part, which its loop holds, and its method
        self._listener = tick_listener.get()

    @property
    def data_seconds(self) -> float:
        return self.streams.seconds

    @property
    def listened_to(self) -> bool:
        """Whether somebody wants to see the state of each tick."""
        return self._listener is not None

    @property
    def trained(self) -> bool:
        """Whether a loop of training steps has begun so far."""
        return any(loop.trains for loop in self._begun.values())

    def seen(self, state: Any) -> None:
        """`state` is the finished state of a tick, and every observer has seen it."""
        self.latest = state
        if self._listener is not None:
            self._listener(state)

    def ended(self, interrupted: Interrupted, state: Any) -> BaseException:
        """What to raise where an interrupt ended the wait for a batch: the program's exit, or the interrupt of a program around."""
        return ProgramExit(state, interrupted.text) if interrupted.by is self.interrupt else interrupted

    def guard(self, part: Any, method: str, who: str) -> Guard:
        """What looks at the first calls of a function in this program."""
        guard = self._guards.get((id(part), method))
        if guard is None:
            guard = self._guards[id(part), method] = Guard(who)
        return guard

    def begin(self, loops: Iterable[Any], state: Any) -> Any:
        """Give each new hook its first memory, and note each new observer. Safe to call again: what has begun is left alone."""
        new = [loop for loop in loops if id(loop) not in self._begun]
        for loop in new:
            self._begun[id(loop)] = loop
            for hook in loop.hook_contracts:
                if hook.init is not None:
                    state = self._remember(hook, hook.init, state)
        for observer in [observer for loop in new for observer in loop.observer_contracts]:
            self.observers.note(observer, state)
        return state

    def _remember(self, hook: HookContract, init: Callable[[Any], Any], state: Any) -> Any:
        name = str(hook.name)
        if self._hooks.setdefault(name, hook.given) is not hook.given:
            raise ProgramError(f"two hooks are named {name!r}: they would share one memory; give one of them another name=")
        if name in state.memory:
            return state
        key = getattr(state, "rng", None) or Key(0)
        with looked_at(f"`init` of the hook {name}", state), key.scope("init", name):
            memory = init(state)
        return state.replace(memory={**state.memory, name: memory})

    def warn_unclaimed(self, state: LoopState) -> None:
        """Say which memory of the state belongs to no hook of the program."""
        names = sorted(set(state.memory) - set(self._hooks))
        if names:
            warnings.warn(
                f"the state remembers hooks that the program does not show: {', '.join(names)}; their memory is kept. "
                "(A function that calls a loop says so by fnrun.wraps(loop))",
                stacklevel=5,
            )

    def close(self, state: Any, reason: str | BaseException | None) -> None:
        """Close observers and streams; every one is closed, and what goes wrong there is raised (or noted on `reason`)."""
        failures: list[BaseException] = []
        # Streams when the state is saved: a worker that hangs may take its time.
        for close in itertools.chain(self.observers.closing(self, state, reason), self.streams.closing()):
            try:
                close()
            except BaseException as failure:
                failures.append(failure)
        if not failures:
            return
        if not isinstance(reason, BaseException):
            raise failures[0]
        for failure in failures:
            reason.add_note(f"and while closing: {type(failure).__name__}: {failure}")


class ObserverLives:
    """The observers of a program, each once: opened with its first batch, flushed before one saves, closed at its end."""

    def __init__(self) -> None:
        self._known: list[ObserverContract] = []
        self._unopened: list[tuple[ObserverContract, Any]] = []

    def note(self, observer: ObserverContract, state: Any) -> None:
        if not any(observer.given is known.given for known in self._known):
            self._known.append(observer)
            self._unopened.append((observer, state))

    def open(self, program: Program) -> None:
        """Open those that are not open yet. Not before the first batch: a program that refuses its data must not cut a log."""
        while self._unopened:
            observer, state = self._unopened.pop(0)
            if observer.open is not None:
                with looked_at(f"`open` of an observer ({type(observer.given).__name__})", state), keyed(observer, "open", state):
                    observer.open(program, state)

    def flush(self) -> None:
        for observer in self._known:
            if observer.flush is not None:
                observer.flush()

    def closing(self, program: Program, state: Any, reason: str | BaseException | None) -> Iterable[Callable[[], None]]:
        """What is to be called, whatever the calls before it raise: those that save come last, behind a flush."""
        if not isinstance(reason, BaseException):
            yield functools.partial(self.open, program)  # a program with nothing left to do
        unopened = [observer.given for observer, _ in self._unopened]
        opened = [observer for observer in self._known if not any(observer.given is other for other in unopened)]
        for observer in sorted(opened, key=lambda observer: observer.saves):
            if observer.saves:
                yield self.flush
            if observer.close is not None:
                yield functools.partial(self._close, observer, observer.close, state, reason)

    def _close(self, observer: ObserverContract, close: Callable[[Any, Any], Any], state: Any, reason: Any) -> None:
        alive = state if deleted_reason(state) is None else None
        with looked_at(f"`close` of an observer ({type(observer.given).__name__})", alive), keyed(observer, "close", alive):
            close(state, reason)


def keyed(observer: ObserverContract, method: str, state: Any) -> AbstractContextManager[Any]:
    """What a call of a user's observer draws from: generators of its own. Other threads may use theirs: it may wait for one at the end."""
    key = getattr(state, "rng", None) or Key(0)
    return nullcontext() if observer.ours else Unlocked(key.fold_path(method, observer.name or "observer"), False)


class LoopContext(NamedTuple):
    """Where in a program a loop is called."""

    program: Program
    data: Any = None  # what the loop was called with
    depth: int = 0  # the number of open loops around
    path: str = ""  # the names of the sequences' members around, "/train"
    round: tuple[int, int | None] | None = None  # of the nearest repeat: its index, and how many there are where that is known
    over_batch: bool = False  # within a loop over data: what comes down is one of its batches
    source: tuple[str, Batches] | None = None  # of a loop over data: the name and the stream
    owner: Owner | None = None  # of the states that a loop donates; behind a function None: it may want the old state
    opened: list[str] | None = None  # the loops that the function around has opened so far: it may open several, one after the other
