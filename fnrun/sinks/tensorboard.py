"""TensorBoard's event files."""

from __future__ import annotations

import itertools
import socket
import struct
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import IO, Any

from fnrun.core import files
from fnrun.core.state import LoopState
from fnrun.sinks.base import Record, Sink, media, numbers, require
from fnrun.sinks.lines import OnDisk, naming
from fnrun.sinks.media import Histogram, Image, Text

WRITER = "fnrun at "  # the writer of our events is this and `Position.order`


def _messages(kind: str) -> Any:
    return import_module(f"tensorboard.compat.proto.{kind}_pb2")


class _TensorBoard(OnDisk):
    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._records: Any = None

    def open(self, state: LoopState) -> None:
        if self._file is not None:
            return
        messages = _messages("event")
        RecordWriter = import_module("tensorboard.summary.writer.record_writer").RecordWriter
        with naming(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            for path in sorted(self.path.glob("events.out.tfevents.*.fnrun.*")):
                _cut(path, state.position.order)
            # The number keeps the files in order, which TensorBoard reads by name.
            numbers_so_far = [int(path.name.rpartition(".")[2]) for path in self.path.glob("events.out.tfevents.*.fnrun.*")]
            number = max(numbers_so_far, default=-1) + 1
            name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.fnrun.{number:04d}"
            self._file = (self.path / name).open("xb")
        self._records = RecordWriter(self._file)
        self._add(messages.Event(file_version="brain.Event:2"), state.position.order)
        if number:  # a TensorBoard that shows the run forgets what was cut
            self._add(
                messages.Event(session_log=messages.SessionLog(status=messages.SessionLog.START), step=state.step + 1), state.position.order
            )

    def _add(self, event: Any, order: tuple[int, ...], wall_time: float | None = None) -> None:
        event.wall_time = time.time() if wall_time is None else wall_time
        event.source_metadata.writer = WRITER + ".".join(map(str, order))
        assert self._file is not None
        with naming(self.path):
            self._records.write(event.SerializeToString())
            self._file.flush()

    def write(self, record: Record) -> None:
        assert self._file is not None, "open the sink first"
        Event, Summary = _messages("event").Event, _messages("summary").Summary
        values = [Summary.Value(tag=name, simple_value=value) for name, value in numbers(record).items()]
        for name, shown in media(record).items():
            values.extend(_summary(name, shown).value)
        self._add(Event(summary=Summary(value=values), step=record.step), record.order, record.clock.get("time"))


def _summary(name: str, value: Image | Histogram | Text) -> Any:
    from torch.utils.tensorboard import summary

    if isinstance(value, Image):
        return summary.image(name, value.pixels(), dataformats="HWC")
    if isinstance(value, Text):
        made = summary.text(name, value.text)
        for each in made.value:
            each.tag = name  # without torch's suffix `/text_summary`
        return made
    counts, edges = value.counts.tolist(), value.edges.tolist()
    middles = [(low + high) / 2 for low, high in itertools.pairwise(edges)]
    total = sum(count * middle for count, middle in zip(counts, middles, strict=True))
    squares = sum(count * middle**2 for count, middle in zip(counts, middles, strict=True))
    return summary.histogram_raw(name, edges[0], edges[-1], sum(counts), total, squares, edges[1:], counts)


def _cut(path: Path, order: tuple[int, ...]) -> None:
    """Keep the events up to `order`: what a killed run wrote after its last checkpoint comes again. An empty file goes."""
    Event = _messages("event").Event
    # A new file: a process that has lost the run, and has not seen it yet, goes on in the old one, which nobody reads.
    with files.opened(path, "rb") as file, files.replacing(path) as new:
        size = 0
        for data, end in _events(file):
            event = Event.FromString(data)
            at = tuple(int(n) for n in event.source_metadata.writer.removeprefix(WRITER).split("."))
            if event.HasField("summary") and at > order:
                break
            size = end
        files.copy(file, new, size)
    if not size:
        path.unlink()


def _events(file: IO[bytes]) -> Iterator[tuple[bytes, int]]:
    """Each whole event in the file, with where it ends: length (8 bytes), its checksum (4), data, its checksum (4)."""
    while len(head := file.read(12)) == 12:
        (length,) = struct.unpack("<Q", head[:8])
        data = file.read(length)
        if len(data) < length or len(file.read(4)) < 4:
            return
        yield data, file.tell()


def tensorboard(directory: str | Path) -> Sink:
    """TensorBoard's event files, over `state.step`: numbers, images, histograms and texts. Needs the extra `tensorboard`, and raises
    ModuleNotFoundError without it.

    `directory` is for this run alone, and gets one file for each start of the run. When a run is resumed, events that are later than its
    state are cut off, and written again; a TensorBoard that shows the run forgets them.
    """
    require("tensorboard", "tensorboard", "tensorboard")
    return _TensorBoard(files.local_path(directory))
