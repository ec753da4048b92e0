"""The summary of a run, printed: its best and last metrics, and the commands to go on with."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shlex
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fnrun.checkpoint import CheckpointError
from fnrun.core.tables import number, table
from fnrun.runs.run import Run


def command_line(run: Run, *args: str | Path) -> str:
    """The shell command that calls the run's experiment with these arguments."""
    return shlex.join([_python(), "-m", run.experiment.partition(":")[0], *map(str, args)])


def _python() -> str:
    """The command of this interpreter: `python` where the shell finds it under that name, else its path."""
    found, this = Path(shutil.which("python") or ""), Path(sys.executable)  # which may be called python3
    if found.parent == this.parent and found.samefile(this):
        return "python"
    with contextlib.suppress(ValueError):
        return str(Path(sys.executable).relative_to(Path.cwd()))
    return sys.executable


def summary(run: Run, *, evaluates: bool) -> None:
    """Print the best and the last losses and accuracies, and the commands to go on with: evaluate, if the experiment can, and resume."""
    from fnrun.runs.curves import chosen, records, thinned
    from fnrun.runs.plot import draw

    notes: dict[str, _Note] = {}
    lines = thinned(_noted(records(run.metrics), notes)) if run.metrics.exists() else []
    if notes:
        rows = [
            [name, f"{number(note.best)} (step {note.best_step})", f"{number(note.last)} (step {note.step})"]
            for name, note in sorted(notes.items())
        ]
        print(f"\n{table(['metric', 'best', 'last'], rows)}\n")
    title = f"{run.experiment}: {run.path.name}"
    print(f"run       {run.path}")
    if found := chosen({title: lines}):
        draw(found, run.path / "curves.png", title=title)
        print(f"plot      {run.path / 'curves.png'}")
    if run.checkpoints.latest() is None:
        return
    if evaluates:
        best = ["--checkpoint", "best"] if _judged(run) else []
        print(f"evaluate  {command_line(run, 'evaluate', run.path, *best)}")
    print(f"resume    {command_line(run, 'resume', run.path)}")


@dataclasses.dataclass
class _Note:
    """The best and the last value of a metric, with their steps."""

    best: float
    best_step: int
    last: float
    step: int


def _noted(lines: Iterable[dict[str, Any]], notes: dict[str, _Note]) -> Iterator[dict[str, Any]]:
    """The lines, one after the other, while `notes` gets each loss and accuracy: a log may be larger than memory."""
    from fnrun.runs.curves import curves

    for line in lines:
        judged = {name: value for name, value in line.items() if name.rpartition("/")[2] in ("loss", "accuracy")}
        for name, (_, values) in curves([{**judged, "step": line["step"]}]).items():
            value, note = values[-1], notes.get(name)
            if note is None:
                notes[name] = _Note(value, line["step"], value, line["step"])
                continue
            note.last, note.step = value, line["step"]
            better = value > note.best if name.endswith("accuracy") else value < note.best
            if better or math.isnan(note.best):
                note.best, note.best_step = value, line["step"]
        yield line


def _judged(run: Run) -> bool:
    """Whether a checkpoint was saved with a monitored metric."""
    try:
        return run.checkpoints.best() is not None
    except CheckpointError:
        return False
