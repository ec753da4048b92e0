"""The bytes of pieces: their digests, and their place in a leaf."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from blake3 import blake3

from fnrun.checkpoint.manifest import Leaf, Piece

#: Digests are BLAKE3; those of formats 1 and 2 are SHA-256.
ALGORITHMS: dict[str, Callable[[], Any]] = {"blake3": blake3, "sha256": hashlib.sha256}
#: Bytes that are hashed, read or written at a time: they fit in the processor's cache, and take long beside a call.
BLOCK = 2**20


def hasher(digest: str = "blake3:") -> Any:
    """A hash object of the algorithm of `digest`."""
    return ALGORITHMS[digest.partition(":")[0]]()


def digest(data: Any, like: str = "blake3:") -> str:
    """The digest of contiguous bytes, by the algorithm of the digest `like`.

    >>> digest(b"")
    'blake3:af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262'
    """
    found = hasher(like)
    found.update(data)
    return f"{like.partition(':')[0]}:{found.hexdigest()}"


def part(leaf: Leaf, piece: Piece, data: np.ndarray) -> np.ndarray:
    """A view of the bytes of a piece in the flat bytes of its leaf; flat too where they are contiguous."""
    if piece.start is None or piece.shape is None:
        return data
    box = tuple(slice(begin, begin + length) for begin, length in zip(piece.start, piece.shape, strict=True))
    inside = data.reshape(*leaf.shape, leaf.itemsize)[box]
    return inside.reshape(-1) if inside.flags.c_contiguous else inside


def holds(leaf: Leaf, data: np.ndarray) -> bool:
    """Whether a leaf was saved with these bytes, by the digests of its pieces."""
    return all(digest(np.ascontiguousarray(part(leaf, piece, data)), piece.digest) == piece.digest for piece in leaf.pieces)


def each(function: Callable[[Any], Any], items: Iterable[Any], threads: int = 2) -> None:
    """Call `function` with each item, on several threads: hashing, reading and writing release the GIL. Raises the first item's error.

    Two threads by default, beside a training that needs the processor too.
    """
    with ThreadPoolExecutor(threads, "fnrun-checkpoint") as pool:
        list(pool.map(function, items))
