"""The files of one checkpoint, read and checked.

manifest.json      structure, leaves with their pieces, metrics, config, environment, the digest of each file without pieces
manifest.sha256    the digest of the manifest
arrays/            orbax: numbered arrays; small leaves lie together in packs, uint8 arrays in which each has its offset
  state/00012/0.0  the bytes of array 12, in the order of C, as zarr (v2, uncompressed, one chunk) lays them down
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch

from fnrun.checkpoint import orbax, pieces
from fnrun.checkpoint.former import migrate
from fnrun.checkpoint.manifest import (
    FORMAT,
    TORCH_DTYPES,
    CheckpointError,
    DamagedError,
    Judgement,
    Leaf,
    Manifest,
    Piece,
    config,
)
from fnrun.core.words import shortened

#: The number of threads that restore.
READERS = min(8, os.cpu_count() or 1)

MANIFEST, DIGEST, ARRAYS = "manifest.json", "manifest.sha256", orbax.ARRAYS


# --- the manifest ------------------------------------------------------------------------------------------------------


class _Version(msgspec.Struct):
    format: int


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a checkpoint, after its digest was checked. Raises CheckpointError."""
    encoded = _encoded(directory)
    try:
        version = msgspec.json.decode(encoded, type=_Version).format
        if not 1 <= version <= FORMAT:
            raise CheckpointError(
                f"{directory / MANIFEST} is written in format {version}; this version of fnrun reads 1 to {FORMAT}: update it"
            )
        if version < FORMAT:
            manifest = msgspec.convert(migrate(msgspec.json.decode(encoded)), Manifest)
        else:
            manifest = msgspec.json.decode(encoded, type=Manifest)
        manifest.check()
        manifest.config = config(manifest.config)
    except CheckpointError:
        raise
    except Exception as error:  # whatever a stranger may write
        raise DamagedError(f"{directory / MANIFEST} is not a manifest: {error}; {_elsewhere(directory)}") from error
    return manifest


def read_judgement(directory: Path) -> Judgement | Manifest:
    """The judgement of a checkpoint, after the digest of its manifest was checked. Raises CheckpointError."""
    with contextlib.suppress(msgspec.MsgspecError, ValueError, RecursionError):
        found = msgspec.json.decode(_encoded(directory), type=Judgement)
        for value in found.metrics.values():
            float(value)
        if 2 <= found.format <= FORMAT:  # between these nothing that it says has changed
            return found
    return read_manifest(directory)  # of another format; or it says what is wrong


def _encoded(directory: Path) -> bytes:
    """The bytes of a manifest, after its digest was checked. Raises DamagedError."""
    encoded, stated = _get(directory / MANIFEST), _get(directory / DIGEST)
    expected = f"{hashlib.sha256(encoded).hexdigest()}  {MANIFEST}\n".encode()
    if stated != expected:
        damaged = directory / MANIFEST if re.fullmatch(rb"[0-9a-f]{64}  manifest\.json\n", stated) else directory / DIGEST
        raise DamagedError(f"{damaged} is damaged: {MANIFEST} and {DIGEST} do not agree; {_elsewhere(directory)}")
    return encoded


def _get(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise DamagedError(f"{path} is missing; {_elsewhere(path.parent)}") from error
    except OSError as error:
        raise DamagedError(f"{path} cannot be read: {error}") from error


def _elsewhere(directory: Path) -> str:
    return f"restore another checkpoint of {directory.parent}, or put the file back from a copy"


# --- files -------------------------------------------------------------------------------------------------------------


class _Span(NamedTuple):
    """Bytes of a file with their digest, and the memory that they are read into; None where only the digest matters."""

    file: str
    offset: int
    size: int
    digest: str
    into: np.ndarray | None = None


def _file(manifest: Manifest, name: str) -> _Span:
    return _Span(name, 0, manifest.files[name].size, manifest.files[name].digest)


def _piece(leaf: Leaf, piece: Piece, into: np.ndarray | None = None) -> _Span:
    return _Span(piece.file, piece.offset, leaf.size(piece), piece.digest, into)


def read_checked(directory: Path) -> Manifest:
    """The manifest of a checkpoint, after every file was compared with its digests. Raises CheckpointError."""
    manifest = read_manifest(directory)
    check_files(directory, manifest)
    return manifest


def is_whole(directory: Path) -> bool:
    """Whether all files of a checkpoint are as they were written."""
    with contextlib.suppress(CheckpointError):
        return bool(read_checked(directory))
    return False


def holds(directory: Path, manifest: Manifest, bits: Mapping[int, np.ndarray]) -> bool:
    """Whether a checkpoint is whole and has the state and the metrics of `manifest`, whose leaves have these bytes."""
    try:
        found = read_checked(directory)
    except CheckpointError:
        return False
    same = _content(found) == _content(manifest) and all(pieces.holds(found.leaves[number], data) for number, data in bits.items())
    return same and (not manifest.metrics or (found.metrics, found.monitors) == (manifest.metrics, manifest.monitors))


def _content(manifest: Manifest) -> Any:
    """All of a state but the bytes of its leaves."""
    leaves = [(leaf.kind, repr(leaf.value), leaf.dtype, leaf.shape, leaf.strides, leaf.shares) for leaf in manifest.leaves]
    return msgspec.json.encode(manifest.structure), leaves


def check_files(directory: Path, manifest: Manifest) -> None:
    """Compare every file with its digest, or with those of the pieces in it.

    Raises DamagedError, naming the first file that differs and the leaves that are lost.
    """
    _check_sizes(directory, manifest, sorted(manifest.files))
    whole = {name for name, file in manifest.files.items() if file.digest}
    in_pieces = manifest.files.keys() - whole
    spans = [_piece(leaf, piece) for leaf in manifest.leaves for piece in leaf.pieces if piece.file in in_pieces]
    _read(directory, manifest, [*(_file(manifest, name) for name in whole), *spans])


def _check_sizes(directory: Path, manifest: Manifest, names: Iterable[str]) -> None:
    for name in names:
        try:
            size = os.stat(directory / name).st_size if (directory / name).is_file() else None
        except (OSError, ValueError) as error:
            raise DamagedError(f"{directory / name} cannot be read: {error}; {_elsewhere(directory)}") from error
        if size is None:
            raise _damaged(directory, manifest, name, "is missing")
        if size != manifest.files[name].size:
            raise _damaged(directory, manifest, name, f"has {size} bytes, {manifest.files[name].size} were written")


def _read(directory: Path, manifest: Manifest, spans: Iterable[_Span]) -> None:
    """Read these bytes, each hashed once on its way.

    Raises DamagedError, naming the first file that differs and the leaves that are lost.
    """
    by_file: dict[str, list[_Span]] = {}
    for span in sorted(spans, key=lambda span: (span.file, span.offset)):
        by_file.setdefault(span.file, []).append(span)

    def read(name: str) -> None:
        try:
            with open(directory / name, "rb", buffering=0) as file:
                for span in by_file[name]:
                    if not _same(file, span):
                        algorithm = span.digest.partition(":")[0]
                        raise _damaged(directory, manifest, name, f"is damaged: its {algorithm} is not the one that was written")
        except OSError as error:
            raise DamagedError(
                f"{directory / name} cannot be read: {error}; {_elsewhere(directory)}", _leaves_in(manifest, name)
            ) from error

    pieces.each(read, by_file, READERS)


def _same(file: io.FileIO, span: _Span) -> bool:
    """Whether these bytes of a file have their digest. They are read into the memory of the span."""
    if span.into is not None and not span.into.flags.c_contiguous:
        data = np.empty(span.into.shape, np.uint8)
        same = _same(file, span._replace(into=data))
        span.into[...] = data
        return same
    file.seek(span.offset)
    found = pieces.hasher(span.digest)
    scratch = memoryview(bytearray(min(span.size, pieces.BLOCK))) if span.into is None else span.into.reshape(-1).data
    for at in range(0, span.size, pieces.BLOCK):
        length = min(pieces.BLOCK, span.size - at)
        block = scratch[:length] if span.into is None else scratch[at : at + length]
        filled = 0
        while filled < length and (more := file.readinto(block[filled:])):
            filled += more
        found.update(block[:filled])
    return found.hexdigest() == span.digest.partition(":")[2]


def _damaged(directory: Path, manifest: Manifest, name: str, wrong: str) -> DamagedError:
    lost = _lost(directory, manifest, name)
    named = f". Lost: {shortened(lost, 3)}" if lost else ""
    return DamagedError(f"{directory / name} {wrong}{named}; {_elsewhere(directory)}", lost)


def _lost(directory: Path, manifest: Manifest, name: str) -> list[str]:
    """The leaves that a damaged file takes with it: those whose bytes differ, or all if its length or the file system tells no more."""
    with contextlib.suppress(OSError), open(directory / name, "rb", buffering=0) as file:
        if os.fstat(file.fileno()).st_size == manifest.files[name].size:
            return _leaves_in(manifest, name, lambda span: not _same(file, span))
    return _leaves_in(manifest, name)


def _leaves_in(manifest: Manifest, name: str, where: Callable[[_Span], bool] = lambda span: True) -> list[str]:
    spans = [(leaf.path, _piece(leaf, piece)) for leaf in manifest.leaves for piece in leaf.pieces if piece.file == name]
    return list(dict.fromkeys(path for path, span in spans if where(span)))


# --- leaves ------------------------------------------------------------------------------------------------------------


def read_leaves(directory: Path, manifest: Manifest, numbers: set[int]) -> dict[int, Any]:
    """Those of these leaves that are stored, as tensors on the CPU and arrays.

    Every byte of them is hashed, once, on its way in; and so is every file that holds no leaves. Raises DamagedError.
    """
    leaves = {number: manifest.leaves[number] for number in sorted(numbers) if manifest.leaves[number].stored}
    others = manifest.files.keys() - {piece.file for leaf in manifest.leaves for piece in leaf.pieces}
    if f"{ARRAYS}/state/manifest.ocdbt" in manifest.files:
        _check_sizes(directory, manifest, others)
        _read(directory, manifest, [_file(manifest, name) for name in others])
        return _from_orbax(directory, manifest, leaves)
    stored = [(number, leaf, piece) for number, leaf in leaves.items() for piece in leaf.pieces]
    for _, leaf, piece in stored:
        if piece.file not in manifest.files:
            raise DamagedError(f"{directory / MANIFEST}: {leaf.path} lies in {piece.file!r}, which does not hold it")
    _check_sizes(directory, manifest, {*others, *(piece.file for _, _, piece in stored)})  # before memory is asked for
    memory = {number: _memory(leaf) for number, leaf in leaves.items()}
    spans = [_piece(leaf, piece, pieces.part(leaf, piece, memory[number][1])) for number, leaf, piece in stored]
    _read(directory, manifest, [*(_file(manifest, name) for name in others), *spans])
    return {number: _value(leaf, memory[number][0]) for number, leaf in leaves.items()}


def _from_orbax(directory: Path, manifest: Manifest, leaves: dict[int, Leaf]) -> dict[int, Any]:
    """The leaves of format 1, read by orbax; its files are as they were written."""
    arrays = {int(piece.file[-5:]) for leaf in leaves.values() for piece in leaf.pieces}
    try:
        found = orbax.load(directory / ARRAYS, arrays, sum(file.size for file in manifest.files.values())) if arrays else {}
    except Exception as error:
        raise DamagedError(f"{directory / ARRAYS} cannot be read by orbax, though its files are as written: {error}") from error
    values = {}
    for number, leaf in leaves.items():
        value, memory = _memory(leaf)
        for piece in leaf.pieces:
            data = np.ascontiguousarray(found[int(piece.file[-5:])]).reshape(-1).view(np.uint8)[piece.offset :][: leaf.nbytes]
            if data.size != leaf.nbytes or pieces.digest(data, piece.digest) != piece.digest:
                raise DamagedError(f"{directory}: leaf {leaf.path} is not what was saved; {_elsewhere(directory)}", [leaf.path])
            memory[:] = data
        values[number] = _value(leaf, value)
    return values


def _memory(leaf: Leaf) -> tuple[Any, np.ndarray]:
    """A tensor or an array to be filled, and its bytes. torch allocates a tensor: kernels may round differently on other alignments."""
    if leaf.kind == "tensor":
        memory = torch.empty(leaf.nbytes, dtype=torch.uint8)
        return memory.view(TORCH_DTYPES[leaf.dtype]).reshape(leaf.shape), memory.numpy()
    array = np.empty(leaf.shape, np.dtype(leaf.dtype))
    return array, array.reshape(-1).view(np.uint8) if leaf.nbytes else np.empty(0, np.uint8)


def _value(leaf: Leaf, filled: Any) -> Any:
    return filled if leaf.strides is None else torch.empty_strided(leaf.shape, leaf.strides, dtype=filled.dtype).copy_(filled)


def remove(path: Path) -> None:
    """Delete a file, a link or a directory with all that is in it, as far as it can be."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()
