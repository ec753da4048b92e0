"""The pages of docs/ as programs."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def text(page: str) -> str:
    """A page of docs/; `../README.md` is the README."""
    return (DOCS / page).read_text()


def blocks(page: str) -> list[str]:
    """The Python of a page, block by block."""
    found = re.findall(r"```python\n(.*?)```", text(page), re.DOTALL)
    assert len(found) == text(page).count("```python") > 0
    return found


def run(page: str) -> dict[str, Any]:
    """What the Python of a page defines, run as it stands from top to bottom. The package's logger is as it was afterwards."""
    names: dict[str, Any] = {"__name__": "docs"}
    logger = logging.getLogger("fnrun")
    before = logger.handlers[:], logger.level
    try:
        for block in blocks(page):
            exec(compile(block, f"docs/{page}", "exec", dont_inherit=True), names)
    finally:
        logger.handlers[:], logger.level = before
    return names
