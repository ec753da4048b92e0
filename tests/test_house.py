"""One way down, no circles; cheap to import; the names that are promised."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fnrun

PACKAGE = Path(fnrun.__file__).parent

#: Rooms are floors, from the ground up; CONTRIBUTING.md says what each is for.
FLOORS = [
    ["core"],
    ["checkpoint", "data", "metrics", "optim", "schedules"],
    ["steps"],
    ["loops"],
    ["hooks", "observers", "sinks"],
    ["runs", "testing"],
    ["cli"],
    ["__main__"],
]
FLOOR = {name: i for i, names in enumerate(FLOORS) for name in names}
#: On one floor these may be imported by those beside them.
BESIDE = {("schedules", "optim"), ("sinks", "observers"), ("hooks", "observers")}
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path != PACKAGE / "__init__.py"
}


def room(module: str) -> str:
    return module.partition(".")[0]


def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Those of a module that run when it is imported, and those of its functions; not what only a type checker reads."""
    for node in body:
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        yield node
        for name in ("body", "orelse", "finalbody", "handlers"):
            yield from statements([each for each in getattr(node, name, []) if isinstance(each, (ast.stmt, ast.ExceptHandler))])


def imported(module: str, *, late: bool = True) -> set[str]:
    """The modules of the package that a module imports; without those that its functions import late, if told so."""
    found: set[str] = set()
    body = ast.parse(MODULES[module].read_text()).body
    for node in statements(body) if late else [each for each in statements(body) if each in body]:
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "fnrun":
            source = (node.module or "").partition(".")[2]
            for alias in node.names:
                full = f"{source}.{alias.name}".removeprefix(".")
                found.add(full if full in MODULES else source)
        elif isinstance(node, ast.Import):
            found.update(alias.name.partition(".")[2] for alias in node.names if alias.name.startswith("fnrun."))
    return found - {module, ""}


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_the_floors_below(module: str) -> None:
    own = room(module)
    assert own in FLOOR, f"{own} stands on no floor"
    for other in map(room, imported(module)):
        assert other == own or FLOOR[other] < FLOOR[own] or (other, own) in BESIDE, f"{module} imports {other}"


def test_no_module_imports_itself_by_a_detour() -> None:
    sorter = graphlib.TopologicalSorter({module: imported(module, late=False) & MODULES.keys() for module in MODULES})
    sorter.prepare()  # raises CycleError, which names them


def in_a_fresh_process(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_import_is_lazy():
    code = "import sys, fnrun; print(*(m for m in ('torch', 'jax', 'orbax', 'wandb', 'matplotlib', 'optree') if m in sys.modules))"
    assert in_a_fresh_process(code) == ""
    code = "import sys, fnrun; fnrun.repeat; fnrun.make_train_step; fnrun.observers.log; fnrun.optim.adamw; print(*(m for m in ('jax', 'torch._dynamo', 'orbax.checkpoint', 'wandb', 'matplotlib', 'sklearn') if m in sys.modules))"  # fmt: skip
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
