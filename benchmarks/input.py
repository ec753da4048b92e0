"""Input: what a batch costs, in microseconds, beside the plain way to get it.

The plain way is `DataLoader(dataset, 32, shuffle=True)` with the same workers; for `data.arrays` it is `torch.randperm` and indexing by
hand. One thread. A pass includes its start, so that with workers the start of the workers counts.

    python -m benchmarks.input [--rounds 9]
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from benchmarks.measure import ROUNDS, alternate, ratios, spread, table
from fnrun import data
from fnrun.core.key import Key
from fnrun.core.position import Cursor

Sides = dict[str, Callable[[], float]]


class Digits(Dataset[Any]):
    """Small images kept as NumPy arrays, as many data sets do."""

    def __init__(self, rows: int) -> None:
        self.image, self.label = np.random.default_rng(0).random((rows, 1, 28, 28), np.float32), np.arange(rows) % 10

    def __len__(self) -> int:
        return len(self.label)

    def __getitem__(self, index: int) -> Any:
        return self.image[index], self.label[index]


class Noisy(Digits):
    """The same with an augmentation that draws from torch's ambient generator."""

    def __getitem__(self, index: int) -> Any:
        image = torch.from_numpy(self.image[index])
        return image + 0.1 * torch.randn(image.shape), self.label[index]


def comparisons() -> Iterator[tuple[str, Sides]]:
    tensors = TensorDataset(torch.randn(8192, 64), torch.arange(8192))
    for name, dataset in (("tensors", tensors), ("arrays", Digits(8192)), ("random augmentation", Noisy(8192))):
        for workers in (0, 2):
            yield f"loader, {name}, {workers} workers", loaded(dataset, workers, 1)
    yield "loader, arrays, 2 workers, 4 passes", loaded(Digits(2048), 2, 4)
    for size in (32, 1024):
        yield f"arrays shuffled, 64 floats, batch {size}", gathered(size)


def loaded(dataset: Any, workers: int, passes: int) -> Sides:
    stream = data.loader(dataset, 32, shuffle=True, workers=workers)
    plain = DataLoader(dataset, 32, shuffle=True, num_workers=workers, persistent_workers=workers > 0 and passes > 1)
    count = passes * len(stream)

    def again() -> Iterator[Any]:
        for _ in range(passes):
            yield from plain

    return {"fnrun": lambda: per_batch(stream.iterate(Key(0), Cursor()), count), "plain": lambda: per_batch(again(), count)}


def gathered(size: int) -> Sides:
    x, y = torch.randn(65_536, 64), torch.arange(65_536)
    stream = data.arrays({"x": x, "y": y}, size, shuffle=True)
    _ = stream.source  # its digest is taken once

    def by_hand() -> Iterator[Any]:
        order = torch.randperm(len(x))
        for start in range(0, len(x), size):
            index = order[start : start + size]
            yield {"x": x[index], "y": y[index]}

    return {"fnrun": lambda: per_batch(stream.iterate(Key(0), Cursor()), len(stream)), "plain": lambda: per_batch(by_hand(), len(stream))}


def per_batch(batches: Iterator[Any], count: int) -> float:
    begin = time.perf_counter()
    for _ in itertools.islice(batches, count):
        pass
    taken = time.perf_counter() - begin
    getattr(batches, "close", lambda: None)()
    return taken / count * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "This DataLoader will create")
    rows = []
    for name, sides in comparisons():
        times = alternate(sides, options.rounds)
        ours, plain = (f"{statistics.median(times[side]):.1f}" for side in ("fnrun", "plain"))
        rows.append([name, ours, plain, spread(ratios(times["fnrun"], times["plain"]))])
    print(f"{options.rounds} rounds, one thread\n")
    print(table(["", "us fnrun", "us plain", "fnrun / plain"], rows))


if __name__ == "__main__":
    main()
