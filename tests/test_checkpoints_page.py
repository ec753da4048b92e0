"""The code of docs/checkpoints.md runs as it stands, from top to bottom, and prints what the page shows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

PAGE = (Path(__file__).parent.parent / "docs" / "checkpoints.md").read_text()


def test_the_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, object] = {"__name__": "docs"}
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(compile(block, "docs/checkpoints.md", "exec", dont_inherit=True), names)
    printed = " ".join(capsys.readouterr().out.replace(f"{tmp_path}/", "").split())
    for shown in re.findall(r"^    (runs/.*?does not match(?:.|\n)*?)\n\n", PAGE, re.MULTILINE):
        assert " ".join(shown.split()) in printed
    assert "Lost: params/0.weight; restore another checkpoint of runs/docs/checkpoints" in printed
