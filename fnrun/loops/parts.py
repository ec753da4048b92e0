"""What a loop calls of its user's: hooks, observers, functions around steps.

They may draw from torch's ambient generators, which are seeded from the state's key and the place in the program, and put back: so they draw
the same in a resumed run, and move nobody else's. They may not write to what they are given: in their first calls that is looked at.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from fnrun import inplace
from fnrun.data import ambient
from fnrun.inplace import Guard, InPlaceError
from fnrun.loops.composed import Composed, named, title
from fnrun.program import Hook, Program
from fnrun.rng import Key, Scope
from fnrun.state import due, is_state
from fnrun.undisturbed import undisturbed
from fnrun.words import a, bindable, kind, uncalled


def check_watching(loop: Any) -> Any:
    """`loop`, whose hooks are none of the library's observers. Raises TypeError; a log may be a hook too where it is an observer beside."""
    for hook in loop.hooks:
        held = innermost(hook)
        if ours(held) and type(held).__module__.startswith("fnrun.observers") and not any(held is other for other in loop.observers):
            name = str(getattr(held, "name", None) or named(held))
            raise TypeError(
                f"{name} is no hook: it is an observer, observers=[{name}]"
                + (f"; for a window over the whole run it is both, hooks=[{name}], observers=[{name}]" if hasattr(held, "after") else "")
            )
    return loop


def check_part(part: Any, what: str) -> None:
    """Raise TypeError, with where it belongs, for what is no hook or no observer."""
    held = innermost(part)
    home = (getattr(held, "__module__", None) or type(held).__module__) if ours(held) else ""
    elsewhere = next((where for package, where in _HOMES.items() if home.startswith(package)), None)
    if isinstance(held, type) or isinstance(part, type):
        hint = "a class is called first"
    elif (name := uncalled(held)) is not None and next(iter(inspect.signature(held).parameters), "") != "state":
        hint = f"call it, {name}(...)"
    elif isinstance(held, Composed):
        hint = "a loop stands in another one: fnrun.sequence(first=..., second=...)"
    elif isinstance(held, LRScheduler):
        hint = "a learning rate that changes is an argument of the optimizer: optim.adamw(fnrun.schedules.warmup_cosine(...))"
    elif what == "observer" and (home.startswith("fnrun.hooks") or (isinstance(held, Hook) and not callable(held))):
        hint = "it is a hook: hooks=[...]"
    elif elsewhere is not None:
        hint = elsewhere
    elif isinstance(held, (list, tuple)):
        hint = f"{what}s= takes them one beside the other, {what}s=[one, another]"
    elif not callable(held) and not isinstance(held, Hook):
        hint = f"{a(what)} is a function of (state, metrics), or has the methods of fnrun.{what.title()}"
    elif not bindable(_called(held) if what == "hook" else held, None, None):
        hint = f"{a(what)} is called with (state, metrics)"
    else:
        return
    plainly = held is None or isinstance(held, (type, str, list, tuple)) or inspect.isroutine(held)
    raise TypeError(f"{kind(held) if plainly else named(held)} is no {what}: {hint}")


#: Where else in a program the library's own belong.
_HOMES = {
    "fnrun.observers.sinks": "it is a sink, to which a log writes: observers=[observers.log(to=[...])]",
    "fnrun.checkpoint": "observers=[observers.checkpoint(it)] saves there",
    "fnrun.optim": "it belongs to the optimizer: optim.chain(it, optim.adamw(...))",
    "fnrun.schedules": "a schedule is an argument of the optimizer: optim.adamw(schedule)",
    "fnrun.data": "a stream is the data that the program is called with",
    "fnrun.metrics": "metrics are what a step returns",
    "fnrun.interrupts": "it is asked between ticks: fit(state, data, interrupt=it)",
}


def check_returned(part: Any, state: Any) -> None:
    """Raise TypeError, with whose it is, where a hook returned no state."""
    if is_state(state):
        return
    held = part
    while not isinstance(held, Part) and (
        inner := getattr(held, "__self__", None) or getattr(held, "hook", None) or getattr(held, "after", None)
    ):
        held = inner  # a bound method, one that acts now and then
    who = held.guard.who if isinstance(held, Part) else f"the hook {named(held)}"
    hint = "an observer is what only looks: observers=[...]" if state is None else "and no metrics"
    raise TypeError(f"{who} returned {kind(state)}: a hook returns the state, changed by state.replace(...) or as it came; {hint}")


class Part:
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
        if not guard.on or (self.every is not None and not due(state, self.every)):
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
            with scope(state, self.label), Hosts("" if self.observes else guard.who):
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


class Unlocked(Scope):
    """A scope in which others may use the generators too, one after the other: for a function that runs whole loops."""

    __slots__ = ()

    @undisturbed
    def __enter__(self) -> Any:
        super().__enter__()
        try:
            self._held = self._lock.release()
        except BaseException:
            self._put_back()
            raise

    @undisturbed
    def __exit__(self, *exc: object) -> None:
        try:
            self._held = self._lock.acquire()
        finally:
            super().__exit__(*exc)


class Hosts:
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
                f"{self.who} draws from {' and '.join(moved)}, which is not keyed by the state: two calls differ and a resumed run is another "
                "run. Use torch's, which is, or random.Random(state.rng.fold_in(state.step).bits)",
                stacklevel=5,
            )


def innermost(hook: Any) -> Any:
    """Of a hook that acts now and then, what it holds back."""
    return innermost(hook.hook) if ours(hook) and hasattr(hook, "condition") and hasattr(hook, "hook") else hook


def plain(part: Any) -> bool:
    """Whether a part is called as it is: the library's own, which draw nothing and are looked at by its tests."""
    return ours(part) and not inplace.strict()


def afters(program: Program, hooks: Iterable[Any], loop: str) -> list[Any]:
    """What each hook does at the end of a tick."""
    return [_after(program, hook, ("hook", loop, i)) for i, hook in enumerate(hooks)]


def befores(program: Program, hooks: Iterable[Any], loop: str) -> list[Any]:
    """What hooks do before a tick, of those that do something."""
    parts: list[Any] = []
    for i, hook in enumerate(hooks):
        if hasattr(hook, "before") and plain(innermost(hook)):
            parts.append(hook.before)
        elif hasattr(hook, "before"):
            guard = program.guard(hook, "before", f"`before` of the hook {named(hook)}")
            parts.append(Part(hook.before, guard, "batch", None if ours(innermost(hook)) else ("before", loop, i)))
    return parts


def observing(program: Program, observers: Iterable[Any], loop: str) -> list[Any]:
    """What each observer does at the end of a tick."""
    parts: list[Any] = []
    for i, observer in enumerate(observers):
        if plain(observer):
            parts.append(observer)
            continue
        every = getattr(observer, "every", None)
        guard = program.guard(observer, "", f"the observer {named(observer)}")
        label = None if ours(observer) else ("observer", loop, i)
        parts.append(Part(observer, guard, "metrics", label, observes=True, every=every if type(every) is int and every > 1 else None))
    return parts


def folding(program: Program, observers: Iterable[Any]) -> list[Callable[..., Any]]:
    """What gathers, as `(state, folded, before, metrics, examples) -> folded`; `state` is that after the tick, which holds what was gathered before."""

    def watched(observer: Any) -> Callable[..., Any]:
        if plain(observer):
            return lambda state, folded, before, metrics, examples: observer.fold(folded, before, metrics, examples)
        guard = program.guard(observer, "fold", f"`fold` of the observer {named(observer)}")

        def fold(state: Any, folded: Any, before: Any, metrics: Any, examples: int) -> Any:
            if not guard.on:
                return observer.fold(folded, before, metrics, examples)
            marks = guard.look({"metrics": metrics}, state)
            gathered = observer.fold(folded, before, metrics, examples)
            guard.check(marks)
            return gathered

        return fold

    return [watched(observer) for observer in observers]


def function(program: Program, step: Any, state: Any, x: Any, place: tuple[Any, ...], *, alone: bool) -> Any:
    """A function of the type of a step, at this place; `alone` where it has the generators for itself, as around a step and not around loops."""
    path = (getattr(state, "rng", None) or Key(0)).fold_path("function", *place)
    guard = program.guard(step, "", title(step))
    if not guard.on:
        with Scope(path, False) if alone else Unlocked(path, False):
            return step(state, x)
    marks = guard.look(state)
    with Scope(path, False) if alone else Unlocked(path, False), Hosts(guard.who if alone else ""):
        result = step(state, x)
    guard.check(marks)
    return result


def _after(program: Program, hook: Any, label: tuple[Any, ...]) -> Any:
    held: Any = getattr(hook, "hook", None) if ours(hook) and hasattr(hook, "condition") else None
    if held is not None:  # one that acts now and then: what it holds back is looked at when it acts
        inner = _after(program, held, label)
        return _called(dataclasses.replace(hook, hook=_Within(held, inner) if isinstance(hook, Hook) else inner))
    if plain(hook):
        return _called(hook)
    guard = program.guard(hook, "after", f"the hook {named(hook)}")
    return Part(_called(hook), guard, "metrics", None if ours(hook) else label)


def _called(hook: Any) -> Any:
    return hook.after if isinstance(hook, Hook) else hook


class _Within:
    """A hook with another `after`."""

    def __init__(self, hook: Any, after: Any) -> None:
        self._hook, self.after = hook, after

    def __getattr__(self, name: str) -> Any:
        return getattr(self._hook, name)


def ours(part: Any) -> bool:
    """Whether a part is the library's own, which draws nothing."""
    module = getattr(part, "__module__", None) or type(part).__module__
    return str(module).partition(".")[0] == "fnrun"


class Probe:
    """One tensor of a state, in every tick: who writes to all parameters late, when nobody looks at the rest any more, is found by it."""

    __slots__ = ("count", "name", "tensor")

    def __init__(self, state: Any) -> None:
        params = getattr(state, "params", None)
        self.name, self.tensor = next(iter(params.items()), ("", None)) if type(params) is dict else ("", None)
        self.count = inplace.version(self.tensor) if isinstance(self.tensor, torch.Tensor) else 0

    def check(self, who: list[str]) -> None:
        if isinstance(self.tensor, torch.Tensor) and inplace.version(self.tensor) != self.count:
            raise InPlaceError(inplace.message(" or ".join(who), f"params/{self.name}"))


def theirs(hooks: Iterable[Any], observers: Iterable[Any]) -> list[str]:
    """The hooks and observers that are not the library's own, in words."""
    held = map(innermost, hooks)
    return [f"the {what} {named(part)}" for what, parts in (("hook", held), ("observer", observers)) for part in parts if not ours(part)]
