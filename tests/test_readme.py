"""The README's code runs as it stands."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from fnrun.checkpoint import Checkpoints

README = Path(__file__).parents[1] / "README.md"


def test_the_code_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    logger = logging.getLogger("fnrun")
    before = logger.handlers[:], logger.level
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names: dict = {}
    try:
        for block in blocks:
            exec(compile(block, str(README), "exec"), names)
    finally:
        logger.handlers[:], logger.level = before
    assert len(blocks) == 2
    assert Checkpoints("runs/readme").latest() == names["state"].step
    assert "val/accuracy" in names["results"]
