"""How many examples a batch has, and which of its parts hold an entry for each of them.

Tensors and arrays with a dimension count, and lists with an entry for each example. Numbers, texts, None and 0-d tensors do not;
dictionaries, tuples and objects with fields are structure. Where what counts disagrees, nobody guesses: an option says it (`examples=`).
The stream that made a batch knows how many examples it asked for: where the batch itself would say another number, that word travels with
it and counts.
"""

from __future__ import annotations

import functools
import operator
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

from fnrun import tree
from fnrun.counts import count
from fnrun.words import bindable, kind

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


def _plain(value: Any) -> bool:
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
        if value and all(map(_plain, value)):
            return "values" if all(isinstance(each, (str, bytes)) for each in value) else "numbers"
        return "structure"
    if not isinstance(value, list) or not value:
        return "structure"
    if all(map(_plain, value)):
        return "values"
    first = value[0]
    if not all(map(_array, value)):
        alike = all(type(each) is type(first) for each in value) and not _plain(first) and not _array(first)
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


def _length(value: Any) -> int:
    return _sizes(value)[0] if isinstance(value, torch.Tensor) else len(value)


def _parts(value: Any, taken: Callable[[Part], bool], path: tuple[Any, ...] = (), within: tuple[int, ...] = ()) -> Iterator[Part]:
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
    for entry, child in _children(value) if fields is None else fields.items():
        yield from _parts(child, taken, (*path, entry), within)


#: So deep objects are looked into that are fields of others: they may be a whole graph of Python's.
DEEP = 4


def _children(value: Any) -> Iterator[tuple[Any, Any]]:
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
        or _plain(value)
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


def _as_entries(part: Part) -> bool:
    return part.kind not in ("structure", "numbers")


def _as_structure(part: Part) -> bool:
    return part.kind in ("values", "entries")


def _as_columns(part: Part) -> bool:
    """Of torch's collate: its lists are columns, but for those of texts."""
    return part.kind == "values" and all(isinstance(each, (str, bytes)) for each in part.value)


def _one_each(value: Any, rows: int) -> bool:
    """Whether that is a list or tuple of as many alike things as there are examples, whose own lengths are not that number."""
    if type(value) not in (list, tuple, _List, _Tuple) or len(value) != rows:
        return False
    if not all(map(_plain, value)):
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
    for part in _parts(batch, taken):
        if part.kind not in ("list", "numbers"):
            (weak if part.kind == "values" else strong).add(_length(part.value))
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
    if (rows := known(batch)) is None:
        raise ValueError(f"how many examples this batch has is not clear: {shapes(batch)}")
    return rows


def known(batch: Any) -> int | None:
    """`examples(batch)`, or None where that is not clear."""
    cls = type(batch)
    if cls is torch.Tensor and batch.ndim:
        rows = told(batch)[0]
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
    return _known(batch, *told(batch))


def _known(batch: Any, told: int | None, columns: bool) -> int | None:
    if told is not None:
        return told
    lists = {part.kind for part in _parts(batch, _as_entries)} - {"array", "values", "numbers"}
    readings = (_as_columns,) if columns else (_as_entries, _as_structure) if lists else (_as_entries,)
    lengths = [_lengths(batch, reading) for reading in readings]
    if not any(lengths):
        return 1
    agreed = [next(iter(found)) if len(found) == 1 else None for found in lengths]
    if _zipped(batch) not in (None, *agreed):
        return None
    if len(set(agreed)) == 1 and agreed[0] is not None:
        return agreed[0]
    if "unclear" in lists and None not in agreed:
        return None
    return next((rows for rows in agreed if rows is not None), None)


def _zipped(batch: Any) -> int | None:
    """How many examples `tuple(zip(*examples))` was made of, if it is that: tuples of one length, one of numbers or dictionaries."""
    if type(batch) not in (tuple, _Tuple) or len(batch) < 2 or not all(type(each) is tuple for each in batch):
        return None
    lengths = {len(each) for each in batch}
    return lengths.pop() if len(lengths) == 1 and any(map(_labels, batch)) else None


def _labels(value: tuple[Any, ...]) -> bool:
    return bool(value) and (all(isinstance(each, Number) for each in value) or all(isinstance(each, Mapping) for each in value))


def counts(batch: Any) -> bool:
    """Whether there is anything that counts, or a stream's word."""
    return told(batch)[0] is not None or any(part.kind != "numbers" for part in _parts(batch, _as_entries))


def ambiguous(batch: Any) -> bool:
    """Whether there is a list that can be read in two ways."""
    return any(part.kind not in ("array", "values", "numbers") for part in _parts(batch, _as_entries))


def shapes(batch: Any) -> str:
    """What of a batch counts, in words.

    >>> shapes({"x": torch.zeros(8, 4), "anchors": torch.zeros(2, 4), "text": ["a", "b"]})
    'anchors [2, 4], text a list of 2, x [8, 4]'
    """
    parts = [part for part in _parts(batch, _as_entries) if part.kind != "numbers"]
    words = [f"{tree.join(part.path) or 'the batch'} {_shape(part.value)}" for part in parts[:12]]
    return ", ".join(words) + (f" and {len(parts) - 12} more" if len(parts) > 12 else "") or kind(batch)


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


def told(batch: Any) -> tuple[int | None, bool]:
    """What its stream said of a batch: how many examples, and whether torch's collate made its lists, which are columns then."""
    return getattr(batch, "told" if type(batch) in (_Dict, _List, _Tuple) else "_fnrun_told", (None, False))


def tell(batch: Any, rows: int | None, columns: bool = False) -> Any:
    """The batch, with a stream's word of it where that is needed: of the same type, or of a subclass that prints and compares alike."""
    speaks = rows is None or known(batch) == rows
    return batch if speaks and not (columns and ambiguous(batch)) else _told(batch, rows, columns)


def retold(made: Any, batch: Any) -> Any:
    """What was made of the tensors of a batch, with a stream's word of that batch."""
    return made if (word := told(batch)) == (None, False) or told(made) == word else _told(made, *word)


def _told(batch: Any, rows: int | None, columns: bool) -> Any:
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
        batch = _told(_with_attributes(cls)(*batch), rows, columns)
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
            return _told({key: values[key] for key in order}, *said)
        return _told(cls._fnrun_like(children), *context)

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


# --- what a user says of his batches ------------------------------------------------------------------------------------

REMEDY = "examples='x' (a key or path of the batch), a number, or a function of the batch"


class Examples:
    """The option `examples=`, called with a batch: how many it has, None where that is not clear.

    It is a key or path of the batch (`"x"`, `"inputs/ids"`, `"0"`), several of them, a number, or a function `batch -> int`. `named` are
    the paths where there are several: exactly those parts have an entry for each example.
    """

    def __init__(self, who: str, option: Any) -> None:
        self.who, self.option, self.named = f"{who}: examples={option!r}", option, ()
        if callable(option) and not isinstance(option, type):
            self.who = f"{who}: examples="
            if not bindable(option, None):
                raise TypeError(f"{who}: examples= takes a function of the batch that returns a number, and not {kind(option)}")
        elif isinstance(option, (list, tuple)):
            self.named = tuple(option)
            if not option or not all(isinstance(each, str) and each for each in option):
                raise TypeError(f"{who}: examples= takes keys or paths of the batch, as ('x', 'inputs/ids'), and not {option!r}")
        elif option is None or isinstance(option, (str, type)):
            if not isinstance(option, str) or not option:
                raise TypeError(f"{who}: examples= takes {REMEDY[9:]}, and not {kind(option)}")
        else:
            self.option = count(f"{who}: examples", option)

    def __call__(self, batch: Any) -> int | None:
        option = self.option
        if isinstance(option, int):
            return option
        if callable(option):
            return self._returned(option(batch))
        paths = self.named or (option,)
        lengths = {path: self._at(batch, path) for path in paths}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"{self.who}: they differ: {', '.join(f'{path} has {n}' for path, n in lengths.items())}; in {shapes(batch)}")
        return lengths[paths[0]]

    def _returned(self, value: Any) -> int:
        try:
            number = -1 if isinstance(value, bool) else operator.index(value)
        except (TypeError, RuntimeError):
            number = -1
        if number < 0:
            raise ValueError(f"{self.who} is a function of the batch that returns a number of examples, and it returned {kind(value)}")
        return number

    def _at(self, batch: Any, path: str) -> int:
        _, part = self.find(batch, path)
        if (rows := told(batch)[0]) is not None and _one_each(part, rows):
            return rows
        if not any(each.kind not in ("list", "numbers") for each in _parts(part, _as_entries)):
            raise ValueError(f"{self.who}: {path!r} is {kind(part)}, which has no length; the batch has {shapes(batch)}")
        if (rows := known(part)) is None:
            raise ValueError(f"{self.who}: what is in {path!r} differs in its length: {shapes(part)}")
        return rows

    def find(self, batch: Any, path: str) -> tuple[tuple[Any, ...], Any]:
        """The place of that path, in the tree's own terms, and what is there."""
        at, found = (), batch
        for entry in tree.split(path):
            fields = getattr(type(found), "_fields", ())
            name = str(fields.index(entry)) if entry in fields else entry
            for key, child in _children(found):
                if str(key) == name:
                    at, found = (*at, key), child
                    break
            else:
                raise ValueError(f"{self.who}: the batch has no {path!r}; it has {shapes(batch)}")
        return at, found


def said(who: str, option: Any) -> Callable[[Any], int | None]:
    """How many examples a batch has, where `option` is what a user said of that, or None."""
    return known if option is None else Examples(who, option)


# --- cutting ------------------------------------------------------------------------------------------------------------


_NONE: Mapping[str, bool] = {}


class Sliced:
    """A batch of so many examples, of which rows can be taken: `[start:end]` of each part with an entry for each, the rest whole.

    `parts` says by path whether each part that counts is cut. Where the number is `known`, of a stream or of an option, a tuple or list of
    so many things is one of examples, if their own lengths are another number. What such a list was in a batch `before`, of examples or
    structure, it is again.
    """

    def __init__(
        self, batch: Any, rows: int, named: Examples | None = None, known: bool = False, before: Mapping[str, bool] = _NONE
    ) -> None:
        self._told = told(batch)
        columns, known = self._told[1], known or self._told[0] is not None
        zipped = _zipped(batch) == rows
        self.lists: dict[str, bool] = {}  # by path, whether a list of arrays or dictionaries is one of examples

        def taken(part: Part) -> bool:
            if part.kind in ("values", "numbers"):
                return _as_columns(part) if columns else part.kind == "values" or (known and _one_each(part.value, rows))
            path = tree.join(part.path)
            if path in before:
                one_each = before[path] and len(part.value) == rows
            else:
                one_each = (
                    (known and _one_each(part.value, rows))
                    or (zipped and len(part.path) == 1)
                    or (part.kind != "structure" and not columns and len(part.value) == rows)
                )
            self.lists[path] = one_each
            return one_each

        found = [*_parts(batch, taken)]
        lists = {id(part.value) for part in found if part.kind not in ("array", "list", "numbers")}
        paths, self._leaves, self._spec = optree.tree_flatten_with_path(batch, is_leaf=lambda value: id(value) in lists)
        places = [named.find(batch, path)[0] for path in named.named] if named is not None else None
        leaves = {tree.join(path): leaf for path, leaf in zip(paths, self._leaves, strict=True)}
        self.parts: dict[str, bool] = {}
        self.others: list[str] = []  # arrays and lists of examples that have another length
        self.hidden: list[str] = []  # those with an entry for each example that lie in an object, which cannot be cut
        for part in found:
            path, counts = tree.join(part.path), part.kind not in ("list", "numbers")
            fits = counts and _length(part.value) == rows
            if places is None:
                if _length(part.value) or fits:
                    self.parts[path] = fits
                if not fits and part.kind not in ("list", "numbers", "values"):
                    self.others.append(path)
            elif counts and any(part.path[: len(place)] == place for place in places):
                if not fits:
                    raise ValueError(f"{named.who}: {path} has no entry for each of the {rows} examples: {shapes(batch)}")  # pyright: ignore[reportOptionalMemberAccess]
                self.parts[path] = True
            if self.parts.get(path) and path not in leaves:
                self.hidden.append(path)
        #: What is cut, by path.
        self.cut = {path: leaf for path, leaf in leaves.items() if self.parts.get(path)}
        self._cut = [tree.join(path) in self.cut for path in paths]
        self.whole = all(part.kind == "numbers" for part in found) and all(map(_plain, self._leaves))  # nothing in it has a length

    def __getitem__(self, rows: slice) -> Any:
        leaves = [_rows(leaf, rows) if cut else leaf for leaf, cut in zip(self._leaves, self._cut, strict=True)]
        piece = optree.tree_unflatten(self._spec, leaves)
        return piece if self._told == (None, False) else _told(piece, rows.stop - rows.start, self._told[1])


def _rows(leaf: Any, rows: slice) -> Any:
    if isinstance(leaf, torch.Tensor) and leaf.is_nested:
        return torch.nested.as_nested_tensor(list(leaf.unbind())[rows], layout=leaf.layout)
    if isinstance(leaf, torch.Tensor) and leaf.layout is not torch.strided:
        wanted = torch.arange(rows.start, rows.stop, device=leaf.device)
        return leaf.to_sparse_coo().index_select(0, wanted).to_sparse(layout=leaf.layout)
    return leaf[rows]
