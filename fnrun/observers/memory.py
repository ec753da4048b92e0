"""The memory that a state takes."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import Any

import optree
import torch

from fnrun.core import tree
from fnrun.core.counts import count
from fnrun.core.donation import storage
from fnrun.core.position import is_due
from fnrun.core.state import LoopState
from fnrun.observers.writing import Writer
from fnrun.sinks import Sink

logger = logging.getLogger("fnrun")

LARGEST = 8  # leaves of the state in the table


class _Memory(Writer):
    name = "memory"
    idle_between = True  # but for the first tick of a call, which every observer sees

    def __init__(self, every: int, sinks: Sequence[Sink]) -> None:
        super().__init__(sinks)
        self.every, self._shown = every, False

    def __str__(self) -> str:
        return f"memory every {self.every}"

    def open(self, program: Any, state: LoopState) -> None:
        super().open(program, state)
        self._shown = not self.writes

    def __call__(self, state: LoopState, metrics: dict[str, Any]) -> None:
        if not self._shown:
            self._shown = True
            logger.info("%s", table(state))
        if is_due(state, self.every):
            self.write(state, {"state_mib": sum(_sizes(state).values()) / 2**20}, resident())


def _sizes(state: Any) -> dict[str, int]:
    """The bytes of each tensor's storage, by path; a storage that several tensors share counts with the first."""
    found: dict[str, int] = {}
    seen: set[int] = set()
    for path, leaf in zip(tree.paths(state), tree.leaves(state), strict=True):
        if isinstance(leaf, torch.Tensor) and storage(leaf) not in seen:
            seen.add(storage(leaf))
            found[path] = leaf.untyped_storage().nbytes()
    return found


def resident() -> dict[str, float]:
    """The memory of this process, in MiB: `resident_mib` on Linux, `cuda_mib` and `cuda_reserved_mib` with CUDA."""
    found: dict[str, float] = {}
    if sys.platform == "linux":
        with open("/proc/self/statm", encoding="ascii") as file:
            import resource

            found["resident_mib"] = int(file.read().split()[1]) * resource.getpagesize() / 2**20
    if torch.cuda.is_initialized():
        found["cuda_mib"] = torch.cuda.memory_allocated() / 2**20
        found["cuda_reserved_mib"] = torch.cuda.memory_reserved() / 2**20
    return found


def table(state: Any) -> str:
    """The largest tensors of a state and what each part of it takes.

    >>> from fnrun.core.state import TrainState
    >>> print(table(TrainState.create(torch.nn.Linear(1024, 512))))
    memory: the state takes 2.0 MiB: params 2.0
           2.00 MiB  params/weight         [512, 1024] float32
           0.00 MiB  params/bias           [512] float32
    """
    sizes = _sizes(state)
    parts: dict[str, int] = {}
    for path, size in sizes.items():
        part = path.partition("/")[0]
        parts[part] = parts.get(part, 0) + size
    described = ", ".join(f"{part} {size / 2**20:,.1f}" for part, size in sorted(parts.items(), key=lambda item: -item[1]))
    rows = [f"memory: the state takes {sum(sizes.values()) / 2**20:,.1f} MiB" + (f": {described}" if described else "")]
    shapes = {tree.join(path): leaf for path, leaf in zip(*optree.tree_flatten_with_path(state)[:2], strict=True)}
    largest = sorted(sizes, key=lambda path: -sizes[path])[:LARGEST]
    width = max((len(path) for path in largest), default=0)
    for path in largest:
        dtype = str(shapes[path].dtype).removeprefix("torch.")
        rows.append(f"  {sizes[path] / 2**20:>9,.2f} MiB  {path:<{max(width, 20)}}  {list(shapes[path].shape)} {dtype}")
    return "\n".join(rows)


def memory(every: int = 1, *, to: Sequence[Sink] = ()) -> Any:
    """The memory of the state: its largest tensors as a table in the log at the first tick, then a record on each n-th step or round.

    - `every=1`: steps or rounds from record to record.
    - `to=()`: the sinks of the records.

    The metric of a record is `state_mib`, the memory of the state's tensors. Its clock has what differs from run to run: `resident_mib` (of
    the process, on Linux), `cuda_mib` (of tensors) and `cuda_reserved_mib` (of torch's allocator). All are in MiB. Their peaks are in every
    line of `observers.log`. Raises ValueError for an `every` below 1.
    """
    return _Memory(count("memory: every", every), to)
