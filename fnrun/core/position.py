"""Where a program stands: the open loops, the streams of data, and how many ticks have been."""

from __future__ import annotations

import dataclasses
import re
import sys
from typing import Any

from fnrun.core.tree import struct

#: What a stream says of its rows and its batch size.
_BATCH, _ROWS = re.compile(r"\b(\d+) a batch\b"), re.compile(r"\bof (\d+) (?:rows|examples)\b")


@struct(name="fnrun.Cursor")
class Cursor:
    """Where a data stream stands: the next batch is `batch` of pass `epoch`.

    `(epoch, n)` with n the last batch's successor is written `(epoch + 1, 0)`. `source` says what the stream is made of, in words
    (rows, batch size, a digest of the content): in other data the same position would mean other rows.
    `loader_state` is what a stream that cannot compute its batches from a position says of itself (`data.stateful`).
    """

    epoch: int = 0
    batch: int = 0
    source: str = ""
    loader_state: Any = None

    def moved(self, source: str) -> tuple[Cursor, str]:
        """Where to go on in other data, and a sentence that says so.

        Where only the batch size has changed, after the same examples of the same pass, if that is in the middle of it there too.
        Elsewhere at the beginning of the next pass: the rest of this one is not trained on.

        >>> cursor = Cursor(2, 3, "arrays of 20 rows, 4 a batch, shuffled, content 1f")
        >>> cursor, sentence = cursor.moved("arrays of 20 rows, 6 a batch, shuffled, content 1f")
        >>> cursor.epoch, cursor.batch, sentence
        (2, 2, 'epoch 3 goes on behind its first 12 examples')
        """
        old, new = _BATCH.search(self.source), _BATCH.search(source)
        if self.batch and old and new and _BATCH.sub("", self.source) == _BATCH.sub("", source):
            done, size, rows = self.batch * int(old[1]), int(new[1]), _ROWS.search(source)
            dropped = "short last batch dropped" in source and rows is not None and done // size >= int(rows[1]) // size
            if done >= size and not dropped:  # in the middle of the pass there too
                twice = f", {done % size} of which come a second time" if done % size else ""
                return Cursor(self.epoch, done // size, source), f"epoch {self.epoch + 1} goes on behind its first {done} examples{twice}"
        if self.loader_state is not None:
            return Cursor(source=source), "the new data begins where it stands by itself, its epochs counted from 1"
        if not self.batch:
            return Cursor(self.epoch, 0, source), f"epoch {self.epoch + 1} begins with the new data"
        return Cursor(
            self.epoch + 1, 0, source
        ), f"the rest of epoch {self.epoch + 1} is left out, and epoch {self.epoch + 2} begins with the new data"


@struct(name="fnrun.Frame")
class Frame:
    """An open loop.

    - `kind`: its combinator, `"epoch_loop"`, `"repeat"`, ...
    - `path`: the names of the sequences' members around it, `"train"`, `"a/train"`; `""` for the outermost.
    - `nth`: how many loops the function around it has opened before it in the same call.
    - `ticks`: how many are finished.
    - `totals`: of its metrics, over these ticks.
    - `folds`: what its observers fold, by the observer's name.
    - `member`: of a sequence or a workflow, the member at work.

    >>> Frame("epoch_loop", "train", 1, ticks=3).name
    'epoch_loop /train #2'
    """

    kind: str
    path: str = ""
    nth: int = 0
    ticks: int = 0
    totals: Any = None
    folds: dict[str, Any] = dataclasses.field(default_factory=dict)
    member: str | None = None

    @property
    def name(self) -> str:
        """The loop in words. Randomness is derived from them: they never change."""
        return f"{self.kind} /{self.path}" + (f" #{self.nth + 1}" if self.nth else "")


@struct(name="fnrun.Position")
class Position:
    """Where the program stands: the frames of the open loops, outermost first, and each stream's cursor.

    `ticks` counts the finished ticks of all loops over data, evaluation included.
    """

    frames: tuple[Frame, ...] = ()
    streams: dict[str, Cursor] = dataclasses.field(default_factory=dict)
    ticks: int = 0

    def brief(self) -> str:
        """In one line: the open loops with their ticks, and the streams with epoch and batch."""
        frames = [f"{frame.name} at tick {frame.ticks}" for frame in self.frames]
        streams = [f"{name} at epoch {cursor.epoch}, batch {cursor.batch}" for name, cursor in self.streams.items()]
        return "; ".join([*frames, *streams]) or "at the beginning"

    @property
    def order(self) -> tuple[int, ...]:
        """What checkpoints and log lines are ordered by: the ticks of all loops, then those of each open one. A later state of a run has
        a higher.

        A program that has ended, or has not begun, is later than all states with the same ticks before it.
        """
        own = [frame.ticks for frame in self.frames]
        while own and not own[-1]:
            own.pop()  # a loop that has begun and done nothing yet
        return (self.ticks, *own) if own else (self.ticks, sys.maxsize)

    def moved(self, name: str, source: str) -> Position:
        """The position with the stream `name` counted in other data, whose `stream.source` is given: see `Cursor.moved`."""
        return dataclasses.replace(self, streams={**self.streams, name: self.streams[name].moved(source)[0]})

    def forget(self, *streams: str) -> Position:
        """The position with these streams at the beginning of their first pass again, whatever they are made of.

        What a loop over such a stream has done of its pass is not forgotten: an epoch that is open ends where it stands.
        """
        return dataclasses.replace(self, streams={k: v for k, v in self.streams.items() if k not in streams})


#: The kinds of loops whose ticks are training steps.
TRAINING = ("epoch_loop", "step_loop")


def in_training(state: Any) -> bool:
    """Whether the loop at work takes training steps; elsewhere its ticks are rounds. Outside every loop a call is like a training step."""
    frames = state.position.frames
    return not frames or frames[-1].kind in TRAINING


def tick_number(state: Any) -> int:
    """The number of the tick that has just ended: `state.step` in a loop of training steps, finished rounds elsewhere."""
    return state.step if in_training(state) else state.position.frames[-1].ticks


def is_due(state: Any, every: int) -> bool:
    """Whether a hook or an observer with `every=n` acts now: counted in `state.step` in a loop of training steps, in rounds elsewhere."""
    return tick_number(state) % every == 0
