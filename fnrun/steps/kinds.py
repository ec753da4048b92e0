"""What a step is: protocols for type checkers, and the base classes by which loops recognize fnrun's own steps."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

from fnrun.core.examples import example_count

Metrics = dict[str, Any]


class Step(Protocol):
    """`(state, batch) -> (state, metrics)`, pure: the outputs are a function of the arguments, which are not written to.

    Each call returns `state.step` one higher. A step that makes no update returns the state otherwise unchanged, with the metrics
    `{"skipped": 1.0}` alone.
    """

    def __call__(self, state: Any, batch: Any, /) -> tuple[Any, Metrics]: ...


class EvalStep(Protocol):
    """`(state, batch) -> metrics`: it cannot change the state."""

    def __call__(self, state: Any, batch: Any, /) -> Metrics: ...


class PureStep:
    """The base of fnrun's own steps: attributes that loops use. A user's function is a step without them.

    A class and not an attribute: `functools.wraps` copies attributes to a wrapper, which may do anything.
    """

    #: The new state may be written over the old one.
    donates = False
    #: It reads nothing of `state.position`, so a loop may update that later.
    ignores_position = False
    #: It has `several(state, batches)`: many steps in one call.
    fuses = False
    #: The optimizer and its schedules, as printed; '' where it is not known.
    optimizer_text = ""
    #: The options that are not defaults, as printed.
    options_text = ""
    #: `batch -> int`: the number of examples, by which plain metrics are weighted; None where it is unclear.
    examples: Callable[[Any], int | None] = staticmethod(example_count)

    def __call__(self, state: Any, batch: Any, /) -> Any:
        raise NotImplementedError


class Function(PureStep):
    """The step `call`, with the name and attributes of `like`, or with `name`."""

    def __init__(
        self,
        call: Callable[..., Any],
        like: Callable[..., Any] | None = None,
        name: str = "",
        examples: Callable[[Any], int | None] | None = None,
    ) -> None:
        if like is not None:
            functools.update_wrapper(self, like)
        else:
            self.__name__ = self.__qualname__ = name
        self._call = call
        if examples is not None:
            self.examples = examples

    def __call__(self, state: Any, batch: Any, /) -> Any:
        return self._call(state, batch)

    def __repr__(self) -> str:
        return f"<{getattr(self, '__qualname__', type(self).__name__)}>"
