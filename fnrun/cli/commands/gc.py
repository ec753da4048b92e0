"""`fnrun gc`: deletes what runs no longer need."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from fnrun.checkpoint import Checkpoints, DamagedError, Entry, store
from fnrun.cli.commands import CommandError, Gc
from fnrun.cli.commands.output import document, say, shown_path, writing
from fnrun.cli.commands.places import run_at, runs_below
from fnrun.core import files
from fnrun.core.tables import size, table
from fnrun.runs.run import Run, RunError

REASONS = {".tmp-delete-": "half deleted", ".tmp-": "half written", "abandoned-": "given up when the run went on from an older checkpoint"}


def run(flags: Gc) -> int:
    if flags.keep_every is not None and flags.keep is None:
        raise CommandError("--keep-every says which of the old checkpoints stay: it goes with --keep")
    for flag, value in (("--keep", flags.keep), ("--keep-every", flags.keep_every)):
        if value is not None and value < 1:
            raise CommandError(f"{flag} is at least 1, not {value}")
    if not flags.runs and not Path("runs").is_dir():
        raise CommandError("there is no directory runs here; name the runs: fnrun gc RUN...")
    runs, refused = _opened(flags.runs or runs_below(Path("runs")))
    with contextlib.ExitStack() as locks:
        free, busy = _taken(runs, locks) if flags.yes else _looked_at(runs)
        refused += busy
        rows, notes = [], []
        for found in free:
            doomed, more = superfluous(found.checkpoints, flags.keep, flags.keep_every)
            doomed += [
                _row(path, REASONS[".tmp-"])
                for path in files.leftovers(found.path.absolute())
                if path.parent != found.checkpoints.directory
            ]
            rows += [{"run": str(found.path), **row} for row in doomed]
            notes += [f"{found.path}: {one}" for one in more]
        if not flags.json:
            _print(rows, notes)
        if flags.yes:
            _delete(free, rows)
    if rows and not flags.json:
        say(f"\n{size(sum(row['bytes'] for row in rows))} {'deleted' if flags.yes else 'would be deleted; --yes deletes'}")
    if flags.json:
        document(
            {"deleted": flags.yes, "bytes": sum(row["bytes"] for row in rows), "superfluous": rows, "notes": notes, "refused": refused}
        )
    if refused:
        raise CommandError("; ".join(refused))
    return 0


# --- the files ---------------------------------------------------------------------------------------------------------


def superfluous(checkpoints: Checkpoints, keep: int | None, keep_every: int | None) -> tuple[list[dict[str, Any]], list[str]]:
    """The files that may be deleted, with reason and size; and notes on damaged checkpoints, which stay."""
    rows = [_row(path, next(reason for start, reason in REASONS.items() if path.name.startswith(start))) for path in checkpoints.garbage()]
    if keep is None:
        return rows, []
    old = checkpoints.superfluous(keep, keep_every)
    entries = checkpoints.entries()
    damaged = {entry: error for entry in entries if (error := _damage(checkpoints.check, entry))}
    notes = [f"{entry.name} is damaged, and stays: {error}" for entry, error in damaged.items()]
    needed = [entry for entry in damaged if entry not in old and (entry in entries[-keep:] or not _damage(checkpoints.manifest, entry))]
    if old and needed:
        return rows, [*notes, f"old checkpoints stay, for {needed[-1].name}, which was to stay in their place, is damaged"]
    reason = f"old: not of the {keep} newest, nor the best{f', nor the first of {keep_every} steps' if keep_every else ''}"
    return rows + [_row(checkpoints.directory / entry.name, reason) for entry in old if entry not in damaged], notes


def _damage(read: Callable[[Entry], Any], entry: Entry) -> DamagedError | None:
    try:
        read(entry)
    except DamagedError as error:
        return error
    return None


def _row(path: Path, reason: str) -> dict[str, Any]:
    within = [Path(folder) / name for folder, _, names in os.walk(path) for name in names] if path.is_dir() else [path]
    return {"name": path.name, "path": str(path), "bytes": sum(file.lstat().st_size for file in within), "reason": reason}


# --- the runs ----------------------------------------------------------------------------------------------------------


def _opened(paths: Iterable[Path]) -> tuple[list[Run], list[str]]:
    """The runs, and the errors of those whose config or status cannot be read."""
    runs, refused = [], []
    for path in paths:
        try:
            found = run_at(path)
            found.status()
            runs.append(found)
        except RunError as error:
            refused.append(str(error))
    return runs, refused


def _looked_at(runs: list[Run]) -> tuple[list[Run], list[str]]:
    """The runs that nobody writes to, and a line on each other one."""
    written = [found for found in runs if found.status().state == "running"]
    return [found for found in runs if found not in written], [
        f"{found.path} is being written: its process looks after it" for found in written
    ]


def _taken(runs: list[Run], locks: contextlib.ExitStack) -> tuple[list[Run], list[str]]:
    """The same, with other writers kept out until `locks` closes. The status of a run does not change."""
    free, refused = [], []
    for found in runs:
        try:
            locks.enter_context(found.writing()).withdraw()
            free.append(found)
        except RunError as error:
            refused.append(str(error))
    return free, refused


def _delete(runs: list[Run], rows: list[dict[str, Any]]) -> None:
    for found in runs:
        directory = found.checkpoints.directory
        mine = [Path(row["path"]) for row in rows if row["run"] == str(found.path)]
        names = [path.name for path in mine if path.parent == directory]
        with writing(directory):
            found.checkpoints.delete(names)
        elsewhere = [path for path in mine if path.parent != directory]
        for path in elsewhere:
            store.remove(path)
        left = [path.name for path in found.checkpoints.garbage() if path.name.removeprefix(".tmp-delete-") in names]
        if left := left + [str(path) for path in elsewhere if os.path.lexists(path)]:
            raise CommandError(f"{directory}: could not be deleted, or not wholly: {', '.join(left)}")


def _print(rows: list[dict[str, Any]], notes: list[str]) -> None:
    cells = [[size(row["bytes"]), row["reason"], shown_path(Path(row["path"]))] for row in rows]
    say(table(["size", "reason", "what"], cells, right=["size"]) if rows else "nothing to delete")
    for note in notes:
        say(note)
    sys.stdout.flush()  # before anything is deleted
