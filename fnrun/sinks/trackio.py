"""trackio."""

from __future__ import annotations

import secrets
from importlib import import_module
from pathlib import Path
from typing import Any

import msgspec

from fnrun.core import files
from fnrun.sinks.base import Record, Sink, media, numbers, require
from fnrun.sinks.journal import Journaled, identity
from fnrun.sinks.media import Histogram, Image, Text


class _TrackioRun:
    def __init__(self, directory: Path, project: str, config: Any) -> None:
        self.directory, self.project, self.config = directory, project, config
        self._run: Any = None

    def start(self) -> int:
        trackio, storage = import_module("trackio"), import_module("trackio.sqlite_storage").SQLiteStorage
        name = identity(self.directory / "trackio.id", f"{self.directory.name}-{secrets.token_hex(2)}")
        self._run = trackio.init(
            project=self.project, name=name, resume="allow", config=msgspec.to_builtins(self.config or {}), embed=False, auto_log_gpu=False
        )
        return storage.get_log_count(self.project, name)

    def send(self, number: int, record: Record) -> None:
        trackio = import_module("trackio")
        row: dict[str, Any] = {**numbers(record), "epoch": record.epoch}
        row.update((f"clock/{name}", value) for name, value in record.clock.items())
        for name, value in media(record).items():
            match value:
                case Image():
                    pixels = value.pixels()
                    row[name] = trackio.Image(pixels.repeat(3, axis=2) if pixels.shape[2] == 1 else pixels)
                case Text():
                    row[name] = trackio.Markdown(value.text)
                case Histogram():
                    row[name] = trackio.Histogram(np_histogram=(value.counts.tolist(), value.edges.tolist()))
        self._run.log(row, step=record.step)

    def finish(self) -> None:
        self._run.finish()


def trackio(directory: str | Path, *, project: str, config: Any = None) -> Sink:
    """One run of a local trackio project, however often the training is resumed. Needs the extra `trackio`, and raises
    ModuleNotFoundError without it.

    - `directory`: the run's directory, which gets the name of the trackio run and a journal of the lines.
    - `project`: the trackio project.
    - `config=None`: the run's config: a dictionary, dataclass or msgspec struct.

    Lines are over `step`. After a resume the lines that a killed process had not sent are sent again, and those that trackio has already
    are not: after an exact resume they are the same. After a resume with other settings it keeps the old lines between the checkpoint
    and the kill.
    """
    require("trackio", "trackio", "trackio")
    path = files.local_path(directory)
    return Journaled(path / "trackio.jsonl", _TrackioRun(path, project, config))
