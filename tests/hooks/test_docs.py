"""The code of docs/hooks.md runs as it stands, from top to bottom."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = (Path(__file__).parents[2] / "docs" / "hooks.md").read_text()


def test_the_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == PAGE.count("```python")
    names: dict = {"__name__": "docs"}
    for block in blocks:
        exec(compile(block, "docs/hooks.md", "exec", dont_inherit=True), names)


def test_every_hook_is_there():
    from fnrun import hooks

    assert [name for name in hooks.__all__ if f"`{name}`" not in PAGE] == []
