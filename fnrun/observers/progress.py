"""A live display for people: the open loops, the speed and the time left."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping
from typing import Any

from fnrun.core.environment import rank
from fnrun.core.position import Frame
from fnrun.core.state import LoopState
from fnrun.core.tables import clock_time
from fnrun.observers.pace import Pace
from fnrun.sinks.console import shown

logger = logging.getLogger("fnrun")

REFRESH = 0.1  # seconds between two updates: each waits for the device
PLAIN = 30.0  # seconds between two lines where there is no terminal
NEWEST = 3  # metrics that are shown


class _Progress:
    def __init__(self, unit: str) -> None:
        self.unit = unit
        self._display: Any = None
        self._program: Any = None
        self._watched = False

    def __str__(self) -> str:
        return "progress"

    def open(self, program: Any, state: LoopState) -> None:
        if self._program is program:
            return
        self._program, self._pace, self._watched = program, Pace(), rank() == 0
        self._begun = False
        self._seen, self._examples = time.perf_counter(), program.examples
        self._interval = PLAIN
        if self._watched and sys.stdout is not None and sys.stdout.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn
            from rich.table import Column

            cut = Column(no_wrap=True, overflow="ellipsis", ratio=1)
            columns = (TextColumn("{task.description}"), BarColumn(bar_width=16), TextColumn("{task.fields[text]}", table_column=cut))
            # No refresh thread: a worker that is forked while it holds a lock would wait for ever.
            self._display = Progress(*columns, console=Console(), auto_refresh=False, transient=True, expand=True)
            self._outer, self._inner = (self._display.add_task("", total=1.0, text="", visible=False) for _ in range(2))
            self._display.start()
            self._interval = REFRESH

    def __call__(self, state: LoopState, metrics: dict[str, Any]) -> None:
        if not self._watched:
            return
        now = time.perf_counter()
        if self._begun and now - self._seen < self._interval:
            return
        frames, lengths = state.position.frames, self._program.lengths
        left = self._pace.at(frames, lengths, now)
        if self._begun:
            rate = f"{(self._program.examples - self._examples) / (now - self._seen):,.0f} {self.unit}/s"
            pace = f"{rate}  {'?' if left is None else clock_time(left)} left"
            self._seen, self._examples = now, self._program.examples
            self._show(frames, lengths, pace, _newest(metrics))
        self._begun = True

    def _show(self, frames: tuple[Frame, ...], lengths: Mapping[str, int | None], pace: str, newest: str) -> None:
        *outer, inner = describe(frames, lengths) or [""]
        rounds = "  ".join(outer)
        if self._display is None:
            logger.info("%s", "  ".join(text for text in (rounds, inner, newest, pace) if text))
            return
        length = lengths.get(frames[-1].name)
        done = 0.0 if not length else frames[-1].ticks / length
        self._display.update(self._outer, visible=bool(rounds), completed=self._pace.done or 0.0, description=rounds, text=pace)
        texts = [newest] if rounds else [newest, pace]
        self._display.update(self._inner, visible=True, completed=done, description=inner, text="  ".join(t for t in texts if t))
        self._display.refresh()

    def close(self, state: LoopState, reason: str | BaseException | None) -> None:
        self._program = None
        if self._display is not None:
            self._display.stop()
            self._display = None


def _newest(metrics: Mapping[str, Any]) -> str:
    found = []
    for name, value in metrics.items():
        single = isinstance(value, (int, float)) or getattr(value, "ndim", None) == 0
        if single and name.rpartition("/")[2] not in ("lr", "grad_norm", "clipped") and len(found) < NEWEST:
            found.append(f"{name.rpartition('/')[2]} {shown(float(value)).rstrip()}")
    return "  ".join(found)


def describe(frames: tuple[Frame, ...], lengths: Mapping[str, int | None]) -> list[str]:
    """The open loops, outermost first: `["epoch 3/10", "train 12/23"]`."""
    words = []
    for i, frame in enumerate(frames):
        length = lengths.get(frame.name)
        count = f"/{length}" if length else ""
        if frame.kind == "repeat":
            words.append(f"epoch {min(frame.ticks + (i < len(frames) - 1), length or sys.maxsize)}{count}")
        elif frame.kind not in ("sequence", "workflow"):
            words.append(f"{frame.path.rpartition('/')[2] or 'step'} {frame.ticks}{count}")
    return words


def progress(unit: str = "examples") -> Any:
    """A live display (rich) in a terminal: the run's rate in `unit` per second, the time left, the loop at work and its newest metrics.

    Give the same object to each loop that it shows, the training's and the evaluation's. The time left is by the pace of this process, so
    it is right after a resume. Lines of the logger and of `print` appear above the display. Where the standard output is no terminal, the
    logger `fnrun` gets a line each half minute.
    """
    return _Progress(unit)
