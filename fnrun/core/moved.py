"""Modules that once had another place stay importable by that name: each is the same module, and is imported only if somebody asks."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from types import ModuleType
from typing import Any

_IN_CORE = (
    *("counts", "donation", "entering", "environment", "files", "inplace", "placing"),
    *("reports", "state", "tables", "tree", "undisturbed", "waiting", "words"),
)
#: By the name of version 0.1 within the package; what lies within a package that moved, has moved with it.
MOVED = {
    **{
        name: f"core.{name}"
        for name in (
            "counts",
            "donation",
            "entering",
            "environment",
            "files",
            "inplace",
            "placing",
            "reports",
            "state",
            "tables",
            "tree",
            "words",
        )
    },
    **{name: f"runs.{name}" for name in ("plot", "run", "summary", "verify", "writer")},
    "command": "cli.commands",
    "dry": "loops.dry_run",
    "interrupts": "loops.interrupts",
    "program": "loops.program",
    "observers.sinks": "sinks",
    "rng": "core.key",
    "rows": "core.examples",
}


def now(name: str) -> str | None:
    """Where the module of that full name lies now, if it has moved.

    >>> now("fnrun.rng"), now("fnrun.observers.sinks.wandb"), now("fnrun.optim")
    ('fnrun.core.key', 'fnrun.sinks.wandb', None)
    """
    package, _, rest = name.partition(".")
    parts = rest.split(".")
    for end in (2, 1):
        if package == "fnrun" and (to := MOVED.get(".".join(parts[:end]))) is not None:
            return ".".join([package, to, *parts[end:]])
    return None


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Asked first: what lies within a package that moved would be found by its path, and be there twice."""

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> importlib.machinery.ModuleSpec | None:
        return None if not fullname.startswith("fnrun.") or now(fullname) is None else importlib.machinery.ModuleSpec(fullname, self)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module = importlib.import_module(str(now(spec.name)))
        self._own = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._own  # what the import system has put there is the old name's


def install() -> None:
    if not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, Finder())
