"""The checkpoint that a command reads, and the statistics of its leaves."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fnrun.checkpoint import Checkpoints
from fnrun.checkpoint.retention import which
from fnrun.cli.commands import CommandError
from fnrun.cli.commands.places import is_checkpoint, is_run, what_is_at
from fnrun.core.checkpoint_name import Entry
from fnrun.runs.run import Run, RunError


def checkpoint_at(path: Path, checkpoint: str = "latest") -> tuple[Checkpoints, Any]:
    """The checkpoints at a path, and the one that `--checkpoint` names. Raises CommandError, with what is there instead."""
    if is_run(path):
        return _of_directory(path / "checkpoints", path, checkpoint)
    if is_checkpoint(path) or Entry.of(path.name):
        if checkpoint != "latest":
            raise CommandError(f"{path} is one checkpoint: --checkpoint chooses among those of a run")
        if path.name.startswith("abandoned-"):
            raise CommandError(
                f"{path} was given up when the run went on from an older step; rename it to {path.name.split('-', 1)[1]} to read it"
            )
        return Checkpoints.at(path)
    return _of_directory(path, path, checkpoint)


def _of_directory(directory: Path, path: Path, checkpoint: str) -> tuple[Checkpoints, Any]:
    checkpoints = Checkpoints(directory)
    if not checkpoints.entries():
        none_yet = is_run(path) or (directory.is_dir() and directory.name == "checkpoints")
        raise CommandError(f"{path} has no checkpoint yet" if none_yet else f"{path} holds no checkpoint: {what_is_at(path)}")
    return checkpoints, checkpoints.find(which(checkpoint))


def run_of(checkpoints: Checkpoints) -> Run | None:
    """The run of these checkpoints, if there is one and its config can be read."""
    path = checkpoints.directory.parent
    try:
        return Run.open(path) if checkpoints.directory.name == "checkpoints" and is_run(path) else None
    except RunError:
        return None


# --- numbers -----------------------------------------------------------------------------------------------------------


def numbers(value: Any) -> np.ndarray | None:
    """A tensor or an array, flat, in float64 or complex128; None for one of another kind."""
    if isinstance(value, torch.Tensor):
        try:
            value = value.detach().cpu().to(torch.complex128 if value.is_complex() else torch.float64).numpy()
        except (RuntimeError, NotImplementedError):
            return None
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "biufc":
        return None
    return value.reshape(-1).astype(np.complex128 if value.dtype.kind == "c" else np.float64, copy=False)


def statistics(value: Any) -> dict[str, Any]:
    """L2 norm, minimum and maximum of the finite values (of complex ones, of their magnitudes), and the shares of NaN and infinities."""
    flat = numbers(value)
    if flat is None or not flat.size:
        return {}
    nan, inf = np.isnan(flat), np.isinf(flat)
    finite = flat[~(nan | inf)]
    finite = np.abs(finite) if finite.dtype.kind == "c" else finite
    found: dict[str, Any] = {"nan": float(nan.mean()), "inf": float(inf.mean())}
    if finite.size:
        largest = float(np.abs(finite).max())
        norm = largest * math.sqrt(float(np.square(finite / largest).sum())) if largest else 0.0
        found |= {"norm": norm, "min": float(finite.min()), "max": float(finite.max())}
    return found
