"""The live line: what it says, and that it says nothing where nobody is watching."""

from __future__ import annotations

import io
import sys

import pytest
import torch

import fnrun
from fnrun import observers
from fnrun.observers.pace import fraction
from fnrun.observers.progress import describe
from fnrun.state import Frame
from fnrun.testing import states_seen
from tests.programs import fresh, train

LENGTHS = {"repeat /": 4, "sequence /": 2, "epoch_loop /train": 5, "eval_loop /val": 3}


@pytest.mark.parametrize(
    ("ticks", "done", "words"),
    [
        ((0, 0, 0), 0.0, ["epoch 1/4", "train 0/5"]),
        ((0, 0, 5), 0.25, ["epoch 1/4", "train 5/5"]),
        ((3, 0, 5), 1.0, ["epoch 4/4", "train 5/5"]),
    ],
)
def test_what_it_says(ticks, done, words):
    names = ("repeat /", "sequence /", "epoch_loop /train")
    frames = tuple(Frame(name, n) for name, n in zip(names, ticks, strict=True))
    assert fraction(frames, LENGTHS) == done
    assert describe(frames, LENGTHS) == words


def program(progress):
    val = fnrun.eval_loop(lambda state, batch: {"loss": batch.sum()}, observers=[progress])
    return fnrun.repeat(fnrun.sequence(train=fnrun.epoch_loop(train, observers=[progress]), val=val), 2)


def test_the_lengths_are_those_of_the_program():
    known = {}

    class Looks:
        def open(self, program, state):
            self.program = program

        def __call__(self, state, metrics):
            known.update(self.program.lengths)

    streams = {"train": [torch.zeros(1)] * 5, "val": [torch.zeros(1)] * 3}
    loop = program(Looks())
    seen, _ = states_seen(loop, fresh(), streams)
    assert known == {**LENGTHS, "repeat /": 2}
    known.clear()
    loop(seen[3], streams)  # in the middle of an epoch
    assert known["epoch_loop /train"] == 5


def test_what_a_terminal_shows(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    monkeypatch.setattr(sys.modules[describe.__module__], "REFRESH", 0.0)
    monkeypatch.setattr("sys.stdout", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    program(observers.progress("images"))(fresh(), {"train": [torch.zeros(2)] * 5, "val": [torch.zeros(1)] * 3})
    text = screen.getvalue()
    for words in ("epoch 1/2", "train 5/5", "epoch 2/2", "val 2/3", "images/s", "left", "loss 0"):
        assert words in text


@pytest.mark.parametrize(("interval", "lines"), [(0.0, 15), (3600.0, 0)])
def test_without_a_terminal_it_is_a_line_now_and_then(monkeypatch, caplog, interval, lines):
    monkeypatch.setattr(sys.modules[describe.__module__], "PLAIN", interval)
    monkeypatch.setattr("sys.stdout", io.StringIO())
    with caplog.at_level("INFO", logger="fnrun"):
        program(observers.progress("images"))(fresh(), {"train": [torch.zeros(2)] * 5, "val": [torch.zeros(1)] * 3})
    assert len(caplog.messages) == lines
    if lines:
        assert caplog.messages[-1].startswith("epoch 2/2  val 3/3  loss 0  ")
