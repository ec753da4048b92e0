"""The random numbers of a captured call, drawn outside of its graph from the keys of the eager call.

A graph cannot seed a generator. So random numbers are its inputs: before each call of the graph the same random operations run in the same
order, with torch's kernels and the same seeds. Masks are bit for bit those of the eager call.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fnrun.core.key import Key, Scope, ambient
from fnrun.core.reports import collect


class Uncapturable(Exception):
    """Why a step cannot be one graph."""


class _Step(NamedTuple):
    """A step's number as data of a key: `after` steps after the first one of the call."""

    after: int


class _Draw(NamedTuple):
    """A random operation, and the shape, stride, dtype and device of the tensor that it fills (`like`; None where it makes one)."""

    operation: Any
    like: tuple[Any, ...] | None
    args: tuple[Any, ...]
    options: dict[str, Any]

    def __call__(self) -> Tensor:
        if self.like is None:
            return self.operation(*self.args, **self.options)
        shape, stride, dtype, device = self.like
        filled = torch.empty_strided(shape, stride, dtype=dtype, device=device)
        if _named(self.operation) == "native_dropout":  # the mask does not depend on the input
            return self.operation(filled.fill_(1), *self.args, **self.options)[1]
        return self.operation(filled, *self.args, **self.options)


#: Operations whose draws depend on no tensor's values: they fill their first argument, use its shape, or make a tensor.
_FILL = {"bernoulli_", "uniform_", "normal_", "random_", "exponential_", "cauchy_", "log_normal_", "geometric_"}
_LIKE = {"rand_like", "randn_like", "randint_like", "bernoulli", "native_dropout"}
_MAKE = {"rand", "randn", "randint", "randperm", "normal"}
_KNOWN = _FILL | _LIKE | _MAKE


def _named(operation: Any) -> str:
    return operation._schema.name.rpartition("::")[2]


def _ambient_state() -> tuple[bytes, ...]:
    return tuple(generator.get_state().numpy().tobytes() for generator in ambient())


class Draws:
    """The draws of one call, in order: found in a first run, then inputs of the graph."""

    def __init__(self) -> None:
        self._values: list[Tensor] | None = []  # the draws of the first run
        self.count = 0  # the number of draws
        self._events: list[Any] = []  # ("enter", data of the key), a _Draw, or "exit"
        self._order: list[int] = []  # the index of the value for each random operation of a run
        self._memo: dict[Any, int] = {}
        self._steps: dict[int, tuple[Tensor, int]] = {}
        self._depth = 0
        self._state: Any = None
        self._given: list[Tensor] | None = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Draws) and self._events == other._events and self._order == other._order

    def note_step(self, step: Tensor, after: int) -> None:
        """`step` is the number of the step `after` steps after the first."""
        self._steps[id(step)] = step, after

    def datum(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) not in self._steps:
            raise Uncapturable("it derives a key from a number that is computed in the step")
        return _Step(self._steps[id(value)][1])

    def found(self) -> TorchDispatchMode:
        """The mode of the first run, which records the draws."""
        return RandomOperations(self._note)

    def given(self, values: list[Tensor]) -> TorchDispatchMode:
        """The mode of a recorded run, in which `values` replace the draws."""
        self._given = values
        order = iter(self._order)

        def give(operation: Any, args: Any, options: Any) -> Any:
            name = _named(operation)
            if name not in _KNOWN:  # it drew nothing in the first run
                return operation(*args, **options)
            value = values[next(order)]
            if name in _FILL:
                return args[0].copy_(value)
            if name == "native_dropout":
                return args[0] * value * (1 / (1 - args[1])), value
            return value.clone()

        return RandomOperations(give)

    @property
    def values(self) -> list[Tensor]:
        """The draws of the first run."""
        return self._drawn(_first) if self._values is None else self._values

    def forget(self) -> None:
        """Free the values of the first run; `values` draws them again."""
        self._values, self._given = None, None
        self._memo.clear()

    def again(self, key: Key, count: int) -> list[Tensor]:
        """The draws of the call whose first step is `count`."""
        return self._drawn(lambda data: key.scope(*[count + datum.after if isinstance(datum, _Step) else datum for datum in data]))

    def _drawn(self, scope_of: Callable[[tuple[Any, ...]], Scope]) -> list[Tensor]:
        if not self.count:
            return []
        drawn: list[Tensor] = []
        scopes: list[Scope] = []
        try:
            for event in self._events:
                if isinstance(event, _Draw):
                    drawn.append(event())
                elif event == "exit":
                    scopes.pop().__exit__()
                else:
                    scope = scope_of(event[1])
                    scope.__enter__()
                    scopes.append(scope)
        finally:
            while scopes:
                scopes.pop().__exit__()
        return drawn

    def finish(self) -> None:
        """End the first run: remove scopes without draws."""
        kept: list[Any] = []
        for event in self._events:
            if event == "exit" and kept and isinstance(kept[-1], tuple) and not isinstance(kept[-1], _Draw):
                kept.pop()
            else:
                kept.append(event)
        self._events = kept

    def enter(self, data: tuple[Any, ...]) -> None:
        self._depth += 1
        self._state = None
        if self._given is None:
            self._events.append(("enter", data))

    def exit(self) -> None:
        self._depth -= 1
        self._state = None
        if self._given is None:
            self._events.append("exit")

    def _note(self, operation: Any, args: Any, options: Any) -> Any:
        name = _named(operation)
        if any(isinstance(value, torch.Generator) for value in (*args, *options.values())):
            raise Uncapturable("it draws from a torch.Generator of its own")
        state = _ambient_state()
        if name not in _KNOWN:
            result = operation(*args, **options)
            if _ambient_state() == state:  # attention and recurrent layers without dropout
                return result
        if not self._depth:
            raise Uncapturable("it draws random numbers where no key is")
        rest = args if name in _MAKE else args[1:]
        drawable = name in _MAKE or (name in _KNOWN and isinstance(args[0], Tensor) and (name != "bernoulli" or rest))
        if not drawable or any(isinstance(value, Tensor) for value in (*rest, *options.values())):
            raise Uncapturable(f"what it draws ({name}) depends on what it computes, and cannot be drawn before the graph is called")
        like = None if name in _MAKE else (tuple(args[0].shape), args[0].stride(), args[0].dtype, args[0].device)
        draw = _Draw(operation, like, tuple(rest), {k: v for k, v in options.items() if k != "pin_memory"})
        if (place := (state, repr(draw))) in self._memo:  # a forward that activation checkpointing repeats
            self._order.append(self._memo[place])
            return operation(*args, **options)
        if self._state is not None and state != self._state:
            raise Uncapturable("it sets torch's generator between two draws")
        result = operation(*args, **options)
        self._state = _ambient_state()
        self._memo[place] = self.count
        self._order.append(self.count)
        self.count += 1
        self._events.append(draw)
        value = result[1] if name == "native_dropout" else result
        assert self._values is not None
        self._values.append(value.detach().clone())
        return result


class RandomOperations(TorchDispatchMode):
    """Replaces each random operation of torch by `random(operation, args, kwargs)`."""

    def __init__(self, random: Callable[[Any, Any, Any], Any]) -> None:
        super().__init__()
        self._random = random

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        return self._random(func, args, kwargs)


def _first(data: tuple[Any, ...]) -> Scope:
    """The scope of a first run: different keys have different numbers."""
    return Key(0).scope(repr(data))


@dataclasses.dataclass(frozen=True)
class TracedKey:
    """Stands for a key in a recorded call: each call of the graph draws its numbers anew."""

    draws: Draws
    data: tuple[Any, ...] = ()

    def fold_in(self, *data: Any) -> TracedKey:
        return TracedKey(self.draws, (*self.data, *map(self.draws.datum, data)))

    def split(self, n: int) -> tuple[TracedKey, ...]:
        return tuple(self.fold_in("split", i) for i in range(n))

    def scope(self, *data: Any, host: bool = False) -> _TracedScope:
        return _TracedScope(self.fold_in(*data), None)

    def within(self, *data: Any) -> _TracedScope:
        """A scope that collects reports, as in `Surroundings`."""
        return _TracedScope(self.fold_in(*data), collect())

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise Uncapturable(f"it asks the step's key for its {name}: random numbers are drawn from torch's generator, or in key.scope()")


class _TracedScope:
    def __init__(self, key: TracedKey, collecting: collect | None) -> None:
        self.key, self._collect = key, collecting
        self._scope = _first(key.data)

    def __enter__(self) -> Any:
        self.key.draws.enter(self.key.data)
        self._scope.__enter__()
        return self._collect.__enter__() if self._collect is not None else None

    def __exit__(self, *exc: object) -> None:
        if self._collect is not None:
            self._collect.__exit__()
        self._scope.__exit__()
        self.key.draws.exit()
