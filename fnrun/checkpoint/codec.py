"""A pytree described as structure and leaves, and built from a description again.

A tree is written as its structure (nodes that name their kind) and a table of its leaves. The table has the values of Python's scalars, and
dtype and shape of tensors and arrays, which are stored elsewhere. Building a tree runs no code that a manifest could choose. A node is a
plain container, a class that `fnrun.struct` has registered, or a loaded NamedTuple, and is filled without a call of the class. No modules
are imported for it but those of fnrun.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import re
import sys
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from fnrun.checkpoint.manifest import ARRAY_KINDS, SEQUENCES, CheckpointError, Leaf, Node, constant, dense, encode_constant, text
from fnrun.core import tree
from fnrun.core.words import a

#: Fields of a state that a fresh one cannot know: always rebuilt from the manifest, whatever `like` has there.
FREE = ("position", "memory")

#: The deepest nesting of containers: reading them again takes a few of Python's frames for each.
DEPTH = 410

DICTS: dict[str, Any] = {"dict": dict, "OrderedDict": OrderedDict, "defaultdict": defaultdict}
_FACTORIES: dict[str, Any] = {"": None} | {cls.__name__: cls for cls in (dict, list, set, tuple, int, float, str, bool, bytes)}


# --- a tree described --------------------------------------------------------------------------------------------------


class Description(NamedTuple):
    """A tree as structure and leaves, and its tensors and arrays by the number of their leaf."""

    structure: Node | int
    leaves: list[Leaf]
    sources: dict[int, Any]


def describe(value: Any) -> Description:
    """Structure and leaf table of `value`. Nothing is copied and no device is waited for.

    Raises CheckpointError, with the path, for what could not be restored: functions, modules, subclasses of tensors, sets, ...
    """
    leaves: list[Leaf] = []
    sources: dict[int, Any] = {}
    known: dict[Any, int] = {}

    def walk(value: Any, path: tuple[Any, ...]) -> Node | int:
        if len(path) > DEPTH:
            raise CheckpointError(f"{text(path[:5])}/... goes on for more than {DEPTH} containers in one another: does one hold itself?")
        if (node := container(value, path)) is not None:
            items = [walk(child, (*path, key)) for key, child in node.items]
            return Node(node.kind, items, node.keys, node.static)
        leaf, number = leaf_of(value, path), len(leaves)
        leaves.append(leaf)
        if leaf.stored:
            if leaf.device == "meta":
                raise CheckpointError(f"{leaf.path} is a meta tensor: it has no data to save")
            leaf.shares = known.get(same := identity(value))
            if leaf.shares is None:
                known[same] = number
                sources[number] = value
        return number

    try:
        return Description(walk(value, ()), leaves, sources)
    except RecursionError:
        raise CheckpointError(
            f"the state has too many containers in one another, near {leaves[-1].path if leaves else 'its root'}"
        ) from None


class Container(NamedTuple):
    """A container: its kind, its children by key in its order, and its keys and static fields as the manifest has them."""

    kind: str
    items: list[tuple[Any, Any]]
    keys: list[Any]
    static: list[Any]


def container(value: Any, path: tuple[Any, ...]) -> Container | None:
    """`value` as a container, None for a leaf."""
    cls: Any = type(value)
    if cls in DICTS.values():
        keys = [_constant(key, path, "the key") for key in value]
        static = [_factory(value, path)] if cls is defaultdict else []
        return Container(cls.__name__, list(value.items()), keys, static)
    if cls is deque:
        return Container("deque", list(enumerate(value)), [], [value.maxlen])
    node = tree.node(value)
    if node is None:
        return None
    items = list(zip(node.entries, node.children, strict=True))
    if node.kind in SEQUENCES:
        return Container(node.kind, items, [], [])
    if node.kind.startswith("namedtuple ") and path[:1] and path[0] in FREE and _loaded_namedtuple(node.kind) is not cls:
        raise CheckpointError(f"{text(path)}: {cls.__qualname__} cannot be found again by name: define it at the top level of its module")
    static = [[name, _constant(item, path, f"the static field {name}")] for name, item in node.static]
    return Container(node.kind, items, list(node.entries), static)


def _constant(value: Any, path: tuple[Any, ...], what: str) -> Any:
    try:
        return encode_constant(value)
    except TypeError as error:
        raise CheckpointError(f"{text(path) or 'the state'}: {what} is {error}, not a plain scalar") from None


def _factory(value: defaultdict[Any, Any], path: tuple[Any, ...]) -> str:
    factory = value.default_factory
    name = "" if factory is None else getattr(factory, "__name__", "?")
    if name not in _FACTORIES or _FACTORIES[name] is not factory:
        raise CheckpointError(f"{text(path)}: a defaultdict of {factory!r} cannot be saved; use a plain dict")
    return name


def leaf_of(value: Any, path: tuple[Any, ...]) -> Leaf:
    """The table entry of one leaf, without its pieces."""
    where = text(path)
    if isinstance(value, torch.Tensor):
        if type(value) not in (torch.Tensor, torch.nn.Parameter) or value.layout != torch.strided or value.is_quantized or value.is_nested:
            raise CheckpointError(f"{where}: {_odd_tensor(value)} cannot be saved; make it a plain, dense tensor")
        dtype = _word(value.dtype).removeprefix("torch.")
        return Leaf(where, "tensor", dtype=dtype, shape=tuple(value.shape), strides=_strides(value), device=_word(value.device))
    if type(value) is np.ndarray and value.dtype.kind in ARRAY_KINDS:
        return Leaf(where, "ndarray", dtype=value.dtype.str, shape=value.shape)
    if type(value) not in tree.SCALARS:
        what = f"an array of {value.dtype}" if isinstance(value, np.ndarray) else f"a {type(value).__module__}.{type(value).__qualname__}"
        raise CheckpointError(f"{where or 'the state'} is {what}: a state holds tensors, arrays, plain scalars and plain containers")
    return Leaf(where, type(value).__name__, value=encode_constant(value))


_word = functools.lru_cache(maxsize=256)(str)  # of a dtype, a device: the training waits while a state is described


def _odd_tensor(value: torch.Tensor) -> str:
    if type(value) not in (torch.Tensor, torch.nn.Parameter):
        return f"{a(type(value).__name__)}"
    if value.is_nested:
        return "a nested tensor"
    return "a quantized tensor" if value.is_quantized else f"a {value.layout} tensor"


def _strides(value: torch.Tensor) -> tuple[int, ...] | None:
    """The strides of a dense tensor that is not contiguous (channels last, transposed); None elsewhere.

    They are kept because kernels choose by them, and another kernel rounds differently.
    """
    if value.is_contiguous() and 1 not in value.shape:  # along an axis of one element any stride will do
        return None
    usual, size = [], 1
    for length in reversed(value.shape):
        usual.append(size)
        size *= max(length, 1)
    strides = value.stride()
    if not value.numel() or strides == tuple(reversed(usual)):
        return None
    return strides if dense(value.shape, strides) else None


def identity(value: Any) -> Any:
    """A key that two tensors or arrays share if they are one: the same elements of the same memory, in the same order."""
    if not isinstance(value, torch.Tensor):
        return id(value)
    storage = value.untyped_storage()._cdata
    return storage, value.storage_offset(), value.shape, value.stride(), value.dtype, value.is_conj(), value.is_neg()


# --- a tree built ------------------------------------------------------------------------------------------------------


class Pick(NamedTuple):
    """A leaf to be restored: its number in the table, and device and dtype of the tensor that it replaces, if `like` has one there."""

    number: int
    device: torch.device | None = None
    dtype: torch.dtype | None = None


class Keep(NamedTuple):
    """A value that is taken from `like` as it is."""

    value: Any


class Branch(NamedTuple):
    """A container to be built, with the class that `like` has there.

    `fit` is for a part of an optimizer state in which leaves are known by number: the fresh part, and the saved number of each leaf.
    """

    kind: str
    keys: list[Any]
    static: list[Any]
    children: list[Any]
    cls: type | None
    fit: tuple[Any, list[int | None]] | None = None


def picks(plan: Any) -> Iterator[Pick]:
    """The leaves that a plan needs."""
    if isinstance(plan, Pick):
        yield plan
    elif isinstance(plan, Branch):
        for child in plan.children:
            yield from picks(child)


def build(plan: Any, value: Callable[[Pick], Any], path: tuple[Any, ...] = ()) -> Any:
    """The tree of a plan, with `value` for the leaves that are restored."""
    if isinstance(plan, Pick):
        return value(plan)
    if isinstance(plan, Keep):
        return plan.value
    children = [build(child, value, (*path, key)) for key, child in zip(plan.keys, plan.children, strict=True)]
    if plan.kind == "defaultdict":
        return defaultdict(_FACTORIES[plan.static[0]], zip(plan.keys, children, strict=True))
    if plan.kind in DICTS:
        return DICTS[plan.kind](zip(plan.keys, children, strict=True))
    if plan.kind == "deque":
        return deque(children, plan.static[0])
    if plan.kind in SEQUENCES:
        return children if plan.kind == "list" else tuple(children)
    built = _instance(plan, children, path)
    return built if plan.fit is None else built.fitted(*plan.fit)


def _instance(plan: Branch, children: list[Any], path: tuple[Any, ...]) -> Any:
    family, _, name = plan.kind.partition(" ")
    cls: Any = plan.cls or (_struct(name) if family == "struct" else _loaded_namedtuple(plan.kind))
    if cls is None or family not in ("struct", "namedtuple"):
        raise CheckpointError(
            f"{text(path) or 'the state'}: {plan.kind} is not loaded: import the module that defines it before restoring. (Where it has "
            "another name now: restore(like=a fresh state), or @struct(formerly=[...]) where it is declared; read() gives the leaves "
            "without any class)"
        )
    values = dict(zip(plan.keys, children, strict=True)) | {
        key: constant(item) for key, item in (plan.static if family == "struct" else [])
    }
    fields = cls._fields if family == "namedtuple" else tuple(field.name for field in dataclasses.fields(cls))
    if set(values) != set(fields):
        raise CheckpointError(
            f"{text(path) or 'the state'}: {name} was saved with the fields {sorted(values)} and now has {sorted(fields)}"
        )
    if family == "namedtuple":
        return tuple.__new__(cls, [values[field] for field in fields])
    node = object.__new__(cls)
    for key, item in values.items():
        object.__setattr__(node, key, item)
    return node


def _struct(name: str) -> type | None:
    """The struct of that name, if it is declared. One of ours is imported: its name is a public module and the class."""
    module, _, class_name = name.rpartition(".")
    if (found := tree.struct_class(name)) is None and re.fullmatch(r"fnrun(\.[a-z]\w*)*", module):
        with contextlib.suppress(ImportError):
            getattr(importlib.import_module(module), class_name, None)
        found = tree.struct_class(name)
    return found


def named_today(structure: Node | int) -> Node | int:
    """The structure with its structs under their names of today, where their classes say other ones (`formerly=`). In place."""
    if isinstance(structure, Node):
        family, _, name = structure.kind.partition(" ")
        cls = tree.struct_class(name) if family == "struct" else None
        if cls is not None:
            structure.kind = f"struct {tree.struct_name(cls)}"
        for child in structure.children:
            named_today(child)
    return structure


def _loaded_namedtuple(kind: str) -> type | None:
    """The NamedTuple of that kind in a module that is loaded already. Nothing is imported, and no module's `__getattr__` asked."""
    module, _, qualname = kind.partition(" ")[2].partition(":")
    found: Any = sys.modules.get("__main__" if tree.module_name("__main__") == module else module)
    for name in qualname.split("."):
        found = vars(found).get(name) if hasattr(found, "__dict__") else None
    return found if isinstance(found, type) and issubclass(found, tuple) and hasattr(found, "_fields") else None
