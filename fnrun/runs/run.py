"""A run: a directory that holds a training from its first step to its last. And an experiment: what can be run.

    runs/<experiment>/<name>/
        config.yaml         the experiment's module, its config, and the run's history: how the config was changed
        environment.json    versions and machine, when the run began
        status.json         running, stopped, finished or crashed, and at which step
        run.lock            the process that writes here now
        checkpoints/        whole states
        metrics.jsonl       the records of the log, one a line
        run.log             the lines of the logger, with their time

Nothing in it depends on where it lies: a run can be moved.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import errno
import functools
import hashlib
import importlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from fnrun.core import files
from fnrun.core.environment import environment
from fnrun.core.words import kind
from fnrun.runs import config as configs, writer
from fnrun.runs.config import CONFIG
from fnrun.runs.writer import RunError, Status, WaitingInterrupted, Writing

if TYPE_CHECKING:
    from fnrun.checkpoint import Checkpoints

__all__ = [
    "Experiment",
    "Run",
    "RunError",
    "Status",
    "WaitingInterrupted",
    "Writing",
    "load_build",
]


@dataclasses.dataclass(frozen=True)
class Experiment:
    """The result of `build(config, run)`: values and functions, nothing started.

    - `state`: a function that makes the fresh state.
    - `program`: the loop that trains it.
    - `data`: the streams by name, or functions that make them.
    - `evaluate=None`: a loop over the same data that evaluates a restored state.
    """

    state: Callable[[], Any]
    program: Callable[..., tuple[Any, dict[str, Any]]]
    data: Mapping[str, Any]
    evaluate: Callable[..., tuple[Any, dict[str, Any]]] | None = None

    def __post_init__(self) -> None:
        from fnrun.core.state import is_state
        from fnrun.steps import PureStep

        if isinstance(self.state, type) or not callable(self.state):
            raise TypeError(
                f"Experiment: state= takes a function that makes the fresh state, and not {kind(self.state)}: "
                "state=lambda: TrainState.create(model, optimizer)"
            )
        for name, loop in (("program", self.program), ("evaluate", self.evaluate)):
            if (isinstance(loop, type) or not callable(loop) or isinstance(loop, PureStep)) and not (name == "evaluate" and loop is None):
                hint = (
                    "epoch_loop(step) or eval_loop(step)"
                    if isinstance(loop, PureStep)
                    else "such as fnrun.repeat(...), or a function of its type"
                )
                raise TypeError(f"Experiment: {name}= takes a loop, and not {kind(loop)}: {hint}")
        if self.data is None or isinstance(self.data, type) or is_state(self.data):
            raise TypeError(
                f"Experiment: data= takes a mapping of streams, such as {{'train': data.arrays(...)}}, and not {kind(self.data)}"
            )

    def fresh(self) -> Any:
        """The result of `state()`. Raises TypeError where it is no state."""
        from fnrun.core.state import is_state

        state = self.state()
        if not is_state(state):
            raise TypeError(f"Experiment: state() returned {kind(state)}: it returns a state, such as TrainState.create(model, optimizer)")
        return state


@dataclasses.dataclass(frozen=True)
class Run:
    """A run directory. `Run.create` makes one, `Run.open` opens one, and `with run.writing():` is where one trains.

    `experiment` is the module whose `build` makes the experiment, or `module:function`. `history` says, oldest first, where the run left
    the path of its first config: `{"changed": {"epochs": [5, 8]}, "step": 115, "ticks": 120}` of each resume with another config, and what
    it was forked from.
    """

    path: Path
    experiment: str
    config: Any
    history: list[dict[str, Any]] = dataclasses.field(default_factory=list, hash=False)

    @classmethod
    def create(cls, experiment: str, config: Any, path: str | Path | None = None) -> Run:
        """A new run of `experiment` at `path`, by default `runs/<the module's last name>/<date and time>`.

        The directory appears with its config or not at all. Raises RunError where `path` holds something already, or cannot be written, and
        for a config that could not be read again.
        """
        configs.check(config)
        short = experiment.partition(":")[0].rpartition(".")[2]
        if path is not None:
            target = files.local_path(path)
            if not cls._claim(target, experiment, config):
                raise RunError(f"{target} already holds {_contents(target)}")
            return cls(target, experiment, config)
        stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        for suffix in ["", *(f"-{n}" for n in range(2, 100))]:
            target = Path("runs") / short / f"{stamp}{suffix}"
            if cls._claim(target, experiment, config):
                return cls(target, experiment, config)
        raise RunError(f"no free name for a run in {Path('runs') / short}")

    @staticmethod
    def _claim(target: Path, experiment: str, config: Any) -> bool:
        """Make the new run there; False where the place is taken."""
        try:
            with appearing(target) as made:
                Run(made, experiment, config).write_beginning()
        except PathTaken:
            return False
        return True

    def write_beginning(self) -> None:
        """Write what a run has from the beginning: its config and the environment."""
        configs.write(self.path, self.experiment, self.config, self.history)
        files.write(self.path / "environment.json", json.dumps(environment(), indent=2).encode() + b"\n")

    @classmethod
    def open(cls, path: str | Path, config_type: type | None = None, experiment: str | None = None) -> Run:
        """The run at `path`, its config decoded as `config_type` (without one: as plain dictionaries).

        Raises RunError where there is none, where it is one of another experiment, or where the config cannot be read (naming the field).
        """
        path = files.local_path(path)
        if not path.is_dir():
            raise RunError(f"there is no run at {path}")
        return cls(path, *configs.read(path, config_type, experiment))

    def write_config(self) -> None:
        """Write config and history; the file is replaced whole."""
        try:
            configs.write(self.path, self.experiment, self.config, self.history)
        except OSError as error:
            raise RunError(f"cannot write {self.path / CONFIG}: {error.strerror or error}") from error

    def untouched(self) -> bool:
        """Whether the run has no checkpoint and no logged line: nothing is lost if it begins anew."""
        logged = self.metrics.exists() and self.metrics.stat().st_size
        return not logged and not self.checkpoints.entries()

    def discard(self) -> None:
        """Delete a run in which nothing has begun: its place is free at once, whenever this is killed."""
        path = self.path.resolve()
        aside = path.with_name(files.temporary_name())
        try:
            path.rename(aside)
        except OSError:  # a directory that is mounted there, or one beside which nothing may be made
            for child in sorted((child for child in path.iterdir() if not _nobodys(child)), key=lambda child: child.name != CONFIG):
                shutil.rmtree(child, ignore_errors=True) if child.is_dir() else child.unlink(missing_ok=True)
        else:
            shutil.rmtree(aside, ignore_errors=True)

    @contextlib.contextmanager
    def writing(self, interrupt: Callable[[], str | None] | None = None) -> Iterator[Writing]:
        """Within it this process alone writes to the run, and the run's status is kept: `with run.writing(): fit(...)`.

        It yields an interrupt, for a process that lost the run to another one: `fit(state, data, interrupt=writing)`. At the end it waits
        for checkpoints in flight. The status is then `finished`, `stopped` after `writing.stopped(reason)`, or `crashed`.

        Raises RunError where another process writes there: at once if it is of this host, after up to 90 seconds without a sign of life to
        wait for if it is of another one; `interrupt` ends the waiting. Raises RunError in one of several processes that a launcher such as
        torchrun started (`WORLD_SIZE`), and at the end if the run was lost.
        """
        with writer.writing(self.path, interrupt) as now, self.written_by(now):
            yield now

    @contextlib.contextmanager
    def written_by(self, now: Writing) -> Iterator[None]:
        """The part of `writing` for an opened run: its checkpoints can be saved as long as `now` has the lease."""
        with contextlib.ExitStack() as stack:
            stack.push(functools.partial(self._leave, now))
            vars(self)["_writing"] = now
            yield

    def _leave(self, now: Writing, *exc: Any) -> None:
        if now.lost is None:
            del vars(self)["_writing"]
        if "checkpoints" in vars(self):
            self.checkpoints.__exit__(*exc)
            if entries := self.checkpoints.entries():
                now.at(entries[-1].step, entries[-1].ticks)

    def _guard(self) -> None:
        """Keep a process from saving that has lost the run to another one."""
        from fnrun.checkpoint import CheckpointError

        try:
            if (now := vars(self).get("_writing")) is not None:
                now.check()
        except RunError as error:
            raise CheckpointError(str(error)) from error

    def status(self) -> Status:
        """The status of the run, without opening its checkpoints. Raises RunError where the file is damaged."""
        return writer.status(self.path)

    @functools.cached_property
    def checkpoints(self) -> Checkpoints:
        """The run's checkpoints; each says with which config it was made, and by which source."""
        from fnrun.checkpoint import Checkpoints

        source = {"experiment": _source(self.experiment)}
        return Checkpoints(self.path / "checkpoints", config=msgspec.to_builtins(self.config), environment=source, guard=self._guard)

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def log(self) -> Path:
        return self.path / "run.log"


class PathTaken(RunError):
    """Where a run is to be made there is something already."""


@contextlib.contextmanager
def appearing(target: Path, mode: int | None = None) -> Iterator[Path]:
    """A new directory beside `target`, which is renamed to `target` at the end; after an error nothing is there. `mode`: its permissions.

    Raises PathTaken where `target` is a file, or holds something; RunError where it cannot be made.
    """

    def taken() -> PathTaken | None:
        full = target.exists() and (not target.is_dir() or any(not _nobodys(entry) for entry in target.iterdir()))
        return PathTaken(f"{target} already holds {_contents(target)}: choose another place, for nothing is overwritten") if full else None

    if (refusal := taken()) is not None:
        raise refusal
    try:
        real = target.resolve()  # where a link points to
        real.parent.mkdir(parents=True, exist_ok=True)
        within = real.is_dir() and (real.is_mount() or not os.access(real.parent, os.W_OK | os.X_OK))
        made = (real if within else real.parent) / files.temporary_name()
        made.mkdir()
        try:
            if mode is not None:
                made.chmod(mode)
            yield made
            _rename_into(made, real, within)
        finally:
            shutil.rmtree(made, ignore_errors=True)
    except OSError as error:
        if target.is_dir() and (refusal := taken()) is not None:
            raise refusal from error
        raise RunError(f"cannot make the run directory {target}: {error.strerror or error}") from error


def _rename_into(made: Path, target: Path, within: bool) -> None:
    """`made` as `target`. A directory that is mounted there, or beside which nothing may be made, is filled instead, the config last."""
    if not within:
        try:
            made.rename(target)
        except OSError as error:
            if error.errno not in (errno.EBUSY, errno.EXDEV):
                raise
        else:
            return
    for entry in sorted(made.iterdir(), key=lambda entry: entry.name == CONFIG):
        shutil.move(entry, target)
    files.sync(target)


def _nobodys(entry: Path) -> bool:
    """Whether a directory with this entry is still free: a killed process left it half made, or a file system has it in its root."""
    return files.TEMPORARY.fullmatch(entry.name) is not None or entry.name == "lost+found"


def _contents(target: Path) -> str:
    if (target / CONFIG).exists():
        return f"a run. To go on with it: resume {target}"
    return "a file" if target.is_file() else "other files"


def built(build: Callable[[Any, Run], Experiment], config: Any, run: Run, hint: str = "") -> Experiment:
    """The experiment of `build`. Raises RunError where it returns none, or raises ValueError for a value in the config."""
    try:
        experiment: Any = build(config, run)
    except RunError:
        raise
    except ValueError as error:
        raise RunError(f"the experiment cannot be built with this config: {error}{hint}") from error
    if not isinstance(experiment, Experiment):
        name = getattr(build, "__qualname__", "build")
        shape = "is its last line a return?" if experiment is None else "Experiment(state=..., program=..., data=...)"
        raise RunError(f"{name}(config, run) returned {kind(experiment)}: it returns an fnrun.Experiment; {shape}")
    return experiment


# --- the code ----------------------------------------------------------------------------------------------------------


def load_build(experiment: str) -> Callable[[Any, Run], Experiment]:
    """The function that `experiment` names, imported as a program does that is started in the current directory.

    `module` is its function `build`, `module:function` another one. Raises RunError where there is no such module or function; an exception
    of the module's own passes.
    """
    module, _, function = experiment.partition(":")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # the module is there, and misses another one
        raise RunError(f"there is no module {module} in {here}, or among what is installed: go to where {experiment} lies") from error
    build: Callable[[Any, Run], Experiment] | None = getattr(found, function or "build", None)
    if build is None or not callable(build):
        raise RunError(f"{module} ({getattr(found, '__file__', None)}) has no function {function or 'build'}")
    return build


def _source(experiment: str) -> str:
    """The module of an experiment with the digest of its file, if it is loaded and has one."""
    from fnrun.core.tree import module_name

    module = experiment.partition(":")[0]
    loaded = sys.modules.get("__main__" if module_name("__main__") == module else module)
    try:
        return f"{module} sha256:{hashlib.sha256(Path(getattr(loaded, '__file__', None) or '').read_bytes()).hexdigest()}"
    except OSError:
        return module
