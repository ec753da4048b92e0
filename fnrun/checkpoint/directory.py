"""A directory of checkpoints: saving, finding, restoring, deleting.

    with Checkpoints("runs/digits/try1/checkpoints") as checkpoints:
        checkpoints.save(state, {"val/loss": 0.2}, monitor="val/loss")     # returns at once, writes behind
    state = Checkpoints("runs/digits/try1/checkpoints").restore(like=fresh)

A directory of checkpoints is one history, ordered by `state.position.ticks`. After a save, `latest()` is what was saved: where a run goes
on from an older checkpoint, what lies beyond it is a future that was given up, and is moved aside when the first new checkpoint is
written (`abandoned-...`: nothing reads it; `fnrun gc` deletes it, or rename it back). One process at a time writes,
through one `Checkpoints` and from one thread.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import torch

from fnrun.checkpoint import codec, handed, restoring, store, writing
from fnrun.checkpoint.background import Background
from fnrun.checkpoint.handed import HandedOver
from fnrun.checkpoint.manifest import CheckpointError, DamagedError, Judgement, Manifest, Mode, encode_config, scalars
from fnrun.checkpoint.match import Rename, check_cast
from fnrun.checkpoint.retention import Which, best, check_keep, judges, monitors_of, superfluous
from fnrun.core import files, tree
from fnrun.core.checkpoint_name import Entry
from fnrun.core.donation import shared

M = TypeVar("M", Manifest, Judgement | Manifest)
T = TypeVar("T")

_TEMPORARY = ".tmp-"
_ABANDONED = "abandoned-"


class Checkpoints:
    """The checkpoints in `directory`, which is made at the first save.

    `config` is written into each manifest, and `environment` beside what is found out about versions and machine. `guard()` is called before
    anything is written and before it takes its place; raising a CheckpointError it keeps a process out that may not write any more.

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
        self._handed = HandedOver()
        self._opened = False
        self._judged: dict[Entry, tuple[Any, Judgement | Manifest]] = {}

    # --- saving

    def save(
        self,
        state: Any,
        metrics: Mapping[str, Any] | None = None,
        *,
        monitor: str | Mapping[str, Mode] | None = None,
        mode: Mode = "min",
    ) -> None:
        """Hand `state` over to be saved behind the training; returns before it is on disk, `wait()` when it is.

        The tensors are not copied, for nobody writes to them; only those that a running loop donates are. At most one save is in flight, a
        second one waits for it. The scalars among `metrics` are kept; `monitor` names the one by which `best()` chooses (what is not
        finite is never the best), or several with their modes: `{"val/loss": "min", "val/accuracy": "max"}`.

        A state of a step and a tick that are on disk already, bit for bit, with nothing new in its metrics, is not written again;
        one that differs is written beside it, and is the newer of the two.

        Raises CheckpointError at once for what cannot be saved, ValueError for a monitored metric that is not among `metrics`.
        The failure of an earlier save is raised when this one is under way.
        """
        monitors = monitors_of(monitor, mode)
        if unknown := [metric for metric in monitors if metrics and metric not in metrics]:
            raise ValueError(f"save: {unknown[0]!r} is monitored and not among the metrics: {', '.join(map(repr, metrics or ()))}")
        if self.guard is not None:
            self.guard()
        step, ticks = _step_and_ticks(state)
        self._background.join()  # before the copy, so that there is one at most
        description, metrics = codec.describe(shared(state)), _numbers(metrics or {})
        if (changed := self._handed.take(step, description.leaves, description.sources)) is not None:
            raise CheckpointError(f"{self.directory}: at the save of step {step}: {changed}") from changed
        versions = self._handed.versions()
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
            self._write(manifest, description.sources, lambda: handed.check(description.leaves, description.sources, versions, step))

        self._background.start(job, f"step {step} was not saved")
        if failure is not None:
            raise failure

    def _write(self, manifest: Manifest, sources: dict[int, Any], check: Callable[[], None]) -> None:
        self._open()
        bits = writing.bits(sources)
        here = [entry for entry in self._entries() if (entry.ticks, entry.step) == (manifest.ticks, manifest.step)]
        if here and store.holds(self._path(here[-1]), manifest, bits):
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
            temporary.rename(self._path(entry))
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
        """Move aside what lies beyond: the future of a run that went on from an older checkpoint. So too what is damaged at the same place."""
        entries = self._entries()
        here = [other for other in entries if other[:2] == entry[:2] and other != entry and not store.is_whole(self._path(other))]
        beyond = here + [other for other in entries if other[:2] > entry[:2]]
        for other in beyond:
            target = self.directory / f"{_ABANDONED}{other.name}"
            count = 1
            while target.exists():
                count += 1
                target = self.directory / f"{_ABANDONED}{other.name}-{count}"
            (self._path(other)).rename(target)
        if beyond:
            files.sync(self.directory)
            names = ", ".join(other.name for other in beyond)
            logging.getLogger("fnrun").warning(
                f"{self.directory}: the run goes on from step {entry.step}; moved aside as {_ABANDONED}*: {names}"
            )

    def poll(self) -> None:
        """Raise the failure of a save that went wrong behind, if there is one; costs nothing and waits for nothing."""
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

    def entries(self) -> list[Entry]:
        """Every checkpoint, from the oldest to the newest. A save in flight is waited for, here and in what follows."""
        self._background.join()
        return self._entries()

    def _path(self, entry: Entry) -> Path:
        return self.directory / entry.name

    def _entries(self) -> list[Entry]:
        if not self.directory.is_dir():
            return []
        return sorted(entry for name in os.listdir(self.directory) if (entry := Entry.of(name)) is not None)

    def steps(self) -> list[int]:
        """The steps of which there is a checkpoint, in order."""
        return list(dict.fromkeys(entry.step for entry in self.entries()))

    def latest(self) -> int | None:
        """The step of the newest checkpoint, by ticks: what was saved last."""
        entries = self.entries()
        return entries[-1].step if entries else None

    def best(self, metric: str | None = None) -> int | None:
        """The step of the checkpoint with the best value of `metric`, or of the first one that the newest monitored checkpoint names; the first of equals.

        Read from the manifests. None where nothing was monitored. Raises CheckpointError if a manifest is damaged, or `metric` was never monitored.
        """
        self._background.join()
        found = self._best(self._judgements(), metric)
        return found.step if found else None

    def _best(self, manifests: Mapping[Entry, Judgement | Manifest], metric: str | None) -> Entry | None:
        known = judges(manifests)
        if metric is not None and metric not in known:
            raise CheckpointError(
                f"{self.directory}: no checkpoint was saved with {metric!r} monitored; monitored: {', '.join(known) or 'nothing'}"
            )
        return best(manifests, metric)

    def best_values(self, monitors: Mapping[str, Mode], *, before: int) -> dict[str, float]:
        """The best value by each of these metrics among the checkpoints of fewer than `before` ticks, as a number to be minimized."""
        self._background.join()
        found: dict[str, float] = {}
        for manifest in self._readable().values():
            for metric, mode in monitors.items():
                value = manifest.value(metric, mode) if manifest.ticks < before else None
                if value is not None:
                    found[metric] = min(value, found.get(metric, value))
        return found

    def manifest(self, step: Which = None) -> Manifest:
        """What a checkpoint says of itself, its arrays apart: metrics, config, environment, leaves. Arguments as in `restore`."""
        return self.reading(step, self._manifest)

    def check(self, step: Which = None) -> Manifest:
        """The manifest, after every file of the checkpoint was compared with its digests. Arguments and errors as in `restore`."""
        return self.reading(step, self._checked)

    def _checked(self, entry: Entry) -> Manifest:
        manifest = self._manifest(entry)
        store.check_files(self._path(entry), manifest)
        return manifest

    def reading(self, step: Which, read: Callable[[Entry], T]) -> T:
        """`read` of the checkpoint that `step` names; of the one that it names by then, where another process deletes that one meanwhile."""
        entry = self.find(step)
        while True:
            try:
                return read(entry)
            except CheckpointError as error:
                if os.path.lexists(self._path(entry)):
                    raise
                gone = CheckpointError(
                    f"{self._path(entry)} was deleted, or moved away, while it was read, by the process that writes there"
                )
                try:
                    before, entry = entry, self.find(step)
                except CheckpointError as none:
                    raise CheckpointError(f"{gone}: {none}") from error
                if entry == before:  # some network file systems do not know yet
                    raise gone from error

    def _judgements(self) -> dict[Entry, Judgement | Manifest]:
        found: dict[Entry, Judgement | Manifest] = {}
        for entry in self._entries():
            try:
                found[entry] = self._judgement(entry)
            except DamagedError:
                if (self._path(entry)).exists():  # and was not deleted meanwhile, by the process that writes
                    raise
        return found

    def _judgement(self, entry: Entry) -> Judgement | Manifest:
        """Read once, and again where the file is another: what a save costs must not grow with the checkpoints that there are."""
        try:
            found = os.stat(f"{self.directory}/{entry.name}/{store.MANIFEST}")
            mark = (found.st_ino, found.st_size, found.st_mtime_ns)
        except OSError:
            mark = None  # reading it says what is wrong
        known = self._judged.get(entry)
        if known is None or known[0] != mark:
            known = self._judged[entry] = mark, self._named(entry, store.read_judgement(self._path(entry)))
        return known[1]

    def _manifest(self, entry: Entry) -> Manifest:
        return self._named(entry, store.read_manifest(self._path(entry)))

    def _named(self, entry: Entry, manifest: M) -> M:
        """What a checkpoint says of itself, if it has the name that it should have."""
        if (manifest.step, manifest.ticks) != (entry.step, entry.ticks):
            raise DamagedError(
                f"{self._path(entry)} holds step {manifest.step}, ticks {manifest.ticks}: the directory was renamed; "
                f"its name is {Entry(manifest.ticks, manifest.step, 0).name}"
            )
        return manifest

    def find(self, step: Which = None) -> Entry:
        """The checkpoint that `step` names: a step (the newest of several), "best", "best:METRIC", or None for the newest.

        Raises CheckpointError where there is none, saying which there are.
        """
        entries = self.entries()
        if not entries:
            raise CheckpointError(f"{self.directory}: there is no checkpoint here")
        if step is None:
            return entries[-1]
        if isinstance(step, Entry):
            found = [entry for entry in entries if entry == step]
        elif isinstance(step, str):
            return self._find_best(step)
        elif type(step) is not int:
            raise CheckpointError(f"a checkpoint is named by its step, 'best' or 'best:METRIC', not {step!r}")
        else:
            found = [entry for entry in entries if entry.step == step]
        if not found:
            number = step.step if isinstance(step, Entry) else step
            steps = ", ".join(str(entry.step) for entry in entries)
            given_up = sorted(path.name for path in self.directory.glob(f"{_ABANDONED}{number:08d}-*"))
            hint = f"; {given_up[0]} was given up when the run went on from an older step: rename it to bring it back" if given_up else ""
            raise CheckpointError(f"{self.directory}: there is no checkpoint of step {number}; there are: {steps}{hint}")
        return found[-1]

    def _find_best(self, text: str) -> Entry:
        kind, _, metric = text.partition(":")
        if kind != "best":
            raise CheckpointError(f"a checkpoint is named by its step, 'best' or 'best:METRIC', not {text!r}")
        found = self._best(manifests := self._judgements(), metric or None)
        if found is None:
            names = sorted({name for manifest in manifests.values() for name in manifest.metrics})
            raise CheckpointError(
                f"{self.directory}: no checkpoint was saved with a monitored metric that is a number, so none is the best; "
                f"metrics: {', '.join(names) or 'none'}"
            )
        return found

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
        """The state of a checkpoint, bit for bit: the latest, that of a step (the newest of several), or the best.

        `like` is a fresh state. Its params, buffers and optimizer state must be those that were saved: names, containers, shapes, dtypes.
        `position`, `memory` and, outside of those three, whatever is empty in `like` is rebuilt from the manifest. Tensors come to the
        devices of `like`'s; those that it does not have, to where the tensors lie that were beside them when they were saved.
        Without `like` everything is rebuilt, on the CPU; the classes of structs and NamedTuples must be loaded.

        `select` restores some leaves only, by glob patterns on their paths (`"params/**"`, `["params/**", "!params/head.*"]`);
        the others are those of `like`, or None. `rename` restores leaves of dictionaries under other paths: regular expressions and what to put
        for them, `{r"^params/backbone\\.": "params/encoder."}`, or a function of the path; `select` then sees the new ones. With
        `strict=False` what is missing in the checkpoint stays as it is in `like`, and what `like` does not have is left out; both are logged as
        warnings, and it is an error all the same where nothing fits.
        `device` brings all tensors there. `dtype` casts floating-point tensors to it, those that have it in `like` and those that
        `like` does not have (what hooks remember; without `like`, all), but never those of `position`: the totals of the loops that are open.

        Raises DamagedError if a byte that is read is not as it was written, CheckpointError with a table of what differs from `like`, and for a
        device that cannot take it or a dtype that is not floating-point.
        """
        check_cast("restore", dtype)
        options = {"select": _patterns(select), "rename": rename, "strict": strict, "device": device, "dtype": dtype}
        return self.reading(step, lambda entry: restoring.restore(self._path(entry), self._manifest(entry), like, **options))

    def read(
        self,
        step: Which = None,
        select: str | Sequence[str] | None = None,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> dict[str, Any]:
        """The leaves of a checkpoint by path, on the CPU or on `device`; no class of the state need be known. Arguments and errors as in `restore`."""
        check_cast("read", dtype)
        options = {"select": _patterns(select), "device": device, "dtype": dtype}
        return self.reading(step, lambda entry: restoring.read(self._path(entry), self._manifest(entry), **options))

    # --- deleting

    def prune(self, keep: int, keep_every: int | None = None) -> None:
        """Delete all but the `keep` newest checkpoints and the best; behind a save in flight, so that nothing goes before it is written.

        With `keep_every=k` the first one at or after each multiple of k steps stays too. What was overtaken at its own step and tick counts as
        old. One whose manifest is damaged is left alone: it may be the best.
        """
        check_keep("prune", keep, keep_every)
        if self._background.busy:
            self._background.start(
                lambda: self.delete([entry.name for entry in self._superfluous(keep, keep_every)]), "old checkpoints were not deleted"
            )
            return
        try:
            self.delete([entry.name for entry in self._superfluous(keep, keep_every)])
        except OSError as error:
            raise CheckpointError(f"{self.directory}: old checkpoints were not deleted: {error}") from error

    def superfluous(self, keep: int, keep_every: int | None = None) -> list[Entry]:
        """What `prune` would delete."""
        check_keep("superfluous", keep, keep_every)
        self._background.join()
        return self._superfluous(keep, keep_every)

    def _superfluous(self, keep: int, keep_every: int | None) -> list[Entry]:
        return superfluous(self._entries(), self._readable(), keep, keep_every)

    def _readable(self) -> dict[Entry, Judgement | Manifest]:
        readable: dict[Entry, Judgement | Manifest] = {}
        for entry in self._entries():
            with contextlib.suppress(DamagedError):
                readable[entry] = self._judgement(entry)
        return readable

    def garbage(self) -> list[Path]:
        """What killed processes have left half written or half deleted, and the futures that were given up; nobody reads either."""
        self._background.join()
        if not self.directory.is_dir():
            return []
        return sorted(path for path in self.directory.iterdir() if path.name.startswith((_TEMPORARY, _ABANDONED)))

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
    """The metrics that are one number, of whatever kind, in memory of their own: who counts in a tensor goes on to do so; no device is waited for."""
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
