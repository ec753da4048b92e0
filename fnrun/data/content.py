"""Digests that identify data."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch

from fnrun.core import tree

#: Data of at most LIMIT bytes is read whole; of larger data BLOCKS evenly spaced blocks, about LIMIT bytes together.
LIMIT = 64 * 2**20
BLOCKS = 256


def digest(data: Any) -> str:
    """16 hex digits for structure, shapes, dtypes and content of a pytree; for a leaf that is not data, for its type."""
    leaves = [part for leaf in tree.leaves(data) for part in _dense(leaf)]
    total = sum(leaf.nbytes for leaf in leaves if isinstance(leaf, (torch.Tensor, np.ndarray)))
    found = hashlib.sha256(repr(tree.paths(data)).encode())
    for leaf in leaves:
        if isinstance(leaf, (torch.Tensor, np.ndarray)):
            found.update(f"{type(leaf).__name__} {leaf.dtype} {tuple(leaf.shape)}".encode())
            for part in _parts(leaf, LIMIT / total if total > LIMIT else None):
                found.update(tree.fingerprint(part).encode())
        else:
            found.update(tree.fingerprint(leaf).encode() if type(leaf) in tree.SCALARS else type(leaf).__name__.encode())
    return found.hexdigest()[:16]


def fingerprint(data: Any) -> Any:
    """The attribute `fingerprint` of a user's data, called if it is a method; None without one."""
    mark = getattr(data, "fingerprint", None)
    return mark() if callable(mark) else mark


def _dense(leaf: Any) -> list[Any]:
    """The tensors of which a sparse or nested one consists."""
    if isinstance(leaf, torch.Tensor) and leaf.is_nested:
        return list(leaf.unbind())
    if isinstance(leaf, torch.Tensor) and leaf.layout is not torch.strided:
        coo = leaf.to_sparse_coo().coalesce()
        return [torch.tensor(coo.shape), coo.indices(), coo.values()]
    return [leaf]


def _parts(leaf: Any, share: float | None) -> list[Any]:
    rows = len(leaf) if leaf.ndim else 1
    size = 1 + int(rows * share / BLOCKS) if share is not None else rows
    if size * BLOCKS >= rows:
        return [leaf]
    return [leaf[start : start + size] for start in ((rows - size) * i // (BLOCKS - 1) for i in range(BLOCKS))]
