"""The code of docs/speed.md runs as it stands, from top to bottom."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

PAGE = (Path(__file__).parents[1] / "docs" / "speed.md").read_text()


def test_the_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == PAGE.count("```python")
    names: dict[str, Any] = {"__name__": "docs"}
    for block in blocks:
        exec(compile(block, "docs/speed.md", "exec", dont_inherit=True), names)
    assert "wrote the next one over it" in capsys.readouterr().out
