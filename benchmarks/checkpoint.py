"""How long training is held, a save and a restore take, beside torch.save and others.

Two states: 300 leaves of 397 MB in all, and 3,000 leaves of 1 kB. Every way writes the same tensors and fsyncs what it wrote. `held` is how
long the caller waits before it may go on; ratios are to torch.save.

    python -m benchmarks.checkpoint [--rounds 7] [--only fnrun]
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import logging
import os
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from benchmarks.measure import alternate, ratios, spread, table
from fnrun.checkpoint import Checkpoints
from fnrun.core.files import sync
from fnrun.core.state import TrainState
from fnrun.core.tree import equal

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


def measure(leaves: dict[str, torch.Tensor], rounds: int, only: list[str]) -> dict[str, list[Times]]:
    def once(way: Callable[[dict[str, torch.Tensor], Path], Times]) -> Times:
        folder = Path(tempfile.mkdtemp(dir=os.environ.get("BENCHMARK_DIR")))
        try:
            with contextlib.redirect_stdout(None):
                return way(leaves, folder)
        finally:
            shutil.rmtree(folder)

    return alternate({name: functools.partial(once, way) for name, way in WAYS.items() if name in only}, rounds)


def compared(times: dict[str, list[Times]]) -> str:
    columns = {name: list(zip(*rows, strict=True)) for name, rows in times.items()}
    base = columns["torch.save + fsync"]
    head = [cell for what in ("held", "saved", "restored") for cell in (f"ms {what}", "/ torch.save")]
    rows = [
        [
            name,
            *(
                cell
                for ours, plain in zip(three, base, strict=True)
                for cell in (f"{statistics.median(ours) * 1e3:.1f}", spread(ratios(ours, plain)))
            ),
        ]
        for name, three in columns.items()
    ]  # fmt: skip
    return table(["", *head], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="+", default=list(WAYS), metavar="WAY", help=f"of {', '.join(WAYS)}")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    print(f"{options.rounds} rounds, {torch.get_num_threads()} threads")
    for title, leaves in (("300 leaves, 397 MB", large()), ("3,000 leaves of 1 kB", small())):
        print(f"\n### {title}\n\n{compared(measure(leaves, options.rounds, ['torch.save + fsync', *options.only]))}", flush=True)


if __name__ == "__main__":
    main()
