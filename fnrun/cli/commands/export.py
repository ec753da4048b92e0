"""`fnrun export`: the weights of a checkpoint, for other programs."""

from __future__ import annotations

import torch

from fnrun.checkpoint import export
from fnrun.cli.commands import CommandError, Export
from fnrun.cli.commands.output import document, say, shown_path, writing
from fnrun.cli.commands.stored import checkpoint_at
from fnrun.core.tables import size


def run(flags: Export) -> int:
    checkpoints, entry = checkpoint_at(flags.path, flags.checkpoint)
    if flags.out.exists() and not flags.overwrite:
        raise CommandError(f"{flags.out} is there already; --overwrite replaces it")
    with writing(flags.out):
        export(checkpoints, flags.out, weights=flags.weights, step=entry, dtype=_dtype(flags.dtype), overwrite=flags.overwrite)
    checkpoint, bytes = shown_path(checkpoints.directory / entry.name), flags.out.stat().st_size
    if flags.json:
        document({"checkpoint": checkpoint, "step": entry.step, "weights": flags.weights, "file": str(flags.out), "bytes": bytes})
    else:
        say(f"{flags.out}  {flags.weights} of step {entry.step}, {size(bytes)}, from {checkpoint}")
    return 0


def _dtype(name: str | None) -> torch.dtype | None:
    if name is None:
        return None
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise CommandError(f"--dtype is a floating-point dtype of torch: bfloat16, float16, float32 or float64, not {name!r}")
    return dtype
