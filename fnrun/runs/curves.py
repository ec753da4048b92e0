"""The curves of runs, read from their logs."""

from __future__ import annotations

import contextlib
import fnmatch
import json
import math
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

from fnrun.core import files

#: Fields of a line that are not metrics.
PLACE = ("ticks", "at", "step", "epoch", "clock")
By = Literal["step", "time", "epoch"]


def records(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a `metrics.jsonl`, one after the other. A line that a kill cut short, or that no log wrote, is left out."""
    with path.open("rb") as file:
        yield from filter(None, map(_record, file))


def last_records(path: Path, size: int) -> tuple[list[dict[str, Any]], bool]:
    """The last `size` bytes of lines of a `metrics.jsonl`, and whether these are all lines."""
    found, begin = deque[dict[str, Any]](), 0
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        for begin, line in files.lines_from_the_end(file):
            if (record := _record(line)) is not None:
                found.appendleft(record)
            if end - begin >= size:
                break
    return list(found), begin == 0


def _record(line: bytes) -> dict[str, Any] | None:
    for decode in (msgspec.json.decode, _lenient):
        with contextlib.suppress(ValueError, RecursionError):
            record = decode(line)
            msgspec.convert(record, _Placed)
            return record
    return None


def _lenient(line: bytes) -> Any:
    """A line with NaN in it, or with bytes that are no UTF-8."""
    return json.loads(line.decode(errors="replace"))


def thinned(lines: Iterable[dict[str, Any]], limit: int = 2000) -> list[dict[str, Any]]:
    """Evenly chosen lines, at most 2 * `limit` for each set of metrics, with the last line of each set.

    >>> [line["step"] for line in thinned(({"step": step, "loss": 0.5} for step in range(10)), limit=3)]
    [0, 2, 4, 6, 8, 9]
    """
    kinds: dict[frozenset[str], _Kind] = {}
    for number, line in enumerate(lines):
        kind = kinds.setdefault(frozenset(line), _Kind())
        kind.last = number, line
        if kind.count % kind.stride == 0:
            kind.kept.append(kind.last)
            if len(kind.kept) >= 2 * limit:
                del kind.kept[1::2]
                kind.stride *= 2
        kind.count += 1
    kept = {number: line for kind in kinds.values() for number, line in (*kind.kept, kind.last)}
    return [kept[number] for number in sorted(kept)]


class _Kind:
    def __init__(self) -> None:
        self.kept: list[tuple[int, dict[str, Any]]] = []
        self.last: tuple[int, dict[str, Any]] = (0, {})
        self.count, self.stride = 0, 1


class _Placed(msgspec.Struct):
    """The fields of a line's place in the run."""

    step: int
    ticks: int = 0
    epoch: int | None = None
    clock: _Clock | None = None


class _Clock(msgspec.Struct):
    time: float = 0.0
    elapsed: float = 0.0


def curves(lines: list[dict[str, Any]], by: By = "step") -> dict[str, tuple[list[Any], list[float]]]:
    """The places and the values of each metric, NaN and infinities included.

    Where the logs of several loops write a metric, over windows of different lengths, the curve is that of the one that wrote most often.
    """
    found: dict[str, dict[int, tuple[list[Any], list[float]]]] = {}
    for line, x in zip(lines, _places(lines, by), strict=True):
        depth = str(line.get("at", "")).count(".")
        for name, value in line.items():
            if name not in PLACE and (number := _number(value)) is not None:
                places, values = found.setdefault(name, {}).setdefault(depth, ([], []))
                places.append(x)
                values.append(number)
    return {name: max(sorted(logs.items()), key=lambda log: len(log[1][1]))[1] for name, logs in found.items()}


def _number(value: Any) -> float | None:
    try:
        return float(value) if isinstance(value, (int, float, str)) else None
    except (ValueError, OverflowError):
        return None


def _places(lines: list[dict[str, Any]], by: By) -> list[Any]:
    if by == "step":
        return [line["step"] for line in lines]
    return _seconds(lines) if by == "time" else _epochs(lines)


def _seconds(lines: list[dict[str, Any]]) -> list[float]:
    """Seconds of training at each line: the time between an end and a resume does not count."""
    seconds, before, last, began = [], 0.0, 0.0, None
    for line in lines:
        clock = line.get("clock") or {}
        elapsed = clock.get("elapsed", 0.0)
        start = clock.get("time", 0.0) - elapsed
        if began is not None and abs(start - began) > 1:  # another process: its clock begins anew
            before = last
        began, last = start, before + elapsed
        seconds.append(last)
    return seconds


def _epochs(lines: list[dict[str, Any]]) -> list[float]:
    """Finished epochs at each line: the last line of an epoch is at its end, those before it in proportion to their steps."""
    ends: dict[int, int] = {}
    for line in lines:
        epoch = line.get("epoch") or 0
        ends[epoch] = max(line["step"], ends.get(epoch, 0))
    begins = {epoch: ends.get(epoch - 1, 0) for epoch in ends}
    longest = max((ends[epoch] - begins[epoch] for epoch in ends), default=0)
    places = []
    for line in lines:
        epoch = line.get("epoch") or 0
        length = longest if epoch == max(ends) else ends[epoch] - begins[epoch]
        places.append(max(epoch - 1, 0) + (line["step"] - begins[epoch]) / max(length, 1))
    return places


class Curve(NamedTuple):
    """One metric of one run. Where a value cannot be drawn (`missing` of them) `y` is NaN: a gap."""

    run: str
    metric: str
    x: list[float]
    y: list[float]

    @property
    def kind(self) -> str:
        """The last part of the metric's name: `loss` of `val/loss`."""
        return self.metric.rpartition("/")[2]

    @property
    def member(self) -> str:
        """The metric's name without its last part: `val` of `val/loss`."""
        return self.metric.rpartition("/")[0]

    @property
    def missing(self) -> int:
        return sum(map(math.isnan, self.y))


def chosen(runs: Mapping[str, list[dict[str, Any]]], *, by: By = "step", only: Sequence[str] = (), log: bool = False) -> list[Curve]:
    """The curves of several runs, from the lines of each.

    - `by="step"`: the unit of the places.
    - `only=()`: globs of the wanted metrics. Without them, the kinds that are measured outside of training too (loss and accuracy, say,
      but no learning rate), or all if there are none.
    - `log=False`: whether values that are not positive are gaps.
    """
    found = [Curve(run, name, *pair) for run, lines in runs.items() for name, pair in curves(lines, by).items()]
    kinds = {curve.kind for curve in found if not curve.member.startswith("train")}
    if only:
        found = [curve for curve in found if any(fnmatch.fnmatchcase(curve.metric, glob) for glob in only)]
    elif kinds:
        found = [curve for curve in found if curve.kind in kinds]
    return [curve._replace(y=[y if math.isfinite(y) and (y > 0 or not log) else math.nan for y in curve.y]) for curve in found]


def panels_of(found: Iterable[Curve]) -> dict[str, list[Curve]]:
    """The curves by their kind; loss and accuracy first."""
    panels: dict[str, list[Curve]] = {}
    for curve in found:
        panels.setdefault(curve.kind, []).append(curve)
    first = ["loss", "accuracy"]
    return dict(sorted(panels.items(), key=lambda panel: (first.index(panel[0]) if panel[0] in first else len(first), panel[0])))


def axis_of(found: Iterable[Curve], by: By) -> tuple[str, float]:
    """The label of the places, and the unit that divides them: time in h, min or s."""
    if by != "time":
        return by, 1.0
    longest = max((x for curve in found for x in curve.x), default=0.0)
    return next(
        (f"time [{unit}]", length) for unit, length in (("h", 3600.0), ("min", 60.0), ("s", 1.0)) if longest >= 3 * length or length == 1
    )
