"""Structs have names apart from the modules in which they stand, and old names are found."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fnrun
from fnrun import metrics, optim
from fnrun.checkpoint import CheckpointError, Checkpoints
from fnrun.checkpoint.former import STRUCTS, migrate
from fnrun.cli.commands import main as command
from fnrun.core import tree
from fnrun.core.position import Cursor, Frame
from fnrun.observers import Text
from tests.test_formats import FORMATS

ROOT = Path(__file__).parents[2]


def declared(module: str, qualname: str, **options: Any) -> Any:
    """A struct as a module of this name would declare it."""
    return tree.struct(**options)(type(qualname, (), {"__module__": module, "__qualname__": qualname, "__annotations__": {"x": Any}}))


def saved(directory: Path, value: Any) -> Checkpoints:
    params = {"w": torch.zeros(2)}
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(fnrun.TrainState(params=params, buffers={}, opt_state=(), rng=fnrun.Key(0), step=1, memory={"it": value}))
    return checkpoints


def rename(directory: Path, old: str, new: str) -> None:
    """Let the manifest call a struct otherwise."""
    import hashlib

    (manifest,) = directory.glob("*/manifest.json")
    content = manifest.read_bytes().replace(old.encode(), new.encode())
    manifest.write_bytes(content)
    (manifest.parent / "manifest.sha256").write_text(f"{hashlib.sha256(content).hexdigest()}  manifest.json\n")


def test_every_struct_of_ours_has_a_name_that_says_from_where_one_imports_it_and_the_table_knows_all_that_were_saved_otherwise():
    for module in pkgutil.walk_packages(fnrun.__path__, "fnrun."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    names = {name: cls for cls, name in tree._names.items() if cls.__module__.startswith("fnrun.") and "<locals>" not in cls.__qualname__}
    assert len(names) > 30
    for name, cls in names.items():
        package, _, own = name.rpartition(".")
        assert own == cls.__qualname__
        assert cls.__module__.startswith(package) or getattr(importlib.import_module(package), own) is cls
        assert len(package.split(".")) <= 2, f"{name} names a file, and files move"
    assert set(STRUCTS.values()) <= set(names)


def test_who_looks_into_a_checkpoint_need_not_have_imported_our_classes(tmp_path: Path):
    totals = metrics.fold(None, {"loss": torch.tensor(1.0), "seen": metrics.sum(torch.ones(2))}, 2)
    rule = optim.adamw(1e-3).init({"w": torch.zeros(2)})
    saved(tmp_path, {"key": fnrun.Key(3), "totals": totals, "rule": rule, "text": Text("a"), "cursor": Cursor()})
    code = (
        "import sys; from fnrun.checkpoint import Checkpoints; state = Checkpoints(sys.argv[1]).restore(); "
        "print(*map(type, state.memory['it'].values()))"
    )
    ran = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, cwd=ROOT, env=os.environ)
    assert [name for name in ("Key", "Totals", "RuleState", "Text", "Cursor") if name not in ran.stdout] == [], ran.stderr


def test_a_struct_with_a_name_moves_to_another_module_and_is_found(tmp_path: Path, capsys):
    old = declared("before.here", "Box", name="tests.Box")
    checkpoints = saved(tmp_path, old(torch.ones(3)))
    assert '"struct tests.Box"' in next(tmp_path.glob("*/manifest.json")).read_text()
    tree._structs.pop("tests.Box")  # as in another process
    new = declared("after.there", "Crate", name="tests.Box")
    for like in (None, saved_like(new)):
        assert type(checkpoints.restore(like).memory["it"]) is new
    assert command(["show", str(tmp_path)]) == 0
    assert "memory/it/x" in capsys.readouterr().out


def saved_like(cls: Any) -> fnrun.TrainState:
    return fnrun.TrainState(params={"w": torch.zeros(2)}, buffers={}, opt_state=(), rng=fnrun.Key(0), memory={"it": cls(torch.zeros(3))})


@pytest.mark.parametrize("field", ["memory", "opt_state", "the root"])
def test_a_struct_says_how_it_was_called_formerly(field: str, tmp_path: Path):
    now = declared("now.here", f"Now{len(field)}", formerly=[f"gone.away:Old{len(field)}"])
    state = saved_like(now)
    if field == "opt_state":
        state = state.replace(memory={}, opt_state=now(torch.zeros(3)))
    if field == "the root":
        fields = {each.name: getattr(state, each.name) for each in dataclasses.fields(state)}
        namespace = {"__module__": "now.here", "__qualname__": "State", "__annotations__": {}}
        root: Any = tree.struct(formerly=["gone.away:State"])(type(fnrun.TrainState)("State", (fnrun.TrainState,), namespace))
        state = root(**{**fields, "memory": {}})
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
    rename(tmp_path, "now.here:Now" if field != "the root" else "now.here:", "gone.away:Old" if field != "the root" else "gone.away:")
    assert "now.here" not in next(tmp_path.glob("*/manifest.json")).read_text()
    for like in (None, state):
        back = checkpoints.restore(like)
        assert tree.equal(back, state)
        assert type(back) is type(state)


def test_a_struct_that_is_given_a_name_later_is_found_under_its_old_one(tmp_path: Path):
    checkpoints = saved(tmp_path, declared("some.where", "Later")(torch.ones(3)))
    named = declared("some.where", "Later", name="tests.Later")
    assert type(checkpoints.restore().memory["it"]) is named
    assert type(checkpoints.restore(saved_like(named)).memory["it"]) is named


def test_a_name_that_nobody_has_says_what_to_do(tmp_path: Path):
    checkpoints = saved(tmp_path, declared("some.where", "Gone", name="tests.Gone")(torch.ones(3)))
    rename(tmp_path, "tests.Gone", "tests.Nobody")
    with pytest.raises(CheckpointError, match=r"memory/it: struct tests.Nobody is not loaded: .*formerly="):
        checkpoints.restore()


def test_two_structs_of_one_name_are_refused_where_the_second_is_declared_and_one_declared_again_is_not():
    declared("one", "A", name="tests.Same")
    again = declared("one", "A", name="tests.Same")
    assert tree.struct_class("tests.Same") is again
    with pytest.raises(ValueError, match=r"struct two:B: 'tests.Same' is the name of one:A"):
        declared("two", "B", name="tests.Same")
    with pytest.raises(ValueError, match=r"struct mine:TrainState: 'fnrun.TrainState' is the name of fnrun.core.state:TrainState"):
        declared("mine", "TrainState", name="fnrun.TrainState")
    declared("one", "C", formerly=("tests.Before",))
    with pytest.raises(ValueError, match=r"struct two:D: 'tests.Before' was formerly the name of one:C"):
        declared("two", "D", formerly=("tests.Before",))
    assert tree.struct_class("tests.Same") is again
    for wrong in ({"name": ""}, {"name": 3}, {"formerly": "a:B"}, {"formerly": [""]}):
        with pytest.raises(TypeError, match="struct E: name= is a text and formerly= a list of texts"):
            declared("one", "E", **wrong)


def test_a_subclass_has_a_name_of_its_own():
    Own = tree.struct(type("Own", (Cursor,), {"__module__": "one", "__qualname__": "Own"}))
    assert (tree.struct_name(Cursor), tree.struct_name(Own), tree.struct_name(int)) == ("fnrun.Cursor", "one:Own", None)


@pytest.mark.parametrize(
    ("loop", "frame"),
    [
        ("repeat", Frame("repeat")),
        ("repeat /", Frame("repeat")),
        ("epoch_loop /train", Frame("epoch_loop", "train")),
        ("epoch_loop /a/train #2", Frame("epoch_loop", "a/train", 1)),
        ("step_loop / #12", Frame("step_loop", "", 11)),
        ("eval_loop /held out", Frame("eval_loop", "held out")),
        ("eval_loop /set #1", Frame("eval_loop", "set #1")),
        ("eval_loop /zwei\nZeilen #3", Frame("eval_loop", "zwei\nZeilen", 2)),
    ],
)
def test_a_frame_of_an_earlier_format_has_fields_and_the_same_name(loop: str, frame: Frame):
    raw = json.loads((FORMATS / "2" / "00000003-00000005" / "manifest.json").read_text())
    (old,) = [leaf for leaf in raw["leaves"] if leaf["path"] == "position/frames/0/loop"]
    old["value"] = loop
    leaves = {leaf["path"]: leaf.get("value") for leaf in migrate(raw)["leaves"]}
    assert Frame(*(leaves[f"position/frames/0/{field}"] for field in ("kind", "path", "nth"))).name == frame.name
    assert [leaves[f"position/frames/0/{field}"] for field in ("kind", "path", "nth")] == [frame.kind, frame.path, frame.nth]
    assert frame.name in (loop, f"{loop} /")


def test_what_a_stream_remembered_is_found_under_its_new_name():
    cursor = {
        "kind": "struct fnrun.state:Cursor",
        "keys": ["epoch", "memo", "batch"],
        "children": [0, {"kind": "dict", "keys": ["memo", "at"], "children": [1, {"kind": "list", "children": [2]}]}, 3],
    }
    paths = ["streams/memo/epoch", "streams/memo/memo/memo", "streams/memo/memo/at/0", "streams/memo/batch"]
    raw = {
        "format": 2,
        "structure": {"kind": "dict", "keys": ["streams"], "children": [{"kind": "dict", "keys": ["memo"], "children": [cursor]}]},
        "leaves": [{"path": path, "kind": "int", "value": i} for i, path in enumerate(paths)],
    }
    now = migrate(raw)
    (stream,) = now["structure"]["children"][0]["children"]
    assert stream["keys"] == ["epoch", "loader_state", "batch"]
    assert stream["children"][1]["keys"] == ["memo", "at"]
    assert {leaf["path"]: leaf["value"] for leaf in now["leaves"]} == {
        "streams/memo/epoch": 0,
        "streams/memo/loader_state/memo": 1,
        "streams/memo/loader_state/at/0": 2,
        "streams/memo/batch": 3,
    }


@pytest.mark.parametrize("change", ["twice", "never", "no text"])
def test_a_damaged_manifest_of_an_earlier_format_is_refused(change: str):
    raw = json.loads((FORMATS / "2" / "00000003-00000005" / "manifest.json").read_text())
    children = raw["structure"]["children"]
    if change == "twice":
        children[-1] = children[-2]["children"][-1]
    elif change == "never":
        raw["leaves"].append(raw["leaves"][-1])
    else:
        for leaf in raw["leaves"]:
            leaf.update(value=3)
    with pytest.raises((ValueError, TypeError)):
        migrate(raw)


class Kept:
    """A sink that keeps what is written."""

    def __init__(self) -> None:
        self.records: list[Any] = []

    def open(self, state: Any) -> None: ...
    def write(self, record: Any) -> None:
        self.records.append(record)

    def flush(self) -> None: ...
    def close(self) -> None: ...


def test_the_second_of_two_loops_in_one_function_logs_under_the_name_of_its_member():
    kept, seen = Kept(), []

    @fnrun.step
    def train(state: Any, batch: Any) -> Any:
        return state.replace(step=state.step + 1), {"loss": batch.sum()}

    first = fnrun.epoch_loop(train)
    second = fnrun.epoch_loop(train, observers=[fnrun.observers.log(1, to=[kept]), lambda state, _: seen.append(state.position)])

    def both(state: Any, data: Any) -> Any:
        state, _ = first(state, data)
        return second(state, data)

    state = saved_like(lambda x: x).replace(memory={})
    fnrun.sequence(train=both)(state, {"train": [torch.ones(1)] * 3})
    assert [record.metrics for record in kept.records] == [{"train/loss": 1.0}] * 3
    assert [record.epoch for record in kept.records] == [2] * 3
    frame = seen[0].frames[1]
    assert (frame.kind, frame.path, frame.nth, frame.name) == ("epoch_loop", "train", 1, "epoch_loop /train #2")
    assert seen[0].brief().startswith("sequence / at tick 0; epoch_loop /train #2 at tick 1")
