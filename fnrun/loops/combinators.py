"""Loops over loops: their ticks are rounds of a step, or turns of their members."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import cycle
from typing import Any

from fnrun.core.context import OUTSIDE, loop_context
from fnrun.core.position import Cursor, Frame
from fnrun.core.words import a
from fnrun.loops.base import Loop
from fnrun.loops.exits import ProgramError, other_program
from fnrun.loops.program import LoopContext
from fnrun.loops.structure import AnyStep, Composed, added, prefixes, total_steps


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Repeat(Loop):
    step: AnyStep
    times: int | None
    until: Callable[[Any], bool] | None = None

    kind = "repeat"

    def inner(self) -> Iterable[tuple[str, AnyStep]]:
        return [("", self.step)]

    def title(self) -> str:
        return "repeat" + (f" {self.times} times" if self.times is not None else "") + (" until" if self.until else "")

    def length(self, state: Any, at: LoopContext) -> int | None:
        return self.times if self.until is None else None

    def done(self, state: Any, frame: Frame, at: LoopContext) -> bool:
        return (self.times is not None and frame.ticks >= self.times) or (self.until is not None and self.until(state))

    def turn(self, state: Any, x: Any, frame: Frame, at: LoopContext) -> tuple[Any, Any]:
        known = self.times if self.until is None else None
        return self.call_step(self.step, state, x, at._replace(depth=at.depth + 1, round=(frame.ticks, known)))

    def shortened(self, within: Callable[[str, AnyStep], AnyStep], **parts: Any) -> Any:
        return dataclasses.replace(self, step=within("", self.step), times=1, until=self.until and once(self.until), **parts)

    def prefixes(self) -> list[str]:
        return prefixes(self.step)

    def total_steps(self) -> int | None:
        inner = total_steps(self.step)
        return None if inner is None or self.times is None or self.until is not None else self.times * inner

    def shown(self, metrics: dict[str, Any], result: Any) -> dict[str, Any]:
        values = super().shown(metrics, result)
        if values and self.prefixes() == [""]:  # no member that may come in another round
            for who, metric in self.monitored():
                if metric not in values and "skipped" not in values:
                    raise ValueError(f"{who}: no step reports {metric!r}; reported: {', '.join(map(repr, values))}")
        return values


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Members(Loop):
    """Loops with named members, each over its own entry of the data."""

    steps: Mapping[str, AnyStep]

    def inner(self) -> Iterable[tuple[str, AnyStep]]:
        return self.steps.items()

    def shortened(self, within: Callable[[str, AnyStep], AnyStep], **parts: Any) -> Any:
        return dataclasses.replace(self, steps={name: within(name, step) for name, step in self.steps.items()}, **parts)

    def prefixes(self) -> list[str]:
        return [f"{name}/{rest}" for name, inner in self.steps.items() for rest in prefixes(inner)]

    def length(self, state: Any, at: LoopContext) -> int | None:
        place = f"data at {at.path}" if at.path else "the data"
        if not isinstance(at.data, Mapping):
            raise TypeError(f"{place} mirrors the {self.kind}: a mapping with the keys {list(self.steps)}, not {a(type(at.data).__name__)}")
        if missing := [name for name in self.steps if name not in at.data]:
            raise ProgramError(f"{place} has nothing for {missing}; the {self.kind} has {list(self.steps)}, the data {list(at.data)}")
        return self._count()

    def _count(self) -> int:
        raise NotImplementedError

    def _member(self, frame: Frame) -> str:
        raise NotImplementedError

    def take(self, state: Any, frame: Frame, at: LoopContext) -> tuple[Any, dict[str, Cursor] | None, str | None]:
        member = self._member(frame)
        return at.data[member], None, member

    def turn(self, state: Any, x: Any, frame: Frame, at: LoopContext) -> tuple[Any, Any]:
        name = str(frame.member)
        state, metrics = self.call_step(self.steps[name], state, x, at._replace(depth=at.depth + 1, path=f"{at.path}/{name}"))
        return state, {f"{name}/{k}": v for k, v in metrics.items()} if isinstance(metrics, Mapping) else {name: metrics}

    def total(self, totals: Any, result: Any, examples: int) -> Any:
        return {**(totals or {}), **result}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class InOrder(Members):
    kind = "sequence"
    end = "(end)"

    def total_steps(self) -> int | None:
        return added(map(total_steps, self.steps.values()))

    def _count(self) -> int:
        return len(self.steps)

    def done(self, state: Any, frame: Frame, at: LoopContext) -> bool:
        if frame.member is not None and frame.member != self.end and frame.member not in self.steps:
            raise other_program(state, at.program.loop)
        return frame.member == self.end or not self.steps

    def _member(self, frame: Frame) -> str:
        return frame.member or next(iter(self.steps))

    def next_member(self, frame: Frame) -> str | None:
        names = [*self.steps, self.end]
        return names[names.index(str(frame.member)) + 1]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Workflow(Members):
    phases: Sequence[tuple[str, int]]
    times: int

    kind = "workflow"

    def title(self) -> str:
        return f"workflow {' '.join(f'{name}*{n}' for name, n in self.phases)}, {self.times} times"

    @functools.cached_property
    def _order(self) -> list[str]:
        """The member of each tick: the phases in turn, until the first has run `times` times; what is behind it still has its turn."""
        order: list[str] = []
        first = self.phases[0][0]
        for name, n in cycle(self.phases):
            left = self.times - order.count(first)
            if name == first and not left:
                return order
            order += [name] * (min(n, left) if name == first else n)
        return order

    def shortened(self, within: Callable[[str, AnyStep], AnyStep], **parts: Any) -> Any:
        return super().shortened(within, phases=tuple((member, 1) for member, _ in self.phases), times=1, **parts)

    def total_steps(self) -> int | None:
        return added(total_steps(self.steps[name]) for name in self._order)

    def _count(self) -> int:
        return len(self._order)

    def done(self, state: Any, frame: Frame, at: LoopContext) -> bool:
        return frame.ticks >= self._count()

    def _member(self, frame: Frame) -> str:
        return self._order[frame.ticks]


@dataclasses.dataclass(frozen=True, eq=False)
class Every(Composed):
    """Not a loop: it has no frame, and lets the rounds of the nearest repeat through to its step or not."""

    intervals: tuple[tuple[int, int], ...]
    step: AnyStep
    begin: int
    last: bool

    def __call__(self, state: Any, x: Any) -> tuple[Any, Any]:
        at = loop_context.get()
        if at is None or at is OUTSIDE or at.round is None:
            return self.step(state, x)
        # Where a loop within is open it goes on, whatever the round.
        if len(state.position.frames) > at.depth or self._works(*at.round):
            return self.step(state, x)
        return state, {}

    def _works(self, index: int, times: int | None) -> bool:
        number = index + 1
        n = next((n for start, n in reversed(self.intervals) if number >= start), None)
        return (number >= self.begin and n is not None and number % n == 0) or (self.last and number == times)

    def inner(self) -> Iterable[tuple[str, AnyStep]]:
        return [("", self.step)]

    def title(self) -> str:
        plain = len(self.intervals) == 1
        when = f"each {self.intervals[0][1]}" if plain else ", ".join(f"each {n} from {start}" for start, n in self.intervals)
        return f"every round, {when}" + (f", from {self.begin}" if self.begin > 1 else "") + (", and the last" if self.last else "")

    def prefixes(self) -> list[str]:
        return prefixes(self.step)

    def total_steps(self) -> int | None:
        return 0 if total_steps(self.step) == 0 else None

    def shortened(self, within: Callable[[str, AnyStep], AnyStep], **parts: Any) -> Any:
        return dataclasses.replace(self, intervals=((0, 1),), begin=1, step=within("", self.step))  # it works now


def once(until: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """The user's condition is asked, and whatever it says there is one round."""

    def asked(state: Any) -> bool:
        until(state)
        return False

    return asked
