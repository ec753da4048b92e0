"""Saving checkpoints as an observer."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any, Literal

from fnrun.checkpoint import CheckpointError, Checkpoints
from fnrun.donation import fate
from fnrun.hooks.monitor import reported
from fnrun.state import LoopState, due, in_training

logger = logging.getLogger("fnrun")

#: So many saves may fail in a row before training ends: a full disk may be emptied, a lost one does not come back.
MAX_FAILURES = 3


class _Checkpoint:
    name = "checkpoint"
    saves = True  # the loop calls it last in a tick, with every sink flushed

    def __init__(self, checkpoints: Checkpoints, monitor: str | None, mode: Literal["min", "max"], keep: int | None, every: int) -> None:
        self.checkpoints, self.monitor, self.keep, self.every = checkpoints, monitor, keep, every
        self.mode: Literal["min", "max"] = mode
        self._saved: tuple[int, ...] | None = None
        self._failures = 0

    def __str__(self) -> str:
        best = f", best by {self.monitor} ({self.mode})" if self.monitor is not None else ""
        return f"checkpoint every {self.every} -> {os.path.relpath(self.checkpoints.directory)}{best}"

    def open(self, program: Any, state: LoopState) -> None:
        self._saved = state.position.order if state.position.ticks else None  # a state that stands somewhere came from a checkpoint
        self._failures = 0

    def __call__(self, state: LoopState, metrics: dict[str, Any]) -> None:
        self._surviving(self.checkpoints.poll)
        now = due(state, self.every)
        if self.monitor is not None and (now or not in_training(state)):
            reported("checkpoint", self.monitor, state, metrics)
        if now:
            self._surviving(lambda: self._save(state, metrics))

    def _surviving(self, action: Callable[[], None]) -> None:
        try:
            action()
        except CheckpointError as error:
            self._failures += 1
            self._saved = None
            if self._failures >= MAX_FAILURES:
                raise
            logger.error("%s. Training goes on, the next save is tried in full", error)

    def _save(self, state: LoopState, metrics: dict[str, Any]) -> None:
        before = self._saved
        self.checkpoints.save(state, metrics, monitor=self.monitor, mode=self.mode)  # raises if the save before this one failed
        if before is not None:
            self._failures = 0
        self._saved = state.position.order
        if self.keep is not None:
            self.checkpoints.prune(self.keep)

    def close(self, state: LoopState, reason: str | BaseException | None) -> None:
        if (by := fate(state)) is not None:
            logger.error("%s, and did not come to its end: the last checkpoint is the good state", by)
        elif state.position.ticks and self._saved != state.position.order:
            self._save(state, {})
        self.checkpoints.wait()


def checkpoint(
    checkpoints: Checkpoints, *, monitor: str | None = None, mode: Literal["min", "max"] = "max", keep: int | None = None, every: int = 1
) -> Any:
    """Save the whole state on each n-th step (in a loop of training steps) or round (elsewhere), in the background.

    `keep` of them stay, besides the best by `monitor`. However the program ends (its last round, a stop, an interrupt, an exception), the
    state of the last finished tick is saved. A save that fails is logged and training goes on; the third in a row raises CheckpointError.
    Raises ValueError where no step reports the monitored metric.
    """
    if mode not in ("min", "max"):
        raise ValueError(f"checkpoint: mode is 'min' or 'max', not {mode!r}")
    if keep is not None and keep < 1:
        raise ValueError(f"checkpoint: keep is at least 1, not {keep!r}")
    return _Checkpoint(checkpoints, monitor, mode, keep, every)
