"""The outputs of a predict_loop, written to disk."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fnrun.core import files, tree
from fnrun.core.documents import jsonable
from fnrun.core.state import LoopState
from fnrun.sinks.lines import Lines, naming, order_fields

_SHARD = re.compile(r"\d{9}\.pt")


class _Rows:
    """A line for each example."""

    def __init__(self, path: Path) -> None:
        self._lines = Lines(path)

    def __str__(self) -> str:
        return f"predictions -> {self._lines.path}"

    def open(self, program: Any, state: LoopState) -> None:
        self._lines.begin(state.position.order if state.position.frames else ())

    def __call__(self, state: LoopState, metrics: dict[str, Any]) -> None:
        place = {**order_fields(state.position.order), "step": state.step, "batch": state.position.frames[-1].ticks - 1}
        for i, output in enumerate(rows(_outputs(metrics))):
            self._lines.append({**place, "row": i, "output": jsonable(output)})

    def flush(self) -> None:
        self._lines.flush()

    def close(self, state: LoopState, reason: str | BaseException | None) -> None:
        self._lines.close()


class _Shards:
    """A file for each batch, named by `Position.ticks`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def __str__(self) -> str:
        return f"predictions -> {self.directory}"

    def open(self, program: Any, state: LoopState) -> None:
        with naming(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            for path in self.directory.iterdir():
                late = _SHARD.fullmatch(path.name) and (not state.position.frames or int(path.stem) > state.position.ticks)
                if late or files.TEMPORARY.fullmatch(path.name):
                    path.unlink()

    def __call__(self, state: LoopState, metrics: dict[str, Any]) -> None:
        # Copies: torch.save writes the whole storage of a view.
        outputs = tree.map(lambda leaf: leaf.cpu().clone() if isinstance(leaf, torch.Tensor) else leaf, _outputs(metrics))
        with files.replacing(self.directory / f"{state.position.ticks:09}.pt") as file:
            torch.save(outputs, file)


def _outputs(metrics: dict[str, Any]) -> Any:
    if "outputs" not in metrics:
        raise ValueError(
            f"predictions: this loop reports {', '.join(map(repr, metrics)) or 'nothing'} and no outputs: give it to a predict_loop"
        )
    return metrics["outputs"]


def rows(outputs: Any) -> list[Any]:
    """The outputs of each example of a batch: tensors, arrays and lists are indexed along their first dimension. Waits for the device.

    Raises ValueError where they are not of one length.

    >>> rows({"label": torch.tensor([3, 1]), "name": ["a", "b"]})
    [{'label': 3, 'name': 'a'}, {'label': 1, 'name': 'b'}]
    """
    columns = tree.map(lambda leaf: leaf.tolist() if isinstance(leaf, (torch.Tensor, np.ndarray)) else leaf, outputs)
    lengths = set(_lengths(columns))
    if len(lengths) != 1 or None in lengths:
        raise ValueError(
            "predictions: a line is written for each example, so outputs are tensors or lists of one length, in dictionaries and tuples; "
            f"these are {tree.map(_described, outputs)}. Others go into a directory: predictions('path/without/suffix')"
        )
    return [_row(columns, i) for i in range(lengths.pop() or 0)]


def _lengths(columns: Any) -> Iterator[int | None]:
    if isinstance(columns, (dict, tuple)):
        for part in columns.values() if isinstance(columns, dict) else columns:
            yield from _lengths(part)
    else:
        yield len(columns) if isinstance(columns, list) else None


def _row(columns: Any, i: int) -> Any:
    if isinstance(columns, dict):
        return {name: _row(part, i) for name, part in columns.items()}
    return [_row(part, i) for part in columns] if isinstance(columns, tuple) else columns[i]


def _described(leaf: Any) -> str:
    return f"{type(leaf).__name__} {list(leaf.shape)}" if hasattr(leaf, "shape") else repr(leaf)


def predictions(path: str | Path) -> Any:
    """The outputs of a `predict_loop`, written to disk tick by tick. `path` is one of two:

    - `predictions.jsonl`: a JSON object for each example: `batch` and `row` (its place in the pass and in the batch, from 0), `step`,
      `ticks`, `at`, and `output`, the step's output for it as JSON. For labels, scores, texts.
    - a directory: one file for each batch, in the order of their names. `torch.load(file, weights_only=True)` reads it if the outputs are
      tensors and plain containers. For masks, embeddings and other large outputs.

    A call that goes on in the middle of a program cuts what is later than its state, which is written again. Any other call begins anew.
    In a `repeat`, each round's predictions follow those of the round before.

    Raises ValueError in another loop, and for outputs that cannot be cut into examples.

    >>> print(predictions("runs/digits/predictions.jsonl"))
    predictions -> runs/digits/predictions.jsonl
    """
    path = files.local_path(path)
    return _Rows(path) if path.suffix == ".jsonl" else _Shards(path)
