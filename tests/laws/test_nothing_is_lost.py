"""Law 6: the newest completed checkpoint restores exactly, or an error of ours names what is damaged. (Kills: tests/experiments, tests/test_checkpoint.)"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from fnrun import tree
from fnrun.checkpoint import CheckpointError, Checkpoints
from fnrun.testing import states_seen
from tests.programs import build, fresh


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A state in the middle of a program, on disk, with an older one beneath."""
    loop, data = build(("repeat", ("sequence", ("epoch",), ("eval",)), 2), [3, 2])
    seen, _ = states_seen(loop, fresh(), data)
    directory = tmp_path_factory.mktemp("saved")
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(seen[0])
        checkpoints.save(seen[4])
    return directory, seen[0], seen[4]


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_damage_is_named_and_never_loaded(saved, data):
    directory, older, newer = saved
    copy = directory.parent / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(directory, copy)
    newest = copy / sorted(p.name for p in copy.iterdir())[-1]
    file = data.draw(st.sampled_from(sorted(p for p in newest.rglob("*") if p.is_file())))
    content = bytearray(file.read_bytes())
    match data.draw(st.sampled_from(["flip", "cut", "delete", "append", "none"])):
        case "flip" if content:
            at = data.draw(st.integers(0, len(content) - 1))
            content[at] ^= 1 << data.draw(st.integers(0, 7))
            file.write_bytes(content)
        case "cut" if content:
            file.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
        case "delete":
            file.unlink()
        case "append":
            file.write_bytes(bytes(content) + b"\0")
        case _:
            assert tree.equal(Checkpoints(copy).restore(like=fresh()), newer)
            return
    with pytest.raises(CheckpointError) as error:
        Checkpoints(copy).restore(like=fresh())
    assert file.name in str(error.value) or Path(newest).name in str(error.value)
    assert tree.equal(Checkpoints(copy).restore(like=fresh(), step=older.step), older)
