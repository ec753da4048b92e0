"""Values that come up in the middle of a computation and belong among the step's metrics."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

_collected: ContextVar[dict[str, Any] | None] = ContextVar("reports", default=None)


def report(name: str, value: Any) -> None:
    """Make `value` (a tensor, a number, or a fold of `fnrun.metrics`) one of the metrics of the step under way.

    Callable from anywhere inside a step: a module's forward, an optimizer's update. Outside a step it does nothing.
    Of several reports under one name the last one counts.

    >>> report("attention/entropy", 1.5)      # outside a step: nothing happens
    """
    collected = _collected.get()
    if collected is not None:
        collected[name] = value


@contextlib.contextmanager
def collect() -> Iterator[dict[str, Any]]:
    """Within, reports are collected into the dictionary that is yielded; a `collect` further in takes its own."""
    reports: dict[str, Any] = {}
    token = _collected.set(reports)
    try:
        yield reports
    finally:
        _collected.reset(token)
