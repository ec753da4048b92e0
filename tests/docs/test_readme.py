"""The README's code runs as it stands."""

from __future__ import annotations

from fnrun.checkpoint import Checkpoints
from tests.docs import pages


def test_the_code_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = pages.run("../README.md")
    assert len(pages.blocks("../README.md")) == 2
    assert Checkpoints("runs/readme").latest() == names["state"].step
    assert "val/accuracy" in names["results"]
