from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.commands.made import Config, after, train


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`whole`, the same `resumed` in the middle of an epoch, `other` of another seed. They are only read; copy one to change it."""
    directory = tmp_path_factory.mktemp("runs")
    train(directory / "whole")
    train(directory / "resumed", interrupt=after(6))
    train(directory / "resumed", resumed=True)
    train(directory / "other", config=Config(seed=1))
    return directory
