"""A dry run: every loop of a program for one tick, with its hooks, and nothing written."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

from fnrun.state import Position


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
    """An observer in each loop, which notes when a tick ended; the first tick within a loop, or the end of the one before, is when it began."""

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


def dry_run(loop: Any, state: Any, data: Any, epoch_as: Callable[..., Any]) -> DryRun:
    """`loop` with every loop cut to one tick: see `Loop.dry_run`. `epoch_as(step, 1, hooks=, observers=, donate=)` makes an `epoch_loop` of one step."""
    clock, root = _Clock(), DryRun("", "")
    with warnings.catch_warnings(action="ignore"):  # what is to be said of a loop was said when it was made
        short = _short("", loop, root, clock, epoch_as)
    clock.last = time.perf_counter()
    short(state.replace(position=Position(streams=state.position.streams, ticks=state.position.ticks), stop=None), data)
    return root.inner[0]


def _short(name: str, given: Any, around: DryRun, clock: _Clock, epoch_as: Callable[..., Any]) -> Any:
    """The step `given` with one tick for each loop that stands in it openly; its notes go under `around`."""
    if not dataclasses.is_dataclass(given) or not hasattr(given, "title"):  # a step, or a wrapper that may hold loops
        return given
    step: Any = given
    if hasattr(step, "intervals"):  # `every`: it works now
        return dataclasses.replace(step, intervals=((0, 1),), begin=1, step=_short(name, step.step, around, clock, epoch_as))
    kind = step.kind
    note = DryRun(name, step.title())
    around.inner.append(note)
    within: dict[str, Any] = {"hooks": (*map(_always, step.hooks), _go_on), "observers": (clock.of(note),)}
    match kind:
        case "epoch_loop":
            return epoch_as(step.step, 1, donate=step.donate, hooks=list(within["hooks"]), observers=list(within["observers"]))
        case "step_loop":
            within |= {"steps": step.fused_steps, "until_step": None}
        case "eval_loop" | "predict_loop":
            within |= {"steps": 1}
            del within["hooks"]  # these have none
        case "repeat":
            within |= {"times": 1, "until": None if step.until is None else _once(step.until)}
            within |= {"step": _short("", step.step, note, clock, epoch_as)}
        case "sequence" | "workflow":
            within |= {"steps": {member: _short(member, each, note, clock, epoch_as) for member, each in step.steps.items()}}
            if kind == "workflow":
                within |= {"phases": tuple((member, 1) for member, _ in step.phases), "times": 1}
    return dataclasses.replace(step, **within)


def _always(hook: Any) -> Any:
    """The hook itself of one that acts now and then."""
    return _always(hook.hook) if hasattr(hook, "condition") and hasattr(hook, "hook") else hook


def _go_on(state: Any, metrics: dict[str, Any]) -> Any:
    """A stop that a hook asks for would keep what comes after it from its turn."""
    return state if state.stop is None else state.replace(stop=None)


def _once(until: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """The user's condition is asked, and whatever it says there is one round."""

    def asked(state: Any) -> bool:
        until(state)
        return False

    return asked
