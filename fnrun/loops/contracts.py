"""What a hook and an observer are, and what one that was given is able to do: looked at once, when its loop is made."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

from torch.optim.lr_scheduler import LRScheduler

from fnrun.core.words import a, bindable, kind, uncalled
from fnrun.loops.structure import Composed, named

Metrics = dict[str, Any]


@runtime_checkable
class Hook(Protocol):
    """What transforms the state between ticks: `(state, metrics) -> state`, pure.

    A plain function of that type is a hook that remembers nothing. A hook with memory is an object with a `name`, under which
    `state.memory` holds what `init(state)` returned until `after` replaces it, and if it needs it `before(state, batch) -> state`.
    """

    name: str

    def init(self, state: Any, /) -> Any: ...
    def after(self, state: Any, metrics: Metrics, /) -> Any: ...


class Observer(Protocol):
    """What watches: `(state, metrics) -> None`, after the hooks of the tick, with the finished state and computed metrics.

    It may have, each optional:

    - `open(program, state)`: before the first batch is worked on. `help(fnrun.loops.program.Program)` lists what a program tells.
    - `close(state, reason)`: at the end. `reason` is None, the text of the stop or interrupt, or the exception. `state` is that of the
      last tick that every observer has seen, its frames still open.
    - `name` and `fold(folded, before, metrics, examples) -> folded`: gathers over ticks. The loop keeps the result, a pytree, in its
      frame (`state.position.frames[-1].folds[name]`), so it survives a kill. `folded` is None at first, `before` the state before the
      tick, `metrics` those of the step, uncomputed, `examples` the batch's number of examples.
    - `carry(folded) -> folded`: in a loop of training steps, what the loop's next round begins with instead of None.
    - `every = n` and `idle_between = True`: a promise that in a loop of training steps it does nothing in ticks that are not due. Such
      ticks then follow each other without a pause. The loop may still call it in one, such as the first of a call.
    - `fold_each(folded, before, ticks) -> folded`: of one that folds and is idle between. It gets those ticks at once, as
      `[(metrics, examples), ...]`; `before` has only the step, the position and the memory of the state before the first.
    - `flush()`: what was written must be on disk when it returns.
    - `saves = True`: it acts last in a tick, after every flush.
    """

    def __call__(self, state: Any, metrics: Metrics, /) -> None: ...


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class HookContract:
    """What a hook that was given is able to do."""

    given: Any
    ours: bool  # of this package: it draws nothing, and is looked at by its tests
    name: str | None  # of its memory
    init: Callable[[Any], Any] | None
    before: Callable[[Any, Any], Any] | None
    after: Callable[[Any, Metrics], Any]
    every: int | None  # it acts each so many ticks
    monitors: tuple[str, ...]  # the metrics that it waits for
    held: HookContract | None  # of one that acts now and then: the hook that it holds back

    def acting(self, after: Callable[[Any, Metrics], Any]) -> Callable[[Any, Metrics], Any]:
        """Of a hook that acts now and then: what it does with another `after` of the hook that it holds back."""
        return self.given.holding_back(after)

    @property
    def title(self) -> str:
        return named(self.given)

    @property
    def innermost(self) -> HookContract:
        return self if self.held is None else self.held.innermost


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class ObserverContract:
    """What an observer that was given is able to do."""

    given: Any
    ours: bool
    name: str | None  # of what it gathers
    observe: Callable[[Any, Metrics], None]
    open: Callable[[Any, Any], Any] | None
    close: Callable[[Any, Any], Any] | None
    fold: Callable[[Any, Any, Any, int], Any] | None
    fold_each: Callable[[Any, Any, Sequence[Any]], Any] | None
    carry: Callable[[Any], Any] | None
    flush: Callable[[], Any] | None
    every: int | None
    idle_between: bool
    saves: bool
    monitors: tuple[str, ...]

    @property
    def title(self) -> str:
        return named(self.given)


def hook_contract(hook: Any) -> HookContract:
    """What `hook` is able to do. Raises TypeError, with what to write, for what is no hook and for a method of another signature."""
    held = hook_contract(hook.hook) if _holds_back(hook) else None
    if held is None:
        _check("hook", hook)
    _warn_of_unknown(hook, "hook", _OF_HOOKS)
    remembers = isinstance(hook, Hook)
    return HookContract(
        given=hook,
        ours=ours(hook),
        name=hook.name if remembers else None,
        init=_method(hook, "hook", "init", "state") if remembers else None,
        before=held.before and hook.before if held else _method(hook, "hook", "before", "state", "batch"),
        after=hook.after if remembers else hook,
        every=_interval(hook),
        monitors=_monitors(hook),
        held=held,
    )


def observer_contract(observer: Any) -> ObserverContract:
    """What `observer` is able to do. Raises TypeError, with what to write, for what is none and for a method of another signature."""
    _check("observer", observer)

    _warn_of_unknown(observer, "observer", _OF_OBSERVERS)

    def method(name: str, *arguments: str) -> Any:
        return _method(observer, "observer", name, *arguments)

    return ObserverContract(
        given=observer,
        ours=ours(observer),
        name=getattr(observer, "name", None),
        observe=observer,
        open=method("open", "program", "state"),
        close=method("close", "state", "reason"),
        fold=method("fold", "folded", "before", "metrics", "examples"),
        fold_each=method("fold_each", "folded", "before", "ticks"),
        carry=method("carry", "folded"),
        flush=method("flush"),
        every=_interval(observer),
        idle_between=getattr(observer, "idle_between", False),
        saves=getattr(observer, "saves", False),
        monitors=_monitors(observer),
    )


def hook_contracts(hooks: Iterable[Any]) -> tuple[HookContract, ...]:
    return tuple(map(hook_contract, flattened(hooks)))


def observer_contracts(observers: Iterable[Any]) -> tuple[ObserverContract, ...]:
    """In the order in which they act: those that save last.

    Raises ValueError where two that fold would share what they keep, TypeError for one whose folds would be left out.
    """
    contracts = tuple(sorted(map(observer_contract, observers), key=lambda observer: observer.saves))
    for observer in contracts:
        if observer.idle_between and observer.fold is not None and observer.fold_each is None:
            raise TypeError(
                f"{observer.title}: it folds and is idle_between, so it needs fold_each(folded, before, ticks) for the ticks between"
            )
    names = [observer.name for observer in contracts if observer.fold is not None]
    if None in names or len(set(names)) < len(names):
        raise ValueError(f"observers of one loop that fold need names of their own, to keep what they gather: {names}")
    return contracts


def flattened(hooks: Iterable[Any]) -> Iterator[Any]:
    """The hooks, with those of a composed one in its place."""
    for hook in hooks:
        if isinstance(inner := getattr(hook, "composed_hooks", None), tuple):
            yield from flattened(inner)
        else:
            yield hook


def ours(part: Any) -> bool:
    """Whether it is the library's own."""
    module = getattr(part, "__module__", None) or type(part).__module__
    return str(module).partition(".")[0] == "fnrun"


def _holds_back(hook: Any) -> bool:
    return ours(hook) and hasattr(hook, "holding_back")


def _method(part: Any, what: str, name: str, *arguments: str) -> Any:
    """The optional method `name`. Raises TypeError for one that cannot be called with these arguments."""
    method = getattr(part, name, None)
    if method is None or isinstance(part, type):
        return None
    if not callable(method) or not bindable(method, *arguments):
        signature = f"{name}({', '.join(arguments)})"
        have = kind(method) if not callable(method) else f"{name}{_signature(method)}"
        raise TypeError(f"{named(part)}: `{name}` of {a(what)} is called {signature}, and this one has {have}")
    return method


_OF_HOOKS = ("init", "before", "after")
_OF_OBSERVERS = ("open", "close", "fold", "fold_each", "carry", "flush")


def _warn_of_unknown(part: Any, what: str, known: Sequence[str]) -> None:
    """Warn of methods that look as if a loop called them, and that none calls: misspelt ones, and those of other libraries' callbacks."""
    if ours(part) or inspect.isroutine(part) or isinstance(part, type):
        return
    methods = [name for name, value in inspect.getmembers_static(type(part)) if inspect.isfunction(value) and not name.startswith("_")]
    for name in methods:
        like = difflib.get_close_matches(name, known, 1, 0.85)
        if name not in (*_OF_HOOKS, *_OF_OBSERVERS) and (like or name.startswith(("before_", "after_", "on_"))):
            hint = f"is {like[0]!r} meant?" if like else f"{a(what)} has {', '.join(known)}"
            warnings.warn(f"{named(part)} has a method {name!r}, which no loop calls: {hint}", stacklevel=2)


def _signature(method: Any) -> str:
    try:
        return str(inspect.signature(method))
    except (TypeError, ValueError):
        return "(...)"


def _interval(part: Any) -> int | None:
    every = getattr(part, "every", None)
    return max(1, every) if type(every) is int else None


def _monitors(part: Any) -> tuple[str, ...]:
    """The metrics that it waits for: one says `monitor`, a name, or `monitors`, several."""
    one, several = getattr(part, "monitor", None), getattr(part, "monitors", None)
    names = (one,) if several is None and one is not None else several or ()
    if not isinstance(names, (list, tuple, set, frozenset, dict)) or not all(isinstance(name, str) for name in names):
        raise TypeError(
            f"{named(part)}: monitor is the name of a metric, monitors are several, and not {kind(one if several is None else several)}"
        )
    return tuple(names)


# --- what is none ------------------------------------------------------------------------------------------------------

#: Where else in a program the library's own belong.
_HOMES = {
    "fnrun.sinks": "it is a sink, to which a log writes: observers=[observers.log(to=[...])]",
    "fnrun.checkpoint": "observers=[observers.checkpoint(it)] saves there",
    "fnrun.optim": "it belongs to the optimizer: optim.chain(it, optim.adamw(...))",
    "fnrun.schedules": "a schedule is an argument of the optimizer: optim.adamw(schedule)",
    "fnrun.data": "a stream is the data that the program is called with",
    "fnrun.metrics": "metrics are what a step returns",
    "fnrun.loops.interrupts": "it is asked between ticks: fit(state, data, interrupt=it)",
}


def check_hooks(hooks: Iterable[HookContract], observers: Iterable[ObserverContract]) -> None:
    """Raise TypeError where one of the library's observers is given as a hook. A log may be a hook too where it is an observer beside."""
    for hook in (hook.innermost for hook in hooks):
        watches = hook.ours and type(hook.given).__module__.startswith("fnrun.observers")
        if watches and not any(hook.given is other.given for other in observers):
            name = hook.name or hook.title
            raise TypeError(
                f"{name} is no hook: it is an observer, observers=[{name}]"
                + (f"; for a window over the whole run it is both, hooks=[{name}], observers=[{name}]" if hook.init is not None else "")
            )


def _runs_later(function: Any) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function)


def _check(what: str, part: Any) -> None:
    """Raise TypeError, with where it belongs, for what is no hook or no observer."""
    home = (getattr(part, "__module__", None) or type(part).__module__) if ours(part) else ""
    elsewhere = next((where for package, where in _HOMES.items() if home.startswith(package)), None)
    remembers = isinstance(part, Hook)
    if isinstance(part, type):
        hint = "a class is called first"
    elif (name := uncalled(part)) is not None and next(iter(inspect.signature(part).parameters), "") != "state":
        hint = f"call it, {name}(...)"
    elif isinstance(part, Composed):
        hint = "a loop stands in another one: fnrun.sequence(first=..., second=...)"
    elif isinstance(part, LRScheduler):
        hint = "a learning rate that changes is an argument of the optimizer: optim.adamw(fnrun.schedules.warmup_cosine(...))"
    elif what == "observer" and (home.startswith("fnrun.hooks") or (remembers and not callable(part))):
        hint = "it is a hook: hooks=[...]"
    elif elsewhere is not None:
        hint = elsewhere
    elif isinstance(part, (list, tuple)):
        hint = f"{what}s= takes them one beside the other, {what}s=[one, another]"
    elif not callable(part) and not remembers:
        hint = f"{a(what)} is a function of (state, metrics), or has the methods of fnrun.{what.title()}"
    elif any(map(_runs_later, (part, getattr(part, "after", None), type(part).__call__ if callable(part) else None))):
        hint = "it is async or a generator: a loop calls it and would run none of it"
    elif not bindable(part.after if what == "hook" and remembers else part, None, None):
        hint = f"{a(what)} is called with (state, metrics)"
    else:
        return
    plainly = part is None or isinstance(part, (type, str, list, tuple)) or inspect.isroutine(part)
    raise TypeError(f"{kind(part) if plainly else named(part)} is no {what}: {hint}")
