"""`fnrun gc`: nothing goes that may be needed, nothing goes unasked, and nothing goes by half."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

import fnrun
from tests.cli.commands.made import Config, document, flip, largest_file, newest, told, train


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five epochs, of which the last is the best."""
    return train(tmp_path_factory.mktemp("long") / "long", config=Config(epochs=5)).path


@pytest.fixture
def run(long: Path, tmp_path: Path) -> Path:
    """A copy with a save that was killed, a deletion that was killed, and a future that was given up."""
    path = tmp_path / "run"
    shutil.copytree(long, path)
    for name in (".tmp-00000018-00000030", ".tmp-delete-00000001-00000001", "abandoned-00000018-00000030"):
        shutil.copytree(newest(path), path / "checkpoints" / name)
    return path


def names(path: Path) -> list[str]:
    return sorted(path.name for path in (path / "checkpoints").iterdir())


def superfluous(capsys: Any, *args: Any) -> list[str]:
    return sorted(row["name"] for row in document(capsys, "gc", *args)["superfluous"])


def whole(path: Path) -> list[int]:
    """The steps that restore."""
    checkpoints = fnrun.Run.open(path).checkpoints
    return [checkpoints.restore(step=step).step for step in checkpoints.steps()]


LEFT = [".tmp-00000018-00000030", ".tmp-delete-00000001-00000001", "abandoned-00000018-00000030"]


def test_it_is_shown_first_and_deleted_with_yes(run, capsys):
    before, status = names(run), (run / "status.json").read_bytes()
    code, out, err = told(capsys, "gc", run)
    assert (code, err) == (0, "")
    for name, reason in zip(LEFT, ("half written", "half deleted", "given up when the run went on from an older checkpoint"), strict=True):
        (line,) = [line for line in out.splitlines() if line.endswith(f"/{name}")]
        assert reason in line
    assert "would be deleted; --yes deletes" in out
    assert names(run) == before
    code, out, _ = told(capsys, "gc", run, "--yes")
    assert code == 0
    assert out.splitlines()[-1].endswith(" deleted")
    assert names(run) == [name for name in before if name not in LEFT]
    assert whole(run) == [3, 6, 9, 12, 15]
    assert (run / "status.json").read_bytes() == status
    assert not (run / "run.lock").exists()
    assert told(capsys, "gc", run)[1] == "nothing to delete\n"


def test_old_checkpoints_go_and_the_newest_and_the_best_stay(run, capsys):
    def old(*flags: Any) -> list[int]:
        return [int(name[:8]) for name in superfluous(capsys, run, *flags) if name[0].isdigit()]

    checkpoints = fnrun.Run.open(run).checkpoints
    losses = {step: checkpoints.manifest(step).metrics["val/loss"] for step in checkpoints.steps()}
    best = min(losses, key=lambda step: losses[step])
    assert old("--keep", 2) == [step for step in (3, 6, 9) if step != best]
    assert old("--keep", 1, "--keep-every", 6) == [step for step in (3, 9) if step != best]
    assert told(capsys, "gc", run, "--keep", 1, "--yes")[0] == 0
    assert whole(run) == sorted({best, 15})


def test_what_is_damaged_stays(run, capsys):
    flip(largest_file(run / "checkpoints" / "00000003-00000005"))
    (run / "checkpoints" / "00000006-00000010" / "manifest.json").write_text("{")
    found = document(capsys, "gc", run, "--keep", 1, "--yes")
    assert [row["name"] for row in found["superfluous"] if row["name"][0].isdigit()] == ["00000009-00000015", "00000012-00000020"]
    assert [note.split(": ")[1] for note in found["notes"]] == [
        f"{name} is damaged, and stays" for name in ("00000003-00000005", "00000006-00000010")
    ]
    assert names(run) == ["00000003-00000005", "00000006-00000010", "00000015-00000025"]


def test_old_checkpoints_stay_where_the_one_that_was_to_stay_is_damaged(run, capsys):
    flip(largest_file(newest(run)))
    found = document(capsys, "gc", run, "--keep", 1, "--yes")
    assert sorted(row["name"] for row in found["superfluous"]) == LEFT
    assert "old checkpoints stay, for 00000015-00000025, which was to stay in their place, is damaged" in found["notes"][-1]
    assert len(names(run)) == 5


def test_a_run_that_is_written_is_refused_and_others_are_not(run, long, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "busy")
    before = names(run)
    with fnrun.Run.open(tmp_path / "busy").writing():
        code, out, err = told(capsys, "gc", tmp_path / "busy", run)
        assert code == 2
        assert f"{tmp_path / 'busy'} is being written" in err
        assert str(tmp_path / "busy") not in out
        code, out, err = told(capsys, "gc", tmp_path / "busy", run, "--yes")
        assert (code, err.count("\n")) == (2, 1)
        assert f"{tmp_path / 'busy'} is being written by this process" in err
    assert names(tmp_path / "busy") == before
    assert names(run) == [name for name in before if name not in LEFT]


def test_by_default_it_is_about_all_runs_below_runs(run, monkeypatch, capsys):
    monkeypatch.chdir(run.parent)
    assert told(capsys, "gc")[2].startswith("error: there is no directory runs here")
    (run.parent / "runs").mkdir()
    run.rename(run.parent / "runs" / "run")
    assert superfluous(capsys) == LEFT


@pytest.mark.parametrize("file", ["config.yaml", "status.json"])
def test_a_damaged_run_keeps_no_other_from_being_cleaned_up(file, run, monkeypatch, capsys):
    (run.parent / "runs").mkdir()
    damaged, other = run.parent / "runs" / "a", run.parent / "runs" / "b"
    shutil.copytree(run, damaged)
    run.rename(other)
    (damaged / file).write_text("{")
    before = names(damaged)
    monkeypatch.chdir(run.parent)
    for flags in ([], ["--yes"]):
        code, out, err = told(capsys, "gc", *flags)
        assert (code, err.count("\n")) == (2, 1)
        assert f"runs/a/{file} is damaged" in err
        assert "runs/b/checkpoints/abandoned-" in out
    assert names(damaged) == before
    assert (damaged / file).read_text() == "{"
    assert not set(LEFT) & set(names(other))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--keep", 0], "--keep is at least 1, not 0"),
        (["--keep", 1, "--keep-every", -1], "--keep-every is at least 1, not -1"),
        (["--keep-every", 5], "it goes with --keep"),
    ],
)
def test_messages(flags, message, run, capsys):
    code, out, err = told(capsys, "gc", run, *flags, "--yes")
    assert (code, out) == (2, "")
    assert message in err
    assert len(names(run)) == 8
