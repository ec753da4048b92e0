"""What a step is: a type tells it, and with it what loops may make use of."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

from fnrun.core import examples as rows

Metrics = dict[str, Any]


class Step(Protocol):
    """What loops turn: `(state, batch) -> (state, metrics)`, pure: outputs are a function of the arguments, which stay as they are."""

    def __call__(self, state: Any, batch: Any, /) -> tuple[Any, Metrics]: ...


class EvalStep(Protocol):
    """`(state, batch) -> metrics`: it has no way to change the state."""

    def __call__(self, state: Any, batch: Any, /) -> Metrics: ...


class PureStep:
    """The base of what fnrun knows to be a step and no loop, with what a loop may use. A user's function is a step too, but none of these.

    A type and not an attribute: `functools.wraps` copies attributes to a wrapper, which may do anything.
    """

    #: The new state may be written over the old one.
    donates = False
    #: Of `state.position` it reads nothing, so that a loop may bring that up to date later.
    looks_at_step_only = False
    #: It has `several(state, batches)`: many steps as one call.
    fuses = False
    #: The optimizer with its schedules in words, '' where it is not known.
    optimizer_text = ""
    #: What it was asked for besides, in words: how it is cut, computed, compiled.
    options_text = ""
    #: How many examples a batch has, None where that is not clear: plain metrics are weighed by it.
    examples: Callable[[Any], int | None] = staticmethod(rows.example_count)

    def __call__(self, state: Any, batch: Any, /) -> Any:
        raise NotImplementedError


class Function(PureStep):
    """A step that is `call`, and goes by the name of `like`."""

    def __init__(
        self,
        call: Callable[..., Any],
        like: Callable[..., Any] | None = None,
        name: str = "",
        examples: Callable[[Any], int | None] | None = None,
    ) -> None:
        if like is not None:
            functools.update_wrapper(self, like)  # with its attributes, if it is one of these too
        else:
            self.__name__ = self.__qualname__ = name
        self._call = call
        if examples is not None:
            self.examples = examples

    def __call__(self, state: Any, batch: Any, /) -> Any:
        return self._call(state, batch)

    def __repr__(self) -> str:
        return f"<{getattr(self, '__qualname__', type(self).__name__)}>"
