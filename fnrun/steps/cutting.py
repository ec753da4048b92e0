"""Slices of a batch of examples, and the option `examples=`."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import optree
import torch

from fnrun.core import tree
from fnrun.core.counts import count
from fnrun.core.examples import (
    REMEDY,
    Part,
    as_columns,
    as_entries,
    attached_count,
    children,
    example_count,
    has_no_length,
    length_of,
    one_each,
    parts,
    shapes,
    with_count,
    zipped,
)
from fnrun.core.words import bindable, kind


class Examples:
    """The option `examples=`, callable with a batch: its number of examples, None where that is unclear.

    The option is a key or path of the batch (`"x"`, `"inputs/ids"`, `"0"`), several of them, a number, or a function `batch -> int`.
    Several are `named`: exactly those parts have an entry for each example.
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
        if (rows := attached_count(batch)[0]) is not None and one_each(part, rows):
            return rows
        if not any(each.kind not in ("list", "numbers") for each in parts(part, as_entries)):
            raise ValueError(f"{self.who}: {path!r} is {kind(part)}, which has no length; the batch has {shapes(batch)}")
        if (rows := example_count(part)) is None:
            raise ValueError(f"{self.who}: what is in {path!r} differs in its length: {shapes(part)}")
        return rows

    def find(self, batch: Any, path: str) -> tuple[tuple[Any, ...], Any]:
        """The path as optree's entries, and the part there."""
        at, found = (), batch
        for entry in tree.split(path):
            fields = getattr(type(found), "_fields", ())
            name = str(fields.index(entry)) if entry in fields else entry
            for key, child in children(found):
                if str(key) == name:
                    at, found = (*at, key), child
                    break
            else:
                raise ValueError(f"{self.who}: the batch has no {path!r}; it has {shapes(batch)}")
        return at, found


def examples_option(who: str, option: Any) -> Callable[[Any], int | None]:
    """`batch -> int | None`, the number of examples by the option `examples=`."""
    return example_count if option is None else Examples(who, option)


class Sliced:
    """A batch of `rows` examples: `[start:end]` slices each part with an entry for each example, and leaves the rest whole.

    - `named`: the option that names what is cut; None finds it by lengths.
    - `known`: `rows` comes from a stream or an option. Then a tuple or list of `rows` entries is one of examples, if the entries' lengths
      differ from `rows`.
    - `before`: by path, whether a list was one of examples in an earlier batch. It is then read in the same way.
    """

    def __init__(self, batch: Any, rows: int, named: Examples | None, known: bool, before: Mapping[str, bool]) -> None:
        self._attached = attached_count(batch)
        columns, known = self._attached[1], known or self._attached[0] is not None
        are_zipped = zipped(batch) == rows
        self.lists: dict[str, bool] = {}  # by path, whether a list of arrays or dictionaries is one of examples

        def taken(part: Part) -> bool:
            if part.kind in ("values", "numbers"):
                return as_columns(part) if columns else part.kind == "values" or (known and one_each(part.value, rows))
            path = tree.join(part.path)
            if path in before:
                each_one = before[path] and len(part.value) == rows
            else:
                each_one = (
                    (known and one_each(part.value, rows))
                    or (are_zipped and len(part.path) == 1)
                    or (part.kind != "structure" and not columns and len(part.value) == rows)
                )
            self.lists[path] = each_one
            return each_one

        found = [*parts(batch, taken)]
        lists = {id(part.value) for part in found if part.kind not in ("array", "list", "numbers")}
        paths, self._leaves, self._spec = optree.tree_flatten_with_path(batch, is_leaf=lambda value: id(value) in lists)
        places = [named.find(batch, path)[0] for path in named.named] if named is not None else None
        leaves = {tree.join(path): leaf for path, leaf in zip(paths, self._leaves, strict=True)}
        self.parts: dict[str, bool] = {}  # by path, whether a part that counts is cut
        self.others: list[str] = []  # arrays and lists of another length
        self.hidden: list[str] = []  # parts of objects, which cannot be cut
        for part in found:
            path, counts = tree.join(part.path), part.kind not in ("list", "numbers")
            fits = counts and length_of(part.value) == rows
            if places is None:
                if length_of(part.value) or fits:
                    self.parts[path] = fits
                if not fits and part.kind not in ("list", "numbers", "values"):
                    self.others.append(path)
            elif counts and any(part.path[: len(place)] == place for place in places):
                if not fits:
                    raise ValueError(f"{named.who}: {path} has no entry for each of the {rows} examples: {shapes(batch)}")  # pyright: ignore[reportOptionalMemberAccess]
                self.parts[path] = True
            if self.parts.get(path) and path not in leaves:
                self.hidden.append(path)
        self.cut = {path: leaf for path, leaf in leaves.items() if self.parts.get(path)}  # by path
        self._cut = [tree.join(path) in self.cut for path in paths]
        self.whole = all(part.kind == "numbers" for part in found) and all(map(has_no_length, self._leaves))  # nothing has a length

    def __getitem__(self, rows: slice) -> Any:
        leaves = [_rows(leaf, rows) if cut else leaf for leaf, cut in zip(self._leaves, self._cut, strict=True)]
        piece = optree.tree_unflatten(self._spec, leaves)
        return piece if self._attached == (None, False) else with_count(piece, rows.stop - rows.start, self._attached[1])


def _rows(leaf: Any, rows: slice) -> Any:
    if isinstance(leaf, torch.Tensor) and leaf.is_nested:
        return torch.nested.as_nested_tensor(list(leaf.unbind())[rows], layout=leaf.layout)
    if isinstance(leaf, torch.Tensor) and leaf.layout is not torch.strided:
        wanted = torch.arange(rows.start, rows.stop, device=leaf.device)
        return leaf.to_sparse_coo().index_select(0, wanted).to_sparse(layout=leaf.layout)
    return leaf[rows]
