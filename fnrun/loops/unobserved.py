"""Ticks that nobody looks at: where no hook acts and no observer is due, steps follow each other, and the loop's own work is done once.

The state afterwards is that of tick by tick, bit for bit. A small program takes 1.13 times as long without it (benchmarks/overhead.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from fnrun.core.donation import deleted_reason
from fnrun.core.position import Frame, Position
from fnrun.core.waiting import Interrupted
from fnrun.loops import totals as running
from fnrun.loops.contracts import ObserverContract
from fnrun.loops.exits import ProgramExit
from fnrun.loops.program import LoopContext
from fnrun.metrics.by_name import rates_last
from fnrun.steps import PureStep

#: So many ticks at most follow each other.
LONGEST = 64


class Before(NamedTuple):
    """The state before a tick, for observers that fold and look at no more."""

    step: int
    position: Position
    memory: Any


def interval(loop: Any) -> int:
    """Each so many training steps somebody looks; 1 where a hook acts, or an observer that may look at each state."""
    step = loop.step
    reads_step_only = isinstance(step, PureStep) and step.ignores_position
    if loop.hook_contracts or not reads_step_only or not all(observer.idle_between for observer in loop.observer_contracts):
        return 1
    return math.gcd(*(observer.every or 1 for observer in loop.observer_contracts)) if loop.observer_contracts else LONGEST


def run_unobserved(
    loop: Any, state: Any, frame: Frame, at: LoopContext, ticks: int, gatherers: Sequence[tuple[str, ObserverContract]]
) -> Any:
    """The state after so many ticks of a loop of training steps, or as many as the pass has. The observers that fold get them all at once.

    An interrupt or an exception ends the run of ticks early.
    """
    program = at.program
    name, stream = loop.stream(at)
    position, replay, cursor = state.position, loop.passing(at), loop.cursor(state, frame, at)
    before, done = Before(state.step, position, state.memory), list[tuple[Any, int]]()

    def finished(state: Any) -> Any:
        gathered = {name: o.fold_each(frame.folds.get(name), before, done) for name, o in gatherers if o.fold_each is not None}
        totals = running.fold_each(frame.totals, [(rates_last(metrics), n) for metrics, n in done])
        program.examples += sum(examples for _, examples in done)
        new = Frame(frame.kind, frame.path, frame.nth, frame.ticks + len(done), totals, gathered if done else frame.folds, frame.member)
        streams = {**position.streams, name: cursor}
        state = state.replace(position=Position((*position.frames[: at.depth], new), streams, position.ticks + len(done)))
        program.seen(state)
        return state

    try:
        while len(done) < ticks and (not done or cursor.batch or not loop.ends_with_pass):
            if done and program.interrupt is not None and (reason := program.interrupt()):  # before the first it was asked already
                raise ProgramExit(finished(state), reason)
            batch, after = program.streams.next_batch(name, stream, state, cursor, replay=replay)
            state, metrics = loop.stepped(state, batch, at)
            done.append((metrics, loop.examples_of(batch, metrics)))
            cursor = after
    except ProgramExit:
        raise
    except Interrupted as interrupted:
        raise program.ended(interrupted, finished(state) if done and deleted_reason(state) is None else state) from interrupted.__cause__
    except BaseException:
        if done and deleted_reason(state) is None:
            finished(state)
        raise
    return finished(state)
