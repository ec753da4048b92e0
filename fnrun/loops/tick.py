"""An open loop and its ticks, in phases.

    enter       the frame is pushed, or found where a restored state has it
    take        the next x; hooks act `before`
    turn        the step within
    advance     its metrics into the totals, its examples counted, the position moved on
    transform   hooks act `after`
    show        observers look; those that save last, behind a flush
    leave       the frame is popped

A stop or an interrupt is heeded between ticks: it unwinds every open loop and leaves the frames standing.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from fnrun.core.context import OUTSIDE, loop_context
from fnrun.core.donation import without_donated
from fnrun.core.position import Cursor, Frame, Position
from fnrun.core.waiting import Interrupted
from fnrun.loops import guarded
from fnrun.loops.exits import ProgramExit, other_program
from fnrun.loops.program import LoopContext
from fnrun.loops.ticking import Ticking
from fnrun.loops.unobserved import run_unobserved
from fnrun.steps import PureStep


@dataclasses.dataclass(slots=True)
class Tick:
    """What the tick at work has found so far."""

    before: Any  # the state that it began with
    frame: Frame  # the loop's own, as it is during the tick
    fresh: bool  # it begins here: no loop within is open, in the middle of which a restored state stands
    x: Any = None
    streams: dict[str, Cursor] | None = None  # where the streams stand after it, of those that it moves
    result: Any = None  # of the step within: its metrics, or its outputs
    metrics: dict[str, Any] = dataclasses.field(default_factory=dict)  # without what predicting loops have put out
    values: dict[str, Any] = dataclasses.field(default_factory=dict)  # what hooks and observers are given
    probe: guarded.Probe | None = None  # where users' own hooks or observers act


class OpenLoop:
    """One call of a loop in a program: what stays the same in it, and its ticks."""

    def __init__(self, loop: Ticking, at: LoopContext) -> None:
        self.loop, self.at = loop, at
        self.program, self.depth = at.program, at.depth
        self.frame = Frame(loop.kind, at.path.removeprefix("/"), len(at.opened or ()))  # as it begins
        self.name = self.frame.name
        if at.opened is not None:
            at.opened.append(self.name)

    def run(self, state: Any) -> tuple[Any, Any]:
        """The state and the metrics at the loop's end. Raises ProgramExit where a hook or somebody outside ends it before."""
        state = self._enter(state)
        token = loop_context.set(OUTSIDE)  # a loop that a hook or an observer calls is no part of this program
        looked_at = False  # the first tick of a call is always one by itself: what is wrong shows there
        try:
            while (tick := self._begin(state)) is not None:
                if looked_at and (ahead := self.loop.unobserved(state, tick.frame, self.at)):
                    state = run_unobserved(self.loop, state, tick.frame, self.at, ahead, self.gatherers)
                    continue
                looked_at = True
                state = self._take(state, tick)
                state = self._turn(state, tick)
                state = self._advance(state, tick)
                state = self._transform(state, tick)
                self._show(state, tick)
        finally:
            loop_context.reset(token)
        return self._leave(state)

    def _enter(self, state: Any) -> Any:
        loop, frames, depth = self.loop, state.position.frames, self.depth
        if len(frames) == depth:
            begun_with = frames[0].folds.get(_carried(self.name), {}) if depth and loop.trains else {}
            state = framed(state, (*frames, dataclasses.replace(self.frame, folds=begun_with)))
        elif frames[depth].name != self.name or (
            loop.over_data and len(frames) > depth + 1 and all(isinstance(s, PureStep) for _, s in loop.inner())
        ):
            raise other_program(state, self.program.loop)
        self.at = loop.enter(self.at)
        self.program.lengths[self.name] = loop.length(state, self.at)
        hooks, observers = loop.hook_contracts, loop.observer_contracts
        self.befores = guarded.befores(self.program, hooks, self.name)
        self.afters = guarded.afters(self.program, hooks, self.name)
        self.observing = [*zip(guarded.observing(self.program, observers, self.name), (o.saves for o in observers), strict=True)]
        self.gatherers = [(str(observer.name), observer) for observer in observers if observer.fold is not None]
        self.folding = [(name, guarded.folding(self.program, observer, self.name)) for name, observer in self.gatherers]
        self.of_users = guarded.of_users(hooks, observers)
        self.watched = bool(hooks or observers)
        return state

    def _begin(self, state: Any) -> Tick | None:
        """The next tick, None at the loop's end."""
        interrupt = self.program.interrupt
        if reason := state.stop or (interrupt() if interrupt is not None else None):
            raise ProgramExit(state, reason)
        frames = state.position.frames
        tick = Tick(state, frames[self.depth], len(frames) == self.depth + 1)
        return None if tick.fresh and self.loop.done(state, tick.frame, self.at) else tick

    def _take(self, state: Any, tick: Tick) -> Any:
        try:
            tick.x, tick.streams, member = self.loop.take(state, tick.frame, self.at)
        except Interrupted as interrupted:
            raise self.program.ended(interrupted, state) from interrupted.__cause__
        if member != tick.frame.member:
            tick.frame = dataclasses.replace(tick.frame, member=member)
            frames = state.position.frames
            state = framed(state, (*frames[: self.depth], tick.frame, *frames[self.depth + 1 :]))
        return guarded.applied(self.befores, state, tick.x) if self.befores and tick.fresh else state

    def _turn(self, state: Any, tick: Tick) -> Any:
        if self.loop.over_data:
            self.program.observers.open(self.program)
        if self.gatherers:
            if not tick.fresh:  # a fold reads its own loop's frame, whatever was open within when the state was saved
                tick.before = framed(tick.before, tick.before.position.frames[: self.depth + 1])
            if self.at.owner is not None:
                tick.before = without_donated(tick.before)
        state, tick.result = self.loop.turn(state, tick.x, tick.frame, self.at)
        if len(state.position.frames) != self.depth + 1:
            raise other_program(state, self.program.loop)
        return state

    def _advance(self, state: Any, tick: Tick) -> Any:
        loop, frame, position = self.loop, tick.frame, state.position
        taken, examples = loop.ticks_of(tick.x), loop.examples_of(tick.x, tick.result)
        self.program.examples += examples
        tick.metrics = loop.metrics_of(tick.result) if self.watched else {}
        folds = {name: fold(state, frame.folds.get(name), tick.before, tick.metrics, examples) for name, fold in self.folding}
        if self.depth == 0 and (carried := position.frames[0].folds):
            folds = {**carried, **folds}
        totals = loop.total(frame.totals, tick.result, examples)
        ended = Frame(frame.kind, frame.path, frame.nth, frame.ticks + taken, totals, folds, loop.next_member(frame))
        streams = position.streams if tick.streams is None else {**position.streams, **tick.streams}
        return state.replace(position=Position((*position.frames[:-1], ended), streams, position.ticks + loop.over_data * taken))

    def _transform(self, state: Any, tick: Tick) -> Any:
        if not self.watched:
            return state
        self.program.observers.open(self.program)
        tick.values = self.loop.shown(tick.metrics, tick.result)
        tick.probe = guarded.Probe(state) if self.of_users else None
        state = guarded.applied(self.afters, state, tick.values)
        if len(state.position.frames) != self.depth + 1:
            raise ValueError(
                f"a hook of {self.loop.title()} returned a state with another position, as another loop left it. Return the state that "
                "the hook was given, changed by state.replace(...)"
            )
        return state

    def _show(self, state: Any, tick: Tick) -> None:
        for observe, saves in self.observing:
            if saves:
                self.program.observers.flush()
            observe(state, tick.values)
        if tick.probe is not None:
            tick.probe.check(self.of_users)
        self.program.seen(state)

    def _leave(self, state: Any) -> tuple[Any, Any]:
        frames = state.position.frames
        ended, around = frames[self.depth], frames[: self.depth]
        carried = {name: o.carry(ended.folds.get(name)) for name, o in self.gatherers if o.carry is not None} if self.loop.trains else {}
        if around and carried:  # the outermost loop keeps it for this one's next round
            around = (dataclasses.replace(around[0], folds={**around[0].folds, _carried(self.name): carried}), *around[1:])
        return self.loop.leave(framed(state, around), self.at), self.loop.result(ended.totals)


def framed(state: Any, frames: tuple[Frame, ...]) -> Any:
    """The state with these open frames."""
    position = state.position
    return state.replace(position=Position(frames, position.streams, position.ticks))


def _carried(loop: str) -> str:
    return f"carried by {loop}"
