"""The command `fnrun`: runs and checkpoints, seen from a shell.

The flags of a command are the fields of a dataclass here. Its work is `run(flags) -> int` in the module of its name, which is imported when
the command is chosen: `fnrun --help` imports nothing heavy.

Exit codes: 0 done, 1 different or failed, 2 an error, which is one line on the standard error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional, UseAppendAction, arg

from fnrun.core.files import PathError, local_paths

__all__ = ["COMMANDS", "CommandError", "main"]


class CommandError(Exception):
    """A user's mistake; the message is enough."""


# --- the flags ---------------------------------------------------------------------------------------------------------


Json = Annotated[bool, arg(help="print one JSON document, and nothing else", help_behavior_hint="")]


@dataclasses.dataclass(frozen=True)
class Ls:
    """List the runs below a directory, the one that was active last first.

    Metrics are those by which checkpoints are judged best; where there are none, those whose names end in loss or accuracy. Of a log that
    is long the end is read: what was best before it is known by the checkpoints.
    """

    directory: Positional[Annotated[Path, arg(metavar="DIR")]] = Path("runs")
    """where to look"""
    json: Json = False


Which = Annotated[str, arg(metavar="WHICH")]


@dataclasses.dataclass(frozen=True)
class Show:
    """Show what a run or a checkpoint holds: config, history, environment, metrics, and every leaf of the state.

    Every byte is checked against its digest first. The classes of the state are not needed, and no code of the run's is executed.
    """

    path: Positional[Annotated[Path, arg(metavar="PATH")]]
    """a run, its directory of checkpoints, or one checkpoint"""
    checkpoint: Which = "latest"
    """latest, best, best:METRIC, or a step"""
    only: UseAppendAction[Annotated[tuple[str, ...], arg(metavar="GLOB")]] = ()
    """only leaves of such paths: 'params/**'; '!params/**' leaves them out"""
    json: Json = False


@dataclasses.dataclass(frozen=True)
class Diff:
    """Compare the final states of two runs, or two checkpoints, bit for bit; or two configs.

    What counts is the state, all of it but position/frames/*/folds: what observers gather in open loops is theirs, and they may differ. A
    run that was interrupted and resumed is equal to one that was not. Configs, environments and logged metrics are compared too, and do not
    count. Two config.yaml files are compared by their fields. Exit code 0: equal; 1: different; 2: an error, damage among them.
    """

    a: Positional[Annotated[Path, arg(metavar="A")]]
    """a run, its directory of checkpoints, one checkpoint, or a config.yaml"""
    b: Positional[Annotated[Path, arg(metavar="B")]]
    """what it is compared with"""
    json: Json = False


@dataclasses.dataclass(frozen=True)
class Plot:
    """Draw the curves of runs, in the terminal or as a picture.

    A panel a kind of metric (loss, accuracy, ...). In the terminal, several runs get a panel a metric. Without --only it is what is
    measured outside of training too: loss and accuracy, say, but no learning rate. NaN and infinities are gaps, and are listed.
    """

    runs: Positional[Annotated[tuple[Path, ...], arg(metavar="RUN...", help_behavior_hint="")]] = ()
    """run directories"""
    out: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """write a picture (.png, .svg or .pdf) instead"""
    by: Literal["step", "time", "epoch"] = "step"
    """what is on the horizontal axis; time is that of training, without the time between an end and a resume"""
    only: UseAppendAction[Annotated[tuple[str, ...], arg(metavar="GLOB")]] = ()
    """only metrics of such names: 'val/*'; '*' is all"""
    log: Annotated[bool, arg(help_behavior_hint="")] = False
    """a logarithmic vertical axis"""
    json: Json = False


@dataclasses.dataclass(frozen=True)
class Export:
    """Write the weights of a checkpoint to a file that other programs read.

    Parameters and buffers have the names of the model's state_dict. The checkpoint is only read.
    """

    path: Positional[Annotated[Path, arg(metavar="PATH")]]
    """a run, its directory of checkpoints, or one checkpoint"""
    out: Annotated[Path, arg(metavar="FILE")]
    """the new file: .safetensors, or .pt for torch.load"""
    weights: Annotated[str, arg(metavar="NAME")] = "params"
    """params, or the name of the hook that averaged them: ema"""
    checkpoint: Which = "latest"
    """latest, best, best:METRIC, or a step"""
    dtype: Annotated[str | None, arg(metavar="DTYPE", help_behavior_hint="")] = None
    """what floating-point tensors are cast to: bfloat16"""
    overwrite: Annotated[bool, arg(help_behavior_hint="")] = False
    """replace a file that is there"""
    json: Json = False


@dataclasses.dataclass(frozen=True)
class Gc:
    """Delete what runs no longer need; without --yes it is only shown.

    That is what killed processes have left half written, and futures that were given up when a run went on from an older checkpoint. With
    --keep also old checkpoints: the newest, and the best by each monitored metric, always stay. All that are in question are read: one that
    is damaged stays, for it may be the best, and if it is one that was to stay, so do the others. A run that is being written is refused.
    """

    runs: Positional[Annotated[tuple[Path, ...], arg(metavar="RUN...", help_behavior_hint="")]] = ()
    """run directories; by default all below runs"""
    keep: Annotated[int | None, arg(metavar="N", help_behavior_hint="")] = None
    """delete old checkpoints too, all but the N newest"""
    keep_every: Annotated[int | None, arg(metavar="K", help_behavior_hint="")] = None
    """of the old checkpoints keep the first at or after each multiple of K steps"""
    yes: Annotated[bool, arg(help_behavior_hint="")] = False
    """delete"""
    json: Json = False


@dataclasses.dataclass(frozen=True)
class Verify:
    """Prove a run: from each checkpoint its program is run to the next one, and every bit is compared.

    The first checkpoint is proven from the fresh state with --from-start, where --to names it, and where it is the only one. Nothing is
    written into the run. Exit code 0: all of it is proven, as far as checkpoints are kept; 1: something differs or is damaged; 2: nothing
    to prove.
    """

    run: Positional[Annotated[Path, arg(metavar="RUN")]]
    """the run directory"""
    to: Annotated[tuple[int, ...], arg(metavar="STEP ...", help_behavior_hint="")] = ()
    """only the pairs of checkpoints that end at these steps"""
    from_start: Annotated[bool, arg(help_behavior_hint="")] = False
    """also from the fresh state to the first checkpoint"""
    json: Json = False


@dataclasses.dataclass(frozen=True)
class Fork:
    """Begin a new run from a checkpoint of another one; the experiment's own flags, which come last, change its config.

    fnrun fork runs/digits/try1 --step best --out runs/digits/try2 --epochs 8 --optimizer.lr 3e-4
    """

    run: Positional[Annotated[Path, arg(metavar="RUN")]]
    """the run directory that is forked; it is only read"""
    step: Annotated[str, arg(metavar="STEP")]
    """a step, latest, best, or best:METRIC"""
    out: Annotated[Path, arg(metavar="NEW")]
    """the new run directory"""
    overrides: tyro.conf.Suppress[tuple[str, ...]] = ()
    json: Json = False


#: By name, in the order in which the help lists them.
COMMANDS: dict[str, type] = {command.__name__.lower(): command for command in (Ls, Show, Diff, Plot, Export, Gc, Verify, Fork)}


# --- the call ----------------------------------------------------------------------------------------------------------


def main(args: Sequence[str] | None = None) -> int:
    """Run the command in `args` (by default the process's arguments) and return the exit code."""
    args = list(sys.argv[1:] if args is None else args)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # lines and dots that the terminal does not have are no reason to fail
    try:
        name, flags = _parse(args)
        if flags is None:
            return 0
        code = importlib.import_module(f"fnrun.cli.commands.{name}").run(local_paths(flags))
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of the output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if not _users_fault(error):
            raise
        from fnrun.core.tables import printable

        print(f"error: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        return 2
    return code


def _users_fault(error: Exception) -> bool:
    """Whether the message of an error is enough. A module that was not imported has raised nothing."""
    known = [("fnrun.runs.run", "RunError"), ("fnrun.checkpoint.manifest", "CheckpointError")]
    classes = [getattr(sys.modules[module], name) for module, name in known if module in sys.modules]
    return isinstance(error, (CommandError, PathError, *classes))


def _parse(args: list[str]) -> tuple[str, Any]:
    """The command's name and its flags; None where help was asked for, and printed."""
    if not args or args[0] in ("-h", "--help"):
        print(_overview())
        return "", None
    name, *rest = args
    if name not in COMMANDS:
        raise CommandError(f"there is no command {name!r}; there are: {', '.join(COMMANDS)} (fnrun --help says what they do)")
    command: Any = COMMANDS[name]
    options: dict[str, Any] = {"prog": f"fnrun {name}", "description": _paragraphs(command), "config": (tyro.conf.FlagCreatePairsOff,)}
    try:
        if not hasattr(command, "overrides"):
            return name, read_flags(command, rest, **options)
        flags, overrides = read_flags(command, rest, return_unknown_args=True, **options)
        return name, dataclasses.replace(flags, overrides=tuple(overrides))
    except SystemExit:
        return name, None


def read_flags(kind: Any, args: Sequence[str], **options: Any) -> Any:
    """`tyro.cli` with its errors as a CommandError. Raises SystemExit where help was asked for, and printed."""
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(kind, args=args, **options)
    except SystemExit as end:
        if end.code:
            raise CommandError(_one_line(errors.getvalue())) from None
        raise


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {(command.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()]
    return "\n".join(
        ["usage: fnrun COMMAND ...", "", "Runs and checkpoints, seen from a shell.", "", *lines, "", "fnrun COMMAND --help says more."]
    )


def _paragraphs(command: type) -> str:
    """The docstring, broken where the terminal ends and indented: lines that begin with a letter tyro joins again."""
    width = min(shutil.get_terminal_size().columns, 100)
    parts = (" ".join(part.split()) for part in (command.__doc__ or "").split("\n\n"))
    return "\n".join(textwrap.fill(part, width, initial_indent="  ", subsequent_indent="  ") for part in parts)


def _one_line(box: str) -> str:
    """tyro's message without its frame and its title: `What is wrong; Perhaps you meant: ...`."""
    rows = [line.strip(" │") for line in box.splitlines() if not line.startswith(("╭", "╰"))]
    parts = [" ".join(part.split()).rstrip(".") for part in re.split("[─-]{8,}", "\n".join(rows))]
    return "; ".join(
        part for part in (parts if box.startswith("╭") else parts[1:]) if part
    )  # without UTF-8 the title is no part of the frame
