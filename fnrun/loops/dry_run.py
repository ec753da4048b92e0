"""A dry run: every loop of a program for one tick, with its hooks, and nothing written."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

from fnrun.core.inplace import SMALL, strictly
from fnrun.core.position import Position
from fnrun.loops.structure import Composed


@dataclasses.dataclass
class DryRun:
    """What ran: a loop with the seconds that its one tick took, the names of its metrics, and the loops within. `print` draws it."""

    name: str
    title: str
    seconds: float = 0.0
    metrics: tuple[str, ...] = ()
    inner: list[DryRun] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        rows = list(self._rows(0))
        width = max(len(left) for left, _, _ in rows)
        return "\n".join(f"{left:<{width}}  {seconds:>8.3f} s  {metrics}".rstrip() for left, seconds, metrics in rows)

    def _rows(self, depth: int) -> Iterator[tuple[str, float, str]]:
        yield "  " * depth + (f"{self.name}: " if self.name else "") + self.title, self.seconds, ", ".join(self.metrics)
        for each in self.inner:
            yield from each._rows(depth + 1)


class _Clock:
    """An observer in each loop that notes when a tick ended. It began with the first tick within it, or where the one before ended."""

    def __init__(self) -> None:
        self.last = time.perf_counter()

    def of(self, note: DryRun) -> Callable[[Any, dict[str, Any]], None]:
        def observe(state: Any, metrics: dict[str, Any]) -> None:
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            now = time.perf_counter()
            # Loops within are over before the one around them; they and what comes after them are its time.
            note.seconds = now - self.last + sum(each.seconds for each in note.inner)
            note.metrics = tuple(dict.fromkeys((*note.metrics, *metrics)))  # a sequence's tick has those of one member
            self.last = now

        return observe


def dry_run(loop: Any, state: Any, data: Any) -> DryRun:
    """`loop` with every loop cut to one tick: see `Loop.dry_run`."""
    clock, root = _Clock(), DryRun("", "")
    with warnings.catch_warnings(action="ignore"):  # what is to be said of a loop was said when it was made
        short = _short("", loop, root, clock)
    clock.last = time.perf_counter()
    with strictly(SMALL):
        short(state.replace(position=Position(streams=state.position.streams, ticks=state.position.ticks), stop=None), data)
    return root.inner[0]


def _short(name: str, step: Any, around: DryRun, clock: _Clock) -> Any:
    """The step with one tick for each loop that stands in it openly; its notes go under `around`."""
    if not isinstance(step, Composed):  # a step, or a function that may call loops
        return step
    if not step.is_loop:  # `every` is no loop and has no tick of its own
        return step.shortened(lambda inner_name, inner: _short(name, inner, around, clock))
    note = DryRun(name, step.title())
    around.inner.append(note)
    innermost = [hook.innermost for hook in step.hook_contracts]
    # Of the library's own the contract alone: a log may be an observer beside, and here it is not.
    hooks, observers = (*(hook if hook.ours else hook.given for hook in innermost), _go_on), (clock.of(note),)
    return step.shortened(lambda inner_name, inner: _short(inner_name, inner, note, clock), hooks=hooks, observers=observers)


def _go_on(state: Any, metrics: dict[str, Any]) -> Any:
    """A stop that a hook asks for would keep what comes after it from its turn."""
    return state if state.stop is None else state.replace(stop=None)
