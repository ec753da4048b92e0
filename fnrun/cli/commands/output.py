"""The output of commands: text for people, one JSON document for programs."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fnrun.cli.commands import CommandError
from fnrun.core.documents import jsonable
from fnrun.core.tables import printable


def document(value: Any) -> None:
    """Print `value` as one JSON document."""
    print(json.dumps(jsonable(value), indent=2, default=str))


def say(text: str) -> None:
    """Print `text` for people. Names in a stranger's checkpoint move no cursor and color nothing."""
    print(printable(text))


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Within it, an OSError is a CommandError."""
    try:
        yield
    except OSError as error:
        raise CommandError(f"cannot write {error.filename or path}: {error.strerror or error}") from error


def shown_path(path: Path) -> str:
    """A path, relative to the current directory if it lies below."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def terminal_width() -> int | None:
    """The columns of the terminal; None where the output is no terminal."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None
