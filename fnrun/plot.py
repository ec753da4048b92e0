"""The curves of runs, from their `metrics.jsonl`: as a picture, and as text."""

from __future__ import annotations

import fnmatch
import json
import math
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

from fnrun import files

#: Fields of a line that are not metrics.
PLACE = ("ticks", "at", "step", "epoch", "clock")
By = Literal["step", "time", "epoch"]


# --- reading -----------------------------------------------------------------------------------------------------------


def records(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a `metrics.jsonl`, one after the other; one that was cut short by a kill, or is none that was logged, is left out."""
    with path.open("rb") as file:
        yield from filter(None, map(_record, file))


def last_records(path: Path, size: int) -> tuple[list[dict[str, Any]], bool]:
    """The last lines of a `metrics.jsonl`, so many bytes of them, and whether they are all."""
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
    try:
        record = msgspec.json.decode(line)
    except ValueError:  # letters that are no UTF-8, NaN
        try:
            record = json.loads(line.decode(errors="replace"))
        except (ValueError, RecursionError):
            return None
    except RecursionError:
        return None
    try:
        msgspec.convert(record, _Placed)
    except (ValueError, RecursionError):
        return None
    return record


def thinned(lines: Iterable[dict[str, Any]], limit: int = 2000) -> list[dict[str, Any]]:
    """At most so many lines, and as many again, of each kind, evenly: those with the same metrics are of a kind. The last of each is there.

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
    """What a line says of its place, where it says it."""

    step: int
    ticks: int = 0
    epoch: int | None = None
    clock: _Clock | None = None


class _Clock(msgspec.Struct):
    time: float = 0.0
    elapsed: float = 0.0


def curves(lines: list[dict[str, Any]], by: By = "step") -> dict[str, tuple[list[Any], list[float]]]:
    """Of each metric where its values lie, and the values; NaN and infinities included.

    Where the logs of several loops write a metric, over windows of different lengths, they are those of the one that wrote it most often.
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
    """How long the run had been training: the time between an end and a resume does not count."""
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
    """Finished epochs: the last line of an epoch is its end, those before it lie where their steps are."""
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


# --- what is shown -----------------------------------------------------------------------------------------------------


class Curve(NamedTuple):
    """One metric of one run. Where a value cannot be drawn (`missing` of them) `y` is NaN: a gap."""

    run: str
    metric: str
    x: list[float]
    y: list[float]

    @property
    def kind(self) -> str:
        """What is measured, whatever it is measured on: the last part of the name."""
        return self.metric.rpartition("/")[2]

    @property
    def member(self) -> str:
        """What it is measured on: the name without its last part."""
        return self.metric.rpartition("/")[0]

    @property
    def missing(self) -> int:
        return sum(map(math.isnan, self.y))


def chosen(runs: Mapping[str, list[dict[str, Any]]], *, by: By = "step", only: Sequence[str] = (), log: bool = False) -> list[Curve]:
    """The curves of several runs, given the lines of each: of the metrics that match a glob of `only`.

    Without `only`: what is measured outside of training too (loss and accuracy, say, but no learning rate), or everything if nothing is.
    With `log`, values that are not positive are gaps.
    """
    found = [Curve(run, name, *pair) for run, lines in runs.items() for name, pair in curves(lines, by).items()]
    kinds = {curve.kind for curve in found if not curve.member.startswith("train")}
    if only:
        found = [curve for curve in found if any(fnmatch.fnmatchcase(curve.metric, glob) for glob in only)]
    elif kinds:
        found = [curve for curve in found if curve.kind in kinds]
    return [curve._replace(y=[y if math.isfinite(y) and (y > 0 or not log) else math.nan for y in curve.y]) for curve in found]


def _panels(found: Iterable[Curve]) -> dict[str, list[Curve]]:
    """The curves by what they measure; loss and accuracy first."""
    panels: dict[str, list[Curve]] = {}
    for curve in found:
        panels.setdefault(curve.kind, []).append(curve)
    first = ["loss", "accuracy"]
    return dict(sorted(panels.items(), key=lambda panel: (first.index(panel[0]) if panel[0] in first else len(first), panel[0])))


def _axis(found: Iterable[Curve], by: By) -> tuple[str, float]:
    """The label of the places and what they are divided by: time in the unit that suits it."""
    if by != "time":
        return by, 1.0
    longest = max((x for curve in found for x in curve.x), default=0.0)
    return next(
        (f"time [{unit}]", length) for unit, length in (("h", 3600.0), ("min", 60.0), ("s", 1.0)) if longest >= 3 * length or length == 1
    )


# --- a picture ---------------------------------------------------------------------------------------------------------

#: What is measured in training is dashed, where runs are told apart by colour.
STYLES: dict[str, Any] = {"train": "--", "val": "-", "": "-"}


def draw(found: list[Curve], to: Path, *, title: str = "", by: By = "step", log: bool = False) -> None:
    """Draw curves to the picture `to`, a panel a kind of metric. The colours are those of the runs, or of the metrics of a single run.

    Raises ValueError for a kind of file that matplotlib does not write.
    """
    from matplotlib.figure import Figure  # without pyplot: no global state, no display

    panels, runs = _panels(found), list(dict.fromkeys(curve.run for curve in found))
    members = list(dict.fromkeys(curve.member for curve in found))
    label, unit = _axis(found, by)
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(max(5 * columns, 7 if len(runs) > 1 else 5), 3.4 * rows), layout="constrained", dpi=150)
    figure.suptitle(title, fontsize=11)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis, (kind, group) in zip(axes, panels.items(), strict=False):
        for curve in sorted(group, key=lambda curve: curve.metric):
            look: dict[str, Any] = {"linewidth": 1.5, "label": curve.metric}
            if len(runs) > 1:
                look |= {"color": _colors(len(runs))[runs.index(curve.run)], "linestyle": STYLES.get(curve.member, ":")}
            dots = len(curve.x) <= 50 and ((len(runs) == 1 and not curve.member.startswith("train")) or _lonely(curve))
            axis.plot([x / unit for x in curve.x], curve.y, marker="o" if dots else None, markersize=3, **look)
        axis.set(xlabel=label, ylabel=kind, yscale="log" if log else "linear")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        if missing := sum(curve.missing for curve in group):
            axis.set_title(f"gaps: {missing} values that are not {'positive numbers' if log else 'finite'}", fontsize=8)
        if len(runs) == 1:
            axis.legend(frameon=False)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    if len(runs) > 1:
        _legend(figure, runs, members, 5 * columns)
    with files.replacing(to) as file:
        figure.savefig(file, format=to.suffix.removeprefix(".") or None)


def _lonely(curve: Curve) -> bool:
    """Whether a value stands between gaps, where a line would not show it."""
    padded = [math.nan, *curve.y, math.nan]
    return any(not math.isnan(y) and math.isnan(padded[i]) and math.isnan(padded[i + 2]) for i, y in enumerate(curve.y))


def _colors(count: int) -> list[Any]:
    import matplotlib

    if count <= 10:
        return list(matplotlib.colormaps["tab10"](range(count)))
    return [matplotlib.colormaps["turbo"](i / (count - 1)) for i in range(count)]


def _legend(figure: Any, runs: list[str], members: list[str], inches: float) -> None:
    """One legend below all panels: a colour a run, a style a member."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=color, label=run) for run, color in zip(runs, _colors(len(runs)), strict=True)]
    styles = [Line2D([], [], color="black", linestyle=STYLES.get(member, ":"), label=member) for member in members if member]
    longest = max(map(len, runs))
    columns = max(1, min(len(handles) + len(styles), int(inches / (0.075 * longest + 0.6))))
    figure.legend(handles=[*handles, *styles], loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


# --- text --------------------------------------------------------------------------------------------------------------

#: Colours that are told apart on a dark and on a light terminal.
COLORS = ("blue", "red", "green", "magenta", "cyan", "yellow", "bright_black", "bright_red")
HEIGHT = 12


def text(found: list[Curve], *, width: int = 80, color: bool = False, by: By = "step", log: bool = False) -> str:
    """The curves as text, a panel below the other, `width` columns at most. Without `color` each curve has a letter at its points.

    A panel holds what one run has of a kind of metric; of several runs, one metric.
    """
    several = len({curve.run for curve in found}) > 1
    panels: dict[str, list[Curve]] = {}
    for kind, group in _panels(found).items():
        for curve in group:
            panels.setdefault(curve.metric if several else kind, []).append(curve)
    return "\n\n".join(_panel(title, group, width, color, by, log) for title, group in panels.items())


def _panel(title: str, group: list[Curve], width: int, color: bool, by: By, log: bool) -> str:
    import plotille

    several = len({curve.run for curve in group}) > 1
    label, unit = _axis(group, by)
    pieces = [list(_pieces(curve, unit, log)) for curve in group]
    xs, ys = ([value for each in pieces for piece in each for value in piece[axis]] for axis in (0, 1))
    names = [curve.run if several else curve.metric for curve in group]
    if not ys:
        return f"{title}: nothing to draw, no value is {'positive' if log else 'finite'} ({', '.join(names)})"
    figure = plotille.Figure()
    figure.width, figure.height, figure.origin, figure.with_colors = max(width - 19 - len(label), 10), HEIGHT, False, color
    figure.x_label, figure.y_label = label, ""
    figure.width -= figure.width % 10
    figure.set_x_limits(0, _end(max(xs), figure.width))
    figure.set_y_limits(*_limits(ys))
    figure.y_ticks_fkt = lambda low, high: f"{10 ** min(float(low), 308.0) if log else low:.4g}"  # pyright: ignore[reportArgumentType]
    figure.x_ticks_fkt = lambda low, high: f"{low:.4g}"
    keys = []
    for number, name in enumerate(names):
        hue, letter = COLORS[number % len(COLORS)], None if color or len(group) == 1 else chr(ord("a") + number % 26)
        for piece in pieces[number]:
            figure.plot(*piece, lc=hue, marker=letter)
        keys.append(f"{plotille.color('━━', fg=hue) if color else letter or ''} {name}".strip())
    return "\n".join([title, *(line.rstrip() for line in figure.show().splitlines()[1:]), *_wrapped(keys, width)])


def _end(last: float, width: int) -> float:
    """Where an axis from 0 past `last` ends, so that its ticks, each 10 columns, are round numbers. Its last dot, 2 a column, is on it."""
    ticks = width // 10
    step = last * 2 * width / (2 * width - 1) / ticks or 1.0
    power = 10 ** math.floor(math.log10(step))
    return ticks * next(round_ * power for round_ in (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10) if round_ * power >= step)


def _limits(values: list[float]) -> tuple[float, float]:
    """Where a vertical axis begins and ends, for the largest value to lie on the last of its dots, 4 a row."""
    low, high = min(values), max(values)
    if high > low:
        return low, low + max(high - low, abs(low) / 1e12) * 4 * HEIGHT / (4 * HEIGHT - 1)
    around = max(abs(low), 1e-300) / 10
    return low - around, low + around


def _pieces(curve: Curve, unit: float, log: bool) -> Iterable[tuple[list[float], list[float]]]:
    """The curve between its gaps, as it is drawn; numbers so large that a range of them has no size lie at the edge."""
    piece: tuple[list[float], list[float]] = ([], [])
    for x, y in zip(curve.x, curve.y, strict=True):
        if not math.isnan(y):
            piece[0].append(x / unit)
            piece[1].append(math.log10(y) if log else max(-1e300, min(y, 1e300)))
        elif piece[0]:
            yield piece
            piece = ([], [])
    if piece[0]:
        yield piece


def _wrapped(keys: list[str], width: int) -> list[str]:
    """The legend, as many in a line as there is room for; colours take none."""
    import re

    lines, room = [], 0
    for key in keys:
        length = len(re.sub(r"\x1b\[[0-9;]*m", "", key)) + 3
        if room < length:
            lines, room = [*lines, []], width
        lines[-1].append(key)
        room -= length
    return ["   ".join(line) for line in lines]
