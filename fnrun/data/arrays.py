"""Batches of tensors and arrays in memory."""

from __future__ import annotations

import dataclasses
import mmap
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, Never

import numpy as np
import optree
import torch

from fnrun.core import tree
from fnrun.core.counts import count
from fnrun.core.examples import ambiguous, attach_count
from fnrun.core.key import Key
from fnrun.core.position import Cursor
from fnrun.core.words import a, kind, unknown
from fnrun.data import ambient
from fnrun.data.content import digest
from fnrun.data.order import permutation
from fnrun.data.stream import Stream, walk

#: The rows of the order that are computed at once: a NumPy call on 32 numbers takes nearly as long as one on thousands.
BLOCK = 65_536


def passes(rows: int, batch_size: int, drop_last: bool) -> int:
    """The number of batches in a pass. Raises ValueError, with the numbers, where there is none."""
    if not rows:
        raise ValueError("the data is empty: a stream needs at least one batch")
    if drop_last and rows < batch_size:
        raise ValueError(f"no batch is left: {rows} rows are fewer than batch_size={batch_size}, and drop_last=True drops the short one")
    return rows // batch_size if drop_last else -(-rows // batch_size)


def cut(batch_size: int, shuffle: bool, drop_last: bool, seed: int | None) -> str:
    """How rows become batches, as text."""
    order = "in order" if not shuffle else "shuffled" if seed is None else f"shuffled by seed {seed}"
    return f"{batch_size} a batch, {order}{', short last batch dropped' if drop_last else ''}"


def check_seed(who: str, seed: Any, shuffle: bool) -> None:
    """Raise TypeError where `seed` is no int, ValueError where it has no use."""
    if seed is None:
        return
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
        raise TypeError(f"{who}: seed is an int, and not {kind(seed)}")
    if not shuffle:
        raise ValueError(f"{who}: seed={seed} is for the order, and that is the data's own without shuffle=True")


class Order:
    """The rows of each batch, in order or shuffled by the key (that of `seed`, if any); computed in blocks of batches."""

    def __init__(self, key: Key, rows: int, batch_size: int, shuffle: bool, seed: int | None) -> None:
        key = key if seed is None else Key(seed)
        self.key, self.rows, self.batch_size, self.shuffle = key, rows, batch_size, shuffle
        self.per_block = max(1, BLOCK // batch_size)
        self.at: tuple[int, int] = (-1, 0)  # the epoch and the first batch of the block
        self.block = np.empty(0, np.int64)

    def fill(self, epoch: int, batch: int) -> bool:
        """Compute the block with this batch; False if it is the present one."""
        first = batch - batch % self.per_block
        if self.at == (epoch, first):
            return False
        positions = np.arange(first * self.batch_size, min((first + self.per_block) * self.batch_size, self.rows))
        self.block = permutation(self.key.fold_in(epoch, "order"), self.rows, positions) if self.shuffle else positions
        self.at = (epoch, first)
        return True

    def within(self, batch: int, batches: int = 1) -> slice:
        """The rows of `batches` batches from this one on, as a slice of the block."""
        start = (batch - self.at[1]) * self.batch_size
        return slice(start, min(start + self.batch_size * batches, len(self.block)))


#: Small batches are gathered several at a time, in one call of at most so many bytes.
TOGETHER = 2**18


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Arrays(Stream):
    """See `arrays`."""

    tensors: Any
    rows: int
    batch_size: int
    shuffle: bool
    drop_last: bool
    transform: Callable[[Any, Key], Any] | None
    name: str | None
    seed: int | None = None

    def brief(self) -> str:
        return f"arrays of {self.rows} rows, {cut(self.batch_size, self.shuffle, self.drop_last, self.seed)}"

    @cached_property
    def content(self) -> str:
        return digest(self.tensors)

    def __len__(self) -> int:
        return passes(self.rows, self.batch_size, self.drop_last)

    def iterate(self, key: Key, cursor: Cursor, *, replay: bool = False) -> Iterator[tuple[Any, Cursor]]:
        leaves, structure = optree.tree_flatten(self.tensors)
        order = Order(key, self.rows, self.batch_size, self.shuffle, self.seed)
        indices: dict[torch.device, torch.Tensor] = {}
        sizes = [leaf[:1].nbytes * self.batch_size for leaf in leaves]
        # Not if a batch would begin within a cache line: kernels may compute other bits there, and a resumed run begins elsewhere.
        together = max(1, TOGETHER // max(1, sum(sizes))) if not any(size % 64 for size in sizes) else 1
        lists, source = ambiguous(self.tensors), self.source
        following, gathered = (-1, 0), deque[Any]()
        for epoch, batch, after in walk(cursor, len(self), replay):
            if not gathered or following != (epoch, batch):  # each batch is handed out once: who gets it may write to it
                if order.fill(epoch, batch) and self.shuffle:
                    block = torch.from_numpy(order.block)
                    indices = {device: block.to(device) for device in {leaf.device for leaf in leaves}}
                if self.shuffle:
                    within = order.within(batch, together)
                    found = [_picked(leaf, indices[leaf.device][within]) for leaf in leaves]
                else:
                    found = [leaf[batch * self.batch_size : (batch + together) * self.batch_size].clone() for leaf in leaves]
                gathered = deque(zip(*(each.split(self.batch_size) for each in found), strict=True))
            following = (epoch, batch + 1)
            made = structure.unflatten(gathered.popleft())
            if self.transform is not None:
                made = _transformed(self.transform, made, key.fold_in(epoch, "batch", batch))
                made = attach_count(made, min(self.batch_size, self.rows - batch * self.batch_size), columns=lists)
            elif lists:
                made = attach_count(made, None, columns=True)
            yield made, Cursor(*after, source)


#: torch lacks kernels for unsigned integers: their bits are gathered as signed ones.
SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}


def _picked(leaf: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    signed = SIGNED.get(leaf.dtype)
    return leaf.index_select(0, rows) if signed is None else leaf.view(signed).index_select(0, rows).view(leaf.dtype)


def _transformed(transform: Callable[[Any, Key], Any], batch: Any, key: Key) -> Any:
    """`transform(batch, key)`, with torch's generators seeded from the key; a draw from Python's or NumPy's is a RuntimeError."""
    saved = ambient.save_hosts()
    with key.scope():
        made = transform(batch, key)
    if moved := ambient.restore_hosts(saved):
        raise RuntimeError(
            f"the transform drew from {' and '.join(moved)}, which would not repeat after a resume: "
            "draw from torch's, or from random.Random(key.bits) or np.random.default_rng(key.bits)"
        )
    return made


ALONE = "the rows are in memory, and no worker fetches them; data.loader has workers="


def arrays(
    tensors: Any,
    batch_size: int,
    *,
    shuffle: bool = False,
    drop_last: bool = False,
    transform: Callable[[Any, Key], Any] | None = None,
    name: str | None = None,
    seed: int | None = None,
    **others: Never,
) -> Arrays:
    """The stream of a pytree of tensors or NumPy arrays of one leading length; batches are pytrees of tensors.

    Data stays where it is: of an `np.memmap`, also a read-only one, or a tensor of `torch.from_file`, only the rows of a batch are read. A
    file of tokens is `arrays(np.memmap("tokens.bin", np.uint16, "r").reshape(-1, 1024), 8)`. Batches have the array's dtype; for an
    embedding, convert uint16 by `transform=lambda batch, key: batch.long()`. A batch has its own memory: writes do not reach `tensors`.

    - `batch_size`: rows in a batch, at least 1. A larger one than the data makes one short batch; with `drop_last` it is an error.
    - `shuffle=False`: a new order for each pass, drawn from the state's key.
    - `drop_last=False`: omit a short last batch of a pass.
    - `transform=None`: `transform(batch, key)` returns the batch for the step. Random numbers come from `key`, or from torch's ambient
      generators, which are seeded from it. The result counts as many examples as it has rows before the transform, whatever its lengths.
    - `name=None`: the stream's name in messages.
    - `seed=None`: with `shuffle`, the order depends on this number alone, so that runs with other seeds have the same order. Random
      numbers in `transform` still depend on the state's key.

    The content must not change during a run. A digest of it, made at each start, shows whether a run resumes on other data: of the whole
    content up to 64 MiB; above, of 256 blocks of rows, 64 MiB together unless single rows are larger than 256 KiB.

    An array in another byte order or with negative strides is copied; a mapped one is refused.

    Raises ValueError for lengths that differ (with the paths), empty data, a batch size below 1, a seed without `shuffle`, and data that
    cannot become a tensor.

    >>> stream = arrays({"x": torch.arange(5), "y": np.arange(5.0)}, 2)
    >>> batch, after = next(stream.iterate(Key(0), Cursor(epoch=0, batch=2)))
    >>> batch, after.epoch, after.batch
    ({'x': tensor([4]), 'y': tensor([4.], dtype=torch.float64)}, 1, 0)
    """
    if others:
        collated = "transform=f makes f(batch, key) of each batch"
        raise unknown("data.arrays", others, {"collate": collated, "collate_fn": collated, "workers": ALONE, "num_workers": ALONE})
    paths, leaves = tree.paths(tensors), tree.leaves(tensors)
    if not leaves:
        raise ValueError("data.arrays was given no array")
    tensors = optree.tree_structure(tensors).unflatten([_tensor(path, leaf) for path, leaf in zip(paths, leaves, strict=True)])
    lengths = dict(zip(paths, (len(leaf) for leaf in tree.leaves(tensors)), strict=True))
    if len(set(lengths.values())) > 1:
        raise ValueError("the arrays differ in their length: " + ", ".join(f"{path or '(root)'} has {n}" for path, n in lengths.items()))
    rows = lengths[paths[0]]
    check_seed("data.arrays", seed, shuffle)
    batch_size = count("batch_size", batch_size)
    passes(rows, batch_size, drop_last)
    return Arrays(tensors, rows, batch_size, shuffle, drop_last, transform, name, seed)


def _tensor(path: str, leaf: Any) -> torch.Tensor:
    where = path or "(root)"
    if isinstance(leaf, np.ndarray):
        leaf = _of_array(where, leaf)
    if not isinstance(leaf, torch.Tensor):
        raise ValueError(
            f"{where} is {a(type(leaf).__name__)}, not a tensor or an array (torch.tensor(values) and np.array(values) make one of a list)"
        )
    if leaf.is_nested or leaf.layout is not torch.strided:
        raise ValueError(
            f"{where} is a {'nested' if leaf.is_nested else 'sparse'} tensor, and rows are gathered from dense ones: "
            "data.loader fetches any"
        )
    if not leaf.ndim:
        raise ValueError(f"{where} is a single number: its leading dimension must be the rows")
    return leaf.detach()


def _of_array(where: str, array: np.ndarray) -> torch.Tensor:
    """A tensor in the array's memory; a copy of an array with a layout that torch cannot read."""
    if isinstance(array, np.ma.MaskedArray):
        raise ValueError(f"{where} is a masked array, and a tensor has no mask: fill it, or give the mask as an array of its own")
    if not array.dtype.isnative or any(stride < 0 or stride % array.itemsize for stride in array.strides if array.itemsize):
        if _mapped(array):
            raise ValueError(
                f"{where} is mapped from a file, of dtype {array.dtype.str} and strides {array.strides}, and torch reads neither foreign "
                "byte orders nor backwards nor a field of records: write it to a file of its own, or copy it into memory (np.array, "
                ".astype)"
            )
        array = array.astype(array.dtype.newbyteorder("="), order="C")
    try:
        with warnings.catch_warnings(action="ignore"):  # of a read-only array: a batch is a copy
            return torch.from_numpy(array)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None


def _mapped(array: Any) -> bool:
    while isinstance(array, np.ndarray):
        array = array.base
    return isinstance(array, mmap.mmap)
