"""`fnrun ls`: the runs below a directory, without torch."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fnrun.cli.commands import CommandError, Ls
from fnrun.cli.commands.output import document, say, terminal_width
from fnrun.cli.commands.places import Judged, judged, runs_below, what_is_at
from fnrun.core.tables import age, number, size, table
from fnrun.runs.curves import curves, last_records
from fnrun.runs.run import Run, RunError

#: The metrics that are shown of a run without monitored ones, by the last part of the name, with their modes.
JUDGED = {"loss": "min", "accuracy": "max"}
#: The bytes of a log that are read, from its end.
TAIL = 2**18


def run(flags: Ls) -> int:
    if not flags.directory.is_dir():
        raise CommandError(f"{flags.directory} is no directory of runs: {what_is_at(flags.directory)}; name one: fnrun ls DIR")
    found = sorted((_seen(path) for path in runs_below(flags.directory)), key=lambda row: row["idle"])
    if flags.json:
        document(found)
    elif not found:
        say(f"no runs in or below {flags.directory}: {what_is_at(flags.directory)}")
    else:
        lines, width = _wide(found), terminal_width()
        say(_narrow(found) if width is not None and max(map(len, lines.splitlines())) > width else lines)
    return 0


# --- a run -------------------------------------------------------------------------------------------------------------


def _seen(path: Path) -> dict[str, Any]:
    """A run in plain values. What cannot be read of it is among its `problems`."""
    files = dict(_files(path))
    row: dict[str, Any] = {"path": str(path), "experiment": None, "state": "damaged", "reason": None, "problems": []}
    row |= {"step": None, "epoch": None, "metrics": {}, "bytes": sum(stat.st_size for stat in files.values())}
    now, forked = time.time(), False
    row["idle"] = max(0.0, now - max((stat.st_mtime for name, stat in files.items() if name != str(path / "status.json")), default=now))
    try:
        found = Run.open(path)
        row["experiment"] = found.experiment
        forked = bool(found.history and "forked" in found.history[-1])
        status = found.status()
        row |= {"state": status.state, "reason": status.reason}
    except RunError as error:
        row["problems"].append(str(error))
    checkpoints = judged(path / "checkpoints")
    saved, newest = next(checkpoints, (None, None))
    if saved is not None and newest is None:
        row["problems"].append(f"the manifest of {path / 'checkpoints' / saved.name} is damaged")
    lines, whole = _lines(path / "metrics.jsonl", row["problems"])
    last = lines[-1] if lines else {}
    row["step"] = max((step for step in (last.get("step"), saved.step if saved else None) if step is not None), default=None)
    row["epoch"] = last.get("epoch")
    if row["state"] == "new" and row["step"] is not None and not forked:
        row["state"] = "unknown"  # it was trained without `run.writing()`, which leaves no status
    older = [] if whole or newest is None else [found for _, found in checkpoints if found is not None]
    row["metrics"] = _metrics(curves(lines), whole, [*([newest] if newest is not None else []), *older])
    return row


def _files(path: Path) -> Iterator[tuple[str, os.stat_result]]:
    """The files of a run by their paths, without those that come and go meanwhile."""
    for folder, _, names in os.walk(path):
        for name in names:
            file = os.path.join(folder, name)
            with contextlib.suppress(OSError):
                yield file, os.lstat(file)


def _lines(path: Path, problems: list[str]) -> tuple[list[dict[str, Any]], bool]:
    """The last lines of a log, and whether they are all."""
    try:
        return last_records(path, TAIL)
    except FileNotFoundError:
        return [], True
    except (OSError, ValueError) as error:
        problems.append(f"{path} cannot be read: {error}")
        return [], True


def _metrics(found: dict[str, Any], whole: bool, checkpoints: list[Judged]) -> dict[str, dict[str, Any]]:
    """The last and the best value of each judged metric: by the lines, and where these are not all, by the checkpoints, newest first."""
    newest = checkpoints[0] if checkpoints else Judged()
    values_known = found if whole else {**newest.metrics, **found}
    monitors = {name: mode for name, mode in newest.monitors.items() if name in values_known}
    monitored = bool(monitors)
    monitors = monitors or {name: JUDGED[kind] for name in found if (kind := name.rpartition("/")[2]) in JUDGED}
    metrics = {}
    for name, mode in monitors.items():
        steps, values = found.get(name, ([], []))
        last = values[-1] if values else _float(newest.metrics[name])
        saved = [] if whole else [(_float(each.metrics[name]), each.step) for each in checkpoints if name in each.metrics]
        numbers = [(value, step) for value, step in [*zip(values, steps, strict=True), *reversed(saved)] if not math.isnan(value)]
        if not whole and not monitored:
            numbers = []  # the best is somewhere in what was not read
        best = (max if mode == "max" else min)(numbers, key=lambda pair: pair[0], default=(None, None))
        metrics[name] = {"mode": mode, "last": last, "best": best[0], "best_step": best[1]}
    return metrics


def _float(value: float | str) -> float:
    try:
        return float(value)
    except ValueError:
        return math.nan


# --- the output --------------------------------------------------------------------------------------------------------


def _wide(found: list[dict[str, Any]]) -> str:
    """A line for each run."""
    rows = []
    for row in found:
        metrics = ", ".join(f"{name} {number(m['last'])} (best {_best(m)})" for name, m in row["metrics"].items())
        where = "  ".join([row["path"], *(f"({note})" for note in _notes(row))])
        rows.append(
            [
                row["state"],
                _text(row["step"]),
                _text(row["epoch"]),
                metrics,
                size(row["bytes"]),
                age(row["idle"]),
                row["experiment"] or "",
                where,
            ]
        )
    return table(["state", "step", "epoch", "metrics", "size", "age", "experiment", "run"], rows, right=["step", "epoch", "size", "age"])


def _narrow(found: list[dict[str, Any]]) -> str:
    """Two lines or more for each run, in 80 columns. The path comes last, so that a terminal breaks it at its edge alone."""
    rows = []
    for row in found:
        metrics = [line for name, m in row["metrics"].items() for line in ((name, number(m["last"])), ("  best", _best(m)))]
        rows.append(
            [
                f"{row['state']}\n{age(row['idle'])} ago",
                f"{_text(row['step'])}\n{_text(row['epoch'])}",
                "\n".join(name for name, _ in metrics),
                "\n".join(value for _, value in metrics),
                size(row["bytes"]),
                "\n".join([row["path"], row["experiment"] or "", *_notes(row)]),
            ]
        )
    return table(
        ["state\n", "step\nepoch", "metric\n", "last\nbest", "size\n", "run\nexperiment"],
        rows,
        right=["step\nepoch", "last\nbest", "size\n"],
        spaced=True,
    )


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def _best(metric: dict[str, Any]) -> str:
    return "none" if metric["best"] is None else number(metric["best"])


def _notes(row: dict[str, Any]) -> list[str]:
    return [*([row["reason"]] if row["reason"] else []), *row["problems"]]
