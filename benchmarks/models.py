"""Time and peak memory of a step where the arithmetic is what takes long: a transformer of 4.9M parameters, a small CNN with batch norm.

One thread, float32, AdamW. fnrun's rows are whole loops over the same batches as the bare loop's. The transformer reads texts of 128 bytes:
with 8 of them a step, activations are most of the memory, and every way peaks at the end of the forward pass; with one, parameters and
moments are, and the peak is in the update. The CNN sees 32 images of 3x32x32.

Memory is that of everything in a run (module, state, gradients, activations), in two measures, each of a fresh process that trains a few
steps: the peak of what torch's allocator had handed out (exact, the same each time), and the peak of the resident set over what it was
before the model was built (which the compiler is part of; median of 3). `donated` is as documented: the module is emptied once the state is
made, `model.to("meta")`, and the state is handed over, `fit(state.donate(), data)`.

    python -m benchmarks.models [--rounds 7] [--only transformer ...]
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

import fnrun
from benchmarks.measure import ROUNDS, Turns, compared, table, take_turns
from benchmarks.problems import Problem, cnn, loss_fn, transformer
from fnrun import data, optim

PROBLEMS: dict[str, Callable[[], Problem]] = {
    "transformer, 8 texts a step": functools.partial(transformer, 8),
    "transformer, 1 text a step": functools.partial(transformer, 1),
    "CNN": cnn,
}
WAYS: dict[str, dict[str, Any]] = {
    "bare, foreach AdamW": {"foreach": True},
    "bare, default AdamW": {},
    "bare, fused AdamW": {"fused": True},
    "fnrun": {},
    "fnrun, donated": {"donate": True},
    "fnrun, compiled": {"compile": True},
    "fnrun, compiled, donated": {"compile": True, "donate": True},
    "fnrun, blocks checkpointed": {"checkpoint_activations": "blocks"},
    "fnrun, donated, blocks checkpointed": {"donate": True, "checkpoint_activations": "blocks"},
    "fnrun, 8 microbatches": {"microbatches": 8},
}
#: The smallest block that glibc maps by itself and gives back at once; fixed, because otherwise it grows with what was freed before.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


def bare(problem: Problem, **adamw: Any) -> Iterator[None]:
    """Train; one pass over the batches each time that it is asked."""
    optimizer = torch.optim.AdamW(problem.model.parameters(), lr=1e-3, **adamw)
    while True:
        for batch in problem.batches:
            optimizer.zero_grad()
            loss_fn(problem.model, batch).backward()
            optimizer.step()
        yield


def ours(problem: Problem, donate: bool = False, **options: Any) -> Iterator[None]:
    optimizer = optim.adamw(1e-3)
    train_step = fnrun.make_train_step(problem.model, loss_fn, optimizer, **options)
    fit = fnrun.epoch_loop(train_step, donate=donate)
    state = fnrun.TrainState.create(problem.model, optimizer)
    stream = data.batches(problem.batches)
    if donate:
        problem.model.to("meta")
    while True:
        state, _ = fit(state.donate() if donate else state, stream)
        yield


def training(name: str) -> tuple[int, Iterator[None]]:
    """The batches in a pass, and a training that goes one pass at a time."""
    torch.set_num_threads(1)
    kind, way = name.split(": ")
    problem = PROBLEMS[kind]()
    return len(problem.batches), (bare if way.startswith("bare") else ours)(problem, **WAYS[way])


def side(name: str) -> tuple[Any, Any]:
    steps, passes = training(name)
    return functools.partial(_in_turn, passes, steps), []


def _in_turn(passes: Iterator[None], steps: int, turns: Turns) -> None:
    while True:
        with turns.turn(steps):
            next(passes)


# --- memory ------------------------------------------------------------------------------------------------------------


def resident_peak(name: str) -> float:
    """The bytes that the resident set of this process had at its highest in two passes, over those before the model was built."""
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark is now what is resident
    before = _high_water()
    _, passes = training(name)
    for _ in range(2):
        next(passes)
    return _high_water() - before


def _high_water() -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return float(line.split()[1]) * 1024


def allocated_peak(name: str) -> float:
    """The most bytes of tensors alive at once in the third of three passes. The first two compile, and look at what first calls look at."""
    return _peak(lambda: training(name)[1], lambda passes: next(passes))


def _peak(prepare: Callable[[], Any], action: Callable[[Any], Any], warm: int = 2, whole: bool = True) -> float:
    """The most bytes of tensors alive at once in `action(prepare())`, after `warm` others; without `whole`, beyond those alive before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        prepared = prepare()
        for _ in range(warm):
            action(prepared)
        with torch.profiler.record_function("measured"):
            action(prepared)
    events: Any = profile.profiler.kineto_results.events()  # pyright: ignore[reportOptionalMemberAccess]
    (begin,) = [event.start_ns() for event in events if event.name() == "measured"]
    alive, before, peak = 0, 0, 0
    for event in sorted((event for event in events if event.name() == "[memory]"), key=lambda event: event.start_ns()):
        alive += event.nbytes()
        if event.start_ns() >= begin:
            peak = max(peak, alive)
        else:
            before = alive
    return peak - (0 if whole else before)


def gradients_at_once() -> str:
    """What `step.gradients` has alive at its peak, in gradients, of a network whose activations are nothing beside them."""
    model = torch.nn.Sequential(*(torch.nn.Linear(512, 512) for _ in range(16)))
    optimizer, x = optim.sgd(0.1), torch.randn(16, 512)
    state, size = fnrun.TrainState.create(model, optimizer), sum(p.nbytes for p in model.parameters())
    rows = []
    for n in (1, 2, 4, 8, 16):
        step = fnrun.make_train_step(model, lambda model, x: model(x).square().mean(), optimizer, microbatches=n)
        peak = _peak(lambda: state, lambda state, step=step: step.gradients(state, x), warm=3, whole=False)
        rows.append([str(n), f"{peak / size:.2f}", str(n.bit_length())])
    return table(["microbatches", "gradients at once", "log2(n) + 1"], rows)


def memory(name: str, measure: str) -> float:
    """What `measure` says in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.models", "--memory", measure, name],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # the profiler says that it starts and stops
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
        env={**os.environ, **MALLOC},
    )
    return json.loads(done.stdout.splitlines()[-1])


def memories(names: list[str]) -> str:
    tasks = [(name, measure) for name in names for measure in ("allocated_peak", *["resident_peak"] * 3)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # of memory, others take nothing away
        results = list(pool.map(lambda task: memory(*task), tasks))
    rows = {name: (results[4 * i], statistics.median(results[4 * i + 1 : 4 * i + 4])) for i, name in enumerate(names)}
    base = rows[names[0]]
    cells = []
    for name, row in rows.items():
        shares = [(f"{value / 2**20:.1f}", f"{value / reference:.2f}") for value, reference in zip(row, base, strict=True)]
        cells.append([name.split(": ")[1], *itertools.chain(*shares)])
    return table(["", "MiB of tensors", "/ first", "MiB resident", "/ first"], cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--only", nargs="+", default=[""], metavar="PREFIX")
    parser.add_argument("--memory", nargs=2, metavar=("MEASURE", "SIDE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        measure, name = options.memory
        print(json.dumps(globals()[measure](name)))
        return
    print(f"{options.rounds} rounds, one thread")
    for kind in [kind for kind in PROBLEMS if kind.startswith(tuple(options.only))]:
        times = take_turns("benchmarks.models", [f"{kind}: {way}" for way in WAYS], options.rounds)
        print(f"\n### {kind}, time\n")
        short = {name.split(": ")[1]: values for name, values in times.items()}
        print(compared(short, ["bare, foreach AdamW", "bare, fused AdamW"], "ms a step", 1e3))
        print(f"\n### {kind}, peak memory\n")
        print(memories(list(times)), flush=True)
    print(f"\n### gradients that microbatches keep\n\n{gradients_at_once()}")


if __name__ == "__main__":
    main()
