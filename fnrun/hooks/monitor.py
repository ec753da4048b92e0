"""Monitored metrics: whether a tick reports one, what it says of a name that none does, and what counts as better."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from typing import Any, Literal

from fnrun.core.position import in_training
from fnrun.core.state import LoopState

Mode = Literal["min", "max"]


def better(value: float, best: float | None, mode: str, min_delta: float = 0.0) -> bool:
    """Whether `value` improves on `best` by more than `min_delta`; anything improves on None, a NaN on nothing."""
    if math.isnan(value):
        return False
    return best is None or (value < best - min_delta if mode == "min" else value > best + min_delta)


def reported(who: str, monitor: str, state: LoopState, metrics: dict[str, Any]) -> bool:
    """Whether this tick reports `monitor`; it waits for nothing.

    A training step reports all that it has, unless its update was skipped (`skip_nonfinite`); in a round, members report that have run
    (validation each n-th round). Raises ValueError, with the names that exist, where the step or the member ran and has no such metric.
    """
    if monitor in metrics:
        return True
    group = monitor.rpartition("/")[0]
    names = [name for name in metrics if name.rpartition("/")[2] != "skipped"]
    if in_training(state):
        missing = bool(names) or not metrics
    else:
        missing = any(name.startswith(f"{group}/") for name in names) if group else bool(names)
    if missing:
        raise ValueError(unknown(who, monitor, metrics))
    return False


def monitored_value(who: str, monitor: str, state: LoopState, metrics: dict[str, Any]) -> float | None:
    """The monitored value, for which it waits; None in a tick without it. Raises as `reported`."""
    return float(metrics[monitor]) if reported(who, monitor, state, metrics) else None


def unknown(who: str, monitor: str, names: Iterable[str]) -> str:
    names = list(names)
    near = difflib.get_close_matches(monitor, names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{who}: no step reports {monitor!r}; reported: {', '.join(map(repr, names)) or 'nothing'}{hint}"


def check_mode(who: str, mode: str) -> None:
    if mode not in ("min", "max"):
        raise ValueError(f"{who}: mode is 'min' or 'max', not {mode!r}")
