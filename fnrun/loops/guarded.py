"""What a loop calls of its user's: hooks, observers, functions around steps.

They may draw from torch's ambient generators: these are seeded from the state's key and the place in the program, and put back. So a
resumed run draws the same, and no other generator moves. They may not write to what they are given: their first calls are looked at.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from fnrun.core import inplace
from fnrun.core.inplace import Guard, InPlaceError
from fnrun.core.key import Key, Scope, Unlocked
from fnrun.core.position import is_due
from fnrun.core.state import is_state
from fnrun.core.words import kind
from fnrun.data import ambient
from fnrun.loops.contracts import HookContract, ObserverContract
from fnrun.loops.program import Program
from fnrun.loops.structure import title


def applied(hooks: Iterable[tuple[Callable[[Any, Any], Any], str]], state: Any, given: Any) -> Any:
    """The state after these hooks, each with its words. Raises TypeError, with whose it is, where one returns no state."""
    for hook, who in hooks:
        kept, state = type(state), hook(state, given)
        if type(state) is not kept and not is_state(state):
            hint = "an observer is what only looks: observers=[...]" if state is None else "and no metrics"
            raise TypeError(f"{who} returned {kind(state)}: a hook returns the state, changed by state.replace(...) or as it came; {hint}")
    return state


class Guarded:
    """A method of a hook or of an observer as the loop calls it: `(state, given) -> result`."""

    __slots__ = ("call", "every", "guard", "label", "observes", "what")

    def __init__(
        self,
        call: Callable[[Any, Any], Any],
        guard: Guard,
        what: str,
        label: tuple[Any, ...] | None,
        *,
        observes: bool = False,
        every: int | None = None,
    ) -> None:
        self.call, self.guard, self.what, self.label, self.observes, self.every = call, guard, what, label, observes, every

    def __call__(self, state: Any, given: Any) -> Any:
        guard = self.guard
        if not guard.on or (self.every is not None and not is_due(state, self.every)):
            if self.label is None:
                return self.call(state, given)
            with scope(state, self.label):
                result = self.call(state, given)
            if self.observes and result is not None:
                self._refuse_state(result, state)
            return result
        marks = guard.look({self.what: given}, state) if self.what != "batch" else guard.look(state)
        if self.label is None:
            result = self.call(state, given)
        else:
            with scope(state, self.label), HostGenerators("" if self.observes else guard.who):
                result = self.call(state, given)
        guard.check(marks)
        if self.observes:
            self._refuse_state(result, state)
        return result

    def _refuse_state(self, result: Any, state: Any) -> None:
        if result is not state and is_state(result):
            raise TypeError(f"{self.guard.who} returned a state, which an observer cannot change: it is a hook, hooks=[...]")


def scope(state: Any, label: tuple[Any, ...]) -> Scope:
    """The generators of what acts at the end of a tick, or before one."""
    position = state.position
    key = getattr(state, "rng", None) or Key(0)
    return Scope(key.fold_path(*label, position.ticks, position.frames[-1].ticks if position.frames else 0), False)


class HostGenerators:
    """Warns of a function that draws from Python's or NumPy's generator, which is seeded by nobody; none where `who` is empty.

    A call in which modules were imported tells nothing: some draw as they are.
    """

    __slots__ = ("modules", "saved", "who")

    def __init__(self, who: str) -> None:
        self.who = who

    def __enter__(self) -> None:
        self.modules = len(sys.modules)
        self.saved = [(generator, generator.save()) for generator in ambient.generators()[1:]] if self.who else []

    def __exit__(self, kind: Any, *exc: object) -> None:
        if kind is not None or len(sys.modules) != self.modules:
            return
        if moved := [generator.what for generator, saved in self.saved if generator.moved(saved)]:
            warnings.warn(
                f"{self.who} draws from {' and '.join(moved)}, which is not keyed by the state: two calls differ and a resumed run is "
                "another run. Use torch's, which is, or random.Random(state.rng.fold_in(state.step).bits)",
                stacklevel=5,
            )


def befores(program: Program, hooks: Iterable[HookContract], loop: str) -> list[tuple[Any, str]]:
    """What hooks do before a tick, of those that do something: `(state, batch) -> state`, each with its words."""
    calls: list[tuple[Any, str]] = []
    for i, hook in enumerate(hooks):
        if (before := hook.before) is not None:
            inner, who = hook.innermost, f"`before` of the hook {hook.title}"
            if not _unguarded(inner):
                before = Guarded(before, program.guard(hook.given, "before", who), "batch", None if inner.ours else ("before", loop, i))
            calls.append((before, who))
    return calls


def afters(program: Program, hooks: Iterable[HookContract], loop: str) -> list[tuple[Any, str]]:
    """What each hook does at the end of a tick: `(state, metrics) -> state`, each with its words."""
    return [(_after(program, hook, ("hook", loop, i)), f"the hook {hook.innermost.title}") for i, hook in enumerate(hooks)]


def _after(program: Program, hook: HookContract, label: tuple[Any, ...]) -> Any:
    if hook.held is not None:  # what is held back is looked at when it acts
        return hook.acting(_after(program, hook.held, label))
    if _unguarded(hook):
        return hook.after
    guard = program.guard(hook.given, "after", f"the hook {hook.title}")
    return Guarded(hook.after, guard, "metrics", None if hook.ours else label)


def observing(program: Program, observers: Iterable[ObserverContract], loop: str) -> list[Any]:
    """What each observer does at the end of a tick: `(state, metrics) -> None`."""
    calls: list[Any] = []
    for i, observer in enumerate(observers):
        if _unguarded(observer):
            calls.append(observer.observe)
            continue
        guard = program.guard(observer.given, "", f"the observer {observer.title}")
        label = None if observer.ours else ("observer", loop, i)
        calls.append(Guarded(observer.observe, guard, "metrics", label, observes=True, every=observer.every))
    return calls


def folding(program: Program, observer: ObserverContract, loop: str) -> Callable[..., Any]:
    """Its `fold`, as `(state, folded, before, metrics, examples) -> folded`, where `state` is that after the step."""
    fold = observer.fold
    assert fold is not None
    if _unguarded(observer):
        return lambda state, folded, before, metrics, examples: fold(folded, before, metrics, examples)
    guard = program.guard(observer.given, "fold", f"`fold` of the observer {observer.title}")

    def guarded(state: Any, folded: Any, before: Any, metrics: Any, examples: int) -> Any:
        marks = guard.look({"metrics": metrics}, state)
        if observer.ours:
            gathered = fold(folded, before, metrics, examples)
        else:
            with scope(state, ("fold", loop, str(observer.name))):
                gathered = fold(folded, before, metrics, examples)
        guard.check(marks)
        return gathered

    return guarded


def function(program: Program, step: Any, state: Any, x: Any, place: tuple[Any, ...], *, alone: bool) -> Any:
    """A call of a function of the type of a step, keyed by `place`. It has the generators `alone` where it calls no loops."""
    path = (getattr(state, "rng", None) or Key(0)).fold_path("function", *place)
    guard = program.guard(step, "", title(step))
    if not guard.on:
        with Scope(path, False) if alone else Unlocked(path, False):
            return step(state, x)
    marks = guard.look(state)
    with Scope(path, False) if alone else Unlocked(path, False), HostGenerators(guard.who if alone else ""):
        result = step(state, x)
    guard.check(marks)
    return result


def _unguarded(part: HookContract | ObserverContract) -> bool:
    """Whether a part is called as it is: the library's own, which draw nothing and are looked at by its tests."""
    return part.ours and not inplace.strict()


class Probe:
    """One tensor of a state, in every tick: who writes to all parameters late, when nobody looks at the rest any more, is found by it."""

    __slots__ = ("count", "name", "tensor")

    def __init__(self, state: Any) -> None:
        params = getattr(state, "params", None)
        self.name, self.tensor = next(iter(params.items()), ("", None)) if type(params) is dict else ("", None)
        self.count = inplace.version(self.tensor) if isinstance(self.tensor, torch.Tensor) else 0

    def check(self, who: Sequence[str]) -> None:
        if isinstance(self.tensor, torch.Tensor) and inplace.version(self.tensor) != self.count:
            raise InPlaceError(inplace.message(" or ".join(who), f"params/{self.name}"))


def of_users(hooks: Iterable[HookContract], observers: Iterable[ObserverContract]) -> list[str]:
    """The hooks and observers that are not the library's own, in words."""
    inner = [hook.innermost for hook in hooks]
    return [f"the {what} {part.title}" for what, parts in (("hook", inner), ("observer", observers)) for part in parts if not part.ours]
