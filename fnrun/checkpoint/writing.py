"""Writing the files of one checkpoint."""

from __future__ import annotations

import errno
import functools
import hashlib
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from fnrun.checkpoint import orbax, pieces
from fnrun.checkpoint.handed import changed_after_saving
from fnrun.checkpoint.manifest import TORCH_DTYPES, File, Leaf, Manifest, Piece
from fnrun.checkpoint.store import DIGEST, MANIFEST
from fnrun.core import files, tree
from fnrun.core.environment import environment

#: Smaller leaves are packed: an array has two files and a directory, which take about as long to make as these bytes to write.
PACKED = 4 * 1024 * 1024
#: The size of a pack.
PACK = 64 * 1024 * 1024
#: The number of files that are synced at a time: a file system writes its journal once for all of them.
SYNCING = 8
#: The number of threads that meanwhile check whether the leaves have changed.
CHECKING = 2
#: torch's dtypes that are NumPy's too.
_NATIVE = {"bool", "float16", "float32", "float64", "complex64", "complex128"} | {
    f"{sign}int{8 * size}" for sign in ("", "u") for size in (1, 2, 4, 8)
}


def bits(sources: Mapping[int, Any]) -> dict[int, np.ndarray]:
    """The bytes of tensors and arrays, flat, without those that have no elements. Waits for devices."""
    return {number: data for number, source in sources.items() if (data := tree.array(source)).size}


def write(directory: Path, manifest: Manifest, bits: dict[int, np.ndarray]) -> None:
    """Write all files of a checkpoint to `directory`, which is empty. They are durable when this returns.

    Raises OSError where the disk does not take them, before anything is written if that can be known. Raises InPlaceError where a leaf has
    changed meanwhile: a write by `.data` raises no version.
    """
    contents = _contents(manifest.leaves, bits)
    if contents:
        _check_space(directory, sum(data.size for data in bits.values()))
        for name, text in orbax.described([content.array for content in contents]).items():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            _new(directory / name, text)
            manifest.files[name] = File(len(text), pieces.digest(text))
        pieces.each(lambda content: _write(directory, content), contents)
        manifest.files |= {content.file: File(sum(data.size for _, data in content.leaves)) for content in contents}
    manifest.environment = {**environment(), **manifest.environment}
    encoded = msgspec.json.encode(manifest)
    _new(directory / MANIFEST, encoded)
    _new(directory / DIGEST, f"{hashlib.sha256(encoded).hexdigest()}  {MANIFEST}\n".encode())
    # The processor looks whether anything was changed while the disk works.
    checks = [functools.partial(_check_unchanged, contents[first::CHECKING], manifest.step) for first in range(CHECKING)]
    syncs = [functools.partial(files.sync, path) for path in (directory, *directory.rglob("*"))]
    pieces.each(lambda job: job(), [*checks, *syncs], CHECKING + SYNCING)


class _Content(NamedTuple):
    """The leaves that one array holds, one behind the other, and its file."""

    file: str
    array: orbax.Array
    leaves: list[tuple[Leaf, np.ndarray]]


def _contents(leaves: list[Leaf], bits: dict[int, np.ndarray]) -> list[_Content]:
    """Place each leaf: a large one in an array that any reader of orbax understands, small ones together in a pack, an array of bytes."""
    groups: list[list[tuple[Leaf, np.ndarray]]] = [[(leaves[number], data)] for number, data in bits.items() if data.size >= PACKED]
    packs: list[list[tuple[Leaf, np.ndarray]]] = []
    end = PACK
    for number, data in bits.items():
        if data.size < PACKED:
            if end + data.size > PACK:
                packs.append([])
                end = 0
            packs[-1].append((leaves[number], data))
            end += data.size
    found = []
    for number, group in enumerate(groups + packs):
        alone = number < len(groups)
        array = _array(*group[0]) if alone else orbax.Array((sum(data.size for _, data in group),), np.dtype(np.uint8))
        file, offset = orbax.chunk(number, array), 0
        for leaf, data in group:
            leaf.pieces = [Piece(file, "", offset)]
            offset += data.size
        found.append(_Content(file, array, group))
    return found


def _array(leaf: Leaf, data: np.ndarray) -> orbax.Array:
    """A leaf as orbax knows it: with its dtype where NumPy has it in the machine's byte order, else as unsigned integers or bytes."""
    if leaf.kind == "tensor":
        dtype = np.dtype(leaf.dtype if leaf.dtype in _NATIVE else f"uint{8 * TORCH_DTYPES[leaf.dtype].itemsize}")
    else:
        dtype = np.dtype(leaf.dtype)
        dtype = dtype if dtype.kind in "biufc" and dtype.isnative and dtype.itemsize <= 16 else np.dtype(np.uint8)
    fits = dtype.itemsize * math.prod(leaf.shape) == data.size
    return orbax.Array(tuple(leaf.shape), dtype) if fits else orbax.Array((data.size,), np.dtype(np.uint8))


def _check_space(directory: Path, needed: int) -> None:
    usage = shutil.disk_usage(directory)
    free = usage.total - usage.used  # and not `usage.free`: root may have more
    if usage.total and needed > free:  # some network file systems do not know
        raise OSError(
            errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: it takes {needed / 1e6:.1f} MB, {free / 1e6:.1f} MB are free", str(directory)
        )


def _write(directory: Path, content: _Content) -> None:
    """Write an array and note the digests of the bytes that were written, whoever writes to the leaf meanwhile."""
    scratch = np.empty(pieces.BLOCK, np.uint8)
    with open(directory / content.file, "xb") as file:
        for leaf, data in content.leaves:
            written = pieces.hasher()
            for at in range(0, data.size, pieces.BLOCK):
                block = scratch[: min(pieces.BLOCK, data.size - at)]
                block[:] = data[at : at + pieces.BLOCK]
                written.update(block.data)
                file.write(block.data)
            leaf.pieces[0].digest = f"blake3:{written.hexdigest()}"


def _check_unchanged(contents: Sequence[_Content], step: int) -> None:
    for content in contents:
        for leaf, data in content.leaves:
            if pieces.digest(data) != leaf.pieces[0].digest:
                raise changed_after_saving(leaf.path, step)


def _new(path: Path, content: bytes) -> None:
    with open(path, "xb") as file:
        file.write(content)
