"""Work in the background of the training: one job after the other, in a thread. A failure is kept until somebody asks for it."""

from __future__ import annotations

import atexit
import concurrent.futures.thread  # noqa: F401  (its own clean-up at exit must come after ours)
import contextlib
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable

from fnrun.checkpoint.manifest import CheckpointError


class Background:
    """Jobs that run one after the other; a program that ends lets them finish. `where` begins the message of a failure."""

    def __init__(self, where: str) -> None:
        self.where = where
        self._thread: threading.Thread | None = None
        self._failure: CheckpointError | None = None

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def start(self, job: Callable[[], None], failed: str) -> None:
        """Start `job` when those before it are done; if it raises, the failure's message is `failed` and its error."""
        before = self._thread

        def work() -> None:
            time.sleep(0.001)  # the caller goes on first: a thread that begins keeps the interpreter for 5 ms
            _ended(before)
            try:
                job()
            except Exception as error:
                failure = CheckpointError(f"{self.where}: {failed}: {error}")
                failure.__cause__ = error
                if self._failure is None:
                    self._failure = failure
                    _failed.add(self)
                else:
                    self._failure.add_note(str(failure))

        _finish_at_exit(self)
        self._thread = threading.Thread(target=work, name="fnrun-checkpoint")
        self._thread.start()

    def join(self) -> None:
        """Wait for every job."""
        _ended(self._thread)
        self._thread = None

    def failure(self) -> CheckpointError | None:
        """The first failure since the last call, with the others as its notes."""
        failure, self._failure = self._failure, None
        _failed.discard(self)
        return failure


def _ended(thread: threading.Thread | None) -> None:
    """Wait for a thread; one that Ctrl-C kept from starting has ended."""
    if thread is not None and thread.ident is not None:
        thread.join()


_unfinished: weakref.WeakSet[Background] = weakref.WeakSet()
_failed: set[Background] = set()  # those with a failure that nobody has asked for: it is logged at exit
if hasattr(os, "register_at_fork"):  # a data worker has nothing to finish, and nothing to log
    os.register_at_fork(after_in_child=_unfinished.clear)
    os.register_at_fork(after_in_child=_failed.clear)


def _finish_at_exit(background: Background) -> None:
    """Let a program that ends without waiting finish its save: once the interpreter shuts down, no more threads can start."""
    if not _unfinished and hasattr(threading, "_register_atexit"):
        with contextlib.suppress(RuntimeError):  # the interpreter is shutting down already
            threading._register_atexit(_finish)  # pyright: ignore[reportAttributeAccessIssue]
    _unfinished.add(background)


def _finish() -> None:
    for background in {*_unfinished, *_failed}:
        background.join()
        if (failure := background.failure()) is not None:
            logging.getLogger("fnrun").error(str(failure))


atexit.register(_finish)  # again, for jobs that began later than that: they can only fail, and that is logged
