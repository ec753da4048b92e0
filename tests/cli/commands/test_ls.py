"""`fnrun ls`: each run on its line, whatever has become of it."""

from __future__ import annotations

import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fnrun
from fnrun.core import files
from tests.cli.commands.made import document, flip, newest, told, train


def states(capsys, directory: Path) -> dict[str, str]:
    return {Path(row["path"]).name: row["state"] for row in document(capsys, "ls", directory)}


def test_runs_are_listed_with_what_is_known_the_last_active_first(runs, capsys):
    rows = document(capsys, "ls", runs)
    assert [Path(row["path"]).name for row in rows] == ["other", "resumed", "whole"]
    row = rows[-1]
    assert (row["experiment"], row["state"], row["step"], row["epoch"]) == ("tests.cli.commands.made", "finished", 6, 2)
    manifest = fnrun.Run.open(runs / "whole").checkpoints.manifest("best")
    assert row["metrics"] == {
        "val/loss": {"mode": "min", "last": manifest.metrics["val/loss"], "best": manifest.metrics["val/loss"], "best_step": 6}
    }
    assert row["bytes"] == sum(path.stat().st_size for path in (runs / "whole").rglob("*") if path.is_file())
    code, out, _ = told(capsys, "ls", runs)
    assert code == 0
    (line,) = [line for line in out.splitlines() if line.endswith("/whole")]
    assert f"val/loss {manifest.metrics['val/loss']:.4f} (best " in line


def test_a_run_says_whether_it_is_at_work(runs, tmp_path, capsys):
    for name in ("working", "killed", "damaged", "new", "status"):
        shutil.copytree(runs / "whole", tmp_path / name)
    shutil.rmtree(tmp_path / "new" / "checkpoints")
    for name in ("status.json", "metrics.jsonl"):
        (tmp_path / "new" / name).unlink()
    (tmp_path / "damaged" / "config.yaml").write_text("experiment: [")
    (tmp_path / "status" / "status.json").write_text("{")
    with fnrun.Run.open(tmp_path / "working").writing():
        shutil.copy(tmp_path / "working" / "status.json", tmp_path / "killed" / "status.json")
        found = states(capsys, tmp_path)
    assert found == {"working": "running", "killed": "crashed", "damaged": "damaged", "new": "new", "status": "damaged"}
    rows = {Path(row["path"]).name: row for row in document(capsys, "ls", tmp_path)}
    assert "config.yaml is damaged" in rows["damaged"]["problems"][0]
    assert rows["damaged"]["metrics"]["val/loss"]["last"] is not None  # what can be read is there
    assert "status.json is damaged" in rows["status"]["problems"][0]
    assert rows["killed"]["reason"] == "killed"


def test_runs_behind_links_are_found_once(runs, tmp_path, capsys):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "scratch").symlink_to(runs)
    (tmp_path / "here" / "again").symlink_to(runs / "whole")
    (tmp_path / "here" / "round").symlink_to(tmp_path / "here")
    assert sorted(states(capsys, tmp_path / "here")) == ["again", "other", "resumed"]


def test_a_damaged_manifest_is_said(runs, tmp_path, capsys):
    shutil.copytree(runs / "whole", tmp_path / "whole")
    (newest(tmp_path / "whole") / "manifest.json").write_text("{")
    (row,) = document(capsys, "ls", tmp_path)
    assert row["problems"] == [f"the manifest of {newest(tmp_path / 'whole')} is damaged"]
    assert set(row["metrics"]) == {"train/loss", "val/loss", "val/accuracy"}  # those of such names, for want of a monitor
    assert row["metrics"]["val/accuracy"]["mode"] == "max"


@pytest.mark.parametrize("manifest", ["[]", '{"monitors": {"val/loss": 3}}', '{"monitor": ["val/loss"], "mode": 3}', "\xff"])
def test_a_manifest_of_another_shape_is_damaged_and_hides_no_other_run(manifest, runs, tmp_path, capsys):
    for name in ("whole", "other"):
        shutil.copytree(runs / name, tmp_path / name)
    (newest(tmp_path / "whole") / "manifest.json").write_text(manifest, encoding="latin-1")
    rows = {Path(row["path"]).name: row["problems"] for row in document(capsys, "ls", tmp_path)}
    assert rows == {"other": [], "whole": [f"the manifest of {newest(tmp_path / 'whole')} is damaged"]}


def test_monitors_of_the_first_format_are_read(runs, tmp_path, capsys):
    shutil.copytree(runs / "whole", tmp_path / "whole")
    (newest(tmp_path / "whole") / "manifest.json").write_text('{"monitor": "val/accuracy", "mode": "max"}')
    (row,) = document(capsys, "ls", tmp_path)
    assert {name: metric["mode"] for name, metric in row["metrics"].items()} == {"val/accuracy": "max"}


def test_a_config_of_another_program_is_no_run(runs, tmp_path, capsys):
    (tmp_path / "hydra").mkdir()
    (tmp_path / "hydra" / "config.yaml").write_text("model: big\n")
    assert told(capsys, "ls", tmp_path) == (0, f"no runs in or below {tmp_path}: it is a directory with no run in or below it\n", "")
    assert told(capsys, "ls", tmp_path / "hydra" / "config.yaml")[0] == 2


def test_checkpoints_without_a_run_are_told_from_runs(runs, tmp_path, capsys):
    shutil.copytree(runs / "whole" / "checkpoints", tmp_path / "readme")
    told_of = f"no runs in or below {tmp_path}: it holds checkpoints, in readme, and a run is what fnrun.main or Run.create makes\n"
    assert told(capsys, "ls", tmp_path) == (0, told_of, "")


def test_a_run_is_not_searched_for_others(runs, tmp_path, capsys):
    shutil.copytree(runs / "whole", tmp_path / "whole")
    shutil.copytree(runs / "other", tmp_path / "whole" / "other")
    assert list(states(capsys, tmp_path)) == ["whole"]


@pytest.mark.parametrize("columns", [80, 140])
def test_in_a_terminal_no_path_is_cut(columns, runs):
    """In 80 columns a run takes two lines, of which only the path may be too long for the terminal; in 140 one line."""
    above, below = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(columns)}
    with subprocess.Popen([sys.executable, "-m", "fnrun", "ls", str(runs)], stdout=below, env=environment) as process:
        os.close(below)
        printed = b""
        while chunk := _read(above):
            printed += chunk
    assert process.returncode == 0
    lines = printed.decode().replace("\r", "").splitlines()
    for name in ("whole", "resumed", "other"):
        (line,) = [line for line in lines if line.endswith(str(runs / name))]
        assert len(line) - len(str(runs / name)) < 60 or columns == 140
    assert any("experiment" in line.split() for line in lines)


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 4096)
    except OSError:  # the other side was closed
        return b""


def test_flipped_bits_of_the_arrays_are_not_its_concern(runs, tmp_path, capsys):
    from tests.cli.commands.made import largest_file

    shutil.copytree(runs / "whole", tmp_path / "whole")
    flip(largest_file(newest(tmp_path / "whole")))
    assert states(capsys, tmp_path) == {"whole": "finished"}


def test_of_a_long_log_the_end_is_read_and_the_best_is_what_checkpoints_say(runs, tmp_path, capsys, monkeypatch):
    """The same is shown as where the whole of it is read, as far as something is monitored."""
    from fnrun.cli.commands import ls

    (whole,) = document(capsys, "ls", runs / "whole")
    monkeypatch.setattr(ls, "TAIL", 1)
    (end,) = document(capsys, "ls", runs / "whole")
    assert whole["metrics"]["val/loss"]["best"] is not None
    assert end == {**whole, "idle": end["idle"]}


def test_a_log_of_any_length_is_read_from_its_end(tmp_path, capsys, monkeypatch):
    run = train(tmp_path / "run")
    lines = run.metrics.read_bytes()
    run.metrics.write_bytes(b'{"step": 0, "train/loss": "NaN"}\n' * 100_000 + lines)
    read = 0

    def counting(file, *args):
        nonlocal read
        for begin, line in through(file, *args):
            read += 1
            yield begin, line

    through = files.lines_from_the_end
    monkeypatch.setattr(files, "lines_from_the_end", counting)
    (row,) = document(capsys, "ls", run.path)
    assert (row["step"], row["epoch"], row["metrics"]["val/loss"]["best"] is not None) == (6, 2, True)
    assert 0 < read < 10_000
