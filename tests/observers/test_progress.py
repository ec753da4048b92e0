"""The live line: what it says, and that it says nothing where nobody is watching."""

from __future__ import annotations

import io
import sys

import pytest
import torch

import fnrun
from fnrun import observers
from fnrun.observers.progress import describe, fraction
from fnrun.state import Frame
from fnrun.testing import states_seen
from tests.programs import fresh, train

LENGTHS = {"repeat /": 4, "sequence /": 2, "epoch_loop /train": 5, "eval_loop /val": 3}


@pytest.mark.parametrize(
    ("ticks", "done", "words"),
    [
        ((0, 0, 0), 0.0, "epoch 1/4  train 0/5"),
        ((0, 0, 5), 0.25, "epoch 1/4  train 5/5"),
        ((3, 0, 5), 1.0, "epoch 4/4  train 5/5"),
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


def test_a_live_line_on_a_terminal_and_nothing_without(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys.modules[describe.__module__], "REFRESH", 0.0)
    monkeypatch.setenv("TERM", "xterm")
    streams = {"train": [torch.zeros(2)] * 5, "val": [torch.zeros(1)] * 3}
    for stream, expected in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr("sys.stdout", stream)
        program(observers.progress("images"))(fresh(), streams)
        monkeypatch.undo()
        monkeypatch.setattr(sys.modules[describe.__module__], "REFRESH", 0.0)
        monkeypatch.setenv("TERM", "xterm")
        text = stream.getvalue()
        assert bool(text) == expected
        if expected:
            assert "epoch 2/2  train 5/5" in text
            assert "epoch 1/2  val 2/3" in text
            assert "images/s" in text
            assert "left" in text
