"""One checkpoint as a state, or as leaves by path: the work of `Checkpoints.restore` and `Checkpoints.read`."""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fnrun.checkpoint import codec, match, store
from fnrun.checkpoint.manifest import CheckpointError, Leaf, Manifest, constant


def restore(
    directory: Path,
    manifest: Manifest,
    like: Any,
    *,
    select: Sequence[str] | None,
    rename: match.Rename | None,
    strict: bool,
    device: str | torch.device | None,
    dtype: torch.dtype | None,
) -> Any:
    """The state of a checkpoint. Raises CheckpointError."""
    with _describing(directory):
        structure, leaves = manifest.structure, manifest.leaves
        if rename is not None:
            structure, leaves = match.renamed(structure, leaves, rename)
        matcher = match.Matcher(structure, leaves, select, strict=strict, cast=dtype)
        plan = matcher.plan(match.ABSENT if like is None else like, str(directory))
        picks = list(codec.picks(plan))
        if like is not None and dtype is not None and not any(pick.dtype == dtype for pick in picks):
            raise CheckpointError(f"restore: dtype={dtype} is for a `like` that has it, and none of the leaves to be restored is one there")
        found = store.read_leaves(directory, manifest, {leaves[pick.number].origin(pick.number) for pick in picks})
        restored = codec.build(plan, _values(leaves, picks, found, device, dtype))
    for line in matcher.left():
        logging.getLogger("fnrun").warning("%s: %s", directory, line)
    return restored


def read(
    directory: Path, manifest: Manifest, *, select: Sequence[str] | None, device: str | torch.device | None, dtype: torch.dtype | None
) -> dict[str, Any]:
    """The leaves of a checkpoint by path. Raises CheckpointError."""
    with _describing(directory):
        leaves = manifest.leaves
        wanted = match.selector(select, [] if select is None else list(match.paths(manifest.structure)))
        picks = [codec.Pick(number) for number, leaf in enumerate(leaves) if wanted(leaf.path)]
        found = store.read_leaves(directory, manifest, {leaves[pick.number].origin(pick.number) for pick in picks})
        value = _values(leaves, picks, found, device, dtype)
        named = {leaves[pick.number].path: value(pick) for pick in picks}
    if len(named) < len(picks):
        twice = next(path for path, count in Counter(leaves[pick.number].path for pick in picks).items() if count > 1)
        raise CheckpointError(f"{directory}: there are two leaves {twice}, their keys of two types; `restore` tells them apart")
    return named


@contextlib.contextmanager
def _describing(directory: Path) -> Iterator[None]:
    """Within it other errors are CheckpointErrors: the digests agree, so somebody wrote a manifest that makes no sense."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{directory / store.MANIFEST} describes what cannot be built: {error}") from error


def _values(
    leaves: list[Leaf],
    picks: list[codec.Pick],
    found: Mapping[int, Any],
    device: str | torch.device | None,
    dtype: torch.dtype | None,
) -> Callable[[codec.Pick], Any]:
    """The value of each leaf, moved and cast from those `found` on the CPU. Leaves that were one tensor are one again."""
    beside = {leaves[pick.number].device: pick.device for pick in picks if pick.device is not None}
    moved: dict[Any, Any] = {}

    def value(pick: codec.Pick) -> Any:
        leaf = leaves[pick.number]
        first = leaf.origin(pick.number)
        if not leaf.stored:
            return constant(leaf.value)
        if leaf.kind == "ndarray":
            return found[first]
        to = device or pick.device or beside.get(leaf.device) or "cpu"
        to = "cpu" if str(to) == "meta" else str(to)
        follows = match.castable(leaf) and (pick.dtype or dtype) == dtype and not leaf.path.startswith("position/")
        cast = dtype if follows else None
        if (first, to, cast) not in moved:
            try:
                moved[first, to, cast] = found[first].to(to, cast)
            except Exception as error:  # a device that is not there, or full
                raise CheckpointError(f"{leaf.path} cannot be brought to {to}: {error}") from error
        return moved[first, to, cast]

    return value
