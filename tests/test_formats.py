"""Checkpoints of earlier versions stay readable for ever: `tests/formats/N` was written once, in format N, and is never written again.

A new format gets a directory of its own, made by the code of its day: `python -m tests.test_formats tests/formats/N`.
"""

from __future__ import annotations

import math
import shutil
import struct as binary
import sys
from collections import OrderedDict, deque
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from fnrun.checkpoint import Checkpoints
from fnrun.cli.commands.diff import states
from fnrun.core import tree
from fnrun.core.key import Key
from fnrun.core.position import Cursor, Frame, Position
from fnrun.core.state import TrainState

FORMATS = Path(__file__).parent / "formats"


class Moments(NamedTuple):
    first: Any
    second: Any


@tree.struct
class Scale:
    value: Any
    unit: str = tree.static(default="")


def bits(dtype: torch.dtype, *shape: int, begin: int = 0) -> torch.Tensor:
    """A tensor of bytes that count up: no generator and no arithmetic that could change."""
    size = math.prod(shape) * dtype.itemsize
    return (torch.arange(begin, begin + size) % (2 if dtype == torch.bool else 251)).to(torch.uint8).view(dtype).reshape(shape)


def state() -> TrainState:
    """A state with a leaf of every kind, small ones and one that gets an array of its own."""
    params = {
        "body.0.weight": bits(torch.float32, 257, 257),
        "body.0.bias": bits(torch.float32, 7, begin=3),
        "a/b~c": bits(torch.bfloat16, 2, 3),
        "": bits(torch.float8_e4m3fn, 5),
        "Größe": bits(torch.complex64, 2),
    }
    tied = bits(torch.float64, 4)
    return TrainState(
        params=params,
        buffers={
            "seen": torch.tensor(7),
            "empty": torch.empty(0, 3),
            "mask": bits(torch.bool, 9),
            "last": bits(torch.float16, 2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        },
        opt_state=(Moments(tied, [tied, None]), Scale(torch.tensor(-0.0), "per step"), deque([1, 2], 3), OrderedDict(z=1, a=b"\0\xff")),
        rng=Key(2**63 + 5),
        step=3,
        memory={"ema": {"params": {"body.0.bias": bits(torch.float32, 7, begin=90)}},
        "odd": binary.unpack(">d", b"\x7f\xf8\0\0\0\0\0\x07")[0]},
        position=Position((Frame("repeat", ticks=1, totals={"loss": bits(torch.float32, 1)}), Frame("epoch_loop", ticks=2)),
        {"train": Cursor(1, 2, "rows")}, 5),
        stop="patience: 3 rounds, café",
    )  # fmt: skip


@pytest.mark.parametrize("directory", sorted(FORMATS.iterdir()), ids=lambda path: f"format {path.name}")
def test_what_an_earlier_version_wrote_is_read(directory: Path) -> None:
    checkpoints = Checkpoints(directory)
    assert checkpoints.steps() == [2, 3]
    assert checkpoints.best() == 2
    assert checkpoints.manifest(3).config == {"lr": 0.1, "huge": float("inf")}
    metrics = checkpoints.manifest(3).metrics
    assert (metrics["val/loss"], len(metrics), math.isnan(float(metrics["train/loss"]))) == (0.5, 2, True)
    restored = checkpoints.restore()
    assert not tree.diff(restored, state())
    assert restored.buffers["last"].stride() == state().buffers["last"].stride()
    assert tree.equal(checkpoints.restore(like=state()), state())
    assert checkpoints.restore(step=2).step == 2


@pytest.mark.parametrize("number", ["1", "2"])
def test_the_same_bits_are_the_same_state_whatever_their_digests(number: str, tmp_path: Path) -> None:
    """What is on disk in an earlier format is not written again; and differs in nothing from what is written today."""
    shutil.copytree(FORMATS / number, tmp_path / "before")
    before = Checkpoints(tmp_path / "before")
    restored = before.restore()
    before.save(restored)
    before.wait()
    assert len(before.entries()) == 2
    with Checkpoints(tmp_path / "now") as now:
        now.save(restored)
    assert states(tmp_path / "before" / before.find().name, tmp_path / "now" / now.find().name)["state"] == []


if __name__ == "__main__":
    with Checkpoints(sys.argv[1], config={"lr": 0.1, "huge": float("inf")}) as written:
        for step, loss in ((2, 0.25), (3, 0.5)):
            small = state() if step == 3 else state().replace(step=2, params={}, position=Position(ticks=2))
            written.save(small, {"val/loss": loss, "train/loss": torch.tensor(float("nan"))}, monitor="val/loss")
