"""`fnrun plot`: the curves of runs."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from fnrun.cli.commands import CommandError, Plot
from fnrun.cli.commands.output import document, say, writing
from fnrun.cli.commands.places import run_at
from fnrun.core.tables import printable
from fnrun.runs.curves import Curve, chosen, records
from fnrun.runs.plot import draw, text


def run(flags: Plot) -> int:
    if not flags.runs:
        raise CommandError("name a run, or several: fnrun plot RUN...")
    lines = {}
    for name, path in _names(flags.runs).items():
        found = run_at(path)
        lines[name] = list(records(found.metrics)) if found.metrics.is_file() else []
    curves = chosen(lines, by=flags.by, only=flags.only, log=flags.log)
    everything = chosen(lines, by=flags.by, only=["*"])
    if not curves:
        names = sorted({curve.metric for curve in everything})
        raise CommandError(
            f"no metric matches {' or '.join(flags.only)}; there are: {', '.join(names)}"
            if names
            else f"nothing is logged yet in {', '.join(lines)}"
        )
    if flags.out is not None:
        _draw(curves, flags.out, flags)
    if flags.json:
        rows = [{"run": curve.run, "metric": curve.metric, "x": curve.x, "y": curve.y, "missing": curve.missing} for curve in curves]
        document({"by": flags.by, "curves": rows, "picture": flags.out})
        return 0
    if flags.out is None:
        color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        shown = [curve._replace(run=printable(curve.run), metric=printable(curve.metric)) for curve in curves]
        print(text(shown, width=shutil.get_terminal_size().columns, color=color, by=flags.by, log=flags.log))
    else:
        say(str(flags.out))
    for note in _notes(curves, everything, lines, flags):
        say(note)
    return 0


def _names(paths: tuple[Path, ...]) -> dict[str, Path]:
    """The runs by the last parts of their paths, as many as make the names unique."""
    runs = {path.absolute(): path for path in paths}
    names: list[str] = []
    for parts in range(1, max(len(path.parts) for path in runs) + 1):
        names = ["/".join(path.parts[-parts:]) for path in runs]
        if len(set(names)) == len(names):
            break
    return dict(zip(names, runs.values(), strict=True))


def _draw(curves: list[Curve], out: Path, flags: Plot) -> None:
    title = curves[0].run if len({curve.run for curve in curves}) == 1 else ""
    with writing(out):
        try:
            draw(curves, out, title=title, by=flags.by, log=flags.log)
        except ValueError as error:
            raise CommandError(f"{out} cannot be drawn: {error}") from error


def _notes(curves: list[Curve], everything: list[Curve], lines: dict[str, list], flags: Plot) -> list[str]:
    """Lines on gaps, empty logs and metrics that are not shown."""
    notes = []
    for curve in curves:
        if curve.missing:
            gaps = [x for x, y in zip(curve.x, curve.y, strict=True) if y != y]
            what = "no positive numbers" if flags.log else "not finite"
            where = f"at {flags.by} {gaps[0]:g}" if len(gaps) == 1 else f"from {flags.by} {gaps[0]:g} to {gaps[-1]:g}"
            notes.append(f"gaps: {curve.missing} of the {len(curve.y)} values of {curve.metric} in {curve.run} are {what}, {where}")
    notes += [f"nothing is logged yet in {name}" for name, found in lines.items() if not found]
    if left := sorted({curve.metric for curve in everything} - {curve.metric for curve in curves}):
        notes += [] if flags.only else [f"not shown: {', '.join(left)} (--only '*' shows all)"]
    return notes
