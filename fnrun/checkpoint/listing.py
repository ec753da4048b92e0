"""The checkpoints that lie in a directory: which there are, which one is meant, and what their manifests say."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from fnrun.checkpoint import store
from fnrun.checkpoint.manifest import CheckpointError, DamagedError, Judgement, Manifest
from fnrun.checkpoint.retention import Which, best, judges
from fnrun.core.checkpoint_name import Entry

T = TypeVar("T")
M = TypeVar("M", Manifest, Judgement | Manifest)

#: Prefix of the checkpoints of a future that was given up.
ABANDONED = "abandoned-"


class Listing:
    """The checkpoints in `directory`, which need not exist. Another process may write and delete there meanwhile."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._judgements: dict[Entry, tuple[Any, Judgement | Manifest]] = {}

    def path(self, entry: Entry) -> Path:
        return self.directory / entry.name

    def entries(self) -> list[Entry]:
        """Every checkpoint, from the oldest to the newest."""
        if not self.directory.is_dir():
            return []
        return sorted(entry for name in os.listdir(self.directory) if (entry := Entry.of(name)) is not None)

    def manifest(self, entry: Entry) -> Manifest:
        return self._check_name(entry, store.read_manifest(self.path(entry)))

    def judgements(self, *, skip_damaged: bool = False) -> dict[Entry, Judgement | Manifest]:
        """By what each checkpoint is judged. Raises DamagedError for a damaged manifest, unless those are skipped."""
        found: dict[Entry, Judgement | Manifest] = {}
        for entry in self.entries():
            try:
                found[entry] = self._judgement(entry)
            except DamagedError:
                if not skip_damaged and self.path(entry).exists():  # and was not deleted since it was listed
                    raise
        return found

    def _judgement(self, entry: Entry) -> Judgement | Manifest:
        """Read once, and again where the file is another: what a save costs must not grow with the checkpoints that there are."""
        try:
            found = os.stat(f"{self.directory}/{entry.name}/{store.MANIFEST}")
            mark = (found.st_ino, found.st_size, found.st_mtime_ns)
        except OSError:
            mark = None  # reading it says what is wrong
        known = self._judgements.get(entry)
        if known is None or known[0] != mark:
            known = self._judgements[entry] = mark, self._check_name(entry, store.read_judgement(self.path(entry)))
        return known[1]

    def _check_name(self, entry: Entry, manifest: M) -> M:
        if (manifest.step, manifest.ticks) != (entry.step, entry.ticks):
            raise DamagedError(
                f"{self.path(entry)} holds step {manifest.step}, ticks {manifest.ticks}: the directory was renamed; "
                f"its name is {Entry(manifest.ticks, manifest.step, 0).name}"
            )
        return manifest

    def best(self, metric: str | None = None) -> Entry | None:
        """The best checkpoint by `metric`, or by the first metric that is monitored; None where nothing was monitored.

        Raises CheckpointError for a metric that was never monitored, DamagedError for a damaged manifest.
        """
        found = self.judgements()
        known = judges(found)
        if metric is not None and metric not in known:
            raise CheckpointError(
                f"{self.directory}: no checkpoint was saved with {metric!r} monitored; monitored: {', '.join(known) or 'nothing'}"
            )
        return best(found, metric)

    def find(self, which: Which = None) -> Entry:
        """The checkpoint that is named: by a step (the newest of several), "best", "best:METRIC", itself, or None for the newest.

        Raises CheckpointError where there is none, saying which there are.
        """
        entries = self.entries()
        if not entries:
            raise CheckpointError(f"{self.directory}: there is no checkpoint here")
        if which is None:
            return entries[-1]
        if isinstance(which, str) and which.partition(":")[0] == "best":
            return self._find_best(which.partition(":")[2] or None)
        if not isinstance(which, Entry) and type(which) is not int:
            raise CheckpointError(f"a checkpoint is named by its step, 'best' or 'best:METRIC', not {which!r}")
        found = [entry for entry in entries if which in (entry, entry.step)]
        if not found:
            step = which.step if isinstance(which, Entry) else which
            steps = ", ".join(str(entry.step) for entry in entries)
            abandoned = sorted(path.name for path in self.directory.glob(f"{ABANDONED}{step:08d}-*"))
            hint = f"; {abandoned[0]} was given up when the run went on from an older step: rename it to bring it back" if abandoned else ""
            raise CheckpointError(f"{self.directory}: there is no checkpoint of step {step}; there are: {steps}{hint}")
        return found[-1]

    def _find_best(self, metric: str | None) -> Entry:
        if (found := self.best(metric)) is None:
            names = sorted({name for judgement in self.judgements().values() for name in judgement.metrics})
            raise CheckpointError(
                f"{self.directory}: no checkpoint was saved with a monitored metric that is a number, so none is the best; "
                f"metrics: {', '.join(names) or 'none'}"
            )
        return found

    def reading(self, which: Which, read: Callable[[Entry], T]) -> T:
        """`read` of the checkpoint that is named. If another process deletes it meanwhile, of the one that is named by then."""
        entry = self.find(which)
        while True:
            try:
                return read(entry)
            except CheckpointError as error:
                if os.path.lexists(self.path(entry)):
                    raise
                gone = CheckpointError(
                    f"{self.path(entry)} was deleted, or moved away, while it was read, by the process that writes there"
                )
                try:
                    before, entry = entry, self.find(which)
                except CheckpointError as none:
                    raise CheckpointError(f"{gone}: {none}") from error
                if entry == before:  # some network file systems do not know yet
                    raise gone from error
