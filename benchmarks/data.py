"""Input: what a batch costs, beside the plain way to get it.

    python benchmarks/data.py

Each comparison runs its sides in turn for some rounds; the figures are medians per batch, and the ratio is ours to the plain way.
"""

from __future__ import annotations

import itertools
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from fnrun import data
from fnrun.rng import Key
from fnrun.state import Cursor

ROUNDS = 9


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


def main() -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "This DataLoader will create")
    print(f"torch {torch.__version__}, one thread, {ROUNDS} rounds; microseconds a batch")
    tensors = TensorDataset(torch.randn(8192, 64), torch.arange(8192))
    for name, dataset in (("tensors", tensors), ("arrays", Digits(8192)), ("random augmentation", Noisy(8192))):
        for workers in (0, 2):
            rows(f"loader, {name}, {workers} workers, 1 pass", loaded(dataset, workers, 1))
    rows("loader, arrays, 2 workers, 4 passes", loaded(Digits(2048), 2, 4))
    for size in (32, 1024):
        rows(f"arrays shuffled, 64 floats, batch {size}", gathered(size))
    for rows_ in (10**3, 10**5, 10**6, 10**8):
        print(f"{f'order alone, batch 32, {rows_:.0e} rows':50} {order(rows_):8.1f}")


def rows(title: str, sides: tuple[Callable[[], float], Callable[[], float]]) -> None:
    times = [[side() * 1e6 for side in sides] for _ in range(ROUNDS)]
    ours, plain = (statistics.median(column) for column in zip(*times, strict=True))
    ratio = statistics.median(a / b for a, b in times)
    print(f"{title:50} {ours:8.1f} {plain:8.1f}  ratio {ratio:.2f}")


def loaded(dataset: Any, workers: int, passes: int) -> tuple[Callable[[], float], Callable[[], float]]:
    stream = data.loader(dataset, 32, shuffle=True, workers=workers)
    plain = DataLoader(dataset, 32, shuffle=True, num_workers=workers, persistent_workers=workers > 0 and passes > 1)
    count = passes * len(stream)

    def again() -> Iterator[Any]:
        for _ in range(passes):
            yield from plain

    return lambda: per_batch(stream.iterate(Key(0), Cursor()), count), lambda: per_batch(again(), count)


def gathered(size: int) -> tuple[Callable[[], float], Callable[[], float]]:
    x, y = torch.randn(65_536, 64), torch.arange(65_536)
    stream = data.arrays({"x": x, "y": y}, size, shuffle=True)
    _ = stream.source  # its digest is taken once

    def by_hand() -> Iterator[Any]:
        order = torch.randperm(len(x))
        for start in range(0, len(x), size):
            index = order[start : start + size]
            yield {"x": x[index], "y": y[index]}

    return lambda: per_batch(stream.iterate(Key(0), Cursor()), len(stream)), lambda: per_batch(by_hand(), len(stream))


def order(rows: int) -> float:
    """Microseconds a batch of 32 to know its rows, in a pass of so many (or in the first million of them)."""
    from fnrun.data.arrays import Order

    def one() -> float:
        found, batches = Order(Key(0), rows, 32, True), min(rows, 10**6) // 32
        begin = time.perf_counter()
        for batch in range(batches):
            found.fill(0, batch)
            found.block[found.within(batch)]
        return (time.perf_counter() - begin) / batches * 1e6

    return statistics.median(one() for _ in range(3))


def per_batch(batches: Iterator[Any], count: int) -> float:
    begin = time.perf_counter()
    for _ in itertools.islice(batches, count):
        pass
    taken = time.perf_counter() - begin
    getattr(batches, "close", lambda: None)()
    return taken / count


if __name__ == "__main__":
    main()
