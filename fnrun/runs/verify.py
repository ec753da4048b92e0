"""Replay and proof: from each checkpoint the program is run to the next one, and every bit is compared."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shlex
import tempfile
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from fnrun.checkpoint import CheckpointError, Checkpoints, DamagedError, Entry, Manifest
from fnrun.checkpoint.manifest import constant
from fnrun.core import tree
from fnrun.core.context import tick_listener
from fnrun.core.donation import shared
from fnrun.core.environment import environment
from fnrun.core.position import Frame, Position
from fnrun.loops.entry import with_observers
from fnrun.loops.exits import ProgramError
from fnrun.runs.config import config_type, decode
from fnrun.runs.run import Experiment, Run, RunError, built, load_build

__all__ = ["Pair", "order", "verify"]

Outcome = Literal["equal", "different", "damaged", "unproven"]
Build = Callable[[Any, Run], Experiment]


@dataclasses.dataclass(frozen=True)
class Pair:
    """The replay from the checkpoint `begin` (None: from the fresh state), compared with the checkpoint `end`.

    - `reason`: why it could not be proven, or where the replay went.
    - `differences`: the leaves that differ, or those that are lost in a damaged checkpoint.
    - `environment`: what differs from when `end` was made, `(then, now)` by name.
    - `notes`: settings of then that the replay used, such as the number of threads.
    - `seconds`: the time of the replay.
    """

    begin: Entry | None
    end: Entry
    outcome: Outcome
    reason: str = ""
    differences: tuple[tree.Difference, ...] = ()
    environment: Mapping[str, tuple[str | None, str | None]] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    seconds: float = 0.0


def verify(
    run: str | Path | Run, *, to: Collection[int] | None = None, from_start: bool = False, build: Build | None = None
) -> Iterator[Pair]:
    """Prove a run: from each checkpoint its program is run to the next one, and every bit is compared. Yields a Pair for each.

    - `run`: a run or its directory. It is only read.
    - `to=None`: the steps at which the wanted pairs end; all pairs by default.
    - `from_start=False`: whether the first checkpoint is proven from the fresh state. It also is where `to` names it, and where it is the
      only one.
    - `build=None`: the function that makes the experiment; by default it is imported by the name that the run knows.

    The experiment is built in a scratch run, which is deleted, with the config in the manifest of `end`: a run may have been extended.
    Observers that fold only fold, since their folds are in the state; others are left out. Those of loops that a function hides cannot be
    seen: they act, and write to the scratch run.

    Raises RunError where there is no such run, step or checkpoint, and what the experiment's own code raises.

    >>> import fnrun
    >>> @dataclasses.dataclass(frozen=True)
    ... class Config:
    ...     epochs: int = 2
    >>> @fnrun.step
    ... def train_step(state, batch):
    ...     return state.replace(params={"x": state.params["x"] + batch}), {}
    >>> def build(config: Config, run: Run) -> Experiment:
    ...     saving = fnrun.observers.checkpoint(run.checkpoints)
    ...     return Experiment(
    ...         state=lambda: fnrun.TrainState(params={"x": torch.zeros(1)}, buffers={}, opt_state=None, rng=fnrun.Key(0)),
    ...         program=fnrun.repeat(fnrun.sequence(train=fnrun.epoch_loop(train_step)), config.epochs, observers=[saving]),
    ...         data={"train": [torch.ones(1)] * 3},
    ...     )
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     run = Run.create("example", Config(), f"{directory}/run")
    ...     experiment = build(run.config, run)
    ...     with run.writing():
    ...         state, _ = experiment.program(experiment.state(), experiment.data)
    ...     [(pair.end.step, pair.outcome) for pair in verify(run, from_start=True, build=build)]
    [(3, 'equal'), (6, 'equal')]
    """
    run = run if isinstance(run, Run) else Run.open(run)
    planned = _plan(run, to, from_start)
    return _proofs(run, planned, build or load_build(run.experiment))


# --- the pairs ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Task:
    begin: Entry | None
    end: Entry
    manifest: Manifest


def _plan(run: Run, to: Collection[int] | None, from_start: bool) -> list[_Task | Pair]:
    """The pairs in order; those that cannot be replayed are Pairs already."""
    checkpoints = Checkpoints(run.path / "checkpoints")
    entries = checkpoints.entries()
    if not entries:
        raise RunError(f"{run.path} has no checkpoint: there is nothing to prove")
    if unknown := sorted(set(to or ()) - {entry.step for entry in entries}):
        steps = ", ".join(str(step) for step in checkpoints.steps())
        raise RunError(f"{run.path} has no checkpoint of step {', '.join(map(str, unknown))}; there are: {steps}")
    manifests, damaged = _manifests(checkpoints, entries)
    newest = _newest_at_each_order(manifests)
    planned: list[_Task | Pair] = []
    before: Entry | None = None
    for entry in entries:
        chosen = entry.step in (to or ())
        if entry in damaged and (chosen or to is None):
            planned.append(Pair(before, entry, "damaged", damaged[entry]))
        elif entry in manifests and entry not in newest and (chosen or to is None):
            planned.append(Pair(before, entry, "unproven", "it was overtaken: a later checkpoint stands at the same place, or before it"))
        elif entry in newest:
            if chosen or (from_start or len(newest) == 1 if before is None else to is None):
                reason = _gap(run, before, entry)
                planned.append(Pair(before, entry, "unproven", reason) if reason else _Task(before, entry, manifests[entry]))
            before = entry
    return planned


def _manifests(checkpoints: Checkpoints, entries: Sequence[Entry]) -> tuple[dict[Entry, Manifest], dict[Entry, str]]:
    """The manifests that can be read, and the errors of the others."""
    manifests: dict[Entry, Manifest] = {}
    damaged: dict[Entry, str] = {}
    for entry in entries:
        try:
            manifests[entry] = checkpoints.manifest(entry)
        except DamagedError as error:
            damaged[entry] = str(error)
    return manifests, damaged


def _newest_at_each_order(manifests: Mapping[Entry, Manifest]) -> list[Entry]:
    """The checkpoints on the way to the last one. A run that went on from an older checkpoint may have left others."""
    kept: list[Entry] = []
    for entry in reversed(list(manifests)):
        if not kept or order(manifests[entry]) < order(manifests[kept[-1]]):
            kept.append(entry)
    return kept[::-1]


def order(manifest: Manifest) -> tuple[int, ...]:
    """`Position.order` of the state in a checkpoint, from its manifest alone."""
    values = {leaf.path: constant(leaf.value) for leaf in manifest.leaves if leaf.path.startswith("position/") and not leaf.stored}
    if "position/ticks" not in values:
        raise RunError(f"the checkpoint of step {manifest.step} was not saved by a program: its state has no position")
    frames: list[Frame] = []
    while (ticks := values.get(f"position/frames/{len(frames)}/ticks")) is not None:
        frames.append(Frame("", ticks=ticks))
    return Position(tuple(frames), ticks=values["position/ticks"]).order


def _gap(run: Run, begin: Entry | None, end: Entry) -> str:
    """Why the history of the run keeps `end` from being replayed from `begin`; empty where it does not."""
    copied = [change for change in run.history if "forked" in change and change["ticks"] == end.ticks]
    if begin is None and copied:  # by forks of forks several times; the first has it from the run that made it
        maker = os.path.normpath(run.path / copied[0]["forked"])
        proof = shlex.join(["fnrun", "verify", maker, "--to", str(end.step)])
        return f"step {end.step} was copied from {maker} when the run was forked: it is proven there ({proof})"
    for change in reversed(run.history):
        if (begin.ticks if begin else 0) < change["ticks"] < end.ticks:
            what = "the run was forked" if "forked" in change else "the config was changed"
            return f"{what} at step {change['step']}, of which no checkpoint is kept"
    return ""


# --- the replay --------------------------------------------------------------------------------------------------------


def _proofs(run: Run, planned: Sequence[_Task | Pair], build: Build) -> Iterator[Pair]:
    with tempfile.TemporaryDirectory(prefix="fnrun-verify-", ignore_cleanup_errors=True) as scratch:
        rebuilt = _Rebuilt(run, build, Path(scratch))
        for task in planned:
            yield task if isinstance(task, Pair) else _proof(run, task, rebuilt)


def _proof(run: Run, task: _Task, rebuilt: _Rebuilt) -> Pair:
    began = time.perf_counter()
    checkpoints = Checkpoints(run.path / "checkpoints")

    def pair(outcome: Outcome, reason: str = "", differences: Sequence[tree.Difference] = ()) -> Pair:
        now = {} if outcome == "equal" else _changed(task.manifest.environment, {**environment(), **rebuilt.environment})
        seconds = time.perf_counter() - began
        return Pair(task.begin, task.end, outcome, reason, tuple(differences), now, tuple(notes), seconds)

    with _as_then(task.manifest.environment) as notes:
        try:
            experiment = rebuilt(task.manifest.config)
            fresh = experiment.fresh()
            expected = checkpoints.restore(fresh, task.end)
            state = fresh if task.begin is None else checkpoints.restore(fresh, task.begin)
            reached = _replay(experiment, state.replace(stop=None), expected.position)  # a stopped run went on because its stop was cleared
        except DamagedError as error:
            gone = [entry for entry in (task.begin, task.end) if entry is not None and not (checkpoints.directory / entry.name).is_dir()]
            if gone:
                return pair("unproven", f"{gone[0].name} was deleted in the meantime")
            return pair(
                "damaged",
                str(error),
                [tree.Difference(path, "damaged", "its bytes are not those that were written") for path in error.leaves],
            )
        except (CheckpointError, ProgramError, RunError) as error:
            return pair("different", str(error))
        if reached.position.order != expected.position.order:
            return pair(
                "different", f"the replay never stands where the checkpoint stands, {_where(expected)}: it came to {_where(reached)}"
            )
        differences = [difference for difference in tree.diff(expected, reached) if not _OF_THE_LOG.match(difference.path)]
        if not differences:
            return pair("equal")
        unseeded = task.begin is None and not tree.equal(fresh, rebuilt(task.manifest.config, anew=True).state())
        return pair(
            "different", "the fresh state is another one each time the experiment is built: seed it" if unseeded else "", differences
        )


#: Folds that earlier versions kept otherwise, logged and not trained with: a rate was a mean, and windows ended with the epoch.
_OF_THE_LOG = re.compile(r"position/frames/\d+/(folds/carried by |(totals|folds)/(.*/)?([^/]*~1)?lr(/|$))")


def _replay(experiment: Experiment, state: Any, target: Position) -> Any:
    """The first state of the program, from `state` on, that is at `target` or beyond it; else the state at its end."""
    reached: list[Any] = []

    def look(state: Any) -> None:
        if not reached and state.position.order >= target.order:
            reached.append(shared(state))

    token = tick_listener.set(look)
    try:
        end, _ = experiment.program(state, experiment.data, interrupt=lambda: "replayed" if reached else None)
    finally:
        tick_listener.reset(token)
    return reached[0] if reached else end


def _where(state: Any) -> str:
    frames = " > ".join(f"{frame.name} tick {frame.ticks}" for frame in state.position.frames)
    stopped = f", stopped by {state.stop!r}" if state.stop else ""
    return f"step {state.step} ({frames or 'the end of the program'}){stopped}"


class _Rebuilt:
    """The experiment in a scratch directory, with observers that only fold; built anew where the config changes."""

    def __init__(self, run: Run, build: Build, scratch: Path) -> None:
        self.run, self.build, self.scratch = run, build, scratch
        self.environment: Mapping[str, str] = {}
        self._known: tuple[Any, Experiment] | None = None

    def __call__(self, raw: Any, *, anew: bool = False) -> Experiment:
        if anew or self._known is None or self._known[0] != raw:
            config = decode(raw, config_type(self.build), "the checkpoint's config")
            place = Path(tempfile.mkdtemp(dir=self.scratch)) / self.run.path.name
            scratch = Run.create(self.run.experiment, config, place)
            self.environment = scratch.checkpoints.environment
            experiment = built(self.build, config, scratch)
            with warnings.catch_warnings(action="ignore"):  # a loop warns when it is made
                program = with_observers(experiment.program, _folding)
            self._known = raw, dataclasses.replace(experiment, program=program)
        return self._known[1]


def _folding(observers: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(_Folding(observer) for observer in observers if hasattr(observer, "fold"))


class _Folding:
    """An observer that folds as another one, and does nothing else."""

    def __init__(self, observer: Any) -> None:
        self.name, self.fold = observer.name, observer.fold  # tick by tick: a replay looks at each
        if hasattr(observer, "carry"):
            self.carry = observer.carry

    def __call__(self, state: Any, metrics: dict[str, Any]) -> None:
        pass


# --- the environment ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _as_then(environment: Mapping[str, str]) -> Iterator[list[str]]:
    """Within it, the threads and the algorithms of when a checkpoint was made: bits may depend on them. Yields notes of what was set."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    lenient = torch.is_deterministic_algorithms_warn_only_enabled()
    notes: list[str] = []
    then = environment.get("threads", str(threads))
    if then != str(threads):
        torch.set_num_threads(int(then))
        notes.append(f"with {then} threads, as when the checkpoint was made, and not {threads}")
    strict = environment.get("deterministic", str(deterministic))
    if strict != str(deterministic):
        torch.use_deterministic_algorithms(strict == "True")
        notes.append(f"with{'' if strict == 'True' else 'out'} torch.use_deterministic_algorithms, as when the checkpoint was made")
    try:
        yield notes
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic, warn_only=lenient)


def _changed(then: Mapping[str, str], now: Mapping[str, str]) -> dict[str, tuple[str | None, str | None]]:
    return {name: (then.get(name), now.get(name)) for name in {**then, **now} if then.get(name) != now.get(name)}
