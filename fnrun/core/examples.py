"""How many examples a batch has, and which of its parts hold an entry for each of them.

Tensors and arrays with a dimension count, and lists with an entry for each example. Numbers, texts, None and 0-d tensors do not;
dictionaries, tuples and objects with fields are structure. Where what counts disagrees, nobody guesses: an option says it (`examples=`).
The stream that made a batch knows how many examples it asked for: where the batch itself would say another number, that word travels with
it and counts.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator, Mapping
from numbers import Number
from typing import Any, NamedTuple

import numpy as np
import optree
import torch
from optree.registry import __GLOBAL_NAMESPACE as EVERYWHERE  # pyright: ignore[reportPrivateUsage]
from optree.utils import total_order_sorted
from torch.utils import _pytree as torch_pytree

from fnrun.core import tree
from fnrun.core.words import kind, shortened

# --- what of a batch counts ---------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """A part of a batch that counts: an array, or a list as entries. What a `list` that is read as structure holds comes after it.

    A tuple of `numbers` does not count, but is one entry for each example where the number of them is known and fits.
    """

    path: tuple[Any, ...]
    value: Any
    kind: str


def _array(value: Any) -> bool:
    return isinstance(value, (torch.Tensor, np.ndarray)) and value.ndim > 0


def has_no_length(value: Any) -> bool:
    return (
        value is None
        or isinstance(value, (str, bytes, Number, np.generic))
        or (isinstance(value, (torch.Tensor, np.ndarray)) and not value.ndim)
    )


def _kind(value: list[Any] | tuple[Any, ...]) -> str:
    """What a list is.

    - `values`: of numbers or texts. A tuple of texts, as torch's collate makes it, is one too.
    - `entries`: of what is no tree, or of arrays of several lengths.
    - `either`: of alike arrays or containers: examples, or columns as torch's collate makes them of tuples.
    - `unclear`: of arrays `[n, a]`, `[n, b]`: as common as either.
    - `structure`: anything else, as arrays of several dtypes or ranks.
    - `numbers`: a tuple of numbers, which is structure too.
    """
    if type(value) in (tuple, _Tuple):
        if value and all(map(has_no_length, value)):
            return "values" if all(isinstance(each, (str, bytes)) for each in value) else "numbers"
        return "structure"
    if not isinstance(value, list) or not value:
        return "structure"
    if all(map(has_no_length, value)):
        return "values"
    first = value[0]
    if not all(map(_array, value)):
        alike = all(type(each) is type(first) for each in value) and not has_no_length(first) and not _array(first)
        return "structure" if not alike else "entries" if optree.tree_is_leaf(first) else "either"
    if any((type(each), each.dtype, each.ndim) != (type(first), first.dtype, first.ndim) for each in value):
        return "structure"
    shapes = {_sizes(each) for each in value}
    if len({shape[0] for shape in shapes}) > 1:
        return "entries"
    return "unclear" if first.ndim == 2 and len(shapes) > 1 else "either"


def _sizes(array: Any) -> tuple[int, ...]:
    """Of a nested tensor, whose rows differ, the number of them alone."""
    return (array.size(0),) if isinstance(array, torch.Tensor) and array.is_nested else tuple(array.shape)


def length_of(value: Any) -> int:
    return _sizes(value)[0] if isinstance(value, torch.Tensor) else len(value)


def parts(value: Any, taken: Callable[[Part], bool], path: tuple[Any, ...] = (), within: tuple[int, ...] = ()) -> Iterator[Part]:
    """What counts, from the top; `taken(list)` says which lists are entries. `within` are the objects that `value` is a field of."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        if value.ndim:
            yield Part(path, value, "array")
        return
    if isinstance(value, (list, tuple)):
        part = Part(path, value, _kind(value))
        if taken(part):
            yield part._replace(kind="entries") if part.kind in ("structure", "numbers") else part
            return
        if part.kind != "structure":
            yield part if part.kind == "numbers" else part._replace(kind="list")
    fields = _fields(value)
    if fields is not None:
        if id(value) in within or len(within) == DEEP:
            return
        within = (*within, id(value))
    for entry, child in children(value) if fields is None else fields.items():
        yield from parts(child, taken, (*path, entry), within)


#: So deep objects are looked into that are fields of others: they may be a whole graph of Python's.
DEEP = 4


def children(value: Any) -> Iterator[tuple[Any, Any]]:
    if value is None or optree.tree_is_leaf(value):
        if isinstance(value, Mapping):  # as a tokenizer's: no tree, but it can be looked into
            yield from value.items()
        else:
            yield from (_fields(value) or {}).items()
        return
    children, _, entries, _ = optree.tree_flatten_one_level(value)
    yield from zip(entries, children, strict=True)


#: What has fields of its own and is no batch.
_NO_BATCH = (type, types.ModuleType, types.FunctionType, types.MethodType, torch.nn.Module)


def _fields(value: Any) -> dict[str, Any] | None:
    """The fields of an object that is no tree: a dataclass, a namespace, anything with attributes; None of what has none."""
    if (
        value is None
        or has_no_length(value)
        or isinstance(value, (torch.Tensor, np.ndarray, Mapping, *_NO_BATCH))
        or not optree.tree_is_leaf(value)
    ):
        return None
    slots = [name for cls in type(value).__mro__ for name in _slots(cls)]
    found = {**{name: getattr(value, name) for name in slots if hasattr(value, name)}, **getattr(value, "__dict__", {})}
    found.pop("_fnrun_told", None)
    return found or None


def _slots(cls: type) -> tuple[str, ...]:
    slots = cls.__dict__.get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(name for name in slots if not name.startswith("__"))


def as_entries(part: Part) -> bool:
    return part.kind not in ("structure", "numbers")


def _as_structure(part: Part) -> bool:
    return part.kind in ("values", "entries")


def as_columns(part: Part) -> bool:
    """Of torch's collate: its lists are columns, but for those of texts."""
    return part.kind == "values" and all(isinstance(each, (str, bytes)) for each in part.value)


def one_each(value: Any, rows: int) -> bool:
    """Whether that is a list or tuple of as many alike things as there are examples, whose own lengths are not that number."""
    if type(value) not in (list, tuple, _List, _Tuple) or len(value) != rows:
        return False
    if not all(map(has_no_length, value)):
        first = value[0]
        if all(map(_array, value)):
            alike = all((each.dtype, each.ndim) == (first.dtype, first.ndim) for each in value)
        else:
            alike = all(type(each) is type(first) and not isinstance(each, (list, tuple)) for each in value)
        if not alike:
            return False
    return _lengths(value, _as_structure) != {rows}


def _lengths(batch: Any, taken: Callable[[Part], bool]) -> set[int]:
    """The lengths of arrays and lists; of lists of numbers and texts only where there is nothing else."""
    strong, weak = set[int](), set[int]()
    for part in parts(batch, taken):
        if part.kind not in ("list", "numbers"):
            (weak if part.kind == "values" else strong).add(length_of(part.value))
    return strong or weak


def examples(batch: Any) -> int:
    """How many examples a batch has: the leading length of its tensors and arrays, and of its lists; 1 where nothing has one.

    A list of arrays that are alike, as images, is a list of examples; one of different dtypes or ranks is structure, as `[inputs, labels]`.
    A batch of a stream that was made of another number of examples than this has that number.

    Raises ValueError, with the shapes, where they disagree and the stream that made the batch did not say how many.

    >>> examples({"image": torch.zeros(8, 3), "label": torch.zeros(8)}), examples(3.5)
    (8, 1)
    >>> examples([torch.zeros(3, 9, 9), torch.zeros(3, 7, 7)]), examples([torch.zeros(8, 4), torch.zeros(8)])
    (2, 8)
    """
    if (rows := example_count(batch)) is None:
        raise ValueError(f"how many examples this batch has is not clear: {shapes(batch)}")
    return rows


def example_count(batch: Any) -> int | None:
    """`examples(batch)`, or None where that is not clear."""
    cls = type(batch)
    if cls is torch.Tensor and batch.ndim:
        rows = attached_count(batch)[0]
        return batch.size(0) if rows is None else rows
    if cls in _USUAL and batch and (cls in _PLAIN or batch.told[0] is None):  # found out without a look at the whole tree
        values = batch.values() if cls in (dict, _Dict) else batch
        lengths = {value.size(0) if type(value) is torch.Tensor and value.ndim else None for value in values}
        if (
            len(lengths) == 1
            and None not in lengths
            and (cls not in (list, _List) or (cls is _List and batch.told[1]) or len({(value.dtype, value.ndim) for value in batch}) > 1)
        ):
            return lengths.pop()  # pyright: ignore[reportReturnType]
    return _example_count(batch, *attached_count(batch))


def _example_count(batch: Any, told: int | None, columns: bool) -> int | None:
    if told is not None:
        return told
    lists = {part.kind for part in parts(batch, as_entries)} - {"array", "values", "numbers"}
    readings = (as_columns,) if columns else (as_entries, _as_structure) if lists else (as_entries,)
    lengths = [_lengths(batch, reading) for reading in readings]
    if not any(lengths):
        return 1
    agreed = [next(iter(found)) if len(found) == 1 else None for found in lengths]
    if zipped(batch) not in (None, *agreed):
        return None
    if len(set(agreed)) == 1 and agreed[0] is not None:
        return agreed[0]
    if "unclear" in lists and None not in agreed:
        return None
    return next((rows for rows in agreed if rows is not None), None)


def zipped(batch: Any) -> int | None:
    """How many examples `tuple(zip(*examples))` was made of, if it is that: tuples of one length, one of numbers or dictionaries."""
    if type(batch) not in (tuple, _Tuple) or len(batch) < 2 or not all(type(each) is tuple for each in batch):
        return None
    lengths = {len(each) for each in batch}
    return lengths.pop() if len(lengths) == 1 and any(map(_labels, batch)) else None


def _labels(value: tuple[Any, ...]) -> bool:
    return bool(value) and (all(isinstance(each, Number) for each in value) or all(isinstance(each, Mapping) for each in value))


def counts(batch: Any) -> bool:
    """Whether there is anything that counts, or a stream's word."""
    return attached_count(batch)[0] is not None or any(part.kind != "numbers" for part in parts(batch, as_entries))


def ambiguous(batch: Any) -> bool:
    """Whether there is a list that can be read in two ways."""
    return any(part.kind not in ("array", "values", "numbers") for part in parts(batch, as_entries))


def shapes(batch: Any) -> str:
    """What of a batch counts, in words.

    >>> shapes({"x": torch.zeros(8, 4), "anchors": torch.zeros(2, 4), "text": ["a", "b"]})
    'anchors [2, 4], text a list of 2, x [8, 4]'
    """
    found = [part for part in parts(batch, as_entries) if part.kind != "numbers"]
    return shortened([f"{tree.join(part.path) or 'the batch'} {_shape(part.value)}" for part in found], 12) or kind(batch)


def _shape(value: Any) -> str:
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return str(list(_sizes(value)))
    arrays = all(map(_array, value)) and f" of {', '.join(_shape(each) for each in value[:3])}{', ...' if len(value) > 3 else ''}"
    return f"a {type(value).__name__.lower()} of {len(value)}" + (f" ({arrays[4:]})" if arrays else "")


# --- what a stream knows of a batch -------------------------------------------------------------------------------------


class _Dict(dict[Any, Any]):
    """A dictionary with a stream's word of it."""

    _fnrun_like, told = dict, (None, False)


class _List(list[Any]):
    _fnrun_like, told = list, (None, False)


class _Tuple(tuple[Any, ...]):
    _fnrun_like, told = tuple, (None, False)


class _Array(np.ndarray):
    """An array that can hold a stream's word."""


_MARKED: dict[type, Any] = {dict: _Dict, list: _List, tuple: _Tuple}
_PLAIN = frozenset(_MARKED)
_USUAL = frozenset({*_MARKED, *_MARKED.values()})


def attached_count(batch: Any) -> tuple[int | None, bool]:
    """What its stream said of a batch: how many examples, and whether torch's collate made its lists, which are columns then."""
    return getattr(batch, "told" if type(batch) in (_Dict, _List, _Tuple) else "_fnrun_told", (None, False))


def attach_count(batch: Any, rows: int | None, columns: bool = False) -> Any:
    """The batch, with a stream's word of it where that is needed: of the same type, or of a subclass that prints and compares alike."""
    speaks = rows is None or example_count(batch) == rows
    return batch if speaks and not (columns and ambiguous(batch)) else with_count(batch, rows, columns)


def keep_count(made: Any, batch: Any) -> Any:
    """What was made of the tensors of a batch, with a stream's word of that batch."""
    return made if (word := attached_count(batch)) == (None, False) or attached_count(made) == word else with_count(made, *word)


def with_count(batch: Any, rows: int | None, columns: bool) -> Any:
    cls = type(batch)
    if cls in _MARKED:
        batch = _MARKED[cls](batch)
    elif cls is np.ndarray:
        batch = batch.view(_Array)
    if type(batch) in (_Dict, _List, _Tuple):
        batch.told = rows, columns
    elif hasattr(batch, "__dict__"):  # a tensor, or an object of the user's, which goes as it is from hand to hand
        object.__setattr__(batch, "_fnrun_told", (rows, columns))
    elif hasattr(batch, "_fields"):
        batch = with_count(_with_attributes(cls)(*batch), rows, columns)
    return batch


@functools.cache
def _with_attributes(cls: Any) -> Any:
    """A named tuple that can hold a stream's word."""
    own = {"__module__": cls.__module__, "__doc__": cls.__doc__, "__reduce__": lambda self: (cls, tuple(self))}
    return type(cls.__name__, (cls,), own)


def _register(cls: Any) -> None:
    def flatten(node: Any) -> tuple[Any, Any, Any]:
        if cls is not _Dict:
            return list(node), node.told, range(len(node))
        keys = total_order_sorted(node)
        return [node[key] for key in keys], (tuple(node), tuple(keys), node.told), keys

    def unflatten(context: Any, children: Any) -> Any:
        if cls is _Dict:
            order, keys, said = context
            values = dict(zip(keys, children, strict=True))
            return with_count({key: values[key] for key in order}, *said)
        return with_count(cls._fnrun_like(children), *context)

    def with_keys(node: Any) -> Any:
        children, context, entries = flatten(node)
        key = torch_pytree.MappingKey if cls is _Dict else torch_pytree.SequenceKey
        return [(key(entry), child) for entry, child in zip(entries, children, strict=True)], context

    entry = optree.MappingEntry if cls is _Dict else optree.SequenceEntry
    optree.register_pytree_node(cls, flatten, unflatten, path_entry_type=entry, namespace=EVERYWHERE)
    torch_pytree.register_pytree_node(
        cls, lambda node: flatten(node)[:2], lambda children, context: unflatten(context, children), flatten_with_keys_fn=with_keys
    )


for _cls in _MARKED.values():
    _register(_cls)


REMEDY = "examples='x' (a key or path of the batch), a number, or a function of the batch"
