"""The live line: what it says, and that it says nothing where nobody is watching."""

from __future__ import annotations

import io
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fnrun
from fnrun import observers
from fnrun.core.position import Frame
from fnrun.observers.pace import fraction
from fnrun.observers.progress import describe
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
    loops = (("repeat", ""), ("sequence", ""), ("epoch_loop", "train"))
    frames = tuple(Frame(*loop, ticks=n) for loop, n in zip(loops, ticks, strict=True))
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


CHILD = """
import importlib, sys, warnings
importlib.import_module("fnrun.observers.progress").REFRESH = 0.0  # it shows every tick
from pathlib import Path
from tests.observers.training import training
def speaks(state, metrics):
    if state.step == 7:
        print("said by the experiment")
        print("said on the other stream", file=sys.stderr)
program, streams, state = training(Path(sys.argv[1]), ["console", "jsonl"], None, speaks)
program(state, streams)
print("the end")
"""


def in_a_terminal(*args):
    """The exit code; the lines of a terminal of 80 columns after the command, with those that scrolled out; and all that was sent to it."""
    import pyte

    leader, follower = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24", "PYTHONPATH": str(Path(__file__).parents[2])}
    child = subprocess.Popen([sys.executable, "-c", CHILD, *args], env=environment, stdin=follower, stdout=follower, stderr=follower)
    os.close(follower)
    screen = pyte.HistoryScreen(80, 24, history=10_000, ratio=1e-9)
    stream = pyte.ByteStream(screen)
    sent = b""
    while True:
        try:
            piece = os.read(leader, 65536)
        except OSError:  # how Linux says that nobody has the terminal open any more
            break
        if not piece:
            break
        stream.feed(piece)
        sent += piece
    os.close(leader)
    scrolled = ["".join(line[i].data for i in range(80)) for line in screen.history.top]
    return child.wait(60), [line.rstrip() for line in [*scrolled, *screen.display] if line.strip()], sent.decode()


def test_it_never_garbles_a_line(tmp_path):
    code, lines, sent = in_a_terminal(str(tmp_path))
    assert code == 0, lines
    for words in ("epoch 2/4", "train 5/5", "val 3/5", "━", "examples/s"):
        assert words in sent
    assert not any("━" in line or "examples/s" in line for line in lines), lines  # gone with the run
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    starts = [f"epoch {r['epoch']}   step {r['step']}".ljust(20) for r in records]
    assert [line[:20] for line in lines if line.startswith("epoch")] == starts
    assert sum("max_run" in line for line in lines) == sum("train/loss_max_run" in r for r in records)  # wrapped, whole
    for words in ("said by the experiment", "said on the other stream", "the end"):
        assert lines.count(words) == sum(words == line for line in lines) > 0
    assert max(map(len, lines)) <= 80
    assert lines[-1] == "the end"
