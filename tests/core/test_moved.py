"""Modules that moved are the same modules by their old names, however they are imported."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from fnrun.core.moved import MOVED, now

OLD = [*MOVED, "observers.sinks.base", "command.ls", "command.output"]


@pytest.mark.parametrize("old", OLD)
def test_the_old_name_is_the_same_module(old: str) -> None:
    name = f"fnrun.{old}"
    module = importlib.import_module(name)
    new = str(now(name))
    assert module is importlib.import_module(new) is sys.modules[name]
    assert module.__name__ == new == module.__spec__.name


@pytest.mark.parametrize("order", [OLD, OLD[::-1]], ids=["in order", "in reverse"])
def test_in_a_fresh_process_in_any_order(order: list[str]) -> None:
    code = f"""
import importlib, sys
import fnrun
assert not any(name.startswith("torch") for name in sys.modules)
for old in {order!r}:
    importlib.import_module(f"fnrun.{{old}}")
from fnrun import rng, state, tree as again
import fnrun.run as run, fnrun.core.tree, fnrun.core.key
from fnrun.tree import equal
from fnrun.state import Cursor, Frame, Position, TrainState
assert fnrun.tree is again is fnrun.core.tree and rng is fnrun.core.key and run.Run is fnrun.Run
files = [module.__file__ for name, module in list(sys.modules.items()) if name.startswith("fnrun") and module is not None]
modules = {{id(module): module.__file__ for name, module in list(sys.modules.items()) if name.startswith("fnrun")}}
assert len(modules) == len(set(modules.values())), "a file was imported twice"
"""
    subprocess.run([sys.executable, "-c", code], check=True)
