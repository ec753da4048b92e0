"""The metrics of a loop's ticks, folded: what a loop keeps in its frame."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from fnrun.core.tree import struct
from fnrun.core.words import a
from fnrun.metrics.base import to_accumulator_dtype
from fnrun.metrics.basic import Last, Max, Mean, Min, Sum
from fnrun.metrics.by_name import flat


@struct(name="fnrun.loops.Means")
class Means:
    """The means of the plain tensors that come together in a tick, stacked, so that a tick is one addition; or that of one Python number.

    `total` and `weight` count in units of `unit` examples, those of the first batch. So for batches of one size nothing is rounded
    but the sum, and the mean of a single batch is its value.
    """

    names: tuple[str, ...]
    total: Any  # a tensor [names, ...], or a float
    weight: float
    unit: int

    def add(self, value: Any, examples: int) -> Means:
        if examples == self.unit:
            return Means(self.names, self.total + value, self.weight + 1.0, self.unit)
        # The product is rounded by itself: fused with the sum, its bits would depend on where in the stack the value stands.
        share = examples / self.unit
        return Means(
            self.names,
            self.total + (to_accumulator_dtype(value) if isinstance(value, Tensor) else value) * share,
            self.weight + share,
            self.unit,
        )

    def add_each(self, values: Tensor, examples: Sequence[int]) -> Means:
        """Several ticks at once, with the bits of one after the other: `values` is `[ticks, names]`."""
        rows, weight = to_accumulator_dtype(values), self.weight
        if any(n != self.unit for n in examples):
            shares = [n / self.unit for n in examples]
            rows = rows * torch.tensor(shares, dtype=rows.dtype, device=rows.device).unsqueeze(1)
        else:
            shares = [1.0] * len(examples)
        for share in shares:
            weight += share
        if rows.is_cpu:  # where a running sum goes from row to row, and so what comes together does not change the bits
            return Means(self.names, torch.cat([self.total.unsqueeze(0), rows]).cumsum(0)[-1], weight, self.unit)
        return Means(self.names, functools.reduce(torch.add, rows.unbind(), self.total), weight, self.unit)

    def add_numbers(self, values: Sequence[float], examples: Sequence[int]) -> Means:
        """Several ticks of a Python number, one after the other."""
        total, weight = self.total, self.weight
        for value, n in zip(values, examples, strict=True):
            share = n / self.unit
            total, weight = total + float(value) * share, weight + share
        return Means(self.names, total, weight, self.unit)

    def only(self, names: list[str]) -> Means:
        return Means(tuple(names), self.total[[self.names.index(name) for name in names]], self.weight, self.unit)


@struct(name="fnrun.loops.Totals")
class Totals:
    """The metrics of the ticks so far, folded: tensors in `means`, Python numbers in `numbers`, folds in `folds`; `names` as they came.

    The newest ticks wait in `waiting`, with their examples, to be folded together: one operation for many ticks. They are at most
    `TOGETHER`, all with the metrics `shared`, which are scalars.
    """

    names: tuple[str, ...] = ()
    means: tuple[Means, ...] = ()
    numbers: dict[str, Means] = dataclasses.field(default_factory=dict)
    folds: dict[str, Any] = dataclasses.field(default_factory=dict)
    shared: tuple[str, ...] = ()
    waiting: tuple[tuple[Any, ...], ...] = ()


#: So many ticks of scalars are folded at once.
TOGETHER = 16
_FOLDS = frozenset({Mean, Sum, Min, Max, Last})
_SCALAR = frozenset({float, int}) | _FOLDS


def fold(totals: Totals | None, metrics: Mapping[str, Any], examples: int) -> Totals:
    """The totals with one more tick: its metrics by name, and how many examples its batch had.

    A tensor or a number is a mean over examples: each tick's value counts `examples` times, each element of a tensor on its own.
    A fold merges. A name may be missing from a tick, or come later: its total is over the ticks that had it.
    The result is a function of the ticks and their order alone, and its size does not grow with their number.

    Raises TypeError for what is no metric and for a name that is a fold in one tick and not in another, ValueError for a changed shape.

    >>> from fnrun.metrics import sum as seen
    >>> totals = fold(None, {"loss": torch.tensor(1.0), "seen": seen(torch.ones(3))}, examples=3)
    >>> compute(fold(totals, {"loss": torch.tensor(2.0), "seen": seen(torch.ones(1))}, examples=1))
    {'loss': tensor(1.2500, dtype=torch.float64), 'seen': tensor(4., dtype=torch.float64)}
    """
    if totals is not None and totals.shared == (names := tuple(metrics)) and _scalars(metrics) and _like(totals, metrics):
        waiting = (*totals.waiting, (examples, *metrics.values()))
        together = Totals(totals.names, totals.means, totals.numbers, totals.folds, names, waiting)
        return together if len(waiting) < TOGETHER else flushed(together)
    totals = _fold(flushed(totals), metrics, examples)
    if _scalars(metrics):
        return dataclasses.replace(totals, shared=tuple(metrics))
    return totals


def fold_each(totals: Totals | None, ticks: Sequence[tuple[Mapping[str, Any], int]]) -> Totals | None:
    """`fold` for several ticks, each `(metrics, examples)`, one after the other."""
    i = 0
    while i < len(ticks):
        totals = fold(totals, *ticks[i])
        i += 1
        if not totals.waiting:
            continue
        names, kinds, waiting = totals.shared, list(map(type, totals.waiting[-1][1:])), list(totals.waiting)
        for metrics, examples in ticks[i : i + TOGETHER - 1 - len(waiting)]:  # the last one before they are folded comes by itself
            if tuple(metrics) != names or list(map(type, metrics.values())) != kinds or not _scalars(metrics):
                break
            waiting.append((examples, *metrics.values()))
            i += 1
        totals = Totals(totals.names, totals.means, totals.numbers, totals.folds, names, tuple(waiting))
    return totals


def _scalars(metrics: Mapping[str, Any]) -> bool:
    for value in metrics.values():
        kind = type(value)
        if value.ndim if isinstance(value, Tensor) else kind not in _SCALAR or (kind is Last and getattr(value.value, "ndim", 0)):
            return False
    return True


def _like(totals: Totals, metrics: Mapping[str, Any]) -> bool:
    """Whether each metric is of the kind that it was."""
    if totals.waiting:
        return list(map(type, totals.waiting[-1][1:])) == list(map(type, metrics.values()))
    kept = totals.folds
    return all(type(kept[name]) is type(value) if name in kept else type(value) not in _FOLDS for name, value in metrics.items())


def flushed(totals: Totals | None) -> Totals:
    """The totals with no tick waiting."""
    if totals is None:
        return Totals()
    if not totals.waiting:
        return dataclasses.replace(totals, shared=()) if totals.shared else totals
    shared, waiting = totals.shared, totals.waiting
    totals = Totals(totals.names, totals.means, totals.numbers, totals.folds)
    columns = dict(zip(shared, zip(*(tick[1:] for tick in waiting), strict=True), strict=True))
    examples = [tick[0] for tick in waiting]
    if not _regular(totals, columns):
        for n, *values in waiting:
            totals = _fold(totals, dict(zip(shared, values, strict=True)), n)
        return totals
    means = []
    for stack in totals.means:
        values = torch.stack([value for row in zip(*(columns[name] for name in stack.names), strict=True) for value in row])
        means.append(stack.add_each(values.detach().view(len(waiting), -1), examples))
    numbers, folds = dict(totals.numbers), dict(totals.folds)
    for name, column in columns.items():
        if name in folds:
            folds[name] = _merged([folds[name], *column])
        elif name in numbers:
            numbers[name] = numbers[name].add_numbers(column, examples)
    return Totals(totals.names, tuple(means), numbers, folds, shared)


def _merged(each: list[Any]) -> Any:
    """Folds of one kind, merged from left to right."""
    first = each[0]
    if isinstance(first, Last):
        return each[-1]
    if not isinstance(first, (Mean, Sum)):
        return functools.reduce(lambda a, b: a.merge(b), each)
    fields = [[getattr(fold, field.name) for fold in each] for field in dataclasses.fields(first)]
    if all(x.is_cpu and x.ndim == 0 and x.dtype == row[0].dtype for row in fields for x in row):  # scalars: running sums, as in `add_each`
        return type(first)(*(torch.stack(row).cumsum(0)[-1] for row in fields))
    return functools.reduce(lambda a, b: a.merge(b), each)


def _regular(totals: Totals, columns: Mapping[str, Sequence[Any]]) -> bool:
    """Whether the ticks that wait are all like those before: every stack whole, each metric of one kind and dtype."""
    kinds = {name: {(type(v), v.dtype, v.device) if isinstance(v, Tensor) else type(v) for v in column} for name, column in columns.items()}
    if any(len(kind) > 1 for kind in kinds.values()):
        return False
    tensors = {name for name, kind in kinds.items() if isinstance(next(iter(kind)), tuple)}
    stacked = [name for stack in totals.means for name in stack.names]
    alike = all(len(set().union(*(kinds[name] for name in stack.names))) == 1 for stack in totals.means if tensors.issuperset(stack.names))
    rest = set(columns) - tensors
    return alike and tensors == set(stacked) and rest <= {*totals.numbers, *totals.folds} and rest.isdisjoint(stacked)


def _fold(old: Totals, metrics: Mapping[str, Any], examples: int) -> Totals:
    tensors: dict[str, Tensor] = {}
    numbers, folds = old.numbers, old.folds
    for name, value in metrics.items():
        if isinstance(value, Last) and name not in folds and name in old.names:
            value = value.value  # totals that were begun as a mean, by a version that knew no rates, end as one
        if isinstance(value, Tensor):
            tensors[name] = value
        elif isinstance(value, Real):
            known = numbers.get(name) or Means((name,), 0.0, 0.0, examples or 1)
            numbers = {**numbers, name: known.add(float(value), examples)}
        elif hasattr(value, "merge") and hasattr(value, "compute"):
            folds = {**folds, name: _merge(name, folds[name], value) if name in folds else value}
        else:
            raise TypeError(f"metric {name!r} is {a(type(value).__name__)}: a metric is a tensor, a number or a fold (see fnrun.metrics)")
    means = _add(old.means, tensors, examples)
    fresh = [name for name in metrics if name not in old.names]
    if folds:
        plain = {*numbers, *(name for stack in means for name in stack.names)}
        for name in folds:
            if name in plain:
                raise TypeError(f"metric {name!r} is {a(type(folds[name]).__name__)} in one tick and a plain value in another")
    return Totals((*old.names, *fresh) if fresh else old.names, means, numbers, folds)


def _add(means: tuple[Means, ...], tensors: dict[str, Tensor], examples: int) -> tuple[Means, ...]:
    """`means` with the tensors of a tick. Those that no longer come together are parted, so there are never more of them than names."""
    added: list[Means] = []
    for stack in means:
        present: Sequence[str] = [name for name in stack.names if name in tensors]
        if not present:
            added.append(stack)
            continue
        if len(present) < len(stack.names):
            added.append(stack.only([name for name in stack.names if name not in tensors]))
            stack = stack.only(present)
        added.append(stack.add(_stacked(present, [tensors.pop(name) for name in present], stack.total.shape[1:]), examples))
    if tensors:
        groups: dict[Any, list[str]] = {}
        for name, value in tensors.items():
            groups.setdefault((value.shape, value.dtype, value.device), []).append(name)
        for (shape, _, _), names in groups.items():
            value = to_accumulator_dtype(_stacked(names, [tensors[name] for name in names], shape))
            added.append(Means(tuple(names), torch.zeros_like(value), 0.0, examples or 1).add(value, examples))
    return tuple(added)


def _stacked(names: Sequence[str], values: list[Tensor], shape: torch.Size) -> Tensor:
    for name, value in zip(names, values, strict=True):
        if value.shape != shape:
            raise ValueError(
                f"metric {name!r} has shape {tuple(value.shape)}, and had {tuple(shape)} in the ticks before. A value of each example is a "
                "fold: metrics.mean(values) is their mean, metrics.collect(values) keeps them"
            )
    if len({value.dtype for value in values}) > 1:  # stacked as they are, an int would be rounded to its neighbour's float32
        values = [to_accumulator_dtype(value) for value in values]
    stacked = torch.stack(values)
    return stacked.detach() if stacked.requires_grad else stacked


def _merge(name: str, old: Any, new: Any) -> Any:
    if type(old) is not type(new):
        raise TypeError(f"metric {name!r} is {a(type(old).__name__)} in one tick and {a(type(new).__name__)} in another")
    return old.merge(new)


def compute(totals: Totals) -> dict[str, Any]:
    """The values by name, in the order in which the names first came: float64 tensors for what were tensors, floats for numbers.

    What a fold computes is under its name; of a fold that computes a dict, under `name/key`.
    """
    totals = flushed(totals)
    found: dict[str, Any] = {}
    for stack in totals.means:
        found.update(zip(stack.names, (stack.total / stack.weight).unbind(), strict=True))
    for name, number in totals.numbers.items():
        if name not in found:
            found[name] = number.total / number.weight if number.weight else float("nan")
            continue
        stack = next(stack for stack in totals.means if name in stack.names)  # a number in some ticks and a tensor in others
        ours, theirs = stack.weight * stack.unit, number.weight * number.unit
        found[name] = (found[name] * ours + number.total * number.unit) / (ours + theirs)
    found.update((name, value.compute()) for name, value in totals.folds.items())
    return flat({name: found[name] for name in totals.names})
