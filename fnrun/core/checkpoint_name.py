"""The name of a checkpoint on disk; who only looks for some needs no torch."""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

_NAME = re.compile(r"(\d+)-(\d+)(?:\.(\d+))?")


class Entry(NamedTuple):
    """A checkpoint on disk, by its name: `STEP-TICKS`, or `STEP-TICKS.VERSION` if another state was saved there before. Sorts by age."""

    ticks: int
    step: int
    version: int

    @property
    def name(self) -> str:
        return f"{self.step:08d}-{self.ticks:08d}" + (f".{self.version}" if self.version else "")

    @staticmethod
    @functools.lru_cache(maxsize=2**16)
    def of(name: str) -> Entry | None:
        """The checkpoint of that name; None for a name that is none."""
        found = _NAME.fullmatch(name)
        entry = Entry(int(found[2]), int(found[1]), int(found[3] or 0)) if found else None
        return entry if entry is not None and entry.name == name else None  # and not what somebody called 2024-11
