"""`fnrun fork`: a new run from a checkpoint of another one, with its ancestry."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fnrun.checkpoint import CheckpointError, Checkpoints, Entry, Manifest, store
from fnrun.checkpoint.retention import which
from fnrun.cli.commands import CommandError, Fork, read_flags
from fnrun.cli.commands.output import document, say
from fnrun.cli.commands.places import run_at
from fnrun.cli.experiment import FLAGS
from fnrun.core import files
from fnrun.runs.config import changes, config_type, decode, words
from fnrun.runs.run import Run, appearing, load_build
from fnrun.runs.summary import command_line
from fnrun.runs.verify import order
from fnrun.sinks.lines import Lines


def run(flags: Fork) -> int:
    parent = run_at(flags.run)
    checkpoints = Checkpoints(parent.path / "checkpoints")
    entry = checkpoints.find(which(flags.step))
    manifest = checkpoints.manifest(entry)
    config, changed = _overridden(parent, manifest.config, flags.overrides)
    if parent.path.resolve() in flags.out.resolve().parents:
        raise CommandError(f"{flags.out} lies in the run {parent.path} itself: a fork needs a place of its own")
    with appearing(flags.out, parent.path.stat().st_mode & 0o777 | 0o700) as made:
        sha256 = _copy(checkpoints, entry, manifest, made / "checkpoints")
        forked = os.path.relpath(parent.path, flags.out)
        fork = {"forked": forked, "step": entry.step, "ticks": entry.ticks, "sha256": sha256, "changed": changed}
        later = {name: pair for name, pair in changes(manifest.config, parent.config).items() if name not in changed}
        run = Run(made, parent.experiment, config, [*_before(parent, entry, flags.out), fork])
        run.write_beginning()
        if parent.metrics.exists():
            shutil.copyfile(parent.metrics, run.metrics)
            lines = Lines(run.metrics)
            lines.begin(order(manifest))
            lines.close()
    _say(flags, parent, fork, later)
    return 0


def _overridden(parent: Run, raw: Any, flags: Sequence[str]) -> tuple[Any, dict[str, list[Any]]]:
    """The config of a checkpoint with the values of the flags, and its changes."""
    if not flags:
        return raw, {}
    kind = config_type(load_build(parent.experiment))
    config = decode(raw, kind, "the checkpoint's config")
    prog = command_line(parent, "resume", parent.path)  # its --help shows the experiment's own flags
    new = read_flags(kind, flags, default=config, config=FLAGS, prog=prog)
    return new, changes(config, new)


def _before(parent: Run, entry: Entry, new: Path) -> list[dict[str, Any]]:
    """The history up to the checkpoint, without changes that were made *at* it: they are the parent's."""
    kept: list[dict[str, Any]] = []
    for change in parent.history:
        if "forked" in change and change["ticks"] <= entry.ticks:
            there = os.path.relpath(parent.path / change["forked"], new)
            kept.append({**change, "forked": there, "changed": change["changed"] if change["ticks"] < entry.ticks else {}})
        elif change["ticks"] < entry.ticks:
            kept.append(change)
    return kept


def _copy(checkpoints: Checkpoints, entry: Entry, manifest: Manifest, to: Path) -> str:
    """Copy one checkpoint and return its manifest's sha256. Every file of the copy is checked.

    Raises CheckpointError where it is damaged, CommandError where it is gone.
    """
    source, copy = checkpoints.directory / entry.name, to / entry.name
    try:
        store.check_files(source, manifest)
        shutil.copytree(source, copy)
        store.read_checked(copy)
    except (OSError, CheckpointError) as error:
        if source.is_dir():
            raise
        raise CommandError(f"{source} was deleted while it was copied: its run goes on, and keeps only some. Choose another one") from error
    for path in (to, *to.rglob("*")):
        files.sync(path)
    return hashlib.sha256((copy / store.MANIFEST).read_bytes()).hexdigest()


def _say(flags: Fork, parent: Run, fork: dict[str, Any], later: dict[str, list[Any]]) -> None:
    resume = command_line(parent, "resume", flags.out)
    if flags.json:
        document({"run": str(flags.out), **fork, "left": later, "resume": resume})
        return
    changed = f", with {words(fork['changed'])}" if fork["changed"] else ""
    say(f"{flags.out}: forked from {parent.path} at step {fork['step']}{changed}")
    if later:
        say(f"It has the config of that step; what {parent.path} changed later stays there: {words(later)}")
    say(f"To go on:\n  {resume}")
