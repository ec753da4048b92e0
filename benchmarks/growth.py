"""What a step costs as the work grows: with the steps that were done before, the rows of the data set, the leaves of the state.

One thread, eager, AdamW; everything in one process, over the bare computation with torch's fused AdamW, which takes turns with it.

- Steps: a whole program (shuffling, a log on each 50th step, a checkpoint) of 1,000 steps, from a state whose every counter says that so
  many steps were done. Its call counts whole, with the wait for the checkpoint.
- Rows: 2,048 steps, shuffled, of a data set whose rows are all the same memory. The order is computed 65,536 rows at a time.
- Leaves: vectors of 8 numbers, the loss is the sum of their squares.
- Log: `fnrun ls` of a run with so many lines, start-up included, and its summary.
- Checkpoints: one more save, with deleting what is old, beside so many; and finding the best in a new process.
- Runs: `fnrun ls` of so many, start-up included.

    python -m benchmarks.growth [--rounds 9] [--only steps rows leaves log checkpoints runs]
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import io
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import optree
import torch
from torch import Tensor, nn

import fnrun
from benchmarks.measure import ROUNDS, Times, alternate, ratios, seconds, spread, table
from benchmarks.problems import loss_fn, tiny
from fnrun import Cursor, Position, data, observers, optim
from fnrun.checkpoint import Checkpoints
from fnrun.runs.summary import summary

STEPS = [10**n for n in range(2, 7)]
ROWS = [10**n for n in range(3, 9)]
LEAVES = {4: 1000, 60: 300, 600: 50}  # and the steps of a turn


def bare(model: nn.Module, loss_fn: Callable[[nn.Module, Any], Tensor], batches: Iterable[Any]) -> Callable[[], Any]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def train() -> None:
        for batch in batches:
            optimizer.zero_grad()
            loss_fn(model, batch).backward()
            optimizer.step()

    return train


def timed(train: Callable[[], Any], steps: int) -> Callable[[], float]:
    return lambda: seconds(train) / steps * 1e6


def over(times: Times, name: str, base: str) -> list[float]:
    return [ours - plain for ours, plain in zip(times[name], times[base], strict=True)]


# --- steps done --------------------------------------------------------------------------------------------------------


def by_steps(rounds: int) -> str:
    problem = tiny(1000)
    optimizer = optim.adamw(1e-3)
    train_step = fnrun.make_train_step(problem.model, loss_fn, optimizer)
    fresh = fnrun.TrainState.create(problem.model, optimizer)
    x, y = (torch.cat(column) for column in zip(*problem.batches, strict=True))
    stream = data.arrays((x, y), 32, shuffle=True)

    def program(done: int) -> Callable[[], Any]:
        position = Position(streams={"train": Cursor(epoch=done // 1000, source=stream.source)}, ticks=done)
        state = fresh.replace(step=done, position=position, opt_state=counting(fresh.opt_state, done))

        def fit() -> None:
            with tempfile.TemporaryDirectory() as folder:
                log = observers.log(every=50, to=[observers.jsonl(f"{folder}/log.jsonl")])
                epochs = fnrun.repeat(
                    fnrun.sequence(train=fnrun.epoch_loop(train_step, observers=[log])),
                    times=1,
                    observers=[observers.checkpoint(Checkpoints(f"{folder}/checkpoints"))],
                )
                end, _ = epochs(state, {"train": stream})
                assert end.step == done + 1000

        return fit

    sides = {"bare": timed(bare(tiny(1000).model, loss_fn, problem.batches), 1000), **{str(n): timed(program(n), 1000) for n in STEPS}}
    times = alternate(sides, rounds)
    first = str(STEPS[0])
    rows = [
        [
            f"{n:,}",
            f"{statistics.median(times[str(n)]):.1f}",
            spread(over(times, str(n), "bare"), 1),
            spread(ratios(times[str(n)], times[first]), 3),
        ]
        for n in STEPS
    ]  # fmt: skip
    return table(["steps done", "us a step", "us over bare", f"/ at {first}"], rows)


def counting(opt_state: Any, done: int) -> Any:
    """The optimizer's memory with its count of updates at `done`: the ints in it are counts, and it has missed none."""
    hyper = dataclasses.replace(opt_state.hyper, count=optree.tree_map(lambda count: count + done, opt_state.hyper.count))
    return dataclasses.replace(opt_state, hyper=hyper)


# --- rows --------------------------------------------------------------------------------------------------------------


def by_rows(rounds: int) -> str:
    problem, steps = tiny(1000), 2048
    optimizer = optim.adamw(1e-3)
    fit = fnrun.step_loop(fnrun.make_train_step(problem.model, loss_fn, optimizer), steps)
    fresh = fnrun.TrainState.create(problem.model, optimizer)

    def trained(rows: int) -> Callable[[], Any]:
        stream = data.arrays((torch.randn(1, 64).expand(rows, 64), torch.zeros(1, dtype=torch.int64).expand(rows)), 32, shuffle=True)
        _ = stream.source  # its digest is taken once
        return lambda: fit(fresh, stream)

    batches = [problem.batches[i % len(problem.batches)] for i in range(steps)]
    sides = {"bare": timed(bare(tiny(1000).model, loss_fn, batches), steps), **{str(n): timed(trained(n), steps) for n in ROWS}}
    times = alternate(sides, rounds)
    first = str(ROWS[0])
    rows = [
        [
            f"{n:,}",
            f"{statistics.median(times[str(n)]):.1f}",
            spread(over(times, str(n), "bare"), 1),
            spread(ratios(times[str(n)], times[first]), 3),
        ]
        for n in ROWS
    ]  # fmt: skip
    return table(["rows", "us a step", "us over bare", f"/ of {int(first):,}"], rows)


# --- leaves ------------------------------------------------------------------------------------------------------------


class Leaves(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.vectors = nn.ParameterList(torch.randn(8) for _ in range(n))

    def forward(self) -> Tensor:
        return torch.cat(list(self.vectors)).square().sum()


def sum_of_squares(model: nn.Module, batch: Any) -> Tensor:
    return model()


def by_leaves(rounds: int) -> str:
    sides: dict[str, Callable[[], float]] = {}
    for n, steps in LEAVES.items():
        batches = [torch.zeros(1)] * steps
        sides[f"{n} bare"] = timed(bare(Leaves(n), sum_of_squares, batches), steps)
        for way, options in (("", {}), (", donated", {"donate": True})):
            model, optimizer = Leaves(n), optim.adamw(1e-3)
            fit = fnrun.epoch_loop(fnrun.make_train_step(model, sum_of_squares, optimizer), **options)
            state = fnrun.TrainState.create(model, optimizer)
            stream = data.batches(batches)
            _ = stream.source  # its digest is taken once
            sides[f"{n}{way}"] = timed(functools.partial(fit, state, stream), steps)
    times = alternate(sides, rounds)
    rows = []
    for way in ("", ", donated"):
        few = min(LEAVES)
        base = over(times, f"{few}{way}", f"{few} bare")
        for n in LEAVES:
            more = over(times, f"{n}{way}", f"{n} bare")
            a_leaf = spread([(m - b) / (n - few) for m, b in zip(more, base, strict=True)]) if n > few else ""
            bare_, ours = statistics.median(times[f"{n} bare"]), statistics.median(times[f"{n}{way}"])
            rows.append([f"{n}{way}", f"{bare_:.1f}", f"{ours:.1f}", spread(more, 1), a_leaf])
    return table(["leaves", "us bare", "us fnrun", "us over bare", f"us a leaf beyond {min(LEAVES)}"], rows)


# --- what is on disk ---------------------------------------------------------------------------------------------------

LINES = [10**n for n in range(3, 7)]
CHECKPOINTS = [10, 100, 2000]
RUNS = [10, 100, 1000]


def a_run(path: Path, lines: int) -> fnrun.Run:
    run = fnrun.Run.create("benchmarks.growth", {}, path)
    with run.metrics.open("w") as file:
        for step in range(1, lines + 1):
            clock = {"time": 1.8e9 + step, "elapsed": float(step)}
            line = {"ticks": step, "at": str(step), "step": step, "epoch": 1 + step // 1000, "train/loss": 1 / step, "clock": clock}
            file.write(json.dumps(line) + "\n")
    return run


def ls(path: Path) -> Callable[[], Any]:
    return lambda: subprocess.run([sys.executable, "-m", "fnrun", "ls", str(path)], check=True, stdout=subprocess.DEVNULL)


def silently(function: Callable[[], Any]) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        function()


def by_log(rounds: int) -> str:
    rows = []
    for lines in LINES:
        with tempfile.TemporaryDirectory() as folder:
            run = a_run(Path(folder) / "run", lines)
            listed = [seconds(ls(Path(folder))) for _ in range(rounds)]
            summed = seconds(lambda: silently(lambda: summary(run, evaluates=True)))  # noqa: B023
            rows.append([f"{lines:,}", spread(listed), f"{summed:.2f}"])
    return table(["lines", "s for ls", "s for the summary"], rows)


def by_checkpoints(rounds: int) -> str:
    model = nn.Linear(8, 8)
    state, rows = fnrun.TrainState.create(model, optim.adamw(1e-3)), []
    for count in CHECKPOINTS:
        with tempfile.TemporaryDirectory() as folder, Checkpoints(folder) as checkpoints:

            def save(step: int) -> None:
                checkpoints.save(state.replace(step=step, position=Position(ticks=step)), {"loss": 1 / step}, monitor="loss")
                checkpoints.prune(count + rounds)  # noqa: B023
                checkpoints.wait()

            for step in range(1, count + 1):
                save(step)
            found = [seconds(lambda: Checkpoints(folder).best()) for _ in range(rounds)]
            saved = [seconds(functools.partial(save, count + 1 + turn)) for turn in range(rounds)]
            rows.append([f"{count:,}", spread(saved, 3), spread(found, 3)])
    return table(["checkpoints", "s for a save", "s for the best"], rows)


def by_runs(rounds: int) -> str:
    rows = []
    for count in RUNS:
        with tempfile.TemporaryDirectory() as folder:
            for number in range(count):
                a_run(Path(folder) / str(number), 10)
            rows.append([f"{count:,}", spread([seconds(ls(Path(folder))) for _ in range(rounds)])])
    return table(["runs", "s for ls"], rows)


SECTIONS = {"steps": by_steps, "rows": by_rows, "leaves": by_leaves, "log": by_log, "checkpoints": by_checkpoints, "runs": by_runs}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--only", nargs="+", default=list(SECTIONS), choices=list(SECTIONS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{options.rounds} rounds, one thread")
    for name in options.only:
        print(f"\n### {name.capitalize()}\n\n{SECTIONS[name](options.rounds)}", flush=True)


if __name__ == "__main__":
    main()
