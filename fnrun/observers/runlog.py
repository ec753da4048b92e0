"""The standard logger `fnrun`, to the terminal and to a file of the run."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from fnrun.core import files
from fnrun.core.environment import rank
from fnrun.core.tables import printable
from fnrun.sinks.console import StdoutHandler

logger = logging.getLogger("fnrun")

Level = Literal["debug", "info", "warning", "error"]


class _Printable(logging.Formatter):
    """Lines without control characters: names and reasons may come from a stranger's checkpoint, and the file is read in a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


@contextlib.contextmanager
def logging_to(path: str | Path, level: Level = "info") -> Iterator[None]:
    """Within it, records of the logger `fnrun` from `level` on are printed and, with the time, appended to the file `path`.

    Where several processes train together, only the first one prints, and each other one has another file: `run.rank1.log` beside
    `run.log`. An exception that ends the block is in the file with its traceback. Raises OSError where the file cannot be written.
    """
    path, this = files.local_path(path), rank()
    file = logging.StreamHandler(
        files.opened(path if this == 0 else path.with_name(f"{path.stem}.rank{this}{path.suffix}"), "a", encoding="utf-8")
    )
    file.setFormatter(_Printable("%(asctime)s %(levelname)s %(message)s"))
    handlers = [file, StdoutHandler()] if this == 0 else [file]
    before, propagate = logger.level, logger.propagate
    logger.setLevel(level.upper())
    logger.propagate = False
    for handler in handlers:
        logger.addHandler(handler)
    try:
        yield
    except Exception as error:
        file.handle(logger.makeRecord(logger.name, logging.ERROR, __file__, 0, "%s", (type(error).__name__,), sys.exc_info()))
        raise
    finally:
        for handler in handlers:
            logger.removeHandler(handler)
        file.close()
        file.stream.close()
        logger.setLevel(before)
        logger.propagate = propagate
