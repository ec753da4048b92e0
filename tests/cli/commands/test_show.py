"""`fnrun show`: what is stored, checked and described by its own numbers."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from collections import namedtuple
from typing import Any

import numpy as np
import pytest
import torch

import fnrun
from fnrun.checkpoint import Checkpoints
from tests.cli.commands.made import document, flip, largest_file, newest, told

Own = namedtuple("Own", "weight twin")  # a class that the command has never heard of


@fnrun.struct
class Odd:
    """A state with everything in it."""

    params: Any
    extra: Any
    step: int = 3


def odd() -> Odd:
    tied = torch.tensor([3.0, -4.0])
    numbers = torch.tensor([1.0, math.nan, math.inf, -2.0])
    extra = {
        "none": None,
        "flag": True,
        "text": "a/b",
        "raw": b"\x00",
        "z": 1 - 2j,
        "big": 2**70,
        "array": np.arange(3),
        "half": tied.to(torch.bfloat16),
    }
    return Odd(Own(tied, tied), {**extra, "bad": numbers, "empty": torch.empty(0, 2), "complex": torch.tensor([3 + 4j])})


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    directory = tmp_path_factory.mktemp("odd") / "checkpoints"
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(odd(), {"loss": math.nan})
    return directory


def test_every_leaf_is_described(stored, capsys):
    found = document(capsys, "show", stored)
    leaves = {leaf["path"]: leaf for leaf in found["leaves"]}
    first = next(path for path in leaves if path.startswith("params/"))
    assert leaves[first] | {"norm": 5.0, "min": -4.0, "max": 3.0, "dtype": "float32", "shape": [2], "bytes": 8} == leaves[first]
    assert [leaf["shares"] for leaf in leaves.values() if "shares" in leaf] == [first]
    bad = leaves["extra/bad"]
    assert (bad["nan"], bad["inf"], bad["min"], bad["max"]) == (0.25, 0.25, -2.0, 1.0)
    assert bad["norm"] == pytest.approx(math.sqrt(5))
    assert leaves["extra/complex"]["norm"] == pytest.approx(5.0)
    assert leaves["extra/half"]["dtype"] == "bfloat16"
    assert leaves["extra/array"]["norm"] == pytest.approx(math.sqrt(5))
    assert (leaves["extra/none"]["value"], leaves["extra/flag"]["value"], leaves["extra/big"]["value"]) == (None, True, 2**70)
    assert found["totals"]["parameters"] == 2
    assert found["metrics"] == {"loss": "NaN"}
    out = told(capsys, "show", stored)[1]
    assert "0.25 NaN, 0.25 infinite" in out
    assert "'a/b'" in out


def test_it_needs_no_class_of_the_state(stored):
    """In a process that has imported nothing of this module."""
    done = subprocess.run([sys.executable, "-m", "fnrun", "show", str(stored)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "extra/bad" in done.stdout


def test_a_run_a_directory_and_a_checkpoint_are_shown_alike(runs, capsys):
    run = runs / "whole"
    found = document(capsys, "show", run)
    assert found["experiment"] == "tests.cli.commands.made"
    assert found["config"] == {"epochs": 2, "seed": 0, "lr": 0.05}
    assert found["step"] == 6
    assert found["monitors"] == {"val/loss": "min"}
    assert document(capsys, "show", run / "checkpoints") == found
    assert document(capsys, "show", newest(run)) == found
    assert document(capsys, "show", run, "--checkpoint", "best") == found
    assert document(capsys, "show", run, "--checkpoint", "3")["step"] == 3


def test_the_numbers_are_those_of_the_tensors(runs, capsys):
    found = {leaf["path"]: leaf for leaf in document(capsys, "show", runs / "whole", "--only", "params/**")["leaves"]}
    state = fnrun.Run.open(runs / "whole").checkpoints.restore()
    assert set(found) == {"params/weight", "params/bias"}
    for name, tensor in state.params.items():
        assert found[f"params/{name}"]["norm"] == pytest.approx(torch.linalg.vector_norm(tensor.double()).item(), rel=1e-12)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--only", "parms/**"], "--only: nothing that was saved matches 'parms/**'; near: params"),
        (["--checkpoint", "4"], "there is no checkpoint of step 4; there are: 3, 6"),
        (["--checkpoint", "newest"], "a checkpoint is latest, best, best:METRIC or a step, not 'newest'"),
        (["--checkpoint", "best:bleu"], "no checkpoint was saved with 'bleu' monitored; monitored: val/loss"),
    ],
)
def test_what_is_not_there_is_said(flags, message, runs, capsys):
    code, out, err = told(capsys, "show", runs / "whole", *flags)
    assert (code, out) == (2, "")
    assert message in err


def test_damage_is_an_error_that_names_the_leaf_and_the_manifest_is_shown(runs, tmp_path, capsys):
    shutil.copytree(runs / "whole", tmp_path / "whole")
    file = largest_file(newest(tmp_path / "whole"))
    flip(file)
    code, out, err = told(capsys, "show", tmp_path / "whole")
    assert code == 2
    assert f"{file} is damaged" in err
    assert "params/weight" in err
    (line,) = [line for line in out.splitlines() if line.startswith("params/weight")]
    assert line.endswith("LOST")
    code, out, err = told(capsys, "show", tmp_path / "whole", "--json")
    assert code == 2
    assert '"lost": [\n      "params/weight"' in out


def test_a_given_up_checkpoint_says_how_to_read_it(runs, tmp_path, capsys):
    shutil.copytree(runs / "whole", tmp_path / "whole")
    given_up = newest(tmp_path / "whole").rename(tmp_path / "whole" / "checkpoints" / "abandoned-00000006-00000010")
    assert f"rename it to {given_up.name[10:]} to read it" in told(capsys, "show", given_up)[2]


def test_what_a_stranger_wrote_does_not_reach_the_terminal(tmp_path, capsys):
    """Escape codes in names and texts would color it, move its cursor, or call its title."""
    evil = "a\x1b[31m\x07\nb"
    with Checkpoints(tmp_path / "checkpoints", config={evil: evil}) as checkpoints:
        checkpoints.save(Odd({evil: torch.zeros(1)}, {"text": evil}), {evil: 1.0}, monitor=evil)
    with Checkpoints(tmp_path / "others") as checkpoints:
        checkpoints.save(Odd({"a": torch.zeros(1)}, {"text": evil + evil}))
    for args in (["show", tmp_path / "checkpoints"], ["diff", tmp_path / "checkpoints", tmp_path / "others"]):
        code, out, _ = told(capsys, *args)
        assert code == (0 if args[0] == "show" else 1)
        assert r"params/a\x1b[31m\x07\nb" in out
        assert all(char.isprintable() for line in out.split("\n") for char in line)
    flip(largest_file(checkpoints.directory.parent / "checkpoints" / "00000003-00000003"))
    code, _, err = told(capsys, "show", tmp_path / "checkpoints")
    assert (code, err.count("\n")) == (2, 1)
    assert all(char.isprintable() for char in err.rstrip("\n"))
