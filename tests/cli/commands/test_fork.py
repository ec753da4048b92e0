"""A fork goes on from a checkpoint of another run, says so, and leaves the other run alone."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import fnrun
from fnrun.checkpoint import Checkpoints, store
from fnrun.cli.commands import main
from fnrun.runs.verify import verify
from tests.runs.replayed import command, trained


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> fnrun.Run:
    """Checkpoints of steps 5, 10 and 15."""
    return trained(tmp_path_factory.mktemp("runs") / "parent", "--epochs", 3)


def fork(*args: Any) -> None:
    assert main(["fork", *map(str, args)]) == 0


def refused(capsys: pytest.CaptureFixture[str], *args: Any) -> str:
    """The one line of the error."""
    assert main(["fork", *map(str, args)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def bits(run: Path, step: int) -> Any:
    """All leaves of a checkpoint, as their digests and values."""
    return [
        (leaf.path, [piece.digest for piece in leaf.pieces], leaf.value) for leaf in Checkpoints(run / "checkpoints").manifest(step).leaves
    ]


def files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def lines(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in json.loads(line).items() if k != "clock"} for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_it_is_as_private_as_its_parent(parent, tmp_path):
    path = shutil.copytree(parent.path, tmp_path / "private")
    path.chmod(0o700)
    fork(path, "--step", "latest", "--out", tmp_path / "new")
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700


def test_a_fork_ends_in_the_bits_of_its_parent(parent, tmp_path, capsys):
    before = files(parent.path)
    new = tmp_path / "new"
    fork(parent.path, "--step", 5, "--out", new)
    said = capsys.readouterr().out
    assert f"{new}: forked from {parent.path} at step 5" in said
    assert f"python -m tests.runs.replayed resume {new}" in said
    assert sorted(path.name for path in new.iterdir()) == ["checkpoints", "config.yaml", "environment.json", "metrics.jsonl"]
    assert files(new / "checkpoints") == {name: data for name, data in files(parent.checkpoints.directory).items() if "00000005" in name}
    assert lines(new) == [line for line in lines(parent.path) if line["ticks"] <= 9]
    command("resume", new, "--log-level", "error")
    assert [bits(new, step) for step in (5, 10, 15)] == [bits(parent.path, step) for step in (5, 10, 15)]
    assert lines(new) == lines(parent.path)
    assert files(parent.path) == before
    assert [pair.outcome for pair in verify(new, from_start=True)] == ["unproven", "equal", "equal"]


def test_ancestry_is_recorded_through_generations(parent, tmp_path):
    child, grandchild = tmp_path / "a" / "child", tmp_path / "b" / "deeper" / "grandchild"
    fork(parent.path, "--step", 5, "--out", child, "--epochs", 4)
    command("resume", child, "--log-level", "error")
    fork(child, "--step", "best:val/loss", "--out", grandchild, "--donate", "--epochs", 5)
    run = fnrun.Run.open(grandchild)
    first, second = run.history
    assert (grandchild / first["forked"]).resolve() == parent.path.resolve()
    assert (first["step"], first["ticks"], first["changed"]) == (5, 9, {"epochs": [3, 4]})
    assert second["forked"] == "../../../a/child"
    assert second["changed"] == {"donate": [False, True], "epochs": [4, 5]}
    for ancestor, entry in ((parent.path, first), (child, second)):
        place = ancestor / "checkpoints" / Checkpoints(ancestor / "checkpoints").find(entry["step"]).name
        assert hashlib.sha256((place / store.MANIFEST).read_bytes()).hexdigest() == entry["sha256"]
    command("resume", grandchild, "--log-level", "error")
    assert Checkpoints(grandchild / "checkpoints").steps()[-1] == 25
    assert {pair.outcome for pair in verify(grandchild)} == {"equal"}


def test_a_fork_of_a_fork_at_its_first_checkpoint(parent, tmp_path, capsys):
    """What the child changed never acted on that checkpoint: the grandchild has the config of the checkpoint, and says so."""
    child, grandchild = tmp_path / "child", tmp_path / "grandchild"
    fork(parent.path, "--step", 5, "--out", child, "--epochs", 4)
    capsys.readouterr()
    fork(child, "--step", "latest", "--out", grandchild)
    assert f"what {child} changed later stays there: epochs 3 -> 4\n" in capsys.readouterr().out
    run = fnrun.Run.open(grandchild)
    assert run.config["epochs"] == 3
    assert [(entry["forked"].rpartition("/")[2], entry["changed"]) for entry in run.history] == [("parent", {}), ("child", {})]
    (pair,) = verify(grandchild, from_start=True)
    assert f"copied from {parent.path} when the run was forked" in pair.reason  # by the child, which proves it no more than this one


def test_a_change_at_the_checkpoint_belongs_to_what_is_left_behind(tmp_path):
    run = tmp_path / "run"
    command("train", "--out", run, "--log-level", "error", "--epochs", 1)
    command("resume", run, "--log-level", "error", "--epochs", 2)
    command("resume", run, "--log-level", "error", "--epochs", 3)
    fork(run, "--step", 10, "--out", tmp_path / "new")
    changes = [entry["changed"] for entry in fnrun.Run.open(tmp_path / "new").history]
    assert changes == [{"epochs": [1, 2]}, {}]
    assert fnrun.Run.open(tmp_path / "new").config["epochs"] == 2


def test_a_stopped_parent(tmp_path):
    """A fork of it is stopped too, unless its config is another: then it goes on, here to the next stop."""
    run, same, other = trained(tmp_path / "run", "--epochs", 3, "--stop-after", 7), tmp_path / "same", tmp_path / "other"
    fork(run.path, "--step", 7, "--out", same)
    fork(run.path, "--step", 7, "--out", other, "--stop-after", 12)
    command("resume", same, "--log-level", "error")
    command("resume", other, "--log-level", "error")
    assert Checkpoints(same / "checkpoints").steps() == [7]
    assert Checkpoints(other / "checkpoints").steps() == [7, 10, 12]
    assert {pair.outcome for pair in verify(other)} == {"equal"}


def test_json(parent, tmp_path, capsys):
    fork(parent.path, "--step", "latest", "--out", tmp_path / "new", "--epochs", 4, "--json")
    said = json.loads(capsys.readouterr().out)
    assert (said["step"], said["changed"]) == (15, {"epochs": [3, 4]})
    assert (tmp_path / "new" / said["forked"]).resolve() == parent.path.resolve()


def test_without_flags_the_experiment_is_not_imported(parent, tmp_path):
    config = shutil.copytree(parent.path, tmp_path / "parent") / "config.yaml"
    config.write_text(config.read_text().replace("tests.runs.replayed", "no_such_module"))
    fork(tmp_path / "parent", "--step", 5, "--out", tmp_path / "new")
    assert fnrun.Run.open(tmp_path / "new").experiment == "no_such_module"


# --- refused -----------------------------------------------------------------------------------------------------------


def test_what_is_wrong_is_one_line_and_leaves_nothing(parent, tmp_path, capsys):
    new = tmp_path / "new"
    assert "Perhaps you meant: --epochs INT" in refused(capsys, parent.path, "--step", 5, "--out", new, "--epoch", 8)
    assert "there is no checkpoint of step 6; there are: 5, 10, 15" in refused(capsys, parent.path, "--step", 6, "--out", new)
    assert "'val/los' monitored; monitored: val/loss" in refused(capsys, parent.path, "--step", "best:val/los", "--out", new)
    assert "not 'newest'" in refused(capsys, parent.path, "--step", "newest", "--out", new)
    assert "a place of its own" in refused(capsys, parent.path, "--step", 5, "--out", parent.path / "new")
    assert "is no run" in refused(capsys, tmp_path, "--step", 5, "--out", new)
    assert list(tmp_path.iterdir()) == []
    (new / "kept").mkdir(parents=True)
    assert "already holds" in refused(capsys, parent.path, "--step", 5, "--out", new)
    assert [path.name for path in tmp_path.rglob("*")] == ["new", "kept"]


def test_a_damaged_checkpoint_is_not_copied(parent, tmp_path, capsys):
    run = shutil.copytree(parent.path, tmp_path / "parent")
    file = next((run / "checkpoints" / "00000005-00000009" / "arrays" / "state").glob("*/0*"))
    file.write_bytes(file.read_bytes()[:-1])
    assert "Lost: " in refused(capsys, run, "--step", 5, "--out", tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["parent"]


def test_a_checkpoint_that_its_run_deletes_meanwhile(parent, tmp_path, capsys, monkeypatch):
    """The parent may be training, and prunes: here right between the look at a checkpoint and its copy."""
    run = shutil.copytree(parent.path, tmp_path / "parent")
    check = store.check_files

    def checked(directory: Path, manifest: Any) -> None:
        check(directory, manifest)
        store.remove(directory)

    monkeypatch.setattr(store, "check_files", checked)
    assert "was deleted while it was copied" in refused(capsys, run, "--step", 5, "--out", tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["parent"]
