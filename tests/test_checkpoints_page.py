"""The code of docs/checkpoints.md and docs/fine-tuning.md runs as it stands, from top to bottom; the first prints what it shows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests import pages


def test_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    page = pages.run("checkpoints.md")
    printed = " ".join(capsys.readouterr().out.replace(f"{tmp_path}/", "").split())
    for shown in re.findall(r"^    (runs/.*?does not match(?:.|\n)*?)\n\n", page, re.MULTILINE):
        assert " ".join(shown.split()) in printed
    assert "Lost: params/0.weight; restore another checkpoint of runs/docs/checkpoints" in printed


def test_fine_tuning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    pages.run("fine-tuning.md")
