"""When hooks act, and several hooks as one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from fnrun.core.counts import count
from fnrun.core.position import in_training, is_due, tick_number
from fnrun.core.words import kind
from fnrun.hooks.monitor import reported

AnyHook = Any  # a Hook or a function (state, metrics) -> state


@dataclasses.dataclass(frozen=True)
class _Composed:
    composed_hooks: tuple[AnyHook, ...]

    def __call__(self, state: Any, metrics: dict[str, Any]) -> Any:
        raise TypeError("a composed hook belongs in a loop's hooks=[...], which takes it apart")


def compose(*hooks: AnyHook) -> AnyHook:
    """Several hooks as one, acting in the order written: `hooks=[compose(f, g)]` is `hooks=[f, g]`, names and memory too."""
    return _Composed(tuple(hooks))


@dataclasses.dataclass(frozen=True)
class _When:
    """A function that acts where `condition(state)` holds."""

    condition: Callable[[Any], bool]
    hook: AnyHook

    def __call__(self, state: Any, metrics: dict[str, Any]) -> Any:
        return self.holding_back(self.hook)(state, metrics)

    def holding_back(self, hook: AnyHook) -> AnyHook:
        """`hook` under the condition. A loop calls this with `hook` wrapped, to check what it does when it acts."""
        return lambda state, metrics: hook(state, metrics) if self.condition(state) else state


@dataclasses.dataclass(frozen=True)
class _WhenRemembering:
    """A hook with memory that acts where `condition(state)` holds; its name and memory are the inner hook's."""

    condition: Callable[[Any], bool]
    hook: AnyHook

    @property
    def name(self) -> str:
        return self.hook.name

    @property
    def monitor(self) -> str | None:
        return getattr(self.hook, "monitor", None)

    def init(self, state: Any) -> Any:
        return self.hook.init(state)

    def before(self, state: Any, batch: Any) -> Any:
        return self.hook.before(state, batch) if hasattr(self.hook, "before") else state

    def after(self, state: Any, metrics: dict[str, Any]) -> Any:
        return self.holding_back(self.hook.after)(state, metrics)

    def holding_back(self, after: AnyHook) -> AnyHook:
        """`after` under the condition, as in `_When`."""

        def acting(state: Any, metrics: dict[str, Any]) -> Any:
            if self.condition(state):
                return after(state, metrics)
            if self.monitor is not None and not in_training(state):
                reported(self.name, self.monitor, state, metrics)  # a misspelt name is found in the first round, not the first that counts
            return state

        return acting


def every(n: int, hook: AnyHook) -> AnyHook:
    """`hook` on each n-th step, by `state.step`, in a loop of training steps; on each n-th round elsewhere.

    The `before` of a hook acts on every batch. Raises ValueError for an n below 1.
    """
    n = count("every: n", n)
    return _conditional(lambda state: is_due(state, n), hook)


def at(ticks: int | Iterable[int], hook: AnyHook) -> AnyHook:
    """`hook` after these steps, or rounds outside of a loop of steps: `at([100, 200], hook)`. A `before` acts on every batch."""
    chosen = frozenset(count("at: a step", tick) for tick in (ticks if isinstance(ticks, Iterable) else [ticks]))
    if not chosen:
        raise ValueError("at: name at least one step, the first is 1")
    return _conditional(lambda state: tick_number(state) in chosen, hook)


def between(begin: int, end: int | None, hook: AnyHook) -> AnyHook:
    """`hook` after each step from `begin` to before `end` (None: to the last); rounds outside of a loop of steps.

    A `before` acts on every batch. Raises ValueError where no step lies between.
    """
    begin = count("between: begin", begin, 0)
    end = None if end is None else count("between: end", end)
    if end is not None and end <= begin:
        raise ValueError(f"between: no step is at least {begin!r} and less than {end!r}")
    return _conditional(lambda state: begin <= tick_number(state) and (end is None or tick_number(state) < end), hook)


def when(condition: Callable[[Any], bool], hook: AnyHook) -> AnyHook:
    """`hook` after the ticks in which `condition(state)` holds. A `before` acts on every batch.

    >>> from fnrun import hooks
    >>> frozen = when(lambda state: state.stop is None, hooks.ema(0.9))
    >>> frozen.name
    'ema'
    """
    if not callable(condition) or isinstance(condition, type):
        raise TypeError(f"when(condition, hook): condition is a function of the state, and not {kind(condition)}")
    return _conditional(condition, hook)


def _conditional(condition: Callable[[Any], bool], hook: AnyHook) -> AnyHook:
    if isinstance(hook, _Composed):
        return _Composed(tuple(_conditional(condition, inner) for inner in hook.composed_hooks))
    return _WhenRemembering(condition, hook) if hasattr(hook, "after") else _When(condition, hook)
