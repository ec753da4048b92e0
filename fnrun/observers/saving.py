"""Saving checkpoints as an observer."""

from __future__ import annotations

from typing import Any, Literal

from fnrun.checkpoint import Checkpoints
from fnrun.hooks.monitor import monitored
from fnrun.state import LoopState, due


class _Checkpoint:
    saves = True  # the loop calls it last in a tick, with every sink flushed

    def __init__(self, checkpoints: Checkpoints, monitor: str | None, mode: Literal["min", "max"], keep: int | None, every: int) -> None:
        self.checkpoints, self.monitor, self.keep, self.every = checkpoints, monitor, keep, every
        self.mode: Literal["min", "max"] = mode
        self._saved: tuple[int, ...] | None = None

    def open(self, program: Any, state: LoopState) -> None:
        self._saved = state.position.order if state.position.ticks else None  # a state that stands somewhere came from a checkpoint

    def __call__(self, state: LoopState, metrics: dict[str, Any]) -> None:
        self.checkpoints.poll()
        if due(state, self.every):
            if self.monitor is not None:
                monitored("checkpoint", self.monitor, metrics)
            self._save(state, metrics)

    def _save(self, state: LoopState, metrics: dict[str, Any]) -> None:
        self.checkpoints.save(state, metrics, monitor=self.monitor, mode=self.mode)
        self._saved = state.position.order
        if self.keep is not None:
            self.checkpoints.prune(self.keep)

    def close(self, state: LoopState, reason: str | BaseException | None) -> None:
        if state.position.ticks and self._saved != state.position.order:
            self._save(state, {})
        self.checkpoints.wait()


def checkpoint(
    checkpoints: Checkpoints, *, monitor: str | None = None, mode: Literal["min", "max"] = "max", keep: int | None = None, every: int = 1
) -> Any:
    """Save the whole state on each n-th step (in a loop of training steps) or round (elsewhere), in the background.

    `keep` of them stay, besides the best by `monitor` and the newest. However the program ends (its last round, a stop, an interrupt, an
    exception), the state of the last finished tick is saved. Raises ValueError where no step reports the monitored metric.
    """
    if mode not in ("min", "max"):
        raise ValueError(f"checkpoint: mode is 'min' or 'max', not {mode!r}")
    return _Checkpoint(checkpoints, monitor, mode, keep, every)
