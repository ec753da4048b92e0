"""Lines of metrics over windows of ticks, to one or several sinks."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import torch

from fnrun.core.counts import count
from fnrun.core.position import in_training, is_due, tick_number
from fnrun.core.state import LoopState
from fnrun.core.words import kind, uncalled
from fnrun.observers.pace import Pace
from fnrun.observers.window import Size, Statistic, Window, compute, windows
from fnrun.observers.writing import Writer
from fnrun.sinks import Record, Sink, console

logger = logging.getLogger("fnrun")

#: Called with the name of a log and each of its lines: for `fnrun.testing`, which compares what a run and a resumed one write.
listener: ContextVar[Callable[[str, Record], None] | None] = ContextVar("listener", default=None)


class _Log(Writer):
    idle_between = True

    def __init__(self, every: int, sinks: Sequence[Sink], named: tuple[Window, ...], asked: frozenset[str], name: str) -> None:
        super().__init__(sinks)
        self.every, self.windows, self.name = every, {str(window.size): window for window in named}, name
        self._unseen = set(asked)
        self._program: Any = None

    def __str__(self) -> str:
        return f"{self.name} every {self.every} -> {', '.join(map(str, self.sinks)) or 'nowhere'}"

    def open(self, program: Any, state: LoopState) -> None:
        self._program, self._pace = program, Pace()
        self._began = self._last = time.perf_counter()
        self._waited, self._ticks, self._step = program.data_seconds, 0, state.step
        super().open(program, state)

    # The windows, in the loop's frame.

    def fold(self, folded: Any, before: LoopState, metrics: Any, examples: int) -> Any:
        if not isinstance(metrics, dict):
            return None
        kept = folded if folded is not None and "run" not in self.windows else self._first(before) | (folded or {})
        return {
            size: window.fold(kept.get(size, ()), tick_number(before) % self.every, metrics, examples)
            for size, window in self.windows.items()
        }

    def fold_each(self, folded: Any, before: Any, ticks: Sequence[tuple[Any, int]]) -> Any:
        """`fold` for ticks of a training loop that follow each other; `before` is before the first."""
        kept = folded if folded is not None and "run" not in self.windows else self._first(before) | (folded or {})
        first = before.step % self.every
        return {size: window.fold_each(kept.get(size, ()), first, ticks) for size, window in self.windows.items()}

    def _first(self, before: LoopState) -> dict[str, Any]:
        """The windows at the beginning of a loop: empty, but that of the whole run is in the hook's memory."""
        if "run" not in self.windows or len(before.position.frames) == 1:
            return {}
        if self.name not in before.memory:
            raise ValueError(
                f"{self.name}: a window over the whole run outlives this loop, which ends in each round: give the log to the loop as a "
                "hook too, and it remembers: hooks=[log], observers=[log]"
            )
        return {"run": before.memory[self.name]}

    def carry(self, folded: Any) -> Any:
        """The windows that go on in the loop's next round: ticks since the line before, and the last n ticks."""
        return {size: parts for size, parts in (folded or {}).items() if size not in ("epoch", "run")}

    # The hook that carries the window of the whole run from round to round.

    def init(self, state: LoopState) -> Any:
        return ()

    def after(self, state: Any, metrics: dict[str, Any]) -> Any:
        folded = state.position.frames[-1].folds.get(self.name) or {}
        return state.replace(memory={**state.memory, self.name: folded.get("run", ())})

    # The line.

    def __call__(self, state: LoopState, metrics: dict[str, Any]) -> None:
        self._ticks += max(1, state.step - self._step) if in_training(state) else 1
        self._step = state.step
        if self._ticks == 1 or is_due(state, self.every):
            now = time.perf_counter()
            left = self._pace.at(state.position.frames, self._program.lengths, now)
            if is_due(state, self.every):
                self._line(state, now, left)

    def _line(self, state: LoopState, now: float, left: float | None) -> None:
        gathered = state.position.frames[-1].folds.get(self.name) or {}
        if self.writes and gathered:
            values = {name: value for window in gathered.values() if window for name, value in compute(window).items()}
            if self._unseen:
                self._check(values)
            if values:
                line = self.write(state, values, self._clock(now, left))
                if line is not None and (listening := listener.get()) is not None:
                    listening(self.name, line)
        self._last, self._ticks = now, 0
        self._waited = self._program.data_seconds

    def _check(self, values: Mapping[str, Any]) -> None:
        missing = sorted(self._unseen - values.keys())
        if missing:
            logger.warning("log: statistics of %s: no step has reported it; reported: %s", ", ".join(missing), ", ".join(values))
        self._unseen.clear()

    def _clock(self, now: float, left: float | None) -> dict[str, float]:
        clock = {"time": time.time(), "elapsed": now - self._began, "seconds_per_tick": (now - self._last) / self._ticks}
        clock["data_seconds_per_tick"] = (self._program.data_seconds - self._waited) / self._ticks
        if left is not None:
            clock["eta"] = left
        if sys.platform != "win32":
            import resource

            clock["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
        if torch.cuda.is_initialized():
            clock["peak_cuda_mib"] = torch.cuda.max_memory_allocated() / 2**20
        return clock


def log(
    every: int = 1,
    *,
    to: Sequence[Sink] | None = None,
    window: Size = "line",
    statistics: Mapping[str, Statistic | Sequence[Statistic]] | None = None,
    name: str = "log",
) -> Any:
    """A line of metrics on each n-th step (in a loop of training steps) or round (elsewhere).

    - `every=1`: steps or rounds from line to line.
    - `to=None`: a list of sinks; the console by default.
    - `window="line"`: the ticks over which a line holds means: those since the line before (`"line"`), the last so many (a number), those
      of the loop's pass (`"epoch"`) or of the whole run (`"run"`). In a loop of training steps the first two reach back into the rounds
      before, elsewhere to where the loop began.
    - `statistics=None`: others than the mean, by the metric's name in the loop: "mean", "min", "max" or "last", or several of them, each
      alone or with another window, as `{"loss": ["mean", "max", ("mean", 100)]}`. The first has the metric's name, the others are
      `loss_max`, `loss_mean_100`. The default of a learning rate (`lr`, `decay/lr`) is "last".
    - `name="log"`: the key of the windows in the state; two logs of one loop need two names.

    Windows are in the state: after a resume the next line is that of an uninterrupted run. For a window of the whole run in a repeated
    loop, the log is a hook of that loop too: `hooks=[log], observers=[log]`.

    Names have the loop's path: `loss` in the sequence's member `train` is `train/loss`. It waits for the device only when a line is due.
    Where several processes train together, the first one writes.

    The clock of a line has, in seconds, `time` (of day), `elapsed`, `seconds_per_tick`, `data_seconds_per_tick` (the wait for data in it)
    and `eta` (left, at the pace of this process); in MiB, `peak_mib` (resident memory) and `peak_cuda_mib`.

    Raises ValueError for a window or a statistic that does not exist.

    >>> log(50, statistics={"loss": "median"})
    Traceback (most recent call last):
    ValueError: log: statistics of 'loss': 'median' is none; there are mean, min, max, last
    """
    every = count("log: every", every)
    for sink in to if isinstance(to, (list, tuple)) else [] if to is None else [to]:
        if not isinstance(to, (list, tuple)) or isinstance(sink, type) or not hasattr(sink, "write"):
            hint = f": call it, {uncalled(sink)}(...)" if uncalled(sink) else ""
            raise TypeError(f"log: to= takes a list of sinks, to=[observers.console(), observers.csv(path)], and not {kind(sink)}{hint}")
    if statistics is not None and not isinstance(statistics, Mapping):
        raise TypeError(f"log: statistics= takes a dict by the metric's name, {{'loss': ['mean', 'max']}}, and not {kind(statistics)}")
    asked = frozenset(statistics or ())
    named = windows(every, window, statistics or {})
    return _Log(every, [console()] if to is None else to, named, asked, name)
