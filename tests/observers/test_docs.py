"""The code of docs/logging.md runs as it stands, from top to bottom."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "logging.md").read_text()


def test_the_code_runs(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = logging.getLogger("fnrun")
    before = logger.handlers[:], logger.level
    names: dict = {"__name__": "docs"}
    try:
        for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
            exec(compile(block, "docs/logging.md", "exec", dont_inherit=True), names)
    finally:
        logger.handlers[:], logger.level = before
    for name in ("metrics.jsonl", "metrics.csv", "tensorboard", "wandb.id", "run.log"):
        assert (tmp_path / "runs" / "logged" / name).exists()


def test_every_name_is_there():
    from fnrun import observers

    for name in (
        "log",
        "progress",
        "console",
        "jsonl",
        "csv",
        "tensorboard",
        "wandb",
        "mlflow",
        "trackio",
        "record",
        "Image",
        "Histogram",
        "Text",
        "histogram",
        "Sink",
    ):
        assert f"{name}" in PAGE
        assert hasattr(observers, name)
