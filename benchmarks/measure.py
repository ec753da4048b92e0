"""How everything here is timed: sides take turns, and only ratios within a round count.

The machine has moods that last seconds to minutes. In a round every side runs once, in an order that is drawn anew; a ratio is taken within
the round, and what is shown is the median over the rounds with its quartiles.

A *side* is a function of a `Turns`. It trains for ever and takes a turn at a time, in one of two ways: it goes through `turns` as through a
data set (each pass over the batches is a turn), or it does something whole `with turns.turn(steps)`. Each side runs in a process group of
its own, so that no framework changes another's threads, allocator or hooks; all are warm before the first round.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import random
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch.utils.data import IterableDataset

ROUNDS = 9
PATIENCE = 120  # seconds, for a turn
Times = dict[str, list[float]]
T = TypeVar("T")


# --- figures -----------------------------------------------------------------------------------------------------------


def ratios(values: Sequence[float], reference: Sequence[float]) -> list[float]:
    """Round by round."""
    return [value / base for value, base in zip(values, reference, strict=True)]


def spread(values: Sequence[float], digits: int = 2) -> str:
    """The median, and the quartiles."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table that also reads well in a terminal: the first column to the left, the others to the right."""
    widths = [max(3, *(len(row[i]) for row in [head, *rows])) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        first, *others = [cell.ljust(w) if not i else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, widths, strict=True))]
        return "| " + " | ".join([first, *others]) + " |"

    rule = "|" + "|".join("-" * (w + 2) if not i else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([line(head), rule, *map(line, rows)])


def compared(times: Times, references: Sequence[str], unit: str, scale: float = 1.0) -> str:
    """A row for each side: the median time in `unit`, and its ratio to each of the references."""
    head = ["", unit, *(f"/ {name}" for name in references)]
    rows = [
        [name, f"{statistics.median(values) * scale:.1f}", *(spread(ratios(values, times[reference])) for reference in references)]
        for name, values in times.items()
    ]
    return table(head, rows)


# --- in one process ----------------------------------------------------------------------------------------------------


def alternate(sides: Mapping[str, Callable[[], T]], rounds: int = ROUNDS) -> dict[str, list[T]]:
    """What each side says that it took, round by round. A first round warms up and is not kept."""
    times: dict[str, list[T]] = {name: [] for name in sides}
    order = list(sides)
    for number in range(rounds + 1):
        random.shuffle(order)
        for name in order:
            taken = sides[name]()
            if number:
                times[name].append(taken)
    return times


def seconds(action: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


# --- in a process group each -------------------------------------------------------------------------------------------


class Turns(IterableDataset[Any]):
    """What a side is given: the batches of a pass, over and over. A pass begins when it is this side's turn."""

    def __init__(self, batches: Sequence[Any], wait: Callable[[], None], answer: Callable[[float], None]) -> None:
        self.batches, self._wait, self._answer = batches, wait, answer

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        with self.turn(len(self.batches)):
            yield from self.batches

    @contextlib.contextmanager
    def turn(self, steps: int) -> Iterator[None]:
        self._wait()
        begin = time.perf_counter()
        with contextlib.suppress(GeneratorExit):  # a framework that counts batches does not ask for the end of a pass
            yield
        self._answer((time.perf_counter() - begin) / steps)


def serve(module: str, name: str) -> None:
    """Be the side `name` of `module.SIDES`: a turn for each line that comes in, its seconds a step as the line that goes out."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a framework prints is no reply
    side, batches = importlib.import_module(module).side(name)

    def wait() -> None:
        if not sys.stdin.readline():
            os._exit(0)  # not an exception, which a framework may catch

    os.chdir(tempfile.mkdtemp(dir=os.environ["BENCHMARK_SCRATCH"]))
    side(Turns(batches, wait, lambda taken: print(taken, file=replies)))


class _Worker:
    def __init__(self, module: str, name: str, scratch: str) -> None:
        self.name, self.ready = name, False
        self.log = Path(scratch, f"{len(os.listdir(scratch))}.log").open("w+")  # noqa: SIM115  (until `end`)
        self.process = subprocess.Popen(
            [sys.executable, "-c", "import sys; from benchmarks.measure import serve; serve(*sys.argv[1:])", module, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            start_new_session=True,
            cwd=Path(__file__).parents[1],
            env={**os.environ, "BENCHMARK_SCRATCH": scratch},
        )

    def go(self) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it is dead: `taken` says of what
            print("go", file=self.process.stdin, flush=True)

    def taken(self) -> float:
        assert self.process.stdout is not None
        heard, _, _ = select.select([self.process.stdout], [], [], PATIENCE)
        line = self.process.stdout.readline() if heard else ""
        if not line:
            self.log.seek(0)
            raise RuntimeError(f"{self.name} {'ended' if heard else 'is silent'}:\n{self.log.read()[-3000:]}")
        return float(line)

    def first(self) -> None:
        try:
            self.taken()
            self.ready = True
        except RuntimeError as error:
            print(f"left out: {self.name}: {str(error).splitlines()[-1]}", file=sys.stderr)

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.log):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()  # pyright: ignore[reportOptionalMemberAccess]


def take_turns(module: str, names: Sequence[str], rounds: int = ROUNDS, warm: int = 2) -> Times:
    """The seconds a step of each side of `module`, round by round, after `warm` rounds that are not kept.

    A side that fails to start is left out, and said to be.
    """
    workers: list[_Worker] = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        try:
            for name in names:
                workers.append(_Worker(module, name, scratch))
                workers[-1].go()
                if len(workers) > 1:  # importing and compiling take longest: two at a time
                    workers[-2].first()
            workers[-1].first()
            ready = [worker for worker in workers if worker.ready]
            times: Times = {worker.name: [] for worker in ready}
            for number in range(1, warm + rounds):
                for worker in random.sample(ready, len(ready)):
                    worker.go()
                    taken = worker.taken()
                    if number >= warm:
                        times[worker.name].append(taken)
            return times
        finally:
            for worker in workers:
                worker.end()
