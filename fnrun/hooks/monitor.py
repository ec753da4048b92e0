"""Hooks that act on a monitored metric."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable
from typing import Any, Literal

from fnrun.state import LoopState

Mode = Literal["min", "max"]


def better(value: float, best: float | None, mode: str, min_delta: float = 0.0) -> bool:
    """Whether `value` improves on `best` by more than `min_delta`; anything improves on None, a NaN on nothing."""
    if math.isnan(value):
        return False
    return best is None or (value < best - min_delta if mode == "min" else value > best + min_delta)


def monitored(who: str, monitor: str, metrics: dict[str, Any]) -> float | None:
    """The monitored value, or None in a round without it (validation each n-th round).

    Raises ValueError where its step reported and had no such metric.
    """
    if monitor in metrics:
        return float(metrics[monitor])
    group = monitor.rpartition("/")[0]
    reported = [name for name in metrics if name.rpartition("/")[0] == group]
    if reported or (metrics and not group):
        raise ValueError(unknown(who, monitor, metrics))
    return None


def unknown(who: str, monitor: str, names: Iterable[str]) -> str:
    names = list(names)
    near = difflib.get_close_matches(monitor, names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{who}: no step reports {monitor!r}; reported: {', '.join(map(repr, names))}{hint}"


@dataclasses.dataclass(frozen=True)
class _EarlyStopping:
    monitor: str
    mode: str
    patience: int
    min_delta: float
    name: str

    def init(self, state: LoopState) -> dict[str, Any]:
        return {"best": None, "waited": 0}

    def after(self, state: Any, metrics: dict[str, Any]) -> Any:
        value = monitored(self.name, self.monitor, metrics)
        if value is None:
            return state
        memory = state.memory[self.name]
        if better(value, memory["best"], self.mode, self.min_delta):
            memory = {"best": value, "waited": 0}
        else:
            memory = {"best": memory["best"], "waited": memory["waited"] + 1}
        state = state.replace(memory={**state.memory, self.name: memory})
        if memory["waited"] < self.patience:
            return state
        best = "none" if memory["best"] is None else f"{memory['best']:.6g}"
        return state.replace(stop=f"{self.name}: {self.monitor} has not improved on {best} for {memory['waited']} rounds")


def early_stopping(monitor: str, *, mode: Mode = "min", patience: int, min_delta: float = 0.0, name: str = "early_stopping") -> Any:
    """Stop the run when `monitor` has not improved by more than `min_delta` for `patience` rounds in a row; a NaN is no improvement.

    Rounds in which the metric is not computed at all (validation each n-th epoch) don't count. Reading the value waits for the device.
    Raises ValueError, with the names that exist, where the monitored step reports no such metric.
    """
    if mode not in ("min", "max"):
        raise ValueError(f"early_stopping: mode is 'min' or 'max', not {mode!r}")
    if patience < 1:
        raise ValueError(f"early_stopping: patience is at least 1, not {patience!r}")
    return _EarlyStopping(monitor, mode, patience, min_delta, name)
