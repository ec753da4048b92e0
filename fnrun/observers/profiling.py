"""The time of some training steps, by operation."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from fnrun.core import files
from fnrun.core.environment import rank
from fnrun.core.state import LoopState
from fnrun.sinks.lines import naming

logger = logging.getLogger("fnrun")

ROWS = 100  # of the table in the file
SHOWN = 8  # of these in the log
WIDTH = 48  # of a name in the log: those of kernels have no end


class _Profile:
    def __init__(self, steps: range, directory: Path) -> None:
        self.steps, self.directory = steps, directory
        self._profiler: Any = None
        self._range: Any = None  # the step under way, as a range of the trace
        self._first = self._last = 0

    def __str__(self) -> str:
        return f"profile steps {self.steps[0]} to {self.steps[-1]} -> {self.directory}"

    def open(self, program: Any, state: LoopState) -> None:
        if self._profiler is None and rank() == 0 and state.step + 1 in self.steps[:1]:
            self._watch(state)  # there is no tick before the first

    def __call__(self, state: LoopState, metrics: dict[str, Any]) -> None:
        if self._range is not None:
            self._end_step(state)
            if state.step < self.steps[-1]:
                self._begin_step(state)
            else:
                self._finish()
        elif self._profiler is not None or (state.step + 1 == self.steps[0] and rank() == 0):
            self._watch(state)
        elif state.step + 2 == self.steps[0] and rank() == 0:
            # Collection begins one step early and that step is discarded: it pays for the profiler's setup.
            self._profiler = torch.profiler.profile()
            self._profiler.prepare_trace()

    def _watch(self, state: LoopState) -> None:
        if self._profiler is None:
            self._profiler = torch.profiler.profile()
            self._profiler.prepare_trace()
        self._profiler.start_trace()
        self._first = state.step + 1
        self._begin_step(state)

    def _begin_step(self, state: LoopState) -> None:
        self._range = torch.profiler.record_function(f"step {state.step + 1}")
        self._range.__enter__()

    def _end_step(self, state: LoopState) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # the kernels that the step has started belong to it
        self._range.__exit__(None, None, None)
        self._range, self._last = None, state.step

    def _finish(self) -> None:
        profiler, self._profiler = self._profiler, None
        profiler.stop_trace()
        name = f"steps-{self._first}-{self._last}"
        trace, table = self.directory / f"{name}.json", self.directory / f"{name}.txt"
        averages = profiler.key_averages()
        on_device = any(event.self_device_time_total for event in averages)
        with naming(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            with files.replacing(trace) as file:
                profiler.export_chrome_trace(file.name)
            order = "self_device_time_total" if on_device else "self_cpu_time_total"
            files.write(table, averages.table(sort_by=order, row_limit=ROWS, max_name_column_width=100).encode())
        ranges = {f"step {step}" for step in range(self._first, self._last + 1)}
        events = [event for event in averages if event.key not in ranges]
        logger.info("profile: steps %d to %d: %s, %s\n%s", self._first, self._last, trace, table, _short(events, order))

    def close(self, state: LoopState, reason: str | BaseException | None) -> None:
        """Write the finished steps, also where the program ended before the others."""
        if self._range is not None:
            self._range.__exit__(None, None, None)
            self._range = None
            if self._last >= self._first:
                self._finish()
        if self._profiler is not None:
            profiler, self._profiler = self._profiler, None
            profiler.stop_trace()


def _short(events: list[Any], order: str) -> str:
    """The most expensive operations, by the time in them alone, without that of operations that they call."""
    events = sorted(events, key=lambda event: -getattr(event, order))
    total = sum(getattr(event, order) for event in events) or 1.0
    where = "device" if "device" in order else "CPU"
    rows = [f"  {'operation':<{WIDTH}} {'calls':>8} {where + ' ms':>10} {'share':>6}"]
    for event in events[:SHOWN]:
        time = getattr(event, order)
        rows.append(f"  {event.key[:WIDTH]:<{WIDTH}} {event.count:>8} {time / 1e3:>10.3f} {time / total:>6.0%}")
    return "\n".join(rows)


def profile(steps: range, to: str | Path) -> Any:
    """torch's profiler over these training steps, counted as in a log's lines: 1 is the first. Give it to the loop that takes them.

    - `steps`: a range such as `range(10, 13)`, from 1 on.
    - `to`: a directory. It gets `steps-10-12.json`, a trace for Perfetto or chrome://tracing with a range for each step, and
      `steps-10-12.txt`, the table of the operations. The most expensive ones are in the log.

    A step lasts from one observer call to the next: hooks, the wait for data and the work of other loops in between are in it. Where the
    program ends early, the finished steps are written. It waits for the device in these steps. Where several processes train together, the
    first one is profiled. Raises ValueError for an empty range, and for a stride other than 1.

    >>> print(profile(range(10, 13), to="runs/digits/profile"))
    profile steps 10 to 12 -> runs/digits/profile
    """
    if not isinstance(steps, range) or steps.step != 1 or not steps or steps[0] < 1:
        raise ValueError(f"profile: steps is a range such as range(10, 13), from 1 on, not {steps!r}")
    return _Profile(steps, files.local_path(to))
