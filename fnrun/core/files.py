"""Files: the one way to write one whole, and the one way to go on with one.

The directory of a run may be a stranger's. So what is written there goes to a new file, never through a link to somewhere else. Until the
file is whole it has a name that nobody can foresee.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import re
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

#: The name of a file that is not whole yet; one that a killed process left behind is nobody's.
TEMPORARY = re.compile(r"\.tmp-[0-9a-f]{16}")
#: What file systems that cannot make anything durable say of it.
_NO_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}


#: How a URL begins: also after `Path`, which makes one slash of two. A single letter is a drive.
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


class PathError(ValueError):
    """What was given as a place is none on this machine's file systems."""


def local_path(path: str | os.PathLike[str]) -> Path:
    """A path as a user gives it: `~` is the home directory. Raises PathError for a URL, which would name a directory of this machine.

    >>> local_path("~/runs") == Path.home() / "runs", str(local_path("runs/try1"))
    (True, 'runs/try1')
    """
    text = os.fspath(path)
    if _URL.match(text):
        raise PathError(f"{text} is a URL, and fnrun reads and writes local files only: give a path, and copy from there or to there")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise PathError(f"{text}: {error}") from error


def local_paths(command: Any) -> Any:
    """A dataclass with every path among its fields as `local_path` reads it. Raises PathError."""

    def read(value: Any) -> Any:
        return local_path(value) if isinstance(value, Path) else tuple(map(read, value)) if isinstance(value, tuple) else value

    return dataclasses.replace(command, **{field.name: read(getattr(command, field.name)) for field in dataclasses.fields(command)})


@contextlib.contextmanager
def replacing(path: str | Path, *, dir_fd: int | None = None) -> Iterator[IO[bytes]]:
    """A new file that is at `path` from the end of the block on, whole and durable; after an error `path` is what it was.

    Before that it is `file.name`, in the same directory. Permissions are those of any new file (the umask's). A link at `path` is replaced,
    what it points to is not. With `dir_fd`, a descriptor of a directory, `path` is a name in it. Raises OSError.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     with replacing(f"{directory}/config.yaml") as file:
    ...         _ = file.write(b"epochs: 3")
    ...     os.listdir(directory), Path(directory, "config.yaml").read_text()
    (['config.yaml'], 'epochs: 3')
    """
    directory = os.path.dirname(path)
    temporary = os.path.join(directory, temporary_name())
    try:
        with open(temporary, "xb", opener=lambda name, flags: os.open(name, flags | _NOFOLLOW, 0o666, dir_fd=dir_fd)) as file:
            yield file
            file.flush()
            sync(file.fileno())
        os.replace(temporary, path, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
        sync(directory or os.curdir if dir_fd is None else dir_fd)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary, dir_fd=dir_fd)
        if isinstance(error, OSError) and error.filename in (None, temporary):  # a full disk does not say which file it is about
            error.filename, error.filename2 = str(path), None
        raise


def write(path: str | Path, content: bytes, *, dir_fd: int | None = None) -> None:
    """`content` as the file `path`, whole or not at all: see `replacing`."""
    with replacing(path, dir_fd=dir_fd) as file:
        file.write(content)


def opened(path: str | Path, mode: str, **options: Any) -> IO[Any]:
    """`open(path, mode)` of a file to go on with, if it is one: no link, no pipe, no device. Raises OSError, also for these."""
    return open(path, mode, opener=_own_file, **options)


def _own_file(path: str, flags: int) -> int:
    try:
        descriptor = os.open(path, flags | _NOFOLLOW | _NONBLOCK, 0o666)  # to open a pipe would wait for somebody who reads it
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO) and os.path.lexists(path):
            raise _not_a_file(path) from None
        raise
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), path) if stat.S_ISDIR(mode) else _not_a_file(path)


def _not_a_file(path: str) -> OSError:
    kind = "a link, and links are not followed" if os.path.islink(path) else "no file"
    return OSError(errno.ELOOP, f"it is {kind}: move it away, a new file takes its place", path)


_NOFOLLOW, _NONBLOCK = (getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK"))


def sync(file: int | str | Path) -> None:
    """Make what a file or a directory (a descriptor, or a path) holds survive a power cut, as far as its file system can."""
    descriptor = file if isinstance(file, int) else os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        if descriptor != file:
            os.close(descriptor)


def temporary_name() -> str:
    """A name for what is not whole yet, unlike all others."""
    return f".tmp-{secrets.token_hex(8)}"


def leftovers(directory: Path) -> list[Path]:
    """What killed processes left half written in and below a directory; links are not followed."""
    found: list[Path] = []
    for folder, names, files in os.walk(directory):
        found += [Path(folder, name) for name in sorted({*names, *files}) if TEMPORARY.fullmatch(name)]
        names[:] = [name for name in names if not TEMPORARY.fullmatch(name)]
    return found


def lines_from_the_end(file: IO[bytes], block: int = 2**16) -> Iterator[tuple[int, bytes]]:
    """The lines of a file from its last to its first, each with where it begins; only a last one that was cut short has no line feed.

    >>> import io
    >>> list(lines_from_the_end(io.BytesIO(b"one\\ntwo\\nthr")))
    [(8, b'thr'), (4, b'two\\n'), (0, b'one\\n')]
    """
    end, tail = file.seek(0, os.SEEK_END), b""  # before `end` nothing was read; behind it comes `tail`, the end of a line
    while end:
        begin = max(0, end - block)
        file.seek(begin)
        tail = file.read(end - begin) + tail
        end, first = begin, (tail.find(b"\n") + 1 if begin else 0)  # where the first line begins that is whole
        if begin and not 0 < first < len(tail):
            block *= 2
            continue
        at = begin + len(tail)
        for line in reversed(_lines(tail[first:])):
            at -= len(line)
            yield at, line
        tail = tail[:first]


def _lines(content: bytes) -> list[bytes]:
    """Parted at line feeds and nowhere else, which is not what `splitlines` does."""
    *whole, last = content.split(b"\n")
    return [line + b"\n" for line in whole] + ([last] if last else [])


def copy(source: IO[bytes], to: IO[bytes], size: int) -> None:
    """The first `size` bytes of a file, behind what is in another one."""
    source.seek(0)
    while size and (piece := source.read(min(size, 2**20))):
        to.write(piece)
        size -= len(piece)
