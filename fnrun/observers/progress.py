"""A live line for people: where the run is, how fast, how long still."""

from __future__ import annotations

import datetime
import sys
import time
from typing import Any

from fnrun.state import Frame, LoopState

REFRESH = 0.1  # seconds between two looks: each waits for the device


class _Progress:
    def __init__(self, unit: str) -> None:
        self.unit = unit
        self._display: Any = None
        self._program: Any = None

    def open(self, program: Any, state: LoopState) -> None:
        self._program = program
        self._began = self._seen = time.perf_counter()
        self._examples, self._first, self._done = program.examples, None, 0.0
        if sys.stdout is not None and sys.stdout.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn

            columns = (TextColumn("{task.description}"), BarColumn(bar_width=10), TextColumn("{task.fields[text]}"))
            # No refresh thread: a worker that is forked while it holds a lock would wait for ever.
            self._display = Progress(*columns, console=Console(), auto_refresh=False, transient=True)
            self._task = self._display.add_task("", total=1.0, text="")
            self._display.start()

    def __call__(self, state: LoopState, metrics: dict[str, Any]) -> None:
        if self._display is None:
            return
        now = time.perf_counter()
        frames = state.position.frames
        if not frames[-1].loop.startswith("eval_loop"):
            self._done = fraction(frames, self._program.lengths)
        if self._first is None:
            self._first = (self._done, now)
        if now - self._seen < REFRESH:
            return
        rate = (self._program.examples - self._examples) / (now - self._seen)
        self._seen, self._examples = now, self._program.examples
        values = [
            f"{name.rpartition('/')[2]} {float(metrics[name]):.3f}" for name in metrics if name.rpartition("/")[2] in ("loss", "accuracy")
        ]
        left = _left(self._done, now, *self._first)
        text = "  ".join([*values, f"{rate:,.0f} {self.unit}/s", f"{left} left"])
        self._display.update(self._task, completed=self._done, description=describe(frames, self._program.lengths), text=text)
        self._display.refresh()

    def close(self, state: LoopState, reason: str | BaseException | None) -> None:
        if self._display is not None:
            self._display.stop()
            self._display = None


def fraction(frames: tuple[Frame, ...], lengths: dict[str, int | None]) -> float:
    """How much of the training is done, from 0 to 1; members of a sequence besides the training count as nothing."""
    done = 0.0
    for frame in reversed(frames):
        length = lengths.get(frame.loop)
        if length and not frame.loop.startswith("sequence"):
            done = min(1.0, (frame.ticks + done) / length)
    return done


def describe(frames: tuple[Frame, ...], lengths: dict[str, int | None]) -> str:
    """The open loops in words: `epoch 3/10  train 12/23`."""
    words = []
    for i, frame in enumerate(frames):
        kind, _, path = frame.loop.partition(" ")
        length = lengths.get(frame.loop)
        count = f"/{length}" if length else ""
        if kind == "repeat":
            words.append(f"epoch {min(frame.ticks + (i < len(frames) - 1), length or sys.maxsize)}{count}")
        elif kind not in ("sequence", "workflow"):
            words.append(f"{path.rpartition('/')[2] or 'step'} {frame.ticks}{count}")
    return "  ".join(words)


def _left(done: float, now: float, done_at_first: float, first: float) -> str:
    if done <= done_at_first:
        return "?"
    seconds = (now - first) * (1 - done) / (done - done_at_first)
    return str(datetime.timedelta(seconds=round(seconds)))


def progress(unit: str = "examples") -> Any:
    """A live progress line (rich): the open loops, loss and accuracy, rate in `unit` per second, time left. Without a terminal, nothing.

    Give the same object to each loop whose ticks shall move it, the training's and the evaluation's. Time left counts from what this process
    has done, so it is right after a resume.
    """
    return _Progress(unit)
