"""Microbatches: a batch in pieces, and the sums of their gradients, buffers and metrics."""

from __future__ import annotations

import dataclasses
import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fnrun.core.examples import REMEDY, counts, example_count, shapes
from fnrun.core.words import kind
from fnrun.metrics.base import to_accumulator_dtype
from fnrun.metrics.basic import Mean, Sum
from fnrun.optim.lists import PLAIN, eager
from fnrun.steps.checks import detached_all
from fnrun.steps.cutting import Examples, Sliced
from fnrun.steps.draws import Uncapturable
from fnrun.steps.functional import FunctionalModule
from fnrun.steps.kinds import Metrics


class PairwiseSum:
    """A sum of values numbered 0..n-1 by `+`, as a balanced tree: (0, 1), (2, 3), ... are added, then pairs of those, an odd one later.

    Values are added in the order of their numbers; some may be absent. At most log2(n) + 1 of them are alive at a time.

    A sum that begins at `start` has `parts`, complete subtrees. Joining the parts of all sums, in order, gives the bits of the whole sum,
    however the numbers were divided.

    >>> left, right, whole = PairwiseSum(), PairwiseSum(3), PairwiseSum()
    >>> for i in range(8):
    ...     (left if i < 3 else right).add(i, [i])
    >>> left.parts, right.parts
    ([(1, 0, [0, 1]), (0, 2, [2])], [(0, 3, [3]), (2, 1, [4, 5, 6, 7])])
    >>> whole.join(left.parts)
    >>> whole.join(right.parts)
    >>> whole.result()
    [0, 1, 2, 3, 4, 5, 6, 7]
    """

    def __init__(self, start: int = 0) -> None:
        self._nodes: list[tuple[int, int, Any]] = []  # (level, place, value), from the left
        self._next = start

    def add(self, number: int, value: Any) -> None:
        self.join([(0, number, value)])

    def join(self, parts: Iterable[tuple[int, int, Any]]) -> None:
        """Add subtrees (level, place, value): the sums of the numbers `place * 2**level` to `(place + 1) * 2**level - 1`."""
        for level, place, value in parts:
            first = place << level
            if first < self._next:
                raise ValueError(f"the sum is at number {self._next}, and {first} comes too late: numbers are added in their order")
            while self._next < first:
                self._push(0, self._next, None)
            self._push(level, place, value)

    @property
    def parts(self) -> list[tuple[int, int, Any]]:
        """The complete subtrees so far, for `join`."""
        return [node for node in self._nodes if node[2] is not None]

    def _push(self, level: int, place: int, value: Any) -> None:
        self._next = (place + 1) << level
        while place % 2 and self._nodes and self._nodes[-1][:2] == (level, place - 1):
            value, level, place = _joined(self._nodes.pop()[2], value), level + 1, place // 2
        self._nodes.append((level, place, value))

    def result(self) -> Any:
        value = None
        while self._nodes:
            value = _joined(self._nodes.pop()[2], value)
        return value


def _joined(a: Any, b: Any) -> Any:
    return b if a is None else a if b is None else a + b


def _mark(leaf: Any) -> Any:
    """A weak reference to the memory of a tensor or an array, its layout, and its count of writes; None where torch knows neither."""
    if isinstance(leaf, np.ndarray):
        owner = leaf
        while isinstance(owner.base, np.ndarray):
            owner = owner.base
        return weakref.ref(owner), (leaf.ctypes.data, leaf.shape, leaf.strides)
    if type(leaf) not in PLAIN or leaf.layout is not torch.strided or leaf.is_nested:
        return None
    writes = -1 if leaf.is_inference() else leaf._version
    return StorageWeakRef(leaf.untyped_storage()), (leaf.storage_offset(), leaf.shape, leaf.stride(), writes)


def _same_memory(now: Any, before: Any) -> bool:
    if isinstance(now[0], weakref.ref) or isinstance(before[0], weakref.ref):
        return now[1] == before[1] and isinstance(before[0], weakref.ref) and now[0]() is before[0]()  # arrays are equal by element
    return now == before


class Weighted(NamedTuple):
    """A piece's loss as a mean, its weight (None: the number of rows), and whether the sum is divided by the weights' sum."""

    mean: Any
    weight: Any
    divided: bool = True


@dataclasses.dataclass(frozen=True)
class Cut:
    """How a batch is cut: by `split`, or piece i of n is rows `rows * i // n` to `rows * (i + 1) // n`, absent if empty."""

    name: str
    pieces: int
    examples: Callable[[Any], int | None]
    split: Callable[[Any, int], Any] | None
    _seen: dict[str, bool] = dataclasses.field(default_factory=dict)  # by path, whether a part was cut in an earlier batch
    _lists: dict[str, bool] = dataclasses.field(default_factory=dict)  # by path, whether a list was one of examples
    _last: dict[str, Any] = dataclasses.field(default_factory=dict)  # by path, the memory that was cut in the batch before

    def __call__(self, batch: Any) -> Iterator[tuple[int, Any, int]]:
        """The number, the batch and the rows of each piece."""
        if self.split is not None:
            yield from self._by_split(self.split, batch)
            return
        sliced, n = self.sliced(batch)
        edges = [n * i // self.pieces for i in range(self.pieces + 1)]
        for i, (start, end) in enumerate(itertools.pairwise(edges)):
            if end > start:
                yield i, sliced[start:end], end - start

    def check(self, batch: Any) -> None:
        """Raise what cutting raises; for a graph, which does not cut the batch of each call anew."""
        if self.pieces > 1 and self.split is None:
            self.sliced(batch)

    def sliced(self, batch: Any) -> tuple[Sliced, int]:
        """The batch as slices, and its number of rows. Raises ValueError where it is unclear how it is cut."""
        n, option = self.examples(batch), self.examples if isinstance(self.examples, Examples) else None
        if n is None:
            raise ValueError(f"{self._cannot(batch)}, and those of one length alone would be cut. {_SAY}")
        sliced = Sliced(batch, n, option if option is not None and option.named else None, option is not None, self._lists)
        if sliced.hidden:
            raise ValueError(
                f"{self._cannot(batch)}: {', '.join(sliced.hidden)} lies in an object, and those are not cut. Cut it yourself, split=f "
                "with f(batch, n) -> n pieces, or give a dictionary"
            )
        if option is None and sliced.others:
            raise ValueError(
                f"{self._cannot(batch)}: {', '.join(path or 'it' for path in sliced.others)} would not be cut, the rest in {n} examples. "
                f"{_SAY}"
            )
        if not sliced.cut and (n > 1 or not sliced.whole):
            raise ValueError(f"{self._cannot(batch)}: no part of it has an entry for each of {n} examples. {_SAY}")
        self._lists.update(sliced.lists)
        if option is None or not option.named:
            self._check_consistent(batch, sliced.parts, n)
            if eager():
                self._check_new(batch, sliced, "" if option is None or callable(option.option) else str(option.option))
        return sliced, n

    def _check_new(self, batch: Any, sliced: Sliced, named: str) -> None:
        """Refuse a part that is the same tensor in two batches while others are new: class weights of the batch's length by accident."""
        now = {path: mark for path, leaf in sliced.cut.items() if (mark := _mark(leaf)) is not None}
        both = [path for path in now if path in self._last]
        same = [path for path in both if _same_memory(now[path], self._last[path])]
        if len(same) < len(both) and (same := [path for path in same if path != named]):
            raise ValueError(
                f"{self.name}: {', '.join(path or 'the batch' for path in same)} is the very same in this batch and the one before, while "
                f"others are new: so it has the batch's length by accident, and would be cut: {shapes(batch)}. "
                "Name all that is per example, and only that is cut: examples=('x', 'y')"
            )
        self._last.clear()
        self._last.update(now)

    def _cannot(self, batch: Any) -> str:
        return f"{self.name}: microbatches={self.pieces} cannot tell how this batch is cut: {shapes(batch)}"

    def _check_consistent(self, batch: Any, parts: dict[str, bool], n: int) -> None:
        """Refuse a part that was cut in one batch and left whole in another: its length fits by accident."""
        moved = [path or "the batch" for path, cut in parts.items() if self._seen.setdefault(path, cut) != cut]
        if moved:
            raise ValueError(
                f"{self.name}: {', '.join(moved)} has an entry for each of the examples in some batches and not in others, so in some by "
                f"accident; here are {n} examples: {shapes(batch)}. Name all that is per example, and only that is cut: "
                "examples=('x', 'y')"
            )

    def _by_split(self, split: Callable[[Any, int], Any], batch: Any) -> Iterator[tuple[int, Any, int]]:
        made = split(batch, self.pieces)
        made = list(made) if isinstance(made, Iterator) else made
        if not isinstance(made, (list, tuple)):
            raise TypeError(
                f"{self.name}: split(batch, {self.pieces}) returned {kind(made)}, and it returns a list of pieces, each a batch"
            )
        if len(made) > self.pieces:
            raise ValueError(f"{self.name}: split(batch, {self.pieces}) returned {len(made)} pieces: at most {self.pieces}")
        sizes = [0 if piece is None else self.examples(piece) for piece in made]
        if None in sizes:
            piece = made[sizes.index(None)]
            raise ValueError(f"{self.name}: how many examples a piece of split= has is not clear: {shapes(piece)}. Say it: {REMEDY}")
        total = sum(n or 0 for n in sizes)
        whole = self.examples(batch) if isinstance(self.examples, Examples) or counts(batch) else None
        if whole is not None and whole != total:
            raise ValueError(
                f"{self.name}: the pieces of split= have {total} examples together, and the batch has {whole}: {shapes(batch)}. Where "
                f"that counts what is no example, say how many a batch and each piece have: {REMEDY}"
            )
        return ((i, piece, n) for i, (piece, n) in enumerate(zip(made, sizes, strict=True)) if n)

    def mean_of(self, loss: Any, batch: Any, n: int | None) -> Weighted:
        """A loss of `n` examples (None: of the whole batch) as a mean and its weight."""
        if isinstance(loss, Mean):
            weight = loss.weight
            if weight.requires_grad:
                raise ValueError(
                    f"{self.name}: the weight of a loss is data, and this one requires grad: give metrics.mean(values, weight.detach())"
                )
            return Weighted(loss.total / torch.where(weight == 0, 1, weight), weight)
        if isinstance(loss, Sum):
            n = n or example_count(batch) or 1  # the gradient is of a mean, multiplied by n again: its numbers are of the usual size
            return Weighted(loss.total / n, n, divided=False)
        return Weighted(loss, None)


_SAY = f"Say it: {REMEDY}; examples=('x', 'y') for all that is per example; or cut it yourself, split=f with f(batch, n) -> n pieces"


# --- sums over pieces ---------------------------------------------------------------------------------------------------


class Part:
    """Weighted sums over a piece, or over several: gradients, buffers that are averaged, metrics."""

    __slots__ = ("buffers", "divided", "grads", "metrics", "rows", "weight")

    def __init__(self, grads: list[Any], weight: Any, divided: bool, rows: int, buffers: list[Tensor], metrics: Any) -> None:
        self.grads, self.weight, self.divided, self.rows = grads, weight, divided, rows
        self.buffers, self.metrics = buffers, metrics

    def __add__(self, other: Part) -> Part:
        """The sum, in the memory of this part: no third gradient is alive beside the two."""
        for i, (a, b) in enumerate(zip(self.grads, other.grads, strict=True)):
            self.grads[i] = b if a is None else a if b is None else a.add_(b)
        metrics = dict(self.metrics)
        for name, value in other.metrics.items():
            metrics[name] = metrics[name].merge(value) if name in metrics else value
        self.weight, self.rows, self.metrics = self.weight + other.weight, self.rows + other.rows, metrics
        self.buffers = [a + b for a, b in zip(self.buffers, other.buffers, strict=True)]
        return self


class Shapes:
    """The shapes of plain metrics in several parts: they are averaged elementwise, so values of single examples are refused."""

    def __init__(self, who: str) -> None:
        self.who, self._seen = who, dict[str, tuple[tuple[int, ...], bool, int]]()

    def add(self, metrics: Mapping[str, Any], rows: int) -> None:
        """Add the metrics of a part of `rows` examples. Raises ValueError, with the metric's name, where its shape has changed."""
        for name, value in metrics.items():
            if not isinstance(value, Tensor) or not (value.ndim or name in self._seen):
                continue
            shape = tuple(value.shape)
            before, each, parts = self._seen.get(name, (shape, True, 0))
            if before != shape:
                raise ValueError(f"{self.who}: the metric {name!r} has shape {list(shape)}, and had {list(before)} before it. {_NO_MEAN}")
            self._seen[name] = shape, each and value.ndim > 0 and shape[0] == rows, parts + 1

    def check(self) -> None:
        """Raise ValueError for a metric that had a value for each example in all parts, if there were several."""
        for name, (shape, each, parts) in self._seen.items():
            if each and parts > 1:
                raise ValueError(f"{self.who}: the metric {name!r} has shape {list(shape)} for {shape[0]} examples. {_NO_MEAN}")


_NO_MEAN = (
    "Metrics are averaged element by element, and a value for each example would be averaged with those of other examples. Give its mean, "
    "or a fold of all values: metrics.mean(values), metrics.collect(values) to keep them in order, metrics.quantiles(values)"
)


class Joined:
    """The sums over the pieces of one step, whose state has these `buffers`."""

    def __init__(self, name: str, functional: FunctionalModule, buffers: Mapping[str, Tensor]) -> None:
        self.name, self.buffers = name, buffers
        self.averages, self.counts = functional.statistics
        self._names = [name for name in self.averages if name in buffers]
        self._first: dict[str, Tensor] = {}
        self._others: dict[str, Tensor] = {}
        self._dtypes: list[Any] = []
        self._shapes = Shapes(f"{name}: microbatches")

    def part(self, grads: list[Any], loss: Weighted, rows: int, buffers: Mapping[str, Tensor], moved: set[str], metrics: Metrics) -> Part:
        """The sums over one piece; `grads` is written over, and `moved` names the buffers that were written to."""
        weight = rows if loss.weight is None else loss.weight
        self._shapes.add(metrics, rows)
        self._dtypes = self._dtypes or [None] * len(grads)
        for i, g in enumerate(grads):  # in place of each other, so that no second copy of all is alive
            if g is not None:
                self._dtypes[i] = g.dtype
                grads[i] = _summable(g) * weight
        for name in self.counts & buffers.keys():
            self._first.setdefault(name, buffers[name])
        for name in moved - self.counts - self.averages.keys():
            self._check_same(name, buffers[name], rows)
        averages = [_summable(buffers[name]) * rows for name in self._names]
        return Part(grads, weight, loss.divided, rows, averages, {k: _foldable(v, rows) for k, v in metrics.items()})

    def _check_same(self, name: str, value: Tensor, rows: int) -> None:
        before = self._others.setdefault(name, value)
        if before is value:
            return
        if not eager():
            raise Uncapturable(
                f"the buffer {name!r} changes in each microbatch, and whether all leave it with one value depends on computed numbers: use "
                "microbatches=1"
            )
        if not torch.equal(before, value):
            raise ValueError(
                f"{self.name}: the buffer {name!r} comes out of each microbatch with another value, and none of them is that of the whole "
                "batch. What is averaged over examples are the mean and variance of torch's norms: use microbatches=1, or keep it out of "
                "the state (register_buffer(..., persistent=False) for what is a cache)"
            )
        if _counted(self.buffers[name], value, rows):
            raise ValueError(
                f"{self.name}: the buffer {name!r} counts, and a microbatch of {rows} examples counts for less than the whole batch. What "
                "goes up by one in each call may do so: use microbatches=1, or count in the loss as a metric, metrics.sum"
            )

    def result(self, whole: Part) -> tuple[list[Any], dict[str, Tensor], Metrics]:
        self._shapes.check()
        weight: Any = whole.weight if whole.divided else 1
        grads = whole.grads
        for i, (g, dtype) in enumerate(zip(grads, self._dtypes, strict=True)):
            grads[i] = None if g is None else (g / weight).to(dtype)
        buffers = {**self.buffers, **self._others, **self._first}
        for name, total in zip(self._names, whole.buffers, strict=True):
            buffers[name] = (total / whole.rows).to(buffers[name].dtype)
        return grads, buffers, {name: detached_all(_value(value)) for name, value in whole.metrics.items()}


def _counted(before: Tensor, after: Tensor, rows: int) -> bool:
    """Whether a buffer that is the same after each piece may count the piece's examples.

    It may if an integer changes by another number than one, or all entries change by one amount. A buffer that depends on the parameters or
    the number of calls alone, as the vectors of spectral norm, is that of the whole batch.
    """
    if after.dtype == torch.bool or before.shape != after.shape or not after.numel():
        return False
    change = (after - before).double() if not after.is_complex() else (after - before).abs().double()
    if not after.dtype.is_floating_point:
        return bool(((change != 0) & (change != 1)).any())
    first = change.flatten()[0]
    return bool((change == first).all() & (first != 0) & ((first != 1) | (rows == 1)))


def _summable(tensor: Tensor) -> Tensor:
    """In float32 or wider."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


class _PlainMean(NamedTuple):
    """The fold of a plain metric: a mean over examples."""

    total: Any
    rows: int

    def merge(self, other: _PlainMean) -> _PlainMean:
        return _PlainMean(self.total + other.total, self.rows + other.rows)


def _foldable(value: Any, rows: int) -> Any:
    if hasattr(value, "merge"):
        return value
    return _PlainMean((to_accumulator_dtype(value.detach()) if isinstance(value, Tensor) else value) * rows, rows)


def _value(metric: Any) -> Any:
    return metric.total / metric.rows if isinstance(metric, _PlainMean) else metric
