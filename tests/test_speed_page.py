"""The code of docs/speed.md runs as it stands, from top to bottom."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import pages


def test_the_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    pages.run("speed.md")
    assert "wrote the next one over it" in capsys.readouterr().out
