"""One way down, no circles; cheap to import; the names that are promised."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fnrun

PACKAGE = Path(fnrun.__file__).parent

#: From the ground up; CONTRIBUTING.md says what each is for.
FLOORS = [
    ["tree", "files", "tables", "documents", "entry", "counts", "undisturbed", "words", "context"],
    ["rng", "reports", "donation", "environment", "inplace", "waiting", "entering", "rows", "placing"],
    ["state", "schedules"],
    ["optim", "data", "metrics", "checkpoint"],
    ["steps"],
    ["loops", "hooks"],
    ["observers"],
    ["writer", "run", "plot", "testing"],
    ["summary", "cli", "verify"],
    ["command"],
    ["__main__"],
]
FLOOR = {name: i for i, names in enumerate(FLOORS) for name in names}
#: On one floor these may be imported by those beside them.
BESIDE = {
    ("words", "tree"),
    ("rng", "placing"),
    ("writer", "run"),
    ("run", "cli"),
    ("summary", "cli"),
}


def part(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def imports(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("fnrun."))
        elif isinstance(node, ast.ImportFrom) and node.module == "fnrun":
            yield from (f"fnrun.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("fnrun."):
            yield node.module


MODULES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_module_imports_only_from_the_floors_below(path):
    own = path.relative_to(PACKAGE).with_suffix("").parts[0]
    assert own in FLOOR, f"{path} stands on no floor"
    for module in imports(path):
        other = part(module)
        if other != own:
            assert FLOOR[other] < FLOOR[own] or (other, own) in BESIDE, f"{own} imports {other}"


def in_a_fresh_process(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_import_is_lazy():
    code = "import sys, fnrun; print(*(m for m in ('torch', 'jax', 'orbax', 'wandb', 'matplotlib', 'optree') if m in sys.modules))"
    assert in_a_fresh_process(code) == ""
    code = "import sys, fnrun; fnrun.repeat; fnrun.make_train_step; fnrun.observers.log; print(*(m for m in ('jax', 'orbax.checkpoint', 'wandb', 'matplotlib', 'sklearn') if m in sys.modules))"  # fmt: skip
    assert in_a_fresh_process(code) == ""


def test_the_names_that_are_promised():
    for name in [
        "struct", "TrainState", "Position", "Frame", "Key", "make_train_step", "make_eval_step", "make_predict_step", "step", "value_and_grad",
        "call", "report", "skip_nonfinite", "epoch_loop", "step_loop", "eval_loop", "predict_loop", "repeat", "sequence", "every", "workflow", "wraps",
        "any_of", "deadline", "Run", "Experiment", "main", "checkpoint", "data", "hooks", "metrics", "observers", "optim", "schedules", "testing", "tree",
    ]:  # fmt: skip
        assert name in dir(fnrun)
        assert getattr(fnrun, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = fnrun.no_such_name


def test_what_is_pinned_can_be_installed_anywhere() -> None:
    """A path on one machine would be a constraint that no other can satisfy."""
    pins = [line for line in (PACKAGE.parent / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert [line for line in pins if "==" not in line or "/" in line] == []
