"""How long training is held, a save and a restore take, beside torch.save and others: `python -m benchmarks.checkpoint [ROUNDS]`.

Two states: 300 leaves of 397 MB in all, and 3,000 leaves of 1 kB. Every way writes the same tensors and fsyncs what it wrote. The ways take
turns within a round, so that a slow minute of the machine hits all of them; what is printed is the median of the rounds, and its ratio to
`torch.save`. "held" is how long the caller waits before it may go on.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from fnrun.checkpoint import Checkpoints
from fnrun.checkpoint.store import sync
from fnrun.state import TrainState
from fnrun.tree import equal

Times = tuple[float, float, float]  # held, saved, restored


def large() -> dict[str, torch.Tensor]:
    """300 leaves of 397 MB, in the proportions of a transformer and its AdamW state: matrices and vectors."""
    shapes = [(484, 410 * (1 + i % 4)) if i % 3 else (1024,) for i in range(300)]
    return {f"layer.{i}.weight": torch.randn(shape) for i, shape in enumerate(shapes)}


def small() -> dict[str, torch.Tensor]:
    """3,000 leaves of 1 kB."""
    return {f"layer.{i}.bias": torch.randn(256) for i in range(3000)}


def sync_all(folder: Path) -> None:
    for path in [folder, *folder.rglob("*")]:
        sync(path)


def fnrun_(leaves: dict[str, torch.Tensor], folder: Path) -> Times:
    state = TrainState(params=leaves, buffers={}, opt_state=None, rng=None, step=1)  # pyright: ignore[reportArgumentType]
    checkpoints = Checkpoints(folder)
    start = time.perf_counter()
    checkpoints.save(state)
    held = time.perf_counter()
    checkpoints.wait()
    saved = time.perf_counter()
    back = checkpoints.restore(like=state)
    restored = time.perf_counter()
    assert equal(back.params, leaves)
    return held - start, saved - start, restored - saved


def torch_save(leaves: dict[str, torch.Tensor], folder: Path) -> Times:
    start = time.perf_counter()
    torch.save(leaves, folder / "state.pt")
    sync_all(folder)
    saved = time.perf_counter()
    torch.load(folder / "state.pt", weights_only=True)
    return saved - start, saved - start, time.perf_counter() - saved


def dcp_sync(leaves: dict[str, torch.Tensor], folder: Path) -> Times:
    start = time.perf_counter()
    dcp.save(dict(leaves), checkpoint_id=folder / "dcp", no_dist=True)  # pyright: ignore[reportPrivateImportUsage]
    sync_all(folder)
    saved = time.perf_counter()
    dcp.load({name: torch.empty_like(leaf) for name, leaf in leaves.items()}, checkpoint_id=folder / "dcp", no_dist=True)  # pyright: ignore[reportPrivateImportUsage]
    return saved - start, saved - start, time.perf_counter() - saved


def dcp_async(leaves: dict[str, torch.Tensor], folder: Path) -> Times:
    start = time.perf_counter()
    future: Any = dcp.async_save(dict(leaves), checkpoint_id=folder / "dcp", no_dist=True)  # pyright: ignore[reportPrivateImportUsage]
    held = time.perf_counter()
    future.result()
    sync_all(folder)
    saved = time.perf_counter()
    dcp.load({name: torch.empty_like(leaf) for name, leaf in leaves.items()}, checkpoint_id=folder / "dcp", no_dist=True)  # pyright: ignore[reportPrivateImportUsage]
    return held - start, saved - start, time.perf_counter() - saved


def orbax_default(leaves: dict[str, torch.Tensor], folder: Path) -> Times:
    from orbax.checkpoint import v1 as ocp

    arrays = {f"{i:05d}": leaf.numpy() for i, leaf in enumerate(leaves.values())}
    start = time.perf_counter()
    response = ocp.save_async(str(folder / "orbax"), arrays)
    held = time.perf_counter()
    response.result()
    sync_all(folder)
    saved = time.perf_counter()
    ocp.load(str(folder / "orbax"))
    return held - start, saved - start, time.perf_counter() - saved


WAYS: dict[str, Callable[[dict[str, torch.Tensor], Path], Times]] = {
    "torch.save + fsync": torch_save,
    "fnrun": fnrun_,
    "DCP": dcp_sync,
    "DCP async": dcp_async,
    "orbax v1 defaults": orbax_default,
}


def measure(leaves: dict[str, torch.Tensor], rounds: int) -> dict[str, list[Times]]:
    times: dict[str, list[Times]] = {way: [] for way in WAYS}
    for number in range(rounds + 1):
        for name, way in WAYS.items():
            folder = Path(tempfile.mkdtemp(dir=os.environ.get("BENCHMARK_DIR")))
            with contextlib.redirect_stdout(None):
                took = way(leaves, folder)
            shutil.rmtree(folder)
            if number:  # the first round imports and warms up
                times[name].append(took)
    return times


def show(title: str, times: dict[str, list[Times]]) -> None:
    medians = {name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in times.items()}
    base = medians["torch.save + fsync"]
    print(f"\n{title}\n{'':20}{'held':>16}{'saved':>18}{'restored':>18}")
    for name, median in medians.items():
        cells = [f"{1000 * value:8.1f} ms {value / reference:5.2f}x" for value, reference in zip(median, base, strict=True)]
        print(f"{name:20}" + "  ".join(cells))


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    for title, leaves in (("300 leaves, 397 MB", large()), ("3,000 leaves of 1 kB", small())):
        show(f"{title} (median of {rounds} rounds, {torch.get_num_threads()} threads)", measure(leaves, rounds))


if __name__ == "__main__":
    main()
