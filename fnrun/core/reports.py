"""Values that come up in the middle of a computation and belong among the step's metrics."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import torch

from fnrun.core import tree
from fnrun.core.context import OUTSIDE, loop_context
from fnrun.core.undisturbed import undisturbed

_collected: ContextVar[_Reports | None] = ContextVar("reports", default=None)


def report(name: str, value: Any) -> None:
    """Make `value` (a tensor, a number, or a fold of `fnrun.metrics`) one of the metrics of the step under way.

    Callable from anywhere inside a step: a module's forward, an optimizer's update. Outside a step it does nothing.
    Of several reports under one name the last one counts, and a metric that the step returns under that name comes before it.
    Where a step calls it within `torch.func.vmap`, the metric has the values of all members, stacked in front.
    Raises ValueError for the name `loss`, which is the loss's own.

    >>> report("attention/entropy", 1.5)      # outside a step: nothing happens
    """
    collected = _collected.get()
    if collected is None:
        return
    if name == "loss":
        raise ValueError("report: 'loss' is the name of the loss itself; call the value something else")
    collected[name] = value if _interpreter() is None else tree.map(lambda leaf: _outside(leaf, collected.level), value)


def _outside(value: Any, level: int) -> Any:
    """A value within `torch.func` transforms as it is at an outer level of them: the members' together, a gradient's without its graph."""
    while isinstance(value, torch.Tensor) and (own := _functorch.maybe_get_level(value)) is not None and own > level:
        place = _functorch.maybe_get_bdim(value) if _functorch.is_batchedtensor(value) else 0
        value = _functorch.get_unwrapped(value).movedim(place, 0) if place else _functorch.get_unwrapped(value)
    return value


_functorch: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
_interpreter = _functorch.peek_interpreter_stack


def collecting() -> object | None:
    """What collects at the moment: the same object within one step, another within a step further in, None outside."""
    return _collected.get()


class _Reports(dict[str, Any]):
    """The values by name, of those that several optimizers report, whose they are, and how many `torch.func` transforms stand around."""

    __slots__ = ("level", "owners")

    def __init__(self) -> None:
        super().__init__()
        self.owners: dict[str, object] = {}
        within = _interpreter()
        self.level = 0 if within is None else within.level()


def name_of(name: str, owner: object) -> str:
    """The name under which `owner` reports: `name`, or `name_2` and so on where another one in this step has it."""
    collected = _collected.get()
    if collected is None:
        return name
    own, n = name, 1
    while collected.owners.setdefault(own, owner) != owner:
        own, n = f"{name}_{n + 1}", n + 1
    return own


class collect:
    """`with collect() as reports:` collects into the dictionary `reports` what is reported within; a `collect` further in takes its own."""

    __slots__ = ("_around", "_token")

    @undisturbed
    def __enter__(self) -> dict[str, Any]:
        reports = _Reports()
        self._token = _collected.set(reports)
        around = loop_context.get()
        # A loop that is called within a step is no part of the program around that.
        self._around = None if around is None or around is OUTSIDE else loop_context.set(OUTSIDE)
        return reports

    @undisturbed
    def __exit__(self, *exc: object) -> None:
        _collected.reset(self._token)
        if self._around is not None:
            loop_context.reset(self._around)
