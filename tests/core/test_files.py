"""Files are written whole or not at all, and never through a link to somewhere else."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest
import torch

import fnrun
from fnrun import observers
from fnrun.checkpoint import Checkpoints, export, load_from, params_from
from fnrun.cli.commands import main
from fnrun.core import files
from tests.experiments.tiny import tiny


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path):
    path = tmp_path / "a"
    files.write(path, b"old")

    def failing() -> None:
        with files.replacing(path) as file:
            file.write(b"half")
            raise KeyError

    with pytest.raises(KeyError):
        failing()
    assert [path.read_bytes(), *os.listdir(tmp_path)] == [b"old", "a"]


def test_what_a_link_points_to_stays_what_it_is(tmp_path: Path):
    outside, path = tmp_path / "outside", tmp_path / "run" / "config.yaml"
    outside.write_bytes(b"mine")
    path.parent.mkdir()
    path.symlink_to(outside)
    files.write(path, b"new")
    assert (outside.read_bytes(), path.read_bytes(), path.is_symlink()) == (b"mine", b"new", False)


@pytest.mark.parametrize("mode", ["a", "r+b"])
@pytest.mark.parametrize("kind", ["link", "dangling", "pipe"])
def test_only_files_are_gone_on_with(mode: str, kind: str, tmp_path: Path):
    outside, path = tmp_path / "outside", tmp_path / "metrics.jsonl"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(outside)
    if kind == "link":
        outside.write_bytes(b"mine")
    with pytest.raises(OSError, match=r"it is (a link, and links are not followed|no file)"):
        files.opened(path, mode)
    assert not outside.exists() or outside.read_bytes() == b"mine"


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_permissions_are_those_of_any_new_file(suffix: str, tmp_path: Path):
    before = os.umask(0o027)
    try:
        files.write(tmp_path / "a", b"")
        export(fnrun.TrainState.create(torch.nn.Linear(2, 1)), tmp_path / f"b.{suffix}")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o640}


def test_a_file_system_that_makes_nothing_durable_is_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refused(number: int):
        def fsync(descriptor: int) -> None:
            raise OSError(number, os.strerror(number))

        return fsync

    monkeypatch.setattr(os, "fsync", refused(errno.EINVAL))
    tiny("train", "--epochs", 1, "--out", tmp_path / "run")
    assert fnrun.Run.open(tmp_path / "run").checkpoints.latest() == 4
    monkeypatch.setattr(os, "fsync", refused(errno.EIO))
    with pytest.raises(OSError, match=os.strerror(errno.EIO)) as caught:
        files.write(tmp_path / "a", b"")
    assert (caught.value.filename, (tmp_path / "a").exists()) == (str(tmp_path / "a"), False)


#: What a run writes, or wrote half, with names that others can know.
KNOWN = [".config.yaml.new", ".status.json.new", "status.json", "environment.json", "curves.png", "metrics.jsonl", "run.log", "config.yaml"]


@pytest.mark.parametrize("name", KNOWN)
def test_a_strangers_run_writes_over_nothing_outside_of_it(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run, outside = tmp_path / "run", tmp_path / "outside"
    tiny("train", "--epochs", 1, "--out", run)
    here = run / name
    before = here.read_bytes() if here.exists() else b"mine"
    outside.write_bytes(before)
    here.unlink(missing_ok=True)
    here.symlink_to(outside)
    refused = name in ("metrics.jsonl", "run.log")
    said = tiny("resume", run, "--epochs", 2, code=refused)
    assert not refused or f"error: cannot write {here}: it is a link" in said
    assert main(["gc", str(run), "--keep", "1", "--yes"]) == 0
    assert outside.read_bytes() == before


def test_gc_takes_what_killed_processes_left_half_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = tmp_path / "run"
    tiny("train", "--epochs", 1, "--out", run)
    left = [run / files.temporary_name(), run / "checkpoints" / files.temporary_name(), run / "checkpoints" / ".tmp-00000004-00000005"]
    for path in left:
        path.write_bytes(b"half")
    link = run / files.temporary_name()
    link.symlink_to(tmp_path)
    mine = run / ".tmp-notes"
    mine.write_bytes(b"mine")
    assert main(["gc", str(run), "--yes"]) == 0
    assert not any(os.path.lexists(path) for path in [*left, link])
    assert (mine.exists(), run.exists(), main(["gc", str(run)])) == (True, True, 0)
    assert "nothing to delete" in capsys.readouterr().out


URLS = ["s3://bucket/run", "gs://bucket/run", "hdfs://node/run", "file:///tmp/run", "https://host/run.safetensors"]

DOORS = {
    "Checkpoints": Checkpoints,
    "Checkpoints.at": Checkpoints.at,
    "Run.create": lambda path: fnrun.Run.create("some.experiment", {}, path),
    "Run.open": fnrun.Run.open,
    "export": lambda path: export(fnrun.TrainState.create(torch.nn.Linear(2, 1)), f"{path}.safetensors"),
    "export from": lambda path: export(path, "weights.safetensors"),
    "load_from": lambda path: load_from(path, fnrun.TrainState.create(torch.nn.Linear(2, 1))),
    "params_from": params_from,
    "jsonl": observers.jsonl,
    "csv": observers.csv,
    "tensorboard": observers.tensorboard,
    "wandb": lambda path: observers.wandb(path, project="p", mode="offline"),
    "predictions": observers.predictions,
    "profile": lambda path: observers.profile(range(1, 2), path),
    "debug_nonfinite": lambda path: observers.debug_nonfinite(lambda state, batch: (state, {}), torch.nn.Linear(2, 1), path),
}


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize("door", DOORS)
def test_a_url_is_no_directory_of_this_machine(door: str, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for given in (url, Path(url)):
        with pytest.raises(ValueError, match="is a URL, and fnrun reads and writes local files only"):
            DOORS[door](given)
    assert list(tmp_path.iterdir()) == []


def test_home_is_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    tiny("train", "--epochs", 1, "--out=~/run")
    tiny("resume", "~/run", "--epochs", 2)
    tiny("resume", "--auto", "~/auto", "--epochs", 1)
    assert "step 8" in tiny("evaluate", "~/run")
    assert main(["fork", "~/run", "--step", "4", "--out", "~/fork"]) == 0
    assert main(["show", "~/run"]) == 0
    assert main(["plot", "~/run", "--out", "~/curves.png"]) == 0
    assert main(["export", "~/run", "--out", "~/weights.pt"]) == 0
    assert Checkpoints("~/run/checkpoints").steps() == [4, 8]
    assert params_from("~/weights.pt").keys() == load_from("~/run", fresh()).params.keys()
    sink = observers.jsonl("~/own.jsonl")
    sink.open(fresh())
    sink.close()
    made = sorted(path.name for path in home.iterdir() if not path.name.startswith("."))  # matplotlib has a place of its own
    assert made == ["auto", "curves.png", "fork", "own.jsonl", "run", "weights.pt"]
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def fresh() -> fnrun.TrainState:
    model = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Dropout(0.5), torch.nn.Linear(4, 1))
    return fnrun.TrainState.create(model, fnrun.optim.sgd(0.1))


@pytest.mark.parametrize("command", ["fork", "plot", "export", "ls", "show", "gc", "train"])
def test_on_the_command_line_it_is_one_line(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    if command == "train":
        said = tiny("train", "--out", "s3://bucket/run", code=1)
        assert "is a URL" in tiny("resume", "--auto", "s3://bucket/run", code=1)
    else:
        args = {"fork": ["run", "--step", "4", "--out"], "plot": ["run", "--out"], "export": ["run", "--out"]}.get(command, [])
        assert main([command, *args, "s3://bucket/run.png"]) == 2
        said = capsys.readouterr().err
    assert (said.count("\n"), "error: s3:/bucket/run" in said, "is a URL" in said) == (1, True, True)
    assert list(tmp_path.iterdir()) == []
