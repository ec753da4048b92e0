"""The command line of an experiment: train, resume, evaluate."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import logging
import os
import shlex
import shutil
import signal
import sys
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar, Union

import msgspec
import tyro

from fnrun.program import ProgramError
from fnrun.run import Experiment, Run, RunError
from fnrun.tree import module_name

Build = Callable[[Any, Run], Experiment]

logger = logging.getLogger("fnrun")

C = TypeVar("C")
Level = Literal["debug", "info", "warning", "error"]

#: Flags of a union's member may be given without naming the member: `--optimizer.lr 3e-4`.
CONFIG = (tyro.conf.CascadeSubcommandArgs,)


class Interrupt:
    """SIGTERM and Ctrl-C as an interrupt of the program: the first one is a request between two ticks, a second one ends the process at once."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __call__(self) -> str | None:
        return self.signal.name if self.signal is not None else None

    def _handle(self, number: int, frame: Any) -> None:
        self.signal = signal.Signals(number)
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, signal.SIG_DFL)
        with contextlib.suppress(OSError):  # not through logging: a handler may hold its lock where the signal arrives
            os.write(2, f"\n{self.signal.name}: finishing the step and saving; once more to stop at once\n".encode())

    @contextlib.contextmanager
    def listening(self) -> Iterator[Interrupt]:
        before = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def main(build: Build, args: Sequence[str] | None = None) -> None:
    """Give an experiment its command line, and leave the process with an exit code.

    `build(config, run) -> Experiment` says by the annotation of its first parameter what its config is: a frozen dataclass, whose fields become
    flags. The commands are `train`, `resume` and `evaluate`; each has `--help`. What a user can get wrong is one line on the standard error
    and exit code 1 (2 for a wrong flag); an exception from the experiment's own code keeps its traceback.

    Exit codes: 0 done, 130 and 143 interrupted by Ctrl-C and SIGTERM, with a checkpoint saved.
    """
    args = list(sys.argv[1:] if args is None else args)
    name, config_type = module_name(build.__module__), _config_type(build)
    command = _parse(args, name, config_type)
    try:
        if isinstance(command, _Evaluate):
            code = _evaluate(build, name, command)
        else:
            with Interrupt().listening() as interrupt:
                code = (_train if isinstance(command, _Train) else _resume)(build, name, command, interrupt)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:
        sys.stdout = None  # whoever read the output has gone
        code = 1
    except Exception as error:
        if command.debug or not _users_fault(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        code = 1
    sys.exit(code)


def _users_fault(error: Exception) -> bool:
    """Whether the message says all there is to say: errors about runs, checkpoints, programs, and the disk under them."""
    from fnrun.checkpoint import CheckpointError

    return isinstance(error, (RunError, CheckpointError, ProgramError))


# --- the flags ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Train(Generic[C]):
    """Begin a run and train it to its end."""

    config: Annotated[C, tyro.conf.arg(name="")]
    out: Path | None = None
    """the run directory; by default runs/<experiment>/<date and time>"""
    log_level: Level = "info"
    """what is printed and written to run.log, from this level on"""
    debug: bool = False
    """show the traceback of every error"""


@dataclasses.dataclass(frozen=True)
class _Resume(Generic[C]):
    """Go on with a run from its newest checkpoint, to the same end; flags change its config (more epochs, other workers)."""

    run: tyro.conf.Positional[Path]
    """the run directory"""
    config: Annotated[C, tyro.conf.arg(name="")]
    log_level: Level = "info"
    """what is printed and written to run.log, from this level on"""
    debug: bool = False
    """show the traceback of every error"""


@dataclasses.dataclass(frozen=True)
class _Evaluate:
    """Evaluate a checkpoint of a run."""

    run: tyro.conf.Positional[Path]
    """the run directory"""
    checkpoint: str = "latest"
    """best, latest, or a step"""
    debug: bool = False
    """show the traceback of every error"""


def _parse(args: list[str], name: str, config_type: type) -> Any:
    command = _flags(args, name, config_type)
    if not isinstance(command, _Resume):
        return command
    try:
        run = Run.open(command.run, config_type, name)
    except RunError as error:
        if command.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    return _flags(args, name, config_type, _Resume(command.run, run.config))  # flags that are not given keep the run's values


def _flags(args: list[str], name: str, config_type: type, default: Any = None) -> Any:
    if default is not None:
        return tyro.cli(_Resume[config_type], prog=f"python -m {name} resume", args=args[1:], default=default, config=CONFIG)
    commands = (
        Annotated[_Train[config_type], tyro.conf.subcommand("train")],
        Annotated[_Resume[config_type], tyro.conf.subcommand("resume")],
        Annotated[_Evaluate, tyro.conf.subcommand("evaluate")],
    )
    return tyro.cli(Union[commands], prog=f"python -m {name}", args=args, config=CONFIG)  # noqa: UP007  # pyright: ignore[reportCallIssue,reportArgumentType]


def _config_type(build: Build) -> type:
    parameters = list(inspect.signature(build).parameters)
    hint = typing.get_type_hints(build).get(parameters[0]) if parameters else None
    if not isinstance(hint, type):
        raise TypeError(f"{build.__name__}: annotate its first parameter with the config dataclass: def build(config: Config, run: Run)")
    return hint


# --- the commands ------------------------------------------------------------------------------------------------------


def _train(build: Build, name: str, command: Any, interrupt: Interrupt) -> int:
    run = Run.create(name, command.config, command.out)
    try:
        experiment = _built(build, run)
        state = experiment.state()
    except BaseException:
        shutil.rmtree(run.path)  # nothing has begun: the command, corrected, may have the place
        raise
    with _logging(run, command.log_level):
        logger.info("%s: a new run in %s", name, run.path)
        return _go(run, experiment, state, interrupt)


def _resume(build: Build, name: str, command: Any, interrupt: Interrupt) -> int:
    before = Run.open(command.run, type(command.config), name)
    run = dataclasses.replace(before, config=command.config)
    experiment = _built(build, run)
    state = experiment.state()
    with _logging(run, command.log_level):
        if run.checkpoints.latest() is None:
            logger.info("%s has no checkpoint yet: starting at step 0", run.path)
        else:
            state = run.checkpoints.restore(like=state)
            logger.info("resuming %s at step %d", run.path, state.step)
        changes = list(_changes(msgspec.to_builtins(before.config), msgspec.to_builtins(run.config), ""))
        if changes:
            logger.info("changed: %s", ", ".join(changes))
            run.write_config()
            if state.stop:
                logger.info("going on after: %s", state.stop)
                state = state.replace(stop=None)
        try:
            return _go(run, experiment, state, interrupt)
        except ProgramError:
            before.write_config()  # refused: the run is what it was
            raise


def _built(build: Build, run: Run) -> Experiment:
    """The experiment; a value that the config's type allows and something in `build` does not is the user's to correct."""
    try:
        return build(run.config, run)
    except ValueError as error:
        raise RunError(f"the experiment cannot be built with this config: {error} (--debug shows where)") from error


def _changes(old: Any, new: Any, name: str) -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            yield from _changes(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif old != new:
        yield f"{name} {old} -> {new}"


def _go(run: Run, experiment: Experiment, state: Any, interrupt: Interrupt) -> int:
    began = state.position.ticks
    stopped = state.stop
    with run.checkpoints:
        state, _ = experiment.program(state, experiment.data, interrupt=interrupt)
    if interrupt.signal is not None and state.position.frames:
        saved = "saved" if state.position.ticks else "before the first step"
        logger.info("interrupted by %s at step %d, %s. To go on:\n  %s", interrupt.signal.name, state.step, saved, _command(run, "resume"))
        return 128 + interrupt.signal
    if state.position.ticks == began:
        ended = f"was stopped ({stopped})" if stopped else "is finished"
        logger.info("%s %s: %d steps. To go on, change its config: resume with more epochs, for one", run.path, ended, state.step)
    elif state.stop:
        logger.info("stopped at step %d: %s", state.step, state.stop)
    _summary(run)
    return 0


def _evaluate(build: Build, name: str, command: _Evaluate) -> int:
    run = Run.open(command.run, _config_type(build), name)
    step: int | str | None = None
    if command.checkpoint == "best":
        step = "best"
    elif command.checkpoint != "latest":
        if not command.checkpoint.isdecimal():
            raise RunError(f"--checkpoint is best, latest or a step, not {command.checkpoint!r}")
        step = int(command.checkpoint)
    if run.checkpoints.latest() is None:
        raise RunError(f"{run.path} has no checkpoint yet")
    experiment = _built(build, run)
    if experiment.evaluate is None:
        raise RunError(f"{name} does not say how to evaluate: build returns an Experiment without evaluate=")
    # Without the optimizer's memory: what the evaluation does not read is not loaded.
    state = run.checkpoints.restore(step=step, select=EVALUATED).rewind()
    _, metrics = experiment.evaluate(state, experiment.data)
    _table(f"{run.path}, step {state.step}", ["metric", "value"], [[k, _number(v)] for k, v in metrics.items()])
    return 0


#: The leaves of a state that an evaluation may read.
EVALUATED = ("params/**", "buffers/**", "memory/**", "rng/**", "step", "stop", "position/**")


# --- what people read --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _logging(run: Run, level: Level) -> Iterator[None]:
    """The logger `fnrun` to the terminal and to the run's log; a disk that is full or locked is the user's to correct."""
    from fnrun.observers.runlog import logging_to

    try:
        with logging_to(run.log, level):
            yield
    except OSError as error:
        if error.filename is not None and run.path.absolute() in Path(error.filename).absolute().parents:
            raise RunError(f"cannot write {error.filename}: {error.strerror or error}") from error
        raise


def _command(run: Run, verb: str, *flags: str) -> str:
    return shlex.join([_python(), "-m", run.experiment, verb, str(run.path), *flags])


def _python() -> str:
    """How this interpreter is called from here: `python` where that is what the shell finds."""
    if shutil.which("python") == sys.executable:
        return "python"
    with contextlib.suppress(ValueError):
        return str(Path(sys.executable).relative_to(Path.cwd()))
    return sys.executable


def _summary(run: Run) -> None:
    from fnrun.plot import curves, plot, records

    found = curves(records(run.metrics)) if run.metrics.exists() else {}
    rows = []
    for name, (steps, values) in sorted(found.items()):
        if name.rpartition("/")[2] in ("loss", "accuracy"):
            best = (max if name.endswith("accuracy") else min)(values)
            rows.append([name, f"{_number(best)} (step {steps[values.index(best)]})", f"{_number(values[-1])} (step {steps[-1]})"])
    if rows:
        _table("", ["metric", "best", "last"], rows)
    picture = plot(run.metrics, run.path / "curves.png", f"{run.experiment}: {run.path.name}")
    print(f"run       {run.path}")
    if picture is not None:
        print(f"plot      {picture}")
    print(f"evaluate  {_command(run, 'evaluate', '--checkpoint', 'best')}")
    print(f"resume    {_command(run, 'resume')}")


def _number(value: Any) -> str:
    value = value.tolist() if hasattr(value, "tolist") else value
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, title=title or None, box=SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for row in rows:
        table.add_row(*row)
    Console(soft_wrap=True).print(table)
