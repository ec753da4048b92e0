"""A directory of checkpoints: saving, finding, restoring, deleting.

    with Checkpoints("runs/digits/try1/checkpoints") as checkpoints:
        checkpoints.save(state, {"val/loss": 0.2}, monitor="val/loss")     # returns at once, writes behind
    state = Checkpoints("runs/digits/try1/checkpoints").restore(like=fresh)

A directory of checkpoints is one history, ordered by `state.position.ticks`. After a save, `latest()` is what was saved. Where a run goes
on from an older checkpoint, what lies beyond it is a future that was given up: it is moved aside when the first new checkpoint is written
(`abandoned-...`). Nothing reads it; `fnrun gc` deletes it, and renaming brings it back. One process at a time writes, through one
`Checkpoints` and from one thread.
"""

from __future__ import annotations

import datetime
import logging
import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import torch

from fnrun.checkpoint import codec, restoring, store, writing
from fnrun.checkpoint.background import Background
from fnrun.checkpoint.handed import HandedOver
from fnrun.checkpoint.listing import ABANDONED, Listing
from fnrun.checkpoint.manifest import CheckpointError, Manifest, Mode, encode_config, scalars
from fnrun.checkpoint.match import Rename, check_cast
from fnrun.checkpoint.retention import Which, check_keep, monitors_of, superfluous
from fnrun.core import files, tree
from fnrun.core.checkpoint_name import Entry
from fnrun.core.donation import check_thread, shared
from fnrun.core.inplace import InPlaceError

T = TypeVar("T")

_TEMPORARY = ".tmp-"


#: By directory: whose turn it is to write there, among the `Checkpoints` of this process. What one is writing looks left over to others.
_turns: dict[Path, Any] = {}
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_turns.clear)


def _turn(directory: Path) -> Any:
    return _turns.setdefault(directory.resolve(), threading.RLock())


class Checkpoints:
    """The checkpoints in `directory`, which is made at the first save.

    - `config=None`: what is written into each manifest: plain values, a dataclass or a msgspec struct.
    - `environment=None`: strings by name, written beside the versions and the machine that are found out.
    - `guard=None`: called before anything is written and before it takes its place. A CheckpointError that it raises keeps a process from
      writing that may not do so any more.

    >>> import tempfile, torch, fnrun.core.state
    >>> state = fnrun.TrainState.create(torch.nn.Linear(2, 1), seed=0)
    >>> with tempfile.TemporaryDirectory() as directory, Checkpoints(directory) as checkpoints:
    ...     checkpoints.save(state.replace(step=10), {"loss": 0.5}, monitor="loss")
    ...     checkpoints.save(state.replace(step=20), {"loss": 0.7}, monitor="loss")
    ...     checkpoints.steps(), checkpoints.best(), checkpoints.restore(like=state).step
    ([10, 20], 10, 20)
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        config: Any = None,
        environment: Mapping[str, str] | None = None,
        guard: Callable[[], None] | None = None,
    ) -> None:
        self.directory = files.local_path(directory).absolute()  # the process may change its directory
        self.config = encode_config(config)
        self.environment = dict(environment or {})
        self.guard = guard
        self._background = Background(str(self.directory))
        self._listing = Listing(self.directory)
        self._handed = HandedOver(0, {})
        self._opened = False

    # --- saving

    def save(
        self,
        state: Any,
        metrics: Mapping[str, Any] | None = None,
        *,
        monitor: str | Mapping[str, Mode] | None = None,
        mode: Mode = "min",
    ) -> None:
        """Hand `state` over to be saved behind the training. This returns before it is on disk; `wait()` returns when it is.

        The tensors are not copied, for nobody writes to them; only those that a running loop donates are. At most one save is in flight, a
        second one waits for it. A state that is on disk already under its step and ticks, bit for bit, with nothing new in its metrics, is
        not written again. One that differs is written beside it, and is the newer of the two.

        - `metrics=None`: values by name; those that are one number are kept.
        - `monitor=None`: the metric by which `best()` chooses (a value that is not finite is never the best), or several with their modes:
          `{"val/loss": "min", "val/accuracy": "max"}`.
        - `mode="min"`: "min" or "max", the mode of a single `monitor`.

        Raises CheckpointError at once for what cannot be saved, ValueError for a monitored metric that is not among `metrics`.
        The failure of an earlier save is raised when this one is under way.
        """
        monitors = monitors_of(monitor, mode)
        if unknown := [metric for metric in monitors if metrics and metric not in metrics]:
            raise ValueError(f"save: {unknown[0]!r} is monitored and not among the metrics: {', '.join(map(repr, metrics or ()))}")
        if self.guard is not None:
            self.guard()
        step, ticks = _step_and_ticks(state)
        check_thread(state)
        self._background.join()  # before the copy, so that there is one at most
        description, metrics = codec.describe(shared(state)), _numbers(metrics or {})
        arrays = {number: each.copy() for number, each in description.sources.items() if isinstance(each, np.ndarray)}
        description.sources.update(arrays)  # nothing counts the writes to an array
        before, self._handed = self._handed, HandedOver.of(step, description.sources)
        try:
            before.check(description.leaves, description.sources)
        except InPlaceError as changed:
            raise CheckpointError(f"{self.directory}: at the save of step {step}: {changed}") from changed
        handed = self._handed
        ready = [torch.cuda.current_stream(device).record_event() for device in _devices(description.sources.values())]
        failure = self._background.failure()

        def job() -> None:
            for event in ready:
                event.synchronize()
            manifest = Manifest(
                step=step,
                ticks=ticks,
                created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                metrics=scalars(metrics),
                monitors=monitors,
                config=self.config,
                environment=self.environment,
                structure=description.structure,
                leaves=description.leaves,
            )
            self._write(manifest, description.sources, lambda: handed.check(description.leaves, description.sources))

        self._background.start(job, f"step {step} was not saved")
        if failure is not None:
            raise failure

    def _write(self, manifest: Manifest, sources: dict[int, Any], check: Callable[[], None]) -> None:
        with _turn(self.directory):
            self._write_alone(manifest, sources, check)

    def _write_alone(self, manifest: Manifest, sources: dict[int, Any], check: Callable[[], None]) -> None:
        self._open()
        bits = writing.bits(sources)
        here = [entry for entry in self._listing.entries() if (entry.ticks, entry.step) == (manifest.ticks, manifest.step)]
        if here and store.holds(self._listing.path(here[-1]), manifest, bits):
            self._abandon_after(here[-1])
            return
        entry = Entry(manifest.ticks, manifest.step, here[-1].version + 1 if here else 0)
        temporary = self.directory / f"{_TEMPORARY}{entry.name}"
        store.remove(temporary)
        try:
            temporary.mkdir()
            writing.write(temporary, manifest, bits)
            if self.guard is not None:
                self.guard()
            check()
            self._abandon_after(entry)
            temporary.rename(self._listing.path(entry))
            files.sync(self.directory)
        except BaseException:
            store.remove(temporary)
            raise

    def _open(self) -> None:
        """Make the directory, again if somebody deleted it, and clean up behind a process that was killed."""
        if self._opened and self.directory.exists():
            return
        missing = [path for path in (self.directory, *self.directory.parents) if not path.exists()]
        self.directory.mkdir(parents=True, exist_ok=True)
        for path in missing:
            files.sync(path.parent)
        if self._opened:
            logging.getLogger("fnrun").error("%s was gone, and all that was saved there; it is made again", self.directory)
        for leftover in self.directory.glob(f"{_TEMPORARY}*"):
            store.remove(leftover)
        self._opened = True

    def _abandon_after(self, entry: Entry) -> None:
        """Move aside what lies beyond `entry`, the future of a run that went on from before, and what is damaged at its place."""
        beyond = [
            other
            for other in self._listing.entries()
            if other[:2] > entry[:2] or (other[:2] == entry[:2] and other != entry and not store.is_whole(self._listing.path(other)))
        ]
        for other in beyond:
            target, count = self.directory / f"{ABANDONED}{other.name}", 1
            while target.exists():
                count += 1
                target = self.directory / f"{ABANDONED}{other.name}-{count}"
            self._listing.path(other).rename(target)
        if beyond:
            files.sync(self.directory)
            names = ", ".join(other.name for other in beyond)
            logging.getLogger("fnrun").warning(
                f"{self.directory}: the run goes on from step {entry.step}; moved aside as {ABANDONED}*: {names}"
            )

    def poll(self) -> None:
        """Raise the failure of a save in the background, if there is one. Waits for nothing."""
        if (failure := self._background.failure()) is not None:
            raise failure

    def wait(self) -> None:
        """Return when everything handed over is on disk. Raises CheckpointError, naming the step, for what is not."""
        self._background.join()
        self.poll()

    close = wait

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        try:
            self.wait()
        except CheckpointError as failure:
            if error is None:
                raise
            error.add_note(str(failure))

    # --- looking

    def _settled(self) -> Listing:
        """The listing of the directory, after a save in flight has ended."""
        self._background.join()
        return self._listing

    def entries(self) -> list[Entry]:
        """Every checkpoint, from the oldest to the newest. A save in flight is waited for, here and in what follows."""
        return self._settled().entries()

    def steps(self) -> list[int]:
        """The steps of which there is a checkpoint, in order."""
        return list(dict.fromkeys(entry.step for entry in self.entries()))

    def latest(self) -> int | None:
        """The step of the newest checkpoint, by ticks: what was saved last."""
        entries = self.entries()
        return entries[-1].step if entries else None

    def best(self, metric: str | None = None) -> int | None:
        """The step of the checkpoint with the best value of `metric`; of equals, the first.

        Without `metric` it is the first one that the newest monitored checkpoint names. None where nothing was monitored.
        Raises CheckpointError if a manifest is damaged, or `metric` was never monitored.
        """
        found = self._settled().best(metric)
        return found.step if found else None

    def best_values(self, monitors: Mapping[str, Mode], *, before: int) -> dict[str, float]:
        """The best value by each of these metrics among the checkpoints of fewer than `before` ticks, as a number to be minimized."""
        found: dict[str, float] = {}
        for judgement in self._settled().judgements(skip_damaged=True).values():
            for metric, mode in monitors.items():
                value = judgement.value(metric, mode) if judgement.ticks < before else None
                if value is not None:
                    found[metric] = min(value, found.get(metric, value))
        return found

    def find(self, step: Which = None) -> Entry:
        """The checkpoint that `step` names: a step (the newest of several), "best", "best:METRIC", or None for the newest.

        Raises CheckpointError where there is none, saying which there are.
        """
        return self._settled().find(step)

    def manifest(self, step: Which = None) -> Manifest:
        """The manifest of a checkpoint: metrics, config, environment, leaves without their values. Arguments as in `restore`."""
        return self.reading(step, self._listing.manifest)

    def check(self, step: Which = None) -> Manifest:
        """The manifest, after every file of the checkpoint was compared with its digests. Arguments and errors as in `restore`."""

        def check(entry: Entry) -> Manifest:
            manifest = self._listing.manifest(entry)
            store.check_files(self._listing.path(entry), manifest)
            return manifest

        return self.reading(step, check)

    def reading(self, step: Which, read: Callable[[Entry], T]) -> T:
        """`read` of the checkpoint that `step` names. If another process deletes it meanwhile, of the one that is named by then."""
        return self._settled().reading(step, read)

    @classmethod
    def at(cls, path: str | Path) -> tuple[Checkpoints, Entry]:
        """The one checkpoint in the directory `path`, and those beside it. Raises CheckpointError where `path` is none."""
        path = files.local_path(path).absolute()
        entry = Entry.of(path.name)
        if entry is None or not path.is_dir():
            raise CheckpointError(f"{path} is no checkpoint: one is a directory named STEP-TICKS, such as {Entry(120, 100, 0).name}")
        return cls(path.parent), entry

    # --- restoring

    def restore(
        self,
        like: Any = None,
        step: Which = None,
        select: str | Sequence[str] | None = None,
        *,
        rename: Rename | None = None,
        strict: bool = True,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> Any:
        """The state of a checkpoint, bit for bit.

        - `like=None`: a fresh state. Its params, buffers and optimizer state must be as they were saved: names, containers, shapes, dtypes.
          `position`, `memory` and, elsewhere, what is empty in `like` is rebuilt from the manifest. Tensors come to the devices of
          `like`'s; those that it does not have, to where the tensors go that were beside them when they were saved. Without `like`
          everything is rebuilt, on the CPU; the classes of structs and NamedTuples must be loaded.
        - `step=None`: the newest checkpoint; else that of a step (the newest of several), `"best"` or `"best:METRIC"`.
        - `select=None`: all leaves; else those whose paths match these glob patterns (`"params/**"`, `["params/**", "!params/head.*"]`).
          The others are those of `like`, or None.
        - `rename=None`: leaves of dictionaries under other paths: regular expressions and their replacements,
          `{r"^params/backbone\\.": "params/encoder."}`, or a function of the path. `select` sees the new paths.
        - `strict=True`: what is missing or unexpected is an error. With `strict=False` what the checkpoint does not have stays as it is in
          `like`, and what `like` does not have is left out; a warning is logged. It is an error all the same where nothing fits.
        - `device=None`: where all tensors go, in place of `like`'s devices.
        - `dtype=None`: a floating-point dtype to cast to. Cast are the tensors that have it in `like` and those that `like` does not have
          (what hooks remember; without `like`, all); never those of `position`, the totals of the open loops.

        Raises DamagedError if a byte that is read is not as it was written. Raises CheckpointError with a table of what differs from
        `like`, and for a device that cannot take it or a dtype that is not floating-point.
        """
        check_cast("restore", dtype)
        options = {"select": _patterns(select), "rename": rename, "strict": strict, "device": device, "dtype": dtype}
        return self.reading(
            step, lambda entry: restoring.restore(self._listing.path(entry), self._listing.manifest(entry), like, **options)
        )

    def read(
        self,
        step: Which = None,
        select: str | Sequence[str] | None = None,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> dict[str, Any]:
        """The leaves of a checkpoint by path, on the CPU or on `device`; no class of the state need be loaded.

        Arguments and errors as in `restore`.
        """
        check_cast("read", dtype)
        options = {"select": _patterns(select), "device": device, "dtype": dtype}
        return self.reading(step, lambda entry: restoring.read(self._listing.path(entry), self._listing.manifest(entry), **options))

    # --- deleting

    def prune(self, keep: int, keep_every: int | None = None) -> None:
        """Delete all but the `keep` newest checkpoints and the best by each metric; behind a save in flight, once that is written.

        With `keep_every=k` the first one at or after each multiple of k steps stays too. One that was overtaken at its step and ticks
        counts as old. One whose manifest is damaged stays: it may be the best.
        """
        check_keep("prune", keep, keep_every)

        def job() -> None:
            self.delete([entry.name for entry in self._superfluous(keep, keep_every)])

        failed = "old checkpoints were not deleted"
        if self._background.busy:
            self._background.start(job, failed)
            return
        try:
            job()
        except OSError as error:
            raise CheckpointError(f"{self.directory}: {failed}: {error}") from error

    def superfluous(self, keep: int, keep_every: int | None = None) -> list[Entry]:
        """The checkpoints that `prune` would delete."""
        check_keep("superfluous", keep, keep_every)
        self._background.join()
        return self._superfluous(keep, keep_every)

    def _superfluous(self, keep: int, keep_every: int | None) -> list[Entry]:
        return superfluous(self._listing.entries(), self._listing.judgements(skip_damaged=True), keep, keep_every)

    def garbage(self) -> list[Path]:
        """The leftovers of killed processes, half written or half deleted, and the futures that were given up. Nothing reads either."""
        self._background.join()
        if not self.directory.is_dir():
            return []
        return sorted(path for path in self.directory.iterdir() if path.name.startswith((_TEMPORARY, ABANDONED)))

    def delete(self, names: Sequence[str]) -> None:
        """Delete what the directory holds under these names, each of it whole or not at all. Raises OSError where that is not allowed.

        What stays the best or the newest is the caller's to judge; `superfluous` and `garbage` say what may go.
        """
        doomed = [self.directory / (name if name.startswith(_TEMPORARY) else f"{_TEMPORARY}delete-{name}") for name in names]
        for name, path in zip(names, doomed, strict=True):
            if path.name != name:
                (self.directory / name).rename(path)
        if doomed:
            files.sync(self.directory)  # only then: a power cut must not bring the name back with half of its files
        for path in doomed:
            store.remove(path)


def _numbers(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Copies of the metrics that are one number: a caller that counts in a tensor goes on to do so. No device is waited for."""
    kinds = (torch.Tensor, np.ndarray)
    return {name: tree.snapshot(value) for name, value in metrics.items() if not isinstance(value, kinds) or math.prod(value.shape) == 1}


def _step_and_ticks(state: Any) -> tuple[int, int]:
    """The step and the ticks by which a state is filed; the ticks of one without a position are its steps."""
    step = getattr(state, "step", None)
    if type(step) is not int or step < 0:
        raise CheckpointError(f"a checkpoint is named by state.step, an int: this {type(state).__name__} has {step!r}")
    ticks = getattr(getattr(state, "position", None), "ticks", step)
    return step, ticks


def _devices(values: Any) -> set[torch.device]:
    return {value.device for value in values if isinstance(value, torch.Tensor) and value.is_cuda}


def _patterns(select: str | Sequence[str] | None) -> Sequence[str] | None:
    return [select] if isinstance(select, str) else select
