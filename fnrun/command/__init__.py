"""The command `fnrun`: runs and checkpoints, seen from a shell.

What a command is asked for is a dataclass here, its fields the flags; what it does is `run(asked) -> int` in the module of its name, which is
imported when the command is chosen. So `fnrun --help` imports nothing heavy.

Exit codes: 0 done, 1 different or failed, 2 an error, which is one line on the standard error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.conf import Positional, arg

__all__ = ["COMMANDS", "CommandError", "main"]


class CommandError(Exception):
    """What a user can get wrong; the message is all there is to say."""


# --- the flags ---------------------------------------------------------------------------------------------------------


Json = Annotated[bool, arg(help="print one JSON document, and nothing else", help_behavior_hint="")]


@dataclasses.dataclass(frozen=True)
class Ls:
    """List the runs below a directory, the one that was active last first.

    Metrics are those by which checkpoints are judged best; where there are none, those whose names end in loss or accuracy.
    """

    directory: Positional[Annotated[Path, arg(metavar="DIR")]] = Path("runs")
    """where to look"""
    json: Json = False


#: By name, in the order in which the help lists them.
COMMANDS: dict[str, type] = {"ls": Ls}


# --- the call ----------------------------------------------------------------------------------------------------------


def main(args: Sequence[str] | None = None) -> int:
    """Do what the arguments say (by default those of the process) and return the exit code."""
    args = list(sys.argv[1:] if args is None else args)
    try:
        name, asked = _parse(args)
        if asked is None:
            return 0
        code = importlib.import_module(f"fnrun.command.{name}").run(asked)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output has gone, and needs no more of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if not _users_fault(error):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return code


def _users_fault(error: Exception) -> bool:
    """Whether the message says all there is to say. A module that was not imported has raised nothing."""
    known = [("fnrun.run", "RunError"), ("fnrun.checkpoint.manifest", "CheckpointError")]
    classes = [getattr(sys.modules[module], name) for module, name in known if module in sys.modules]
    return isinstance(error, (CommandError, *classes))


def _parse(args: list[str]) -> tuple[str, Any]:
    """The command's name and what it is asked for; None where help was asked for, and given."""
    if not args or args[0] in ("-h", "--help"):
        print(_overview())
        return "", None
    name, *rest = args
    if name not in COMMANDS:
        raise CommandError(f"there is no command {name!r}; there are: {', '.join(COMMANDS)} (fnrun --help says what they do)")
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return name, tyro.cli(COMMANDS[name], prog=f"fnrun {name}", args=rest, config=(tyro.conf.FlagCreatePairsOff,))
    except SystemExit as end:
        if end.code:
            raise CommandError(_one_line(said.getvalue())) from None
        return name, None


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {(command.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()]
    return "\n".join(
        ["usage: fnrun COMMAND ...", "", "Runs and checkpoints, seen from a shell.", "", *lines, "", "fnrun COMMAND --help says more."]
    )


def _one_line(box: str) -> str:
    """tyro's message without the frame that it draws around it: `What is wrong; perhaps you meant ...`."""
    rows = [line.strip(" │") for line in box.splitlines() if not line.startswith(("╭", "╰"))]
    return "; ".join(" ".join(part.split()) for part in "\n".join(rows).split("─") if part.strip())
