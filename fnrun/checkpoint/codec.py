"""What a checkpoint's manifest says, and how a pytree becomes one and is built from one again.

A tree is written as its structure (nodes that name their kind) and a table of its leaves. Python's scalars stand in the table, tensors
and arrays are told apart there and stored elsewhere. Building a tree runs no code that the manifest could choose: a node is a plain
container, a class that `fnrun.struct` has registered, or a NamedTuple that is already loaded, and is filled without calling it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import importlib
import math
import re
import struct as binary
import sys
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch

from fnrun import tree

#: The version of the format. A reader refuses a version that it does not know.
FORMAT = 1

#: Fields of a state that a fresh one cannot know: always rebuilt from the manifest, whatever `like` holds there.
FREE = ("position", "memory")
#: Fields of a state that must match `like` exactly. Elsewhere an empty container or None in `like` takes whatever was saved.
EXACT = ("params", "buffers", "opt_state")

TORCH_DTYPES = {str(d).removeprefix("torch."): d for d in vars(torch).values() if isinstance(d, torch.dtype)}
_FACTORIES: dict[str, Any] = {"": None} | {cls.__name__: cls for cls in (dict, list, set, tuple, int, float, str, bool, bytes)}
_DICTS: dict[str, type] = {"dict": dict, "OrderedDict": OrderedDict, "defaultdict": defaultdict}
_SEQUENCES: dict[str, Callable[[Any], Any]] = {"list": list, "tuple": tuple, "deque": deque}


class CheckpointError(Exception):
    """A checkpoint that could not be saved or restored: what was wrong, where, and what to do."""


class DamagedError(CheckpointError):
    """What is on disk is not what was saved. The checkpoint before it may be whole."""


# --- the manifest ------------------------------------------------------------------------------------------------------


class Leaf(msgspec.Struct, omit_defaults=True):
    """One leaf. Where its bytes are: in orbax's array number `array`, whole or, in a pack of small leaves, from byte `offset` on."""

    path: str
    kind: str
    value: Any = None
    dtype: str = ""
    shape: tuple[int, ...] = ()
    strides: tuple[int, ...] | None = None
    device: str = ""
    sha256: str = ""
    array: int | None = None
    offset: int | None = None
    shares: int | None = None

    @property
    def stored(self) -> bool:
        """Whether it is a tensor or an array: with a digest, and bytes outside of the manifest."""
        return self.kind in ("tensor", "ndarray")

    @property
    def nbytes(self) -> int:
        """How many bytes are stored of it."""
        return math.prod(self.shape) * (TORCH_DTYPES[self.dtype].itemsize if self.kind == "tensor" else np.dtype(self.dtype).itemsize)

    def origin(self, number: int) -> int:
        """The leaf that holds the bytes of this one, which is the leaf of that number: itself, or the first of several that are one tensor."""
        return number if self.shares is None else self.shares

    def spec(self) -> str:
        """What a leaf of the same kind must have in common with it, in words."""
        return f"{self.kind} {self.dtype} {tuple(self.shape)}" if self.stored else self.kind


class Node(msgspec.Struct, omit_defaults=True):
    """One container: its kind, the keys of its children (those of a sequence go without saying) and the children, leaves by number."""

    kind: str
    children: list[Node | int]
    keys: list[Any] = []
    static: list[Any] = []

    def items(self) -> list[tuple[Any, Node | int]]:
        """The children by key; keys are those of the container itself."""
        keys = range(len(self.children)) if self.kind in _SEQUENCES else [constant(key) for key in self.keys]
        return list(zip(keys, self.children, strict=True))


class File(msgspec.Struct):
    """One file of a checkpoint."""

    size: int
    sha256: str


class Manifest(msgspec.Struct, kw_only=True):
    """Everything about a checkpoint except the bytes of its arrays."""

    format: int = FORMAT
    step: int
    ticks: int
    created: str
    metrics: dict[str, float | str] = {}
    monitor: str | None = None
    mode: str = "min"
    config: Any = None
    environment: dict[str, str] = {}
    structure: Node | int
    leaves: list[Leaf]
    files: dict[str, File] = {}

    def value(self) -> float | None:
        """The monitored metric as a number to be minimized; None if there is none, or if it is NaN."""
        value = float(self.metrics.get(self.monitor or "", "nan"))
        return None if math.isnan(value) else (-value if self.mode == "max" else value)

    def check(self) -> None:
        """Raise ValueError unless the structure names each leaf once, in order, and each leaf says where its bytes are."""
        if list(_numbers(self.structure)) != list(range(len(self.leaves))):
            raise ValueError("the structure does not name each leaf once")
        for number, leaf in enumerate(self.leaves):
            if leaf.shares is not None:
                if not 0 <= leaf.shares < number or self.leaves[leaf.shares].spec() != leaf.spec():
                    raise ValueError(f"{leaf.path} shares leaf {leaf.shares}")
            elif leaf.stored and (leaf.array is None) != (leaf.nbytes == 0):
                raise ValueError(f"{leaf.path} has no place")
            elif leaf.stored and (len(leaf.sha256) != 64 or min((*leaf.shape, leaf.array or 0, leaf.offset or 0)) < 0):
                raise ValueError(f"{leaf.path} is badly described")


def _numbers(structure: Node | int) -> Iterator[int]:
    if isinstance(structure, int):
        yield structure
    else:
        for child in structure.children:
            yield from _numbers(child)


# --- constants ---------------------------------------------------------------------------------------------------------


def encode_constant(value: Any) -> Any:
    """A scalar or a tuple of scalars as JSON that comes back with its type and its bits.

    >>> encode_constant((1, "a", -0.0, float("inf"), 2**70, b"a"))
    {'tuple': [1, 'a', -0.0, {'float': '7ff0000000000000'}, {'int': '0x400000000000000000'}, {'bytes': '61'}]}
    """
    cls = type(value)
    if value is None or cls is bool:
        return value
    if cls is int:
        return value if -(2**63) <= value < 2**63 else {"int": hex(value)}
    if cls is float:
        return value if math.isfinite(value) else {"float": binary.pack(">d", value).hex()}
    if cls is str:
        return value if _utf8(value) == value else {"str": value.encode("utf-8", "surrogatepass").hex()}
    if cls is bytes:
        return {"bytes": value.hex()}
    if cls is complex:
        return {"complex": [encode_constant(value.real), encode_constant(value.imag)]}
    if cls is tuple:
        return {"tuple": [encode_constant(item) for item in value]}
    raise TypeError(f"a {cls.__name__}")


def constant(value: Any) -> Any:
    """What `encode_constant` made `value` of."""
    if not isinstance(value, dict):
        return value
    ((kind, data),) = value.items()
    if kind == "int":
        return int(data, 16)
    if kind == "float":
        return binary.unpack(">d", bytes.fromhex(data))[0]
    if kind == "str":
        return bytes.fromhex(data).decode("utf-8", "surrogatepass")
    if kind == "bytes":
        return bytes.fromhex(data)
    if kind == "complex":
        return complex(*(constant(part) for part in data))
    if kind == "tuple":
        return tuple(constant(item) for item in data)
    raise ValueError(f"unknown constant {kind!r}")


def encode_config(value: Any) -> Any:
    """A config as JSON: what msgspec makes of it, and floats that JSON does not have (it would write null)."""
    value = msgspec.to_builtins(value)
    if isinstance(value, dict):
        return {key: encode_config(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode_config(item) for item in value]
    return encode_constant(value) if isinstance(value, float) else value


def config(value: Any) -> Any:
    """What `encode_config` made `value` of, in plain containers."""
    if isinstance(value, list):
        return [config(item) for item in value]
    if isinstance(value, dict):
        return constant(value) if set(value) == {"float"} and isinstance(value["float"], str) else {k: config(v) for k, v in value.items()}
    return value


def _utf8(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def text(path: tuple[Any, ...]) -> str:
    """A path in words."""
    return _utf8(tree.join(path))


# --- a tree described --------------------------------------------------------------------------------------------------


class Description(NamedTuple):
    """A tree as structure and leaves, and what is to be stored of it: tensors and arrays by the number of their leaf."""

    structure: Node | int
    leaves: list[Leaf]
    sources: dict[int, Any]


def describe(value: Any) -> Description:
    """Structure and leaf table of `value`; nothing is copied and no device is waited for.

    Raises CheckpointError, with the path, for what could not be restored: functions, modules, subclasses of tensors, sets, ...
    """
    leaves: list[Leaf] = []
    sources: dict[int, Any] = {}
    known: dict[Any, int] = {}

    def walk(value: Any, path: tuple[Any, ...]) -> Node | int:
        if (node := _node(value, path)) is not None:
            items = [walk(child, (*path, key)) for key, child in node.items]
            return Node(node.kind, items, node.keys, node.static)
        leaf, number = leaf_of(value, path), len(leaves)
        leaves.append(leaf)
        if leaf.stored:
            if leaf.device == "meta":
                raise CheckpointError(f"{leaf.path} is a meta tensor: it has no data to save")
            leaf.shares = known.get(identity := _identity(value))
            if leaf.shares is None:
                known[identity] = number
                sources[number] = value
        return number

    return Description(walk(value, ()), leaves, sources)


class _Described(NamedTuple):
    kind: str
    items: list[tuple[Any, Any]]
    keys: list[Any]
    static: list[Any]


def _node(value: Any, path: tuple[Any, ...]) -> _Described | None:
    """`value` as a container with its children in their own order; None for a leaf."""
    cls: Any = type(value)
    if cls in _DICTS.values():
        keys = [_constant(key, path, "the key") for key in value]
        static = [_factory(value, path)] if cls is defaultdict else []
        return _Described(cls.__name__, list(value.items()), keys, static)
    if cls is deque:
        return _Described("deque", list(enumerate(value)), [], [value.maxlen])
    node = tree.node(value)
    if node is None:
        return None
    items = list(zip(node.entries, node.children, strict=True))
    if node.kind in _SEQUENCES:
        return _Described(node.kind, items, [], [])
    if node.kind.startswith("namedtuple ") and path[:1] and path[0] in FREE and _loaded_namedtuple(node.kind) is not cls:
        raise CheckpointError(f"{text(path)}: {cls.__qualname__} cannot be found again by name: define it at the top level of its module")
    static = [[name, _constant(item, path, f"the static field {name}")] for name, item in node.static]
    return _Described(node.kind, items, list(node.entries), static)


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
    """The entry of one leaf, as yet without digest and place."""
    where = text(path)
    if isinstance(value, torch.Tensor):
        if type(value) not in (torch.Tensor, torch.nn.Parameter) or value.layout != torch.strided or value.is_quantized:
            raise CheckpointError(f"{where}: {_odd_tensor(value)} cannot be saved; make it a plain, dense tensor")
        dtype = str(value.dtype).removeprefix("torch.")
        return Leaf(where, "tensor", dtype=dtype, shape=tuple(value.shape), strides=_strides(value), device=str(value.device))
    if type(value) is np.ndarray and value.dtype.kind in "biufcSUmM":
        return Leaf(where, "ndarray", dtype=value.dtype.str, shape=value.shape)
    if type(value) not in tree.SCALARS:
        what = f"an array of {value.dtype}" if isinstance(value, np.ndarray) else f"a {type(value).__module__}.{type(value).__qualname__}"
        raise CheckpointError(f"{where or 'the state'} is {what}: a state holds tensors, arrays, plain scalars and plain containers")
    return Leaf(where, type(value).__name__, value=encode_constant(value))


def _odd_tensor(value: torch.Tensor) -> str:
    if type(value) not in (torch.Tensor, torch.nn.Parameter):
        return f"a {type(value).__name__}"
    return "a quantized tensor" if value.is_quantized else f"a {value.layout} tensor"


def _strides(value: torch.Tensor) -> tuple[int, ...] | None:
    """The strides of a tensor that fills its memory in another order than the usual one (channels last, transposed); None elsewhere.

    They are kept because kernels choose by them, and another kernel rounds differently.
    """
    usual, size = [], 1
    for length in reversed(value.shape):
        usual.append(size)
        size *= max(length, 1)
    strides = value.stride()
    if not value.numel() or strides == tuple(reversed(usual)):
        return None
    size = 1
    for stride, length in sorted((stride, length) for stride, length in zip(strides, value.shape, strict=True) if length > 1):
        if stride != size:
            return None
        size *= length
    return strides


def _identity(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return id(value)
    storage = value.untyped_storage()._cdata
    return storage, value.storage_offset(), value.shape, value.stride(), value.dtype, value.is_conj(), value.is_neg()


# --- a description matched with a fresh state --------------------------------------------------------------------------


class Pick(NamedTuple):
    """A leaf to be restored: its number in the table, and the device of the tensor that it stands for, if it stands for one."""

    number: int
    device: torch.device | None


class Keep(NamedTuple):
    """A value that is taken from `like` as it is."""

    value: Any


class Branch(NamedTuple):
    """A container to be built, with the class that `like` has there."""

    kind: str
    keys: list[Any]
    static: list[Any]
    children: list[Any]
    cls: type | None


class _Absent:
    pass


ABSENT = _Absent()


def selector(patterns: Sequence[str] | None, known: Sequence[str]) -> Callable[[str], bool]:
    """Whether a path is among `patterns`: `*` stands for anything within one entry, `**` for any number of entries.

    Raises CheckpointError for a pattern that matches none of the `known` paths.

    >>> wanted = selector(["params/**"], ["params", "params/0.weight"])
    >>> wanted("params/0.weight"), wanted("buffers/0.mean")
    (True, False)
    """
    if patterns is None:
        return lambda path: True
    globs = [pattern.split("/") for pattern in patterns]
    for glob in globs:
        if not any(_matches(glob, path.split("/")) for path in known):
            near = difflib.get_close_matches("/".join(glob).rstrip("*/"), known, cutoff=0.5)
            hint = f"near: {', '.join(near)}" if near else f"saved: {', '.join(path for path in known if path and '/' not in path)}"
            raise CheckpointError(f"select: nothing that was saved matches {'/'.join(glob)!r}; {hint}")
    return functools.cache(lambda path: any(_matches(glob, path.split("/")) for glob in globs))


def _matches(glob: list[str], entries: list[str]) -> bool:
    if not glob:
        return not entries
    if glob[0] == "**":
        return any(_matches(glob[1:], entries[n:]) for n in range(len(entries) + 1))
    return bool(entries) and _entry(glob[0]).fullmatch(entries[0]) is not None and _matches(glob[1:], entries[1:])


@functools.lru_cache
def _entry(glob: str) -> re.Pattern[str]:
    parts = ["[^/]*" if char == "*" else "[^/]" if char == "?" else re.escape(char) for char in glob]
    return re.compile("".join(parts), re.DOTALL)


def _paths(structure: Node | int, path: tuple[Any, ...] = ()) -> Iterator[str]:
    """The paths of all containers and leaves."""
    yield text(path)
    if isinstance(structure, Node):
        for key, child in structure.items():
            yield from _paths(child, (*path, key))


class Mismatch(NamedTuple):
    """One line of the table: a leaf or container, what was saved there and what `like` has there."""

    path: str
    saved: str
    expected: str


class Matcher:
    """What to restore, given what was saved, what a fresh state looks like (or ABSENT) and which leaves are wanted."""

    def __init__(self, manifest: Manifest, patterns: Sequence[str] | None) -> None:
        self.leaves = manifest.leaves
        self.all = patterns is None
        self.wanted = selector(patterns, [] if patterns is None else list(_paths(manifest.structure)))
        self.wrong: list[Mismatch] = []

    def match(self, saved: Any, like: Any, path: tuple[Any, ...] = ()) -> Any:
        """A tree of Branch, Pick and Keep; what does not match is added to `wrong`."""
        if saved is ABSENT:
            self._only_in(like, path)
            return Keep(like)
        if not self.all and not self._any(saved, path) and (like is ABSENT or not self._any_of(like, path)):
            return Keep(None if like is ABSENT else like)
        free = path[:1] != () and path[0] in FREE
        if like is not ABSENT and self._rebuilt(saved, like, path, free):
            like = ABSENT
        node = None if like is ABSENT else _node(like, path)
        if isinstance(saved, int):
            return self._leaf(saved, like, node, path, free)
        if like is not ABSENT and (node is None or node.kind != saved.kind):
            self.wrong.append(Mismatch(text(path), self._words(saved), _words(like)))
            return Keep(like)
        if node is not None and not free and msgspec.json.encode(node.static) != msgspec.json.encode(saved.static):
            self.wrong.append(Mismatch(text(path), _statics(saved.static), _statics(node.static)))
        return self._branch(saved, node, path, free, None if like is ABSENT else type(like))

    def _rebuilt(self, saved: Any, like: Any, path: tuple[Any, ...], free: bool) -> bool:
        """Whether this place is the manifest's alone: by its field, or because `like` is empty there."""
        node = _node(like, path)
        kind = node.kind if node else leaf_of(like, path).kind
        same = kind == (self.leaves[saved].kind if isinstance(saved, int) else saved.kind)
        empty = like is None or (node is not None and not node.items)
        return (free or (empty and path[:1] != () and path[0] not in EXACT)) and not same

    def _leaf(self, number: int, like: Any, node: _Described | None, path: tuple[Any, ...], free: bool) -> Any:
        saved = self.leaves[number]
        if like is ABSENT:
            return Pick(number, None)
        if node is not None or (not free and leaf_of(like, path).spec() != saved.spec()):
            self.wrong.append(Mismatch(saved.path, saved.spec(), _words(like)))
            return Keep(like)
        if not self.wanted(saved.path):
            return Keep(like)
        return Pick(number, like.device if isinstance(like, torch.Tensor) else None)

    def _branch(self, saved: Node, node: _Described | None, path: tuple[Any, ...], free: bool, cls: type | None) -> Branch:
        ours = {_typed(key): child for key, child in saved.items()}
        theirs = {_typed(key): child for key, child in node.items} if node else {}
        rebuilt = node is None or free or (not node.items and path[:1] != () and path[0] not in EXACT)
        children, keys = [], []
        for typed, child in ours.items():
            if typed not in theirs and not rebuilt:
                self._only_saved(child, (*path, typed[1]))
                continue
            keys.append(typed[1])
            children.append(self.match(child, theirs.get(typed, ABSENT), (*path, typed[1])))
        for typed, child in theirs.items():
            if typed not in ours and not (free and (self.all or saved.kind not in _DICTS)):
                keys.append(typed[1])
                children.append(self.match(ABSENT, child, (*path, typed[1])))
        return Branch(saved.kind, keys, saved.static, children, cls)

    def _any(self, saved: Any, path: tuple[Any, ...]) -> bool:
        return self.wanted(text(path)) or (isinstance(saved, Node) and any(self._any(child, (*path, key)) for key, child in saved.items()))

    def _any_of(self, like: Any, path: tuple[Any, ...]) -> bool:
        node = _node(like, path)
        return self.wanted(text(path)) or (node is not None and any(self._any_of(child, (*path, key)) for key, child in node.items))

    def _only_in(self, like: Any, path: tuple[Any, ...]) -> None:
        node = _node(like, path)
        if (node is None or not node.items) and self.wanted(text(path)):
            self.wrong.append(Mismatch(text(path), "(missing)", _words(like)))
        for key, child in node.items if node else ():
            self._only_in(child, (*path, key))

    def _only_saved(self, saved: Any, path: tuple[Any, ...]) -> None:
        if isinstance(saved, int) or not saved.children:
            if self.wanted(text(path)):
                self.wrong.append(Mismatch(text(path), self._words(saved), "(unexpected)"))
            return
        for key, child in saved.items():
            self._only_saved(child, (*path, key))

    def _words(self, saved: Any) -> str:
        return self.leaves[saved].spec() if isinstance(saved, int) else f"{saved.kind} of {len(saved.children)}"

    def table(self, rows: int = 30) -> str:
        """What does not match, a line each, with near names for what is missing."""
        unexpected = [row.path for row in self.wrong if row.expected == "(unexpected)"]
        lines = [Mismatch("leaf", "saved", "expected"), *(row._replace(path=row.path or "(root)") for row in self.wrong[:rows])]
        widths = [max(len(line[column]) for line in lines) for column in range(3)]
        shown = []
        for line in lines:
            near = difflib.get_close_matches(line.path, unexpected, n=1) if line.saved == "(missing)" else []
            hint = f"  (saved under a near name: {near[0]})" if near else ""
            shown.append("  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() + hint)
        if len(self.wrong) > rows:
            shown.append(f"  ... and {len(self.wrong) - rows} more")
        return "\n".join(shown)


def _words(like: Any) -> str:
    node = _node(like, ())
    return leaf_of(like, ()).spec() if node is None else f"{node.kind} of {len(node.items)}"


def _statics(static: list[Any]) -> str:
    return "static " + ", ".join(f"{name}={constant(value)!r}" for name, value in static) if static else "no static fields"


def _typed(key: Any) -> tuple[str, Any]:
    return type(key).__name__, key


# --- a tree built ------------------------------------------------------------------------------------------------------


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
    if plan.kind in _DICTS:
        return _DICTS[plan.kind](zip(plan.keys, children, strict=True))
    if plan.kind == "deque":
        return deque(children, plan.static[0])
    if plan.kind in _SEQUENCES:
        return _SEQUENCES[plan.kind](children)
    return _instance(plan, children, path)


def _instance(plan: Branch, children: list[Any], path: tuple[Any, ...]) -> Any:
    family, _, name = plan.kind.partition(" ")
    if plan.cls is None and name.startswith("fnrun."):  # our own classes need not have been imported by whoever looks into a checkpoint
        with contextlib.suppress(ImportError):
            importlib.import_module(name.partition(":")[0])
    cls: Any = plan.cls or (tree.struct_class(name) if family == "struct" else _loaded_namedtuple(plan.kind))
    if cls is None or family not in ("struct", "namedtuple"):
        raise CheckpointError(f"{text(path) or 'the state'}: {plan.kind} is not loaded: import the module that defines it before restoring")
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


def _loaded_namedtuple(kind: str) -> type | None:
    """The NamedTuple of that kind in a module that is loaded already. Nothing is imported, and no module's `__getattr__` asked."""
    module, _, qualname = kind.partition(" ")[2].partition(":")
    main = sys.modules.get("__main__")
    spec = getattr(main, "__spec__", None)
    found: Any = main if spec is not None and spec.name.removesuffix(".__main__") == module else sys.modules.get(module)
    for name in qualname.split("."):
        found = vars(found).get(name) if hasattr(found, "__dict__") else None
    return found if isinstance(found, type) and issubclass(found, tuple) and hasattr(found, "_fields") else None


def scalars(metrics: Mapping[str, Any]) -> dict[str, float | str]:
    """The metrics that are one number, as JSON can hold them."""
    found: dict[str, float | str] = {}
    for name, value in metrics.items():
        if isinstance(value, (torch.Tensor, np.ndarray)) and math.prod(value.shape) == 1:
            value = value.item()
        if isinstance(value, (bool, int, float, np.number)):
            number = float(value)
            found[_utf8(name)] = number if math.isfinite(number) else str(number)
    return found
