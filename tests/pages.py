"""The pages of docs/ as programs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"


def run(page: str) -> str:
    """Run the Python of a page as it stands, from top to bottom, and return the page."""
    names(page)
    return (DOCS / page).read_text()


def names(page: str) -> dict[str, Any]:
    """What the Python of a page defines."""
    text = (DOCS / page).read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert blocks
    assert len(blocks) == text.count("```python")
    names: dict[str, Any] = {"__name__": "docs"}
    for block in blocks:
        exec(compile(block, f"docs/{page}", "exec", dont_inherit=True), names)
    return names
