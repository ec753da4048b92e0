"""Sinks that are services: lines that were sent cannot be taken back, and lines that a killed process had not sent are lost.

So a run keeps a journal of all lines. When it is resumed, the journal is cut as every file is. Lines of it that did not reach the service
are sent again. Lines that the service has already are not sent a second time: after an exact resume they would be the same.
"""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any, Protocol

import torch

from fnrun.core import files
from fnrun.core.documents import jsonable
from fnrun.core.state import LoopState
from fnrun.sinks.base import Record
from fnrun.sinks.lines import Lines, naming, order_of, position_fields
from fnrun.sinks.media import Histogram, Image, Text


class Service(Protocol):
    """A run of a tracking service. Its lines are numbered, from 0."""

    def start(self) -> int:
        """Make the run, or go on with it. Returns the number of its lines."""
        ...

    def send(self, number: int, record: Record, /) -> None: ...
    def finish(self) -> None: ...


class Journaled(Lines):
    """A sink whose lines are in a journal, the file `path`, and in `service`."""

    def __init__(self, path: Path, service: Service) -> None:
        super().__init__(path)
        self.service = service
        self._number = self._sent = 0

    def open(self, state: LoopState) -> None:
        if self:
            return
        self.begin(state.position.order)
        self._number, self._sent = 0, self.service.start()
        with naming(self.path), self.path.open(encoding="utf-8") as file:
            for line in file:
                self._send(_decoded(json.loads(line)))

    def write(self, record: Record) -> None:
        self.append(_encoded(record))
        self._send(record)

    def _send(self, record: Record) -> None:
        if self._number >= self._sent:
            self.service.send(self._number, record)
        self._number += 1

    def close(self) -> None:
        if self:
            super().close()
            self.service.finish()


def identity(path: Path, fresh: str) -> str:
    """The service's name for a run: the content of the file `path`, which is `fresh` from the first call on."""
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or not path.read_text(encoding="utf-8").strip():
            files.write(path, f"{fresh}\n".encode())
        return path.read_text(encoding="utf-8").strip()


def _encoded(record: Record) -> dict[str, Any]:
    metrics = {name: jsonable(_packed(value)) for name, value in record.metrics.items()}
    return {**position_fields(record), "metrics": metrics, "clock": record.clock}


def _decoded(line: dict[str, Any]) -> Record:
    metrics = {name: _unpacked(value) for name, value in line["metrics"].items()}
    return Record(order_of(line), line["step"], line["epoch"], metrics, line["clock"])


def _packed(value: Any) -> Any:
    if isinstance(value, Image):
        from PIL import Image as pictures

        file = io.BytesIO()
        pictures.fromarray(value.pixels().squeeze()).save(file, "PNG")
        return {"image": base64.b64encode(file.getvalue()).decode()}
    if isinstance(value, Text):
        return {"text": value.text}
    if isinstance(value, Histogram):
        return {"counts": value.counts.tolist(), "edges": value.edges.tolist()}
    return value


def _unpacked(value: Any) -> Any:
    match value:
        case {"image": png}:
            import numpy as np
            from PIL import Image as pictures

            pixels = torch.from_numpy(np.array(pictures.open(io.BytesIO(base64.b64decode(png)))))
            return Image(pixels if pixels.ndim == 2 else pixels.permute(2, 0, 1))
        case {"text": text}:
            return Text(text)
        case {"counts": counts, "edges": edges}:
            return Histogram(torch.tensor(counts, dtype=torch.float64), torch.tensor(edges, dtype=torch.float64))
        case str():
            return float(value)  # NaN and infinities
    return value
