"""Runs and checkpoints at and below a path, read without torch."""

from __future__ import annotations

import contextlib
import difflib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import msgspec

from fnrun.cli.commands import CommandError
from fnrun.core.checkpoint_name import Entry
from fnrun.runs.run import Run


def run_at(path: Path) -> Run:
    """The run at `path`. Raises CommandError, with what is there instead, and RunError for a config that cannot be read."""
    if not is_run(path):
        raise CommandError(f"{path} is no run: {what_is_at(path)}")
    return Run.open(path)


def is_run(path: Path) -> bool:
    """Whether `path` is a directory with a config."""
    return (path / "config.yaml").is_file()


def is_checkpoint(path: Path) -> bool:
    """Whether `path` is the directory of one checkpoint, also of one that was given up."""
    return (path / "manifest.json").is_file()


def what_is_at(path: Path) -> str:
    """A sentence on what is at a path, for errors."""
    if not path.exists():
        return _nothing(path)
    if not path.is_dir():
        return "it is a file"
    if is_run(path):
        return "it is a run"
    if is_checkpoint(path):
        return f"it is a checkpoint{_of(path.parent.parent)}"
    if path.name == "checkpoints" or any(is_checkpoint(child) for child in path.iterdir()):
        return f"it holds checkpoints{_of(path.parent)}"
    below = [os.path.relpath(run, path) for _, run in zip(range(4), runs_below(path), strict=False)]
    if below:
        return f"it holds runs: {', '.join(below[:3])}{', ...' if len(below) > 3 else ''}"
    loose = [child.name for child in sorted(path.iterdir()) if _holds_checkpoints(child)]
    if loose:
        places = f"{', '.join(loose[:3])}{', ...' if len(loose) > 3 else ''}"
        return f"it holds checkpoints, in {places}, and a run is what fnrun.main or Run.create makes"
    return "it is an empty directory" if not any(path.iterdir()) else "it is a directory with no run in or below it"


def _holds_checkpoints(path: Path) -> bool:
    with contextlib.suppress(OSError):
        return path.is_dir() and any(is_checkpoint(child) for child in path.iterdir())
    return False


def _of(run: Path) -> str:
    return f" of the run {run}" if is_run(run) else ""


def _nothing(path: Path) -> str:
    beside = sorted(child.name for child in path.parent.iterdir() if not child.name.startswith(".")) if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, beside)
    return f"there is nothing there{f'; near: {path.parent / near[0]}' if near else ''}"


def runs_below(directory: Path) -> Iterator[Path]:
    """The runs in and below a directory, behind links too, each once. Those in runs, or behind a dot, are left out."""
    seen: set[Path] = set()
    for folder, names, files in os.walk(directory, followlinks=True):
        if (real := Path(folder).resolve()) in seen:
            names.clear()
            continue
        seen.add(real)
        names[:] = sorted(name for name in names if not name.startswith("."))
        if "config.yaml" in files and _looks_like_a_run(Path(folder)):
            names.clear()
            yield Path(folder)


def _looks_like_a_run(path: Path) -> bool:
    """Whether config.yaml is one of a run, or is damaged beside files that only runs have. Other programs have a config.yaml too."""
    try:
        text = (path / "config.yaml").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        text = ""
    ours = re.search(r"^experiment:", text, re.MULTILINE) and re.search(r"^config:", text, re.MULTILINE)
    return bool(ours) or (path / "environment.json").is_file() or (path / "checkpoints").is_dir()


class Judged(msgspec.Struct):
    """The metrics by which a checkpoint is judged, from the manifest of any format."""

    step: int = 0
    metrics: dict[str, float | str] = {}
    monitors: dict[str, Literal["min", "max"]] = {}
    monitor: str | None = None
    mode: Literal["min", "max"] = "min"

    def __post_init__(self) -> None:
        self.monitors = self.monitors or ({self.monitor: self.mode} if self.monitor else {})


def judged(checkpoints: Path) -> Iterator[tuple[Entry, Judged | None]]:
    """The checkpoints in a directory, the newest first, each with its metrics; None for a damaged one."""
    try:
        found = [entry for name in os.listdir(checkpoints) if (entry := Entry.of(name)) is not None]
    except OSError:
        return
    for entry in sorted(found, reverse=True):
        try:
            yield entry, msgspec.json.decode((checkpoints / entry.name / "manifest.json").read_bytes(), type=Judged)
        except (OSError, UnicodeDecodeError, msgspec.MsgspecError):
            yield entry, None
