"""Work behind the training: one job after the other, in a thread; what goes wrong is kept until somebody asks."""

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
    """Jobs in their order, for `where`; a program that ends lets them finish."""

    def __init__(self, where: str) -> None:
        self.where = where
        self._thread: threading.Thread | None = None
        self._failure: CheckpointError | None = None

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def start(self, job: Callable[[], None], failed: str) -> None:
        """Begin `job` once those before it are done; `failed` says what was not done if it raises."""
        before = self._thread

        def work() -> None:
            time.sleep(0.001)  # whoever handed it over goes on first: a thread that begins keeps the interpreter for 5 ms
            _ended(before)
            try:
                job()
            except Exception as error:
                failure = CheckpointError(f"{self.where}: {failed}: {error}")
                failure.__cause__ = error
                if self._failure is None:
                    self._failure = failure
                    _untold.add(self)
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
        """What went wrong since it was last asked for."""
        failure, self._failure = self._failure, None
        _untold.discard(self)
        return failure


def _ended(thread: threading.Thread | None) -> None:
    """Wait for a thread; one that Ctrl-C kept from starting is at its end."""
    if thread is not None and thread.ident is not None:
        thread.join()


_unfinished: weakref.WeakSet[Background] = weakref.WeakSet()
_untold: set[Background] = set()  # with a failure that nobody has asked for yet, and that must be told though nobody holds them any more
if hasattr(os, "register_at_fork"):  # a data worker has nothing to finish, and nothing to tell
    os.register_at_fork(after_in_child=_unfinished.clear)
    os.register_at_fork(after_in_child=_untold.clear)


def _finish_at_exit(background: Background) -> None:
    """Let a program that ends without waiting finish its save: once the interpreter shuts down, no more threads can start."""
    if not _unfinished and hasattr(threading, "_register_atexit"):
        with contextlib.suppress(RuntimeError):  # the interpreter is shutting down already
            threading._register_atexit(_finish)  # pyright: ignore[reportAttributeAccessIssue]
    _unfinished.add(background)


def _finish() -> None:
    for background in {*_unfinished, *_untold}:
        background.join()
        if (failure := background.failure()) is not None:
            logging.getLogger("fnrun").error(str(failure))


atexit.register(_finish)  # again, for what was begun later than that: it cannot be saved any more, and that must be told
