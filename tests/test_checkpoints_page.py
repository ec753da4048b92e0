"""The code of docs/checkpoints.md and docs/fine-tuning.md runs as it stands, from top to bottom; the first prints what it shows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).parent.parent / "docs"


def run(page: str) -> str:
    text = (DOCS / page).read_text()
    torch.manual_seed(0)
    names: dict[str, object] = {"__name__": "docs"}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(block, f"docs/{page}", "exec", dont_inherit=True), names)
    return text


def test_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    page = run("checkpoints.md")
    printed = " ".join(capsys.readouterr().out.replace(f"{tmp_path}/", "").split())
    for shown in re.findall(r"^    (runs/.*?does not match(?:.|\n)*?)\n\n", page, re.MULTILINE):
        assert " ".join(shown.split()) in printed
    assert "Lost: params/0.weight; restore another checkpoint of runs/docs/checkpoints" in printed


def test_fine_tuning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run("fine-tuning.md")
