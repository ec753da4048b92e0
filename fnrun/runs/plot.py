"""The curves of runs as a picture, and as text."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fnrun.core import files
from fnrun.runs.curves import By, Curve, axis_of, panels_of

# --- a picture ---------------------------------------------------------------------------------------------------------

#: Line styles by the first part of a metric's name, where the colour is the run's.
STYLES: dict[str, Any] = {"train": "--", "val": "-", "": "-"}


def draw(found: list[Curve], to: Path, *, title: str = "", by: By = "step", log: bool = False) -> None:
    """Draw curves to the picture `to`, a panel for each kind of metric. A colour is a run, or a metric of a single run.

    Raises ValueError for a kind of file that matplotlib does not write.
    """
    from matplotlib.figure import Figure  # without pyplot: no global state, no display

    panels, runs = panels_of(found), list(dict.fromkeys(curve.run for curve in found))
    members = list(dict.fromkeys(curve.member for curve in found))
    label, unit = axis_of(found, by)
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
    """Whether a value is alone between gaps, where a line would not show it."""
    padded = [math.nan, *curve.y, math.nan]
    return any(not math.isnan(y) and math.isnan(padded[i]) and math.isnan(padded[i + 2]) for i, y in enumerate(curve.y))


def _colors(count: int) -> list[Any]:
    import matplotlib

    if count <= 10:
        return list(matplotlib.colormaps["tab10"](range(count)))
    return [matplotlib.colormaps["turbo"](i / (count - 1)) for i in range(count)]


def _legend(figure: Any, runs: list[str], members: list[str], inches: float) -> None:
    """One legend below all panels: a colour for each run, a style for each member."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=color, label=run) for run, color in zip(runs, _colors(len(runs)), strict=True)]
    styles = [Line2D([], [], color="black", linestyle=STYLES.get(member, ":"), label=member) for member in members if member]
    longest = max(map(len, runs))
    columns = max(1, min(len(handles) + len(styles), int(inches / (0.075 * longest + 0.6))))
    figure.legend(handles=[*handles, *styles], loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


# --- text --------------------------------------------------------------------------------------------------------------

#: Colours that can be distinguished on a dark and on a light terminal.
COLORS = ("blue", "red", "green", "magenta", "cyan", "yellow", "bright_black", "bright_red")
HEIGHT = 12


def text(found: list[Curve], *, width: int = 80, color: bool = False, by: By = "step", log: bool = False) -> str:
    """The curves as text, panels below one another, `width` columns at most. Without `color` each curve has a letter at its points.

    A panel shows one kind of metric of a single run, or one metric of several runs.
    """
    several = len({curve.run for curve in found}) > 1
    panels: dict[str, list[Curve]] = {}
    for kind, group in panels_of(found).items():
        for curve in group:
            panels.setdefault(curve.metric if several else kind, []).append(curve)
    return "\n\n".join(_panel(title, group, width, color, by, log) for title, group in panels.items())


def _panel(title: str, group: list[Curve], width: int, color: bool, by: By, log: bool) -> str:
    import plotille

    several = len({curve.run for curve in group}) > 1
    label, unit = axis_of(group, by)
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
