"""What a run came to, for people: how far it got, its tables, the commands to go on with."""

from __future__ import annotations

import contextlib
import shlex
import shutil
import sys
from pathlib import Path

from fnrun.checkpoint import CheckpointError
from fnrun.run import Run
from fnrun.tables import number, table


def command_line(run: Run, *args: str | Path) -> str:
    """What a shell is told to call the run's experiment with these arguments."""
    return shlex.join([_python(), "-m", run.experiment.partition(":")[0], *map(str, args)])


def _python() -> str:
    """How this interpreter is called from here: `python` where that is what the shell finds."""
    found, own = Path(shutil.which("python") or ""), Path(sys.executable)  # which may be called python3
    if found.parent == own.parent and found.samefile(own):
        return "python"
    with contextlib.suppress(ValueError):
        return str(Path(sys.executable).relative_to(Path.cwd()))
    return sys.executable


def summary(run: Run, *, evaluates: bool) -> None:
    """Print the best and the last of losses and accuracies, and what can be done with the run: evaluate, if its experiment can, and resume."""
    from fnrun.plot import curves, plot, records

    found = curves(records(run.metrics)) if run.metrics.exists() else {}
    rows = []
    for name, (steps, values) in sorted(found.items()):
        if name.rpartition("/")[2] in ("loss", "accuracy"):
            best = (max if name.endswith("accuracy") else min)(values)
            rows.append([name, f"{number(best)} (step {steps[values.index(best)]})", f"{number(values[-1])} (step {steps[-1]})"])
    if rows:
        print(f"\n{table(['metric', 'best', 'last'], rows)}\n")
    picture = plot(run.metrics, run.path / "curves.png", f"{run.experiment}: {run.path.name}")
    print(f"run       {run.path}")
    if picture is not None:
        print(f"plot      {picture}")
    if run.checkpoints.latest() is None:
        return
    if evaluates:
        best = ["--checkpoint", "best"] if _judged(run) else []
        print(f"evaluate  {command_line(run, 'evaluate', run.path, *best)}")
    print(f"resume    {command_line(run, 'resume', run.path)}")


def _judged(run: Run) -> bool:
    """Whether one of the checkpoints is the best."""
    try:
        return run.checkpoints.best() is not None
    except CheckpointError:
        return False
