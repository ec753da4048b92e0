"""The code of docs/schedules.md runs as it stands, from top to bottom."""

from __future__ import annotations

from tests import pages


def test_the_code_runs() -> None:
    pages.run("schedules.md")
