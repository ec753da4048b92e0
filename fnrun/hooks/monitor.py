"""Monitored metrics: whether a tick reports one, and what counts as better."""

from __future__ import annotations

import difflib
import math
from typing import Any

from fnrun.core.position import in_training
from fnrun.core.state import LoopState


def better(value: float, best: float | None, mode: str, min_delta: float = 0.0) -> bool:
    """Whether `value` improves on `best` by more than `min_delta`. Any number improves on None; a NaN improves on nothing."""
    if math.isnan(value):
        return False
    return best is None or (value < best - min_delta if mode == "min" else value > best + min_delta)


def reported(who: str, monitor: str, state: LoopState, metrics: dict[str, Any]) -> bool:
    """Whether this tick reports `monitor`. Waits for no device.

    A training step reports all its metrics, unless its update was skipped (`skip_nonfinite`). A round reports those of the members that ran
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
        near = difflib.get_close_matches(monitor, list(metrics), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{who}: no step reports {monitor!r}; reported: {', '.join(map(repr, metrics)) or 'nothing'}{hint}")
    return False


def monitored_value(who: str, monitor: str, state: LoopState, metrics: dict[str, Any]) -> float | None:
    """The monitored value, None in a tick without it. Waits for the device; raises as `reported`."""
    return float(metrics[monitor]) if reported(who, monitor, state, metrics) else None


def check_mode(who: str, mode: str) -> None:
    if mode not in ("min", "max"):
        raise ValueError(f"{who}: mode is 'min' or 'max', not {mode!r}")
