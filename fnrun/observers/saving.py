"""Saving checkpoints as an observer."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

from fnrun.checkpoint import CheckpointError, Checkpoints
from fnrun.checkpoint.manifest import Mode, ranked
from fnrun.checkpoint.retention import check_keep, monitors_of
from fnrun.core.counts import count
from fnrun.core.donation import deleted_reason
from fnrun.core.environment import rank
from fnrun.core.inplace import InPlaceError
from fnrun.core.position import Position, in_training, is_due
from fnrun.core.state import LoopState
from fnrun.core.words import kind
from fnrun.hooks.monitor import reported

logger = logging.getLogger("fnrun")


class _Checkpoint:
    name = "checkpoint"
    saves = True  # the loop calls it last in a tick, with every sink flushed

    def __init__(
        self, checkpoints: Checkpoints, monitors: dict[str, Mode], keep: int | None, keep_every: int | None, every: int, max_failures: int
    ) -> None:
        self.checkpoints, self.monitors, self.every = checkpoints, monitors, every
        self.keep, self.keep_every, self.max_failures = keep, keep_every, max_failures
        self._saved: tuple[int, ...] | None = None
        self._seen: tuple[Position | None, dict[str, Any]] = None, {}  # the position of the newest tick, and its metrics
        self._best: dict[str, float] | None = None  # of what is saved, by metric: the lower the better
        self._failures = 0

    def __str__(self) -> str:
        best = f", best by {' and '.join(f'{metric} ({mode})' for metric, mode in self.monitors.items())}" if self.monitors else ""
        return f"checkpoint every {self.every} -> {os.path.relpath(self.checkpoints.directory)}{best}"

    def open(self, program: Any, state: LoopState) -> None:
        self._saved = state.position.order if state.position.ticks else None  # a state that is not at the beginning came from a checkpoint
        self._failures = 0
        self._seen, self._best = (None, {}), None
        _check_checkpoints(self.checkpoints)
        if this := rank():
            raise CheckpointError(f"{self.checkpoints.directory}: this is process {this} of several; the first one alone may save there")

    def __call__(self, state: LoopState, metrics: dict[str, Any]) -> None:
        now = is_due(state, self.every)
        # One save is in flight at most: its failure is raised before the next one begins.
        self._surviving(state, self.checkpoints.wait if now else self.checkpoints.poll)
        if now or not in_training(state):
            for metric in self.monitors:
                reported("checkpoint", metric, state, metrics)
        self._seen = state.position, metrics
        if (not in_training(state) and self._improves(state, metrics)) or now:
            self._surviving(state, lambda: self._save(state, metrics))

    def _improves(self, state: LoopState, metrics: dict[str, Any]) -> bool:
        """Whether the round is the best one yet by any of the metrics: such a round is saved whatever `every` is."""
        if self._best is None:
            self._best = self.checkpoints.best_values(self.monitors, before=state.position.ticks)
        found = {name: ranked(metrics[name], mode) for name, mode in self.monitors.items() if name in metrics}
        better = {name: value for name, value in found.items() if value is not None and value < self._best.get(name, math.inf)}
        self._best.update(better)
        return bool(better)

    def _surviving(self, state: LoopState, action: Callable[[], None]) -> None:
        try:
            action()
        except CheckpointError as error:
            self._failures += 1
            self._saved = self._best = None
            if self._failures >= self.max_failures or isinstance(error.__cause__, InPlaceError):
                error.state = state
                raise
            logger.error("%s. Training goes on, the next save is tried in full", error)

    def _save(self, state: LoopState, metrics: dict[str, Any]) -> None:
        before = self._saved
        self._hand_over(state, metrics)
        if before is not None:  # and it is on disk
            self._failures = 0
        self._saved = state.position.order
        if self.keep is not None:
            self.checkpoints.prune(self.keep, self.keep_every)

    def _hand_over(self, state: LoopState, metrics: dict[str, Any]) -> None:
        """Save; a round without a monitored metric is not judged by it."""
        self.checkpoints.save(state, metrics, monitor={name: mode for name, mode in self.monitors.items() if name in metrics})

    def close(self, state: LoopState, reason: str | BaseException | None) -> None:
        changed: CheckpointError | None = None  # the state was written to in place: raised when the last state is on disk
        try:
            self.checkpoints.wait()
        except CheckpointError as error:
            logger.error("%s", error)
            self._saved = None
            changed = error if isinstance(error.__cause__, InPlaceError) else None
        if isinstance(reason, CheckpointError) and reason.state is not None:
            state = reason.state  # of the tick whose save failed
        if (by := deleted_reason(state)) is not None:
            logger.error("%s, and did not come to its end: the last checkpoint is the good state", by)
        elif state.position.ticks and self._saved != state.position.order:
            try:
                position, metrics = self._seen
                metrics = metrics if position is not None and position.order == state.position.order else {}
                try:
                    self._hand_over(state, metrics)
                except CheckpointError as error:
                    if not isinstance(error.__cause__, InPlaceError):
                        raise
                    changed = error
                    self._hand_over(state, metrics)
                self.checkpoints.wait()
                if self.keep is not None:
                    self.checkpoints.prune(self.keep, self.keep_every)
            except CheckpointError as error:
                error.state = state
                raise
        if changed is not None:
            raise changed


def _check_checkpoints(checkpoints: Any) -> None:
    if not isinstance(checkpoints, Checkpoints):
        raise TypeError(
            f"checkpoint: it saves to fnrun.checkpoint.Checkpoints(directory), or run.checkpoints, and not to {kind(checkpoints)}"
        )


def checkpoint(
    checkpoints: Checkpoints,
    *,
    monitor: str | Mapping[str, Mode] | None = None,
    mode: Mode = "min",
    keep: int | None = None,
    keep_every: int | None = None,
    every: int = 1,
    max_failures: int = 3,
) -> Any:
    """Save the whole state on each n-th step (in a loop of training steps) or round (elsewhere), in the background.

    However the program ends (its last round, a stop, an interrupt, an exception), the state of the last finished tick is saved.

    - `checkpoints`: `fnrun.checkpoint.Checkpoints(directory)`, or `run.checkpoints`.
    - `monitor=None`: the metric by which checkpoints are judged, or several with their modes: `{"val/loss": "min", "val/accuracy": "max"}`.
      A round that is the best one yet is saved whatever `every` is; in a loop of training steps only each n-th step is judged.
    - `mode="min"`: "min" or "max", the mode of a single `monitor`.
    - `keep=None`: the number of newest checkpoints that stay, besides the best by each metric; by default all stay.
    - `keep_every=None`: with `keep`, the first checkpoint at or after each multiple of so many steps stays too.
    - `every=1`: steps or rounds from save to save.
    - `max_failures=3`: failed saves in a row that end the run, with a CheckpointError whose `state` is that of the tick. After fewer the
      failure is logged, training goes on and the next save is tried.

    Raises ValueError where no step reports a monitored metric.
    """
    if checkpoints is not None:  # a program can be printed and checked without a directory; it cannot begin
        _check_checkpoints(checkpoints)
    check_keep("checkpoint", keep, keep_every)
    if keep_every is not None and keep is None:
        raise ValueError("checkpoint: keep_every says what stays besides the `keep` newest: give keep too (without it everything stays)")
    every, max_failures = count("checkpoint: every", every), count("checkpoint: max_failures", max_failures)
    return _Checkpoint(checkpoints, monitors_of(monitor, mode), keep, keep_every, every, max_failures)
