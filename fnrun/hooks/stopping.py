"""Hooks that ask the run to stop."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import torch

from fnrun.checkpoint.manifest import Mode
from fnrun.core import counts
from fnrun.core.state import LoopState
from fnrun.hooks.monitor import better, check_mode, monitored_value


@dataclasses.dataclass(frozen=True)
class _EarlyStopping:
    monitor: str
    mode: str
    patience: int
    min_delta: float
    threshold: float | None
    check_finite: bool
    name: str

    def __str__(self) -> str:
        return f"{self.name} on {self.monitor} ({self.mode}), patience {self.patience}"

    def init(self, state: LoopState) -> dict[str, Any]:
        return {"best": None, "waited": 0}

    def after(self, state: Any, metrics: dict[str, Any]) -> Any:
        value = monitored_value(self.name, self.monitor, state, metrics)
        if value is None:
            return state
        memory = state.memory[self.name]
        if better(value, memory["best"], self.mode, self.min_delta):
            memory = {"best": value, "waited": 0}
        else:
            memory = {"best": memory["best"], "waited": memory["waited"] + 1}
        why = self._why(value, memory)
        state = state.replace(memory={**state.memory, self.name: memory})
        return state.replace(stop=f"{self.name}: {self.monitor} {why}") if why else state

    def _why(self, value: float, memory: dict[str, Any]) -> str | None:
        if self.check_finite and not math.isfinite(value):
            return f"is {value}"
        if self.threshold is not None and (value <= self.threshold if self.mode == "min" else value >= self.threshold):
            return f"has reached {self.threshold:g}: it is {value:.6g}"
        if memory["waited"] >= self.patience:
            best = "none" if memory["best"] is None else f"{memory['best']:.6g}"
            return f"has not improved on {best} for {memory['waited']} rounds"
        return None


def early_stopping(
    monitor: str,
    *,
    mode: Mode = "min",
    patience: int,
    min_delta: float = 0.0,
    threshold: float | None = None,
    check_finite: bool = True,
    name: str = "early_stopping",
) -> Any:
    """Stop the run when `monitor`, a scalar, has not improved by more than `min_delta` for `patience` rounds in a row.

    - `monitor`: the name of a metric, such as `"val/loss"`.
    - `mode="min"`: whether less (`"min"`) or more (`"max"`) is better.
    - `patience`: rounds, at least 1.
    - `min_delta=0.0`: an improvement is larger than this, in units of the metric.
    - `threshold=None`: stop as soon as the metric reaches it.
    - `check_finite=True`: stop as soon as the metric is infinite or NaN. Without it, a NaN is no improvement.

    Rounds in which the metric is not computed at all (validation each n-th epoch) don't count. Reading the value waits for the device.
    Raises ValueError for options out of range and, with the names that exist, where the monitored step reports no such metric.

    Source: MMEngine's EarlyStoppingHook. There a value that equals the best is an improvement, so that a constant metric never stops a run;
    here, as in Keras and Lightning, it is none.
    """
    check_mode("early_stopping", mode)
    patience = counts.count("early_stopping: patience", patience)
    if threshold is not None and math.isnan(threshold):
        raise ValueError("early_stopping: threshold is a number, not NaN, which no metric reaches")
    if not min_delta >= 0:
        raise ValueError(f"early_stopping: min_delta is at least 0, not {min_delta!r}")
    return _EarlyStopping(monitor, mode, patience, min_delta, threshold, check_finite, name)


# --- at a limit ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _StopAfter:
    limit: int
    unit: str
    reached: Callable[[Any], int]
    name: str

    def __str__(self) -> str:
        return f"{self.name} {self.limit} {self.unit}"

    def __call__(self, state: Any, metrics: dict[str, Any]) -> Any:
        reached = self.reached(state)
        return state.replace(stop=f"{self.name}: {reached} {self.unit}") if reached >= self.limit else state


@dataclasses.dataclass(frozen=True)
class _StopAfterTokens(_StopAfter):
    count: Callable[[Any], int]

    def init(self, state: LoopState) -> dict[str, Any]:
        return {"tokens": 0}

    def before(self, state: Any, batch: Any) -> Any:
        tokens = state.memory[self.name]["tokens"] + int(self.count(batch))
        return state.replace(memory={**state.memory, self.name: {"tokens": tokens}})

    after = _StopAfter.__call__


def stop_after(
    *,
    steps: int | None = None,
    tokens: int | None = None,
    epochs: int | None = None,
    count: Callable[[Any], int] | None = None,
    stream: str | None = None,
    name: str = "stop_after",
) -> Any:
    """Stop the run after the first tick at which so many steps, tokens or epochs are reached: one of the three.

    - `steps=None`: the limit of `state.step`.
    - `tokens=None`: the limit of the tokens in all batches of the loop that has this hook.
    - `epochs=None`: the limit of finished passes over the data.
    - `count=None`: a function of a batch that counts its tokens, `lambda batch: batch["input_ids"].numel()`. Without it a batch is one
      tensor, and its elements are counted. A shape is known without waiting for the device.
    - `stream=None`: the stream whose epochs count, where the program has several.

    A run that was stopped goes on with a higher limit, once `state.stop` is cleared. A limit in time is an interrupt, `fnrun.deadline`.
    Raises ValueError for anything but one limit of at least 1, and where `stream` does not name the stream.
    """
    limits = {option: limit for option, limit in (("steps", steps), ("tokens", tokens), ("epochs", epochs)) if limit is not None}
    if len(limits) != 1:
        raise ValueError(f"stop_after: one of steps=, tokens= and epochs=, not {', '.join(limits) or 'none'}")
    [(option, limit)] = limits.items()
    limit = counts.count(f"stop_after: {option}", limit)
    if option == "steps":
        return _StopAfter(limit, option, lambda state: state.step, name)
    if option == "epochs":
        return _StopAfter(limit, option, functools.partial(_epochs, name, stream), name)
    return _StopAfterTokens(limit, option, lambda state: state.memory[name]["tokens"], name, count or _elements)


def _epochs(name: str, stream: str | None, state: LoopState) -> int:
    streams = state.position.streams
    if stream is None and len(streams) == 1:
        return next(iter(streams.values())).epoch
    if stream not in streams:
        names = ", ".join(map(repr, streams)) or "none"
        raise ValueError(f"{name}: whose epochs? stream= names one of the program's streams of data: {names}")
    return streams[stream].epoch


def _elements(batch: Any) -> int:
    if isinstance(batch, torch.Tensor):
        return batch.numel()
    raise ValueError("stop_after: say how many tokens a batch has: stop_after(tokens=..., count=lambda batch: batch['input_ids'].numel())")
