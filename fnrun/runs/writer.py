"""The one process that writes to a run, and the status that it leaves.

    run.lock       a lease of filelock: its owner, refreshed as long as that process lives
    status.json    running, stopped, finished or crashed, and at which step

A lease of a dead process of this host is free at once. One of another host is free when it was not refreshed for `LEASE` seconds. A process
that lost its lease (it was suspended for that long, or somebody deleted the file) writes no more.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import logging
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec

from fnrun.core import files
from fnrun.core.environment import ranks

#: Seconds without a refresh after which an owner counts as dead. All that write to one run must agree on it.
LEASE = 90.0
#: Seconds between two refreshes.
HEARTBEAT = 15.0
#: Seconds after which an empty lock has no owner: a process that makes one writes its name into it at once.
UNSIGNED = 2.0
#: Seconds between two checks of a process at work that it still owns the lease: it may have been suspended for long.
LOOK = 1.0

LOCK, STATUS = "run.lock", "status.json"

logger = logging.getLogger("fnrun")


class RunError(ValueError):
    """A run directory that cannot be made, opened or written, or a config that cannot be read."""


class WaitingInterrupted(RunError):
    """An interrupt came while this process waited to see whether another one is alive."""


class Status(msgspec.Struct, frozen=True):
    """The status of a run.

    - `state`: `new` where nobody has trained yet; `stopped` where a signal, a deadline or a hook ended the run early; `crashed` where an
      exception or SIGKILL did.
    - `reason`: the text of a stop or a crash.
    - `step`, `ticks`: those of the newest checkpoint when the status was written.
    - `began`, `ended`, `pid`, `host`: of the last process that wrote.
    """

    state: Literal["new", "running", "stopped", "finished", "crashed"]
    reason: str | None = None
    step: int | None = None
    ticks: int | None = None
    began: datetime.datetime | None = None
    ended: datetime.datetime | None = None
    pid: int | None = None
    host: str | None = None


def status(path: Path) -> Status:
    """The status of the run at `path`; one that says running, of a process that is no more, is crashed, killed.

    Raises RunError where the file cannot be read.
    """
    found = Status("new")
    for _ in range(2):  # the writer may end between the two looks
        found = _read(path)
        if found.state != "running" or _held(path):
            return found
    return msgspec.structs.replace(found, state="crashed", reason="killed")


def _read(path: Path) -> Status:
    try:
        return msgspec.json.decode((path / STATUS).read_bytes(), type=Status)
    except FileNotFoundError:
        return Status("new")
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise RunError(f"{path / STATUS} is damaged: {error}; delete it, the next process that trains writes it anew") from error
    except OSError as error:
        raise RunError(f"cannot read {path / STATUS}: {error.strerror or error}") from error


# --- the lease ---------------------------------------------------------------------------------------------------------


def _lease(path: Path, lost: Callable[[Any], None] | None = None) -> Any:
    from filelock import SoftFileLease

    # Not thread_local: the thread that saves asks for the token too.
    return SoftFileLease(
        path / LOCK, lease_duration=LEASE, heartbeat_interval=HEARTBEAT, on_compromise=lost, thread_local=False, poll_interval=LEASE / 200
    )


@functools.cache
def _here() -> str:
    """This host as leases name it: with its container, for two may share the name of a host and have the same process ids."""
    with tempfile.TemporaryDirectory() as directory, _lease(Path(directory)) as probe:
        return probe.owner.hostname


def _alive(owner: Any) -> bool:
    """Whether a process of this host holds the lease: it exists, and is no zombie that nobody has waited for."""
    import psutil

    try:
        return owner.hostname == _here() and psutil.Process(owner.pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


def _refreshed(path: Path) -> float:
    """When the lease was refreshed, by the clock of the file system; 0 where there is none."""
    try:
        return (path / LOCK).stat().st_mtime
    except OSError:
        return 0.0


def _held(path: Path) -> bool:
    owner = _lease(path).owner
    if owner is None or (owner.hostname == _here() and not _alive(owner)):
        return False
    return time.time() - _refreshed(path) < LEASE


def _name(owner: Any) -> str:
    return f"process {owner.pid} on host {owner.hostname.partition('?')[0]}"  # behind it is the container


# --- writing -----------------------------------------------------------------------------------------------------------


class Writing:
    """A run while this process writes to it. It is an interrupt: it returns a text once the lease is lost."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lost: str | None = None
        self.status = Status("finished")
        self.withdrawn = False
        self._lock: Any = None
        self._looked = time.monotonic()

    def __call__(self) -> str | None:
        if (now := time.monotonic()) - self._looked >= LOOK:
            self._looked = now
            with contextlib.suppress(RunError):
                self.check()
        return self.lost

    def stopped(self, reason: str) -> None:
        """Note that the run ends early, and why: the text of an interrupt, or `state.stop`."""
        self.status = msgspec.structs.replace(self.status, state="stopped", reason=reason)

    def at(self, step: int | None, ticks: int | None) -> None:
        """Note the step and the ticks of the run. A run with checkpoints does this itself, with those of the newest."""
        self.status = msgspec.structs.replace(self.status, step=step, ticks=ticks)

    def withdraw(self) -> None:
        """Note that nothing has begun: the status becomes what it was before."""
        self.withdrawn = True

    def check(self) -> None:
        """Raise RunError if this process does not own the lease any more."""
        if self.lost is None and self._lock is not None and (owner := self._lock.owner) is not None and owner.token != self._lock.token:
            self.lost = _taken(self.path, owner)
        if self.lost is not None:
            raise RunError(self.lost)

    def lose(self, compromise: Any) -> None:
        """Note that the lease is lost; called from the thread that refreshes it."""
        file, rest = self.path / LOCK, "this process writes there no more"
        owner = self._lock.owner
        if owner is not None and owner.token != compromise.token:
            self.lost = _taken(self.path, owner)
        elif compromise.reason == "marker-missing":
            self.lost = f"{file} was deleted, by which others may write to the run: {rest}"
        else:
            self.lost = f"{file} cannot be refreshed ({compromise.error or compromise.reason}): {rest}"


def _taken(path: Path, owner: Any) -> str:
    return f"{path} was taken over by {_name(owner)}, which had not heard of this one for {LEASE:.0f} s: this process writes there no more"


@contextlib.contextmanager
def writing(path: Path, interrupt: Callable[[], str | None] | None = None) -> Iterator[Writing]:
    """Within it this process alone writes to the run at `path`, and the status is `running`; then it is how that ended.

    Raises RunError where another process writes there: at once if it is of this host, after up to `LEASE` seconds if it is of another one;
    `interrupt` ends the waiting. Raises RunError for one of several ranks, and at the end if the lease was lost.
    """
    check_alone()
    now = _took(path, interrupt)
    directory, token = os.open(path, os.O_RDONLY), now._lock.token  # the directory may be moved meanwhile
    try:
        with _telling(now, directory):
            yield now
    finally:
        now._lock.release()
        _remove_moved(directory, token)
        os.close(directory)


def check_alone() -> None:
    """Raise RunError in one of several processes that a launcher started together: each would try to write to the run."""
    try:
        rank, world = ranks()
    except ValueError as error:
        raise RunError(str(error)) from error
    if rank or world > 1:
        raise RunError(
            f"this is process {rank} of {max(world, rank + 1)} that were started together (RANK, WORLD_SIZE), and a run is trained by one: "
            "start it alone, without torchrun, or unset these variables"
        )


def _took(path: Path, interrupt: Callable[[], str | None] | None) -> Writing:
    from filelock import LeaseSettingsMismatch, Timeout

    if not path.is_dir():
        raise RunError(f"there is no run at {path}")
    now = Writing(path)
    lock = now._lock = _lease(path, now.lose)
    looks: list[tuple[str, float]] = []
    unsigned = _Unsigned(path / LOCK)

    def hopeless() -> bool:
        if (owner := lock.owner) is None:
            unsigned()
            return False
        looks.append((owner.token, _refreshed(path)))
        if len(looks) == 2:
            logger.warning("%s: waiting up to %.0f s to see whether %s is alive", path, LEASE, _name(owner))
        return _alive(owner) or looks[-1] != looks[0] or (interrupt is not None and interrupt() is not None)

    try:
        lock.acquire(timeout=LEASE + HEARTBEAT, cancel_check=hopeless)
    except Timeout:
        if interrupt is not None and (text := interrupt()) is not None:
            raise WaitingInterrupted(
                f"{path}: {text} while waiting for {_name(lock.owner) if lock.owner else 'the one that writes there'}"
            ) from None
        raise RunError(_refusal(path, lock.owner)) from None
    except LeaseSettingsMismatch as error:
        raise RunError(f"{path} is being written by another version of fnrun: {error}") from error
    except OSError as error:
        raise RunError(f"cannot write {path / LOCK}: {error.strerror or error}") from error
    return now


class _Unsigned:
    """Frees an empty lock, whose process was killed before it signed it; called while a lock has no readable owner.

    filelock takes an empty file for a lock in force, and any other file without an owner for one that it may take over.
    """

    def __init__(self, lock: Path) -> None:
        self.lock, self._seen, self._since = lock, None, 0.0

    def __call__(self) -> None:
        with contextlib.suppress(OSError), files.opened(self.lock, "r+b") as file:
            found = os.fstat(file.fileno())
            if found.st_size or (found.st_ino, found.st_mtime_ns) != self._seen:
                self._seen, self._since = (found.st_ino, found.st_mtime_ns), time.monotonic()
            elif time.monotonic() - self._since >= UNSIGNED:
                file.write(b"nobody\n")


def _refusal(path: Path, owner: Any) -> str:
    if owner is None:
        return f"{path} is being written, {path / LOCK} does not say by whom: wait, or delete that file if it is nobody"
    if owner.pid == os.getpid() and owner.hostname == _here():
        return f"{path} is being written by this process already"
    since = ""
    with contextlib.suppress(RunError):
        if (began := _read(path).began) is not None:
            since = f" (since {began.astimezone():%Y-%m-%d %H:%M})"
    return f"{path} is being written by {_name(owner)}{since}: wait for it, or stop it (kill {owner.pid})"


# --- the status --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _telling(now: Writing, directory: int) -> Iterator[None]:
    """Within it the status is `running`; at the end it is `finished`, `stopped` or `crashed`."""
    try:
        before = _read(now.path)
    except RunError:
        before = Status("new")
    started: dict[str, Any] = {"began": _now(), "ended": None, "pid": os.getpid(), "host": socket.gethostname()}
    now.at(before.step, before.ticks)
    _put(directory, msgspec.structs.replace(now.status, state="running", **started))
    try:
        yield
        now.check()
    except BaseException as error:
        kind = "stopped" if isinstance(error, (KeyboardInterrupt, SystemExit)) else "crashed"
        text = f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")
        now.status = msgspec.structs.replace(now.status, state=kind, reason=text)
        raise
    finally:
        with contextlib.suppress(RunError):
            now.check()
        if now.lost is None:
            _put(directory, before if now.withdrawn else msgspec.structs.replace(now.status, **started | {"ended": _now()}))


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC).replace(microsecond=0)


def _put(directory: int, status: Status) -> None:
    """Write the status to an open directory; `new` is no file. A full disk is logged and ends no training."""
    try:
        if status.state == "new":
            with contextlib.suppress(FileNotFoundError):
                os.unlink(STATUS, dir_fd=directory)
            return
        files.write(STATUS, msgspec.json.encode(status) + b"\n", dir_fd=directory)
    except OSError as error:
        logger.error("cannot write %s: %s", STATUS, error.strerror or error)


def _remove_moved(directory: int, token: str) -> None:
    """Delete the lease of a directory that was moved meanwhile, where filelock did not find it."""
    with contextlib.suppress(OSError):
        with open(os.open(LOCK, os.O_RDONLY, dir_fd=directory), "rb") as stream:
            ours = f"token={token}\n".encode() in stream.read()
        if ours:
            os.unlink(LOCK, dir_fd=directory)
