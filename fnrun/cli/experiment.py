"""The command line of an experiment: train, resume, evaluate."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import os
import re
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar, Union

import torch
import tyro

from fnrun.checkpoint import CheckpointError, DamagedError
from fnrun.checkpoint.retention import which
from fnrun.core.donation import deleted_reason
from fnrun.core.files import PathError, local_paths
from fnrun.core.position import Cursor
from fnrun.core.tables import number, printable, table
from fnrun.core.tree import module_name
from fnrun.loops import Loop
from fnrun.loops.exits import ProgramError
from fnrun.loops.interrupts import Interrupt, Signals, any_of, deadline
from fnrun.loops.streams import OtherData
from fnrun.loops.structure import Composed, loops_of
from fnrun.runs import writer
from fnrun.runs.config import CONFIG, changes, config_type, words
from fnrun.runs.run import Experiment, Run, RunError, WaitingInterrupted, Writing, built
from fnrun.runs.summary import command_line, summary
from fnrun.steps import PureStep

Build = Callable[[Any, Run], Experiment]

logger = logging.getLogger("fnrun")

C = TypeVar("C")
Level = Literal["debug", "info", "warning", "error"]

#: Flags of a union's member may be given without naming the member: `--optimizer.lr 3e-4`.
FLAGS = (tyro.conf.CascadeSubcommandArgs,)


def main(build: Build, args: Sequence[str] | None = None) -> None:
    """Give an experiment its command line, and leave the process with an exit code.

    `build(config, run) -> Experiment` says by the annotation of its first parameter what its config is: a frozen dataclass, whose fields
    become flags. The commands are `train`, `resume` and `evaluate`; each has `--help`. What a user can get wrong is one line on the
    standard error and exit code 1 (2 for a wrong flag); an exception from the experiment's own code keeps its traceback.

    Exit codes: 0 done; interrupted with a checkpoint saved, to be resumed: 75 by `--deadline`, 128 + n by signal n
    (130 Ctrl-C, 143 SIGTERM, 138 SIGUSR1, 129 SIGHUP, 140 SIGUSR2, 152 SIGXCPU).
    """
    args = list(sys.argv[1:] if args is None else args)
    name, of_config = _name(build), config_type(build)
    command = _flags(args, name, of_config)
    try:
        if isinstance(command, _Evaluate):
            code = _evaluate(build, name, command)
        else:
            code = _interruptible(build, name, command, args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:
        sys.stdout = None  # the reader of the output has gone
        code = 1
    except Exception as error:
        if command.debug or not isinstance(error, _USERS_FAULTS):
            if not command.debug and sys.excepthook is sys.__excepthook__:
                sys.excepthook = _print_error
            raise
        print(f"error: {printable(str(error))}", file=sys.stderr)
        code = 1
    sys.exit(code)


#: The frames of these directories are left out of a traceback.
_LEFT_OUT = tuple(f"{Path(root).resolve()}{os.sep}" for root in (Path(__file__).parents[1], Path(torch.__file__).parent))


def _print_error(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Print an exception of the experiment's code with its frames, without those of fnrun and torch between them."""
    shown = traceback.TracebackException(kind, error, trace)
    left, seen = 0, [shown]
    for each in seen:
        seen += [other for other in (each.__cause__, each.__context__) if other is not None]
        own = [frame for frame in each.stack if not frame.filename.startswith((*_LEFT_OUT, "<frozen "))]
        if own and (each is not shown or len(own) > 1):  # and not only the call of `main`
            left += len(each.stack) - len(own)
            each.stack = traceback.StackSummary.from_list(own)
    print(printable("".join(shown.format())), end="", file=sys.stderr)
    if left:
        print(f"({left} frames of fnrun and torch are left out; --debug shows them)", file=sys.stderr)


#: Errors whose message is enough for the user: about runs, checkpoints, programs, and the disk under them.
_USERS_FAULTS = (RunError, CheckpointError, ProgramError, PathError)


# --- the flags ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Train(Generic[C]):
    """Begin a run and train it to its end.

    Exit codes: 0 done, 1 refused or failed; saved, to be resumed: 75 the deadline, 130 Ctrl-C, 143 SIGTERM, or 128 + another signal.
    """

    config: Annotated[C, tyro.conf.arg(name="")]
    out: Path | None = None
    """the run directory; by default runs/<experiment>/<date and time>"""
    deadline: str | None = None
    """save and leave after so long, with exit code 75: 50m, 2h30m, 90s, 1d"""
    log_level: Level = "info"
    """what is printed and written to run.log, from this level on"""
    debug: bool = False
    """show the traceback of every error"""


@dataclasses.dataclass(frozen=True)
class _Resume(Generic[C]):
    """Go on with a run from its newest checkpoint, to the same end; flags change its config (more epochs, other workers).

    Exit codes: 0 done, 1 refused or failed; saved, to be resumed: 75 the deadline, 130 Ctrl-C, 143 SIGTERM, or 128 + another signal.
    """

    run: tyro.conf.Positional[Path]
    """the run directory"""
    config: Annotated[C, tyro.conf.arg(name="")]
    auto: bool = False
    """begin where there is no run yet, only say so where it is finished: one command for a scheduler that starts it again and again"""
    fall_back: bool = False
    """pass over damaged checkpoints, to the newest that is whole"""
    other_data: bool = False
    """go on though the data or the batch size is another: behind the same examples, or at the next epoch's beginning; it says which"""
    deadline: str | None = None
    """save and leave after so long, with exit code 75: 50m, 2h30m, 90s, 1d"""
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
    """latest, a step, best, or of several monitored metrics best:METRIC"""
    debug: bool = False
    """show the traceback of every error"""


def _resumed(build: Build, name: str, path: Path, args: list[str]) -> tuple[Any, Run]:
    """The command, with the run's config as the defaults of its flags, and the run."""
    run = Run.open(path, config_type(build), name)
    return local_paths(_flags(args, name, config_type(build), _Resume(run=path, config=run.config))), run


def _flags(args: list[str], name: str, config_type: type, default: Any = None) -> Any:
    """The command in the arguments. Exits with code 2 where they are wrong, and with 0 after a help."""
    module, errors = name.partition(":")[0], io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return _read_flags(args, module, config_type, default)
    except SystemExit:
        _show(errors.getvalue(), module)
        raise


def _show(box: str, module: str) -> None:
    """Print tyro's message. Where it names a help, it takes the first word of `python -m module` for the program: that is corrected."""
    for line in box.splitlines():
        if found := re.search(r"in python (\w+ )?--help", line):
            right = found[0].replace("in python ", f"in python -m {module} ", 1)
            room = len(right) - len(found[0])
            line = line.replace(found[0] + " " * room, right) if found[0] + " " * room in line else line.replace(found[0], right)
        print(line, file=sys.stderr)


def _read_flags(args: list[str], module: str, config_type: type, default: Any) -> Any:
    if default is not None:
        return tyro.cli(_Resume[config_type], prog=f"python -m {module} resume", args=args[1:], default=default, config=FLAGS)
    commands = (
        Annotated[_Train[config_type], tyro.conf.subcommand("train")],
        Annotated[_Resume[config_type], tyro.conf.subcommand("resume")],
        Annotated[_Evaluate, tyro.conf.subcommand("evaluate")],
    )
    return tyro.cli(Union[commands], prog=f"python -m {module}", args=args, config=FLAGS)  # noqa: UP007  # pyright: ignore[reportCallIssue,reportArgumentType]


def _name(build: Build) -> str:
    """The experiment by which `load_build` finds the function again."""
    module, function = module_name(build.__module__), getattr(build, "__name__", "build")
    return module if function == "build" else f"{module}:{function}"


# --- the commands ------------------------------------------------------------------------------------------------------


class _Interrupts:
    """The interrupts of a command, signals and a deadline, as one that keeps its answer; with the exit code."""

    def __init__(self, signals: Signals, limit: Interrupt | None, args: list[str]) -> None:
        self.signals, self.args = signals, args
        self._ask = signals if limit is None else any_of(signals, limit)
        self.text: str | None = None

    def __call__(self) -> str | None:
        self.text = self.text or self._ask()
        return self.text

    @property
    def code(self) -> int:
        return 128 + self.signals.first if self.signals.first is not None and self.text == self.signals() else os.EX_TEMPFAIL


def _deadline(command: Any) -> Interrupt | None:
    """The deadline in the flags, counted from the start of this process: imports take a part of the time."""
    import psutil

    try:
        spent = max(0.0, time.time() - psutil.Process().create_time())
        return None if command.deadline is None else deadline(command.deadline, spent=spent)
    except ValueError as error:
        print(f"error: --deadline: {error}", file=sys.stderr)
        sys.exit(2)


def _interruptible(build: Build, name: str, command: Any, args: list[str]) -> int:
    interrupts = _Interrupts(Signals(), _deadline(command), args)
    with interrupts.signals.listening(), _printable_warnings():
        try:
            return _trained(build, name, command, interrupts)
        except WaitingInterrupted as error:
            print(f"error: {error}", file=sys.stderr)
            return interrupts.code


@contextlib.contextmanager
def _printable_warnings() -> Iterator[None]:
    """Within it warnings have no control characters: names may come from a stranger's checkpoint."""
    before = warnings.formatwarning

    def formatted(*args: Any, **options: Any) -> str:
        return printable(before(*args, **options))

    warnings.formatwarning = formatted
    try:
        yield
    finally:
        warnings.formatwarning = before


def _trained(build: Build, name: str, command: Any, interrupts: _Interrupts) -> int:
    writer.check_alone()
    command = local_paths(command)
    if not isinstance(command, _Resume):
        return _train(build, name, command.out, command, interrupts)
    if command.auto and not (command.run / CONFIG).exists():
        return _train(build, name, command.run, command, interrupts)
    command, run = _resumed(build, name, command.run, interrupts.args)
    if command.auto and run.config == command.config and (steps := _finished(run)) is not None:
        print(f"{run.path} is finished: {steps} steps")
        return 0
    return _resume(build, name, command, interrupts)


def _finished(run: Run) -> int | None:
    """The steps of a run whose newest checkpoint is its end, by its status alone."""
    status, entries = run.status(), run.checkpoints.entries()
    return status.step if status.state == "finished" and entries and status.ticks == entries[-1].ticks else None


def _train(build: Build, name: str, path: Path | None, command: Any, interrupts: _Interrupts) -> int:
    run, made = _begun(name, command.config, path)
    with run.writing(interrupts) as writing, contextlib.ExitStack() as stack:
        try:
            experiment = _built(build, run)
            state = experiment.fresh()
            if not made and not run.untouched():
                raise RunError(f"{run.path} was trained meanwhile. To go on with it: resume {run.path}")
            if not made:
                run.write_beginning()
        except BaseException:
            writing.withdraw()
            if made:
                stack.callback(run.discard)  # the corrected command can take its place
            raise
        stack.enter_context(_logging(run, command.log_level))
        logger.info("%s: a new run in %s", run.experiment, run.path)
        return _go(run, experiment, state, interrupts, writing)


def _begun(name: str, config: Any, path: Path | None) -> tuple[Run, bool]:
    """A new run, and whether its directory is new: one in which nothing was saved or logged is taken again."""
    try:
        return Run.create(name, config, path), True
    except RunError:
        if path is None or not (path / CONFIG).is_file() or (before := Run.open(path)).status().state in ("running", "finished"):
            raise
        if not before.untouched():
            raise
        return Run(path, name, config), False


def _resume(build: Build, name: str, command: Any, interrupts: _Interrupts) -> int:
    with writer.writing(command.run, interrupts) as writing, contextlib.ExitStack() as stack:
        try:
            command, before = _resumed(build, name, command.run, interrupts.args)  # as the last writer left it
            run = dataclasses.replace(before, config=command.config, history=list(before.history))
            stack.enter_context(run.written_by(writing))
            experiment = _built(build, run)
            state = fresh = experiment.fresh()
            stack.enter_context(_logging(run, command.log_level))
            if interrupts() is None:
                state = _restored(run, fresh, command.fall_back)
                _check_seed(build, before, run, state, fresh)
        except BaseException:
            writing.withdraw()
            raise
        if interrupts() is not None:
            writing.withdraw()
            how = "the same with more time" if interrupts.code == os.EX_TEMPFAIL else "the same again"
            logger.info("%s: interrupted before it went on. To go on, %s:\n  %s", interrupts.text, how, command_line(run, *interrupts.args))
            return interrupts.code
        try:
            state = _departing(before, run, state, fresh)
            return _go(run, experiment, state, interrupts, writing, before, other_data=command.other_data)
        except ProgramError as error:
            writing.withdraw()
            before.write_config()  # refused: the run is what it was
            if isinstance(error, OtherData):
                hint = command_line(run, *interrupts.args, "--other-data")
                raise RunError(f"{error.what}To go on with it all the same, where {error.then}:\n  {hint}") from error
            raise


def _restored(run: Run, like: Any, fall_back: bool) -> Any:
    """The state of the newest checkpoint, or with `fall_back` of the newest that is whole."""
    entries = run.checkpoints.entries()
    if not entries:
        logger.info("%s has no checkpoint yet: starting at step 0", run.path)
        return like
    while True:
        newest = entries.pop()
        try:
            state = run.checkpoints.restore(like, newest)
        except DamagedError as error:
            if not entries:
                raise
            if not fall_back:
                hint = command_line(run, "resume", run.path, "--fall-back")
                raise RunError(f"{error}; to go on from the one before (step {entries[-1].step}): {hint}") from error
            logger.warning("passed over: %s", error)
            continue
        logger.info("resuming %s at step %d", run.path, state.step)
        return state


def _check_seed(build: Build, before: Run, run: Run, state: Any, fresh: Any) -> None:
    """Raise RunError where the changed config makes a fresh state with another key: the run goes on with the key in its checkpoints."""
    changed = changes(before.config, run.config)
    key = getattr(fresh, "rng", None)
    if not changed or key == getattr(state, "rng", None) or key == getattr(build(before.config, before).state(), "rng", None):
        return
    flags = " ".join(f"--{name.replace('_', '-')} {new}" for name, (_, new) in changed.items())
    raise RunError(
        f"{words(changed)}: a run that goes on keeps the randomness that it began with, so another seed changes nothing. To go on with "
        f"another in a run of its own: fnrun fork {run.path} --step latest --out NEW {flags}"
    )


def _departing(before: Run, run: Run, state: Any, fresh: Any) -> Any:
    """The state to go on from. Where the config was changed at it, by the history, an earlier stop is cleared."""
    changed = changes(before.config, run.config)
    if changed:
        logger.info("changed: %s", words(changed))
        run.history.append({"changed": changed, "step": state.step, "ticks": state.position.ticks})
        run.write_config()
    last = _departure(run, state)
    if state.stop and last.get("changed"):
        logger.info("going on after: %s", state.stop)
        state = state.replace(stop=None)
    if "forked" in last and last["changed"] and getattr(fresh, "rng", None) != getattr(state, "rng", None):
        logger.info("going on with the randomness of the config's own seed")
        state = state.replace(rng=fresh.rng)
        for name, cursor in state.position.streams.items():
            if cursor.batch:  # what is left of the pass is another rest, in another order
                logger.info("data of %r: the rest of epoch %d is left out", name, cursor.epoch + 1)
                cursors = {**state.position.streams, name: Cursor(cursor.epoch + 1, 0, cursor.source, cursor.loader_state)}
                state = state.replace(position=dataclasses.replace(state.position, streams=cursors))
    return state


def _departure(run: Run, state: Any) -> dict[str, Any]:
    """The last entry of the run's history, if it is at this state: the change of a fork or a resume."""
    last = run.history[-1] if run.history else {}
    return last if last and last["ticks"] == state.position.ticks else {}


def _moved(state: Any, name: str, source: str) -> Any:
    logger.info("data of %r: %s", name, state.position.streams[name].moved(source)[1])
    return state.replace(position=state.position.moved(name, source))


def _built(build: Build, run: Run) -> Experiment:
    return built(build, run.config, run, hint=" (--debug shows where)")


def _go(
    run: Run,
    experiment: Experiment,
    state: Any,
    interrupts: _Interrupts,
    writing: Writing,
    before: Run | None = None,
    *,
    other_data: bool = False,
) -> int:
    """Train to the end. `before` is the run before this command; where nothing was trained its config is written again."""
    began, stopped = state.position.ticks, state.stop
    if interrupts() is None:
        program = _saving(experiment.program, run)
        with _workers_end_too(interrupts), run.checkpoints:
            state = _run(run, program, state, experiment.data, any_of(writing, interrupts), other_data=other_data)
    writing.check()
    writing.at(state.step, state.position.ticks)
    if interrupts.text is not None:
        writing.stopped(interrupts.text)
        saved = run.checkpoints.latest()
        where = "before the first step" if saved is None else f"at step {saved}, saved"
        if saved is None and state.position.ticks:
            logger.warning("%s: interrupted at step %d, and nothing was saved", interrupts.text, state.step)
            return interrupts.code
        logger.info("%s: interrupted %s. To go on:\n  %s", interrupts.text, where, command_line(run, "resume", run.path))
        return interrupts.code
    if state.stop:
        writing.stopped(state.stop)
    if state.position.ticks == began:
        ended = f"was stopped ({stopped})" if stopped else "is finished"
        logger.info("%s %s: %d steps. To go on, change its config: resume with more epochs, for one", run.path, ended, state.step)
        if before is not None and len(run.history) > len(before.history):
            logger.info("nothing was trained with the config as it was changed: it stays what it was")
            before.write_config()
    with _unread():
        summary(run, evaluates=experiment.evaluate is not None)
    return 0


def _run(run: Run, program: Any, state: Any, data: Any, interrupt: Interrupt, *, other_data: bool) -> Any:
    """The state at the end. Where the data is another one (a fork, --other-data), the position is moved into it."""
    while True:
        last = _departure(run, state)
        try:
            return program(state, data, interrupt=interrupt)[0]
        except OtherData as error:
            agreed = "forked" in last or "other_data" in last
            if not (agreed or other_data) or deleted_reason(error.state) is not None:
                raise
            state = _moved(error.state, error.name, error.source)
            if not agreed:
                here = _departure(run, state)
                run.history[len(run.history) - bool(here) :] = [
                    {"changed": {}, "step": state.step, "ticks": state.position.ticks, **here, "other_data": True}
                ]
                run.write_config()


#: In a program without a checkpoint observer: the checkpoints that stay, and the training steps from one to the next.
KEPT, BETWEEN = 3, 1000


def _saving(program: Any, run: Run) -> Any:
    """The program with a checkpoint observer. Where it cannot get one, a warning says that nothing is saved."""
    from fnrun import observers

    if any(getattr(observer, "saves", False) for loop in loops_of(program) for observer in loop.observers):
        return program
    if not isinstance(program, Loop) or not _stands_openly(program):
        logger.warning(
            "no loop of the program that is known has an observers.checkpoint: unless a function calls one that has, NOTHING IS SAVED, "
            "and what is interrupted cannot go on (fnrun.wraps says which loops a function calls)"
        )
        return program
    every = BETWEEN if program.over_data else 1
    what = f"each {every} steps" if program.over_data else "each round"
    logger.info("the program has no observers.checkpoint: one is saved %s and at the end, and the %d newest stay", what, KEPT)
    with warnings.catch_warnings(action="ignore"):  # a loop warns when it is made
        return dataclasses.replace(program, observers=(*program.observers, observers.checkpoint(run.checkpoints, every=every, keep=KEPT)))


def _stands_openly(step: Any) -> bool:
    """Whether all loops of a program are known: none is in a function that wraps it."""
    if not isinstance(step, Composed):
        return isinstance(step, PureStep)
    return getattr(step, "over_data", False) or all(_stands_openly(each) for _, each in step.inner())


@contextlib.contextmanager
def _unread() -> Iterator[None]:
    """Within it a closed standard output is no error."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left in the buffer goes there when the interpreter ends


@contextlib.contextmanager
def _workers_end_too(interrupts: _Interrupts) -> Iterator[None]:
    """Within it data workers that end by SIGTERM are no error: a scheduler may send it to all processes of a job."""
    try:
        yield
    except RuntimeError as error:
        if interrupts() is None or "DataLoader worker" not in str(error):
            raise


def _evaluate(build: Build, name: str, command: _Evaluate) -> int:
    command = local_paths(command)
    run = Run.open(command.run, config_type(build), name)
    step = which(command.checkpoint)
    if run.checkpoints.latest() is None:
        raise RunError(f"{run.path} has no checkpoint yet")
    experiment = _built(build, run)
    if experiment.evaluate is None:
        raise RunError(f"{name} does not say how to evaluate: build returns an Experiment without evaluate=")
    # Without the optimizer state, which an evaluation does not read.
    state = run.checkpoints.restore(step=step, select=EVALUATED).rewind()
    _, metrics = experiment.evaluate(state, experiment.data)
    print(f"{run.path}, step {state.step}\n\n{table(['metric', 'value'], [[k, number(v)] for k, v in metrics.items()])}")
    return 0


#: The leaves of a state that an evaluation may read.
EVALUATED = ("params/**", "buffers/**", "memory/**", "rng/**", "step", "stop", "position/**")


# --- the log ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _logging(run: Run, level: Level) -> Iterator[None]:
    """The logger `fnrun` to the terminal and to the run's log. An OSError of a file in the run is a RunError."""
    from fnrun.observers.runlog import logging_to

    try:
        with logging_to(run.log, level):
            yield
    except OSError as error:
        if error.filename is not None and run.path.absolute() in Path(error.filename).absolute().parents:
            raise RunError(f"cannot write {error.filename}: {error.strerror or error}") from error
        raise
