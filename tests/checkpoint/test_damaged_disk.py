"""Disks that fail while a training saves: it goes on, says what was not saved and why, and tries the next save in full."""

from __future__ import annotations

import json
import logging
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import fnrun
from fnrun import observers
from fnrun.checkpoint import CheckpointError, Checkpoints, store
from fnrun.core import tree
from fnrun.core.position import Position
from fnrun.runs.writer import LOCK, RunError, status, writing
from tests.torture.flips import sign
from tests.torture.training import BATCHES, OPTIMIZER, SERVER, Net, fresh, loss, parameters

ROOT = Path(__file__).parents[2]


def training(checkpoints: Checkpoints, before: Callable[[int], None] = lambda step: None, *, donate: bool = False, **options: Any) -> Any:
    """A program of 8 steps, each of which is saved; `before` is called once the save before it is done and its own has not begun."""

    def watch(state: Any, metrics: Any) -> None:
        checkpoints.entries()
        before(state.step)

    saving = observers.checkpoint(checkpoints, **options)
    return fnrun.step_loop(fnrun.make_train_step(Net(), loss, OPTIMIZER), 8, observers=[watch, saving], donate=donate)


def exactly(state: Any, step: int) -> bool:
    return state.step == step and tree.equal(dict(state.params), parameters(step))


# --- troubles ----------------------------------------------------------------------------------------------------------


def too_large(folder: Path) -> Iterator[str]:
    """No file may grow beyond 100 kB: what a quota does."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    yield "File too large"
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def in_the_way(folder: Path) -> Iterator[str]:
    """The directory is replaced by a file, and comes back."""
    folder.rename(folder.with_name("away"))
    folder.write_text("")
    yield "Not a directory"
    folder.unlink()
    folder.with_name("away").rename(folder)


def full(folder: Path) -> Iterator[str]:
    """The last block of the disk is taken."""
    filler = os.open(folder.with_name("filler"), os.O_WRONLY | os.O_CREAT)
    try:
        while True:
            os.write(filler, bytes(4096))
    except OSError:
        os.close(filler)
    yield "No space left on device: it takes 0.7 MB, 0.0 MB are free"
    folder.with_name("filler").unlink()


def read_only(folder: Path) -> Iterator[str]:
    """What a kernel does with a disk whose errors it cannot bear."""
    subprocess.run(["mount", "-o", "remount,ro", folder.parent], check=True)
    yield "Read-only file system"
    subprocess.run(["mount", "-o", "remount,rw", folder.parent], check=True)


def survives(folder: Path, trouble: Callable[[Path], Iterator[str]], *, donate: bool) -> None:
    """A training whose steps 3 and 4 meet the trouble: both are told, nothing else is, and everything before and after is on disk."""
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    logging.getLogger().addHandler(handler)
    checkpoints, course = Checkpoints(folder), trouble(folder)
    causes: list[str] = []

    def before(step: int) -> None:
        if step == 3:
            causes.append(next(course))
        elif step == 5:
            next(course, None)

    state, _ = training(checkpoints, before, donate=donate)(fresh(), BATCHES)
    logging.getLogger().removeHandler(handler)
    for step, text in zip((3, 4), told, strict=True):
        assert re.fullmatch(
            rf"{folder}: step {step} was not saved: \[Errno \d+\] .*\. Training goes on, the next save is tried in full", text
        ), text
        assert causes[0] in text
        assert "\n" not in text
    assert exactly(state, 8)
    assert checkpoints.steps() == [1, 2, 5, 6, 7, 8]
    assert all(exactly(checkpoints.restore(step=step), step) for step in checkpoints.steps())
    assert checkpoints.garbage() == []


@pytest.mark.parametrize("donate", [False, True])
def test_a_file_in_the_way_of_the_directory(donate: bool, tmp_path: Path) -> None:
    survives(tmp_path / "checkpoints", in_the_way, donate=donate)


def test_files_that_may_not_grow(tmp_path: Path) -> None:
    process = SERVER.Process(target=survives, args=(tmp_path / "checkpoints", too_large), kwargs={"donate": True})
    process.start()
    process.join(60)
    assert process.exitcode == 0


NAMESPACE = ["unshare", "--map-root-user", "--mount"]
MOUNTED = 'mount -t tmpfs -o size=7m tmpfs "$0" && exec "$@"'


def test_a_full_and_a_read_only_disk(tmp_path: Path) -> None:
    """A disk of 7 MB in a mount namespace of its own, so that nothing is mounted that others see."""
    if shutil.which("unshare") is None or subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode:
        pytest.skip("this machine gives no namespace to mount a disk in")
    done = subprocess.run(
        [*NAMESPACE, "sh", "-c", MOUNTED, str(tmp_path), sys.executable, "-m", __name__, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    lines = done.stderr.splitlines()
    assert done.returncode == 0, done.stderr
    assert len(lines) == 4, "one line for each save that failed, and nothing of orbax:\n" + done.stderr


def test_a_directory_that_is_deleted_is_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
    training(checkpoints, lambda step: shutil.rmtree(tmp_path / "run") if step == 5 else None)(fresh(), BATCHES)
    assert [record.getMessage() for record in caplog.records] == [
        f"{checkpoints.directory} was gone, and all that was saved there; it is made again"
    ]
    assert checkpoints.steps() == [5, 6, 7, 8]


# --- giving up ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("mended", [False, True])
def test_a_run_that_gives_up_hands_its_state_over(donate: bool, mended: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Steps 3, 4 and 5 fail; the program ends in step 6, whose own save succeeds where the disk is mended by then."""
    checkpoints, course = Checkpoints(tmp_path / "checkpoints"), in_the_way(tmp_path / "checkpoints")

    def before(step: int) -> None:
        if step in ((3, 6) if mended else (3,)):
            next(course, None)

    with pytest.raises(CheckpointError, match=r"step 5 was not saved: .*Not a directory") as error:
        training(checkpoints, before, donate=donate)(fresh(), BATCHES)
    assert exactly(error.value.state, 6)
    if not mended:
        assert any("step 6 was not saved" in note for note in error.value.__notes__)
        next(course, None)
    assert checkpoints.steps() == ([1, 2, 6] if mended else [1, 2])
    state, _ = training(checkpoints, donate=donate)(error.value.state, BATCHES)
    assert exactly(state, 8)
    assert checkpoints.steps()[-2:] == [7, 8]
    assert [path.name for path in checkpoints.garbage()] == []


@pytest.mark.parametrize("mended", [False, True])
def test_the_last_save_is_tried_twice(mended: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Where it is mended, that is done by whoever reads the line which says that the save has failed."""
    checkpoints, course = Checkpoints(tmp_path / "checkpoints"), in_the_way(tmp_path / "checkpoints")

    def before(step: int) -> None:
        if step == 8:
            next(course)
            caplog.handler.addFilter(lambda record: (next(course, None) if mended else None, True)[1])

    program = training(checkpoints, before, monitor="loss")
    if not mended:
        with pytest.raises(CheckpointError, match=r"step 8 was not saved: .*Not a directory") as error:
            program(fresh(), BATCHES)
        assert exactly(error.value.state, 8)
        next(course, None)
        assert checkpoints.latest() == 7
        return
    program(fresh(), BATCHES)
    assert "step 8 was not saved" in caplog.text
    assert exactly(checkpoints.restore(), 8)
    assert "loss" in checkpoints.manifest().metrics


# --- clocks ------------------------------------------------------------------------------------------------------------

FUTURE = 7_000_000_000  # in 2191


def test_the_order_of_checkpoints_does_not_come_from_a_clock(tmp_path: Path) -> None:
    """The clock was set back: what is on disk comes from the future, the older the later."""
    checkpoints = Checkpoints(tmp_path)
    program = training(checkpoints, lambda step: None, keep=4)
    state, _ = program(fresh(), BATCHES)
    for step in (5, 6, 7):
        (directory,) = tmp_path.glob(f"{step:08d}-*")
        manifest = json.loads((directory / store.MANIFEST).read_text())
        sign(directory, json.dumps({**manifest, "created": f"{2200 - step}-01-01T00:00:00+00:00"}).encode())
        for path in (directory, *directory.rglob("*")):
            os.utime(path, (FUTURE - step, FUTURE - step))
    assert (checkpoints.steps(), checkpoints.latest()) == ([5, 6, 7, 8], 8)
    checkpoints.save(state.replace(step=9, position=Position(ticks=9)))
    checkpoints.prune(2)
    assert checkpoints.steps() == [8, 9]


def dies_writing(run: Path) -> None:
    with writing(run):
        os._exit(1)


def test_a_lock_from_the_future_of_a_process_that_died_keeps_nobody_out(tmp_path: Path) -> None:
    process = SERVER.Process(target=dies_writing, args=(tmp_path,))
    process.start()
    process.join(60)
    os.utime(tmp_path / LOCK, (FUTURE, FUTURE))
    assert (status(tmp_path).state, status(tmp_path).reason) == ("crashed", "killed")
    with writing(tmp_path):
        os.utime(tmp_path / LOCK, (FUTURE, FUTURE))
        with pytest.raises(RunError, match="is being written by this process already"), writing(tmp_path):
            pass
    assert status(tmp_path).state == "finished"


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    survives(Path(sys.argv[1]) / "full", full, donate=False)
    shutil.rmtree(Path(sys.argv[1]) / "full")
    survives(Path(sys.argv[1]) / "read-only", read_only, donate=True)
