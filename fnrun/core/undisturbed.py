"""Ctrl-C and what must not be left half done: the module that a step borrows, the generators that it seeds.

Python's own handler of SIGINT raises KeyboardInterrupt between any two instructions, also in the middle of putting things back. While a
program runs, it does not raise within the functions that are marked here, but a moment later: that costs nothing until Ctrl-C is pressed.
"""

from __future__ import annotations

import _thread
import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode

F = TypeVar("F", bound=Callable[..., Any])

_codes: set[CodeType] = set()
#: What hangs there is interrupted after so long all the same, in seconds.
_PATIENCE = 2.0


def undisturbed(fn: F) -> F:
    """A function within which, and within what it calls, Ctrl-C does not raise: for putting things back."""
    _codes.add(fn.__code__)  # pyright: ignore[reportFunctionMemberAccess]
    return fn


for _around in (
    contextlib._GeneratorContextManager,
    TorchDispatchMode,
    torch.no_grad,
    torch.enable_grad,
    torch.set_grad_enabled,
):  # between a `with` and what is put back at its end
    for _method in (_around.__enter__, _around.__exit__):
        undisturbed(_method)


@contextlib.contextmanager
def restoring() -> Iterator[None]:
    """Within it Ctrl-C leaves marked functions undisturbed: in the main thread, and where it does what Python makes it do."""
    own = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not own:
        yield
        return
    signal.signal(signal.SIGINT, _Handler())
    try:
        yield
    finally:
        if isinstance(signal.getsignal(signal.SIGINT), _Handler):  # else somebody has set another one meanwhile
            signal.signal(signal.SIGINT, signal.default_int_handler)


class _Handler:
    """Of SIGINT: what Python's own does, but for the marked functions."""

    def __init__(self) -> None:
        self.since: float | None = None

    def __call__(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        self.since = self.since or now
        if now - self.since < _PATIENCE and _marked(frame):
            _thread.start_new_thread(_again, ())
            return
        self.since = None
        raise KeyboardInterrupt


def _marked(frame: Any) -> bool:
    while frame is not None:
        if frame.f_code in _codes:
            return True
        frame = frame.f_back
    return False


def _again() -> None:
    time.sleep(0.001)
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
