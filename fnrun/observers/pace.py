"""The share of a training that is done, and the time that is left."""

from __future__ import annotations

from collections.abc import Mapping

from fnrun.core.position import Frame


def fraction(frames: tuple[Frame, ...], lengths: Mapping[str, int | None]) -> float | None:
    """The share of the training that is done, from 0 to 1, or None where its end is not known (`until`).

    The other members of a sequence count as nothing.
    """
    done = 0.0
    for frame in reversed(frames):
        if frame.kind == "sequence":
            continue
        length = lengths.get(frame.name)
        if length:
            done = min(1.0, (frame.ticks + done) / length)
        elif frame.kind == "repeat":
            return None
    return done


class Pace:
    """The time that is left, at the pace of this process."""

    def __init__(self) -> None:
        self._first: tuple[float, float] | None = None
        self.done: float | None = None

    def at(self, frames: tuple[Frame, ...], lengths: Mapping[str, int | None], now: float) -> float | None:
        """Seconds left at `now`; None as long as that is not known. A validation does not count."""
        if frames[-1].kind not in ("eval_loop", "predict_loop"):
            self.done = fraction(frames, lengths)
        if self.done is None:
            return None
        if self._first is None:
            self._first = (self.done, now)
        done, began = self._first
        return (now - began) * (1 - self.done) / (self.done - done) if self.done > done else None
