"""Statistics over a window of ticks, at a constant cost for each tick however long the window and the run.

A window is a tuple of totals of metrics (`fnrun.loops.totals`), its parts. A window of the last n ticks is split at the n-th tick before
each line, so that the newest parts are exactly n ticks when a line is due.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch

from fnrun import metrics as folds
from fnrun.core.counts import count
from fnrun.loops import totals as running
from fnrun.loops.totals import Totals
from fnrun.metrics.by_name import rates_last

#: Over which ticks: since the line before, the last so many, the loop's pass, or the whole run.
Size = int | Literal["line", "epoch", "run"]
Statistic = str | tuple[str, Size]

#: The most lines in a window of the last n ticks, whose parts are kept in the state.
MAX_LINES = 100


def _value(metric: Any) -> Any:
    """A tick's metric as a value, for an extreme or the newest."""
    value = metric.compute() if hasattr(metric, "compute") else metric
    return value.detach() if isinstance(value, torch.Tensor) else value


def _single(metric: Any) -> torch.Tensor:
    value = _value(metric)
    if not isinstance(value, (torch.Tensor, int, float)):
        raise TypeError(f"log: there is no smallest and no largest {type(metric).__name__}: statistics are of numbers")
    return torch.as_tensor(value)


KINDS: dict[str, Callable[[Any], Any]] = {
    "mean": lambda metric: metric,
    "min": lambda metric: folds.Min(_single(metric)),
    "max": lambda metric: folds.Max(_single(metric)),
    "last": lambda metric: folds.Last(_value(metric)),
}


class Window:
    """The statistics over one window.

    - `size`, `every`: the window, and the ticks from line to line.
    - `chosen`: by metric, each statistic and its name in the line.
    - `rest`: whether it takes the mean of all other metrics.
    - `taken`: the names of the statistics that do not have their metric's name.
    """

    def __init__(
        self, size: Size, every: int, chosen: Mapping[str, Sequence[tuple[str, str]]], rest: bool, taken: frozenset[str] = frozenset()
    ) -> None:
        self.size, self.every, self.chosen, self.rest = size, every, dict(chosen), rest
        self.taken = taken
        self.lines, self.part = divmod(size, every) if isinstance(size, int) else (0, 0)
        self.parts = 2 * self.lines + 1 if self.part else self.lines

    def fold(self, parts: tuple[Totals, ...], at: int, metrics: Mapping[str, Any], examples: int) -> tuple[Totals, ...]:
        """The parts with one more tick, the one that is `at` ticks after the line before, from 0."""
        if isinstance(self.size, int):
            if not self.lines and at < self.every - self.part:
                return ()  # before the last n ticks of the line to come
            begins = (at == 0 and self.lines > 0) or (self.part > 0 and at == self.every - self.part)
        else:
            begins = self.size == "line" and at == 0
            parts = () if begins else parts
        metrics = self._expanded(metrics)
        if begins or not parts:
            ended = (*parts[:-1], running.flushed(parts[-1])) if parts else ()
            return (*ended, running.fold(None, metrics, examples))[-max(1, self.parts) :]
        return (*parts[:-1], running.fold(parts[-1], metrics, examples))

    def fold_each(self, parts: tuple[Totals, ...], at: int, ticks: Sequence[tuple[Mapping[str, Any], int]]) -> tuple[Totals, ...]:
        """`fold` of consecutive ticks, of which only the first may be the first after a line."""
        if isinstance(self.size, int):
            for i, (metrics, examples) in enumerate(ticks):
                parts = self.fold(parts, at + i, metrics, examples)
            return parts
        parts = self.fold(parts, at, *ticks[0])
        rest = running.fold_each(parts[-1], [(self._expanded(metrics), n) for metrics, n in ticks[1:]])
        return (*parts[:-1], rest) if rest is not None else parts

    def _expanded(self, metrics: Mapping[str, Any]) -> Mapping[str, Any]:
        if not self.taken.isdisjoint(metrics):
            both = sorted(self.taken & metrics.keys())
            raise ValueError(
                f"log: {', '.join(both)}: a statistic and a metric have this name, and a line has room for one; rename the metric, or ask "
                "for another statistic"
            )
        if self.rest and self.chosen.keys().isdisjoint(metrics):
            return rates_last(metrics)
        found: dict[str, Any] = {}
        for name, metric in (rates_last(metrics) if self.rest else metrics).items():
            if name in self.chosen:
                found.update((label, KINDS[kind](metrics[name])) for kind, label in self.chosen[name])
            elif self.rest:
                found[name] = metric
        return found


def compute(parts: Sequence[Totals]) -> dict[str, Any]:
    """The values over all parts, by name."""
    parts = [running.flushed(part) for part in parts]
    if len(parts) == 1:
        return running.compute(parts[0])
    sums: dict[str, Any] = {}
    weights: dict[str, float] = {}
    merged: dict[str, list[Any]] = {}
    for part in parts:
        for means in (*part.means, *part.numbers.values()):
            totals = means.total.unbind() if isinstance(means.total, torch.Tensor) else [means.total]
            for name, total in zip(means.names, totals, strict=True):
                sums[name] = sums.get(name, 0.0) + total * means.unit
                weights[name] = weights.get(name, 0.0) + means.weight * means.unit
        for name, fold in part.folds.items():
            merged.setdefault(name, []).append(fold)
    found = {name: total / weights[name] for name, total in sums.items()}
    found.update((name, functools.reduce(lambda a, b: a.merge(b), each)) for name, each in merged.items())
    return folds.values({name: found[name] for part in parts for name in part.names})


def windows(every: int, default: Size, statistics: Mapping[str, Statistic | Sequence[Statistic]]) -> tuple[Window, ...]:
    """The windows of these statistics. Raises ValueError for an unknown window or statistic."""
    chosen: dict[Size, dict[str, list[tuple[str, str]]]] = {default: {}}
    for name, wanted in statistics.items():
        chosen[default].setdefault(name, [])  # a metric that is listed has no mean unless that is listed
        for i, (kind, size) in enumerate(_each(wanted, default)):
            if kind not in KINDS:
                raise ValueError(f"log: statistics of {name!r}: {kind!r} is none; there are {', '.join(KINDS)}")
            label = name if i == 0 else f"{name}_{kind}" + (f"_{size}" if size != default else "")
            chosen.setdefault(size, {}).setdefault(name, []).append((kind, label))
    labels = [(name, label) for by_metric in chosen.values() for name, statistics in by_metric.items() for _, label in statistics]
    twice = sorted(label for label, times in Counter(label for _, label in labels).items() if times > 1)
    if twice:
        raise ValueError(f"log: two statistics are called {', '.join(twice)}: one of them would be lost; ask for each once")
    taken = frozenset(label for name, label in labels if label != name)
    return tuple(Window(_size(size, every), every, by_metric, rest=size == default, taken=taken) for size, by_metric in chosen.items())


def _each(wanted: Statistic | Sequence[Statistic], default: Size) -> list[tuple[str, Size]]:
    """The statistics, each with its window. A pair of a statistic and a window is one; a pair of statistics is two."""
    if isinstance(wanted, str):
        return [(wanted, default)]
    if isinstance(wanted, tuple) and len(wanted) == 2 and isinstance(wanted[0], str) and wanted[1] not in KINDS:
        return [(wanted[0], wanted[1])]  # pyright: ignore[reportReturnType]
    return [each for one in wanted for each in _each(one, default)]  # pyright: ignore[reportArgumentType]


def _size(size: Any, every: int) -> Size:
    if size in ("line", "epoch", "run"):
        return size
    if isinstance(size, str):
        raise ValueError(f"log: a window is at least 1 tick, 'line', 'epoch' or 'run', not {size!r}")
    size = count("log: a window", size)
    if size > MAX_LINES * every:
        raise ValueError(f"log: a window of {size} ticks holds more than {MAX_LINES} lines of every={every}: log less often, or take 'run'")
    return size
