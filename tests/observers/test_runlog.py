"""What the program says of itself: to the terminal, to the run's file, from each process."""

from __future__ import annotations

import logging

import pytest

from fnrun.observers.runlog import logging_to

logger = logging.getLogger("fnrun")


def said(path):
    return [line.partition(" ")[2].partition(" ")[2] for line in path.read_text().splitlines()]


def test_to_the_terminal_and_with_the_time_to_a_file(tmp_path, capsys):
    for words in ("first", "again"):
        with logging_to(tmp_path / "run.log"):
            logger.info(words)
            logger.debug("not at this level")
    assert capsys.readouterr().out == "first\nagain\n"
    assert said(tmp_path / "run.log") == ["INFO first", "INFO again"]
    assert (tmp_path / "run.log").read_text()[:2] == "20"


def test_the_level_is_what_is_asked_for_and_afterwards_as_before(tmp_path, capsys):
    before = logger.level, logger.propagate, logger.handlers[:]
    with logging_to(tmp_path / "run.log", "warning"):
        logger.info("quiet")
        logger.warning("loud")
    assert (logger.level, logger.propagate, logger.handlers) == before
    assert capsys.readouterr().out == "loud\n"
    assert said(tmp_path / "run.log") == ["WARNING loud"]


def test_each_process_has_a_file_and_one_prints(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    with logging_to(tmp_path / "run.log"):
        logger.info("third")
    assert capsys.readouterr().out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["run.rank3.log"]
    assert said(tmp_path / "run.rank3.log") == ["INFO third"]


def test_an_exception_leaves_its_traceback_in_the_file(tmp_path, capsys):
    with pytest.raises(KeyError), logging_to(tmp_path / "run.log"):
        raise KeyError("lost")
    text = (tmp_path / "run.log").read_text()
    assert "ERROR KeyError\nTraceback" in text
    assert "KeyError: 'lost'" in text
    assert capsys.readouterr().out == ""
