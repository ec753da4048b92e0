"""A file of JSON lines in the order of the run, which can be cut at a state."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from fnrun.core import files
from fnrun.sinks.base import Record, check_names


class OnDisk:
    """A sink that writes to a file at, or below, `path` while it is open."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[Any] | None = None

    def __str__(self) -> str:
        return str(self.path)

    def flush(self) -> None:
        if self._file is not None:
            with naming(self.path):
                files.sync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self.flush()
            self._file.close()
            self._file = None


#: The files that sinks of this process append to.
_appending: set[IO[str]] = set()


class Lines(OnDisk):
    """Appends to `path`. Each line has the fields `ticks` and `at`, which are `Position.order`."""

    def __bool__(self) -> bool:
        """Whether it is open."""
        return self._file is not None

    def begin(self, order: tuple[int, ...]) -> None:
        """Open the file and keep the lines up to `order`: what a killed run wrote after its last checkpoint comes again.

        Does nothing while it is open.
        """
        if self:
            return
        with naming(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError), files.opened(self.path, "r+b") as old:
                if any(os.path.sameopenfile(old.fileno(), other.fileno()) for other in _appending):
                    old.truncate(_kept(old, order))  # another sink of this process writes there too
                else:
                    # A new file: a process that has lost the run, and has not seen it yet, goes on in the old one, which nobody reads.
                    with files.replacing(self.path) as new:
                        files.copy(old, new, _kept(old, order))
            self._file = files.opened(self.path, "a", encoding="utf-8")
            _appending.add(self._file)

    def close(self) -> None:
        if self._file is not None:
            _appending.discard(self._file)
        super().close()

    def append(self, line: dict[str, Any]) -> None:
        assert self._file is not None, "open the sink first"
        with naming(self.path):
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()  # a killed process loses nothing; a power cut nothing that came before a checkpoint (`flush`)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Within it an OSError names a file: a full disk does not say which one it is about."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def _kept(file: IO[bytes], order: tuple[int, ...]) -> int:
    """How many bytes the lines up to `order` take. Later ones follow, and one that was half written when the power went."""
    for begin, line in files.lines_from_the_end(file):
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
            if line.endswith(b"\n") and order_of(json.loads(line)) <= order:
                return begin + len(line)
    return 0


def position_fields(record: Record) -> dict[str, Any]:
    """The fields of a line's place in the run."""
    check_names(record.metrics)
    return {**order_fields(record.order), "step": record.step, "epoch": record.epoch}


def order_fields(order: tuple[int, ...]) -> dict[str, Any]:
    """The fields of `Position.order`, which `order_of` reads."""
    ticks, *loops = order
    return {"ticks": ticks, "at": ".".join(map(str, loops))}


def order_of(line: dict[str, Any]) -> tuple[int, ...]:
    """`Position.order` of a line."""
    return (int(line["ticks"]), *(int(n) for n in line["at"].split(".") if n))
