"""`fnrun export`: the weights as other programs read them."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

import fnrun
from tests.cli.commands.made import document, newest, told


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_the_file_holds_the_weights(suffix, runs, tmp_path, capsys):
    file = tmp_path / f"weights.{suffix}"
    found = document(capsys, "export", runs / "whole", "--out", file, "--checkpoint", "3")
    assert (found["step"], found["file"], found["bytes"]) == (3, str(file), file.stat().st_size)
    written = load_file(file) if suffix == "safetensors" else torch.load(file, weights_only=True)
    params = fnrun.Run.open(runs / "whole").checkpoints.restore(step=3).params
    assert fnrun.tree.equal(dict(sorted(written.items())), dict(sorted(params.items())))
    torch.nn.Linear(4, 1).load_state_dict(written)


def test_a_checkpoint_in_another_precision(runs, tmp_path, capsys):
    file = tmp_path / "weights.safetensors"
    assert told(capsys, "export", newest(runs / "whole"), "--out", file, "--dtype", "bfloat16")[0] == 0
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--out", "NEW/there.pt"], "NEW/there.pt is there already; --overwrite replaces it"),
        (["--out", "NEW/weights.bin"], "weights are written as .safetensors, .pt, .pth, not as .bin"),
        (["--out", "NEW/weights.pt", "--dtype", "int8"], "--dtype is a floating-point dtype of torch"),
        (["--out", "NEW/weights.pt", "--weights", "ema"], "weights='ema': no hook of this name remembers"),
        (["--out", "NEW/none/weights.pt"], "NEW/none"),
    ],
)
def test_messages(flags, message, runs, tmp_path, capsys):
    (tmp_path / "there.pt").write_text("mine")
    code, out, err = told(capsys, "export", runs / "whole", *(flag.replace("NEW", str(tmp_path)) for flag in flags))
    assert (code, out) == (2, "")
    assert message.replace("NEW", str(tmp_path)) in err
    assert [path.name for path in tmp_path.iterdir()] == ["there.pt"]
    assert (tmp_path / "there.pt").read_text() == "mine"


def test_a_file_that_is_to_be_replaced_is(runs, tmp_path, capsys):
    (tmp_path / "there.pt").write_text("mine")
    assert told(capsys, "export", runs / "whole", "--out", tmp_path / "there.pt", "--overwrite")[0] == 0
    torch.load(tmp_path / "there.pt", weights_only=True)
