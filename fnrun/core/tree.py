"""Pytrees: what a state is made of, how two of them compare, and what identifies one.

The mechanics are optree's. What is added here is `struct`, which makes one class a node for optree and for torch alike,
and equality, differences and fingerprints that look at bits: `0.0` is not `-0.0`, a NaN equals itself, `1` is not `True`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import operator
import sys
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, dataclass_transform, overload

import numpy as np
import optree
import optree.dataclasses
import torch
from optree.registry import __GLOBAL_NAMESPACE as EVERYWHERE  # pyright: ignore[reportPrivateUsage]
from torch.utils import _pytree as torch_pytree

from fnrun.core.words import a

T = TypeVar("T")

#: Types of leaves besides tensors and arrays. Matched exactly: a subclass (an `IntEnum`, a `np.float64`) would not come back as it was.
SCALARS = (type(None), bool, int, float, complex, str, bytes)

_structs: dict[str, type] = {}
_names: dict[type, str] = {}
_former: dict[str, type] = {}


def static(**options: Any) -> Any:
    """A `struct` field that is part of the structure and not a leaf: hashable, never touched by `map`, never stored as an array."""
    return optree.dataclasses.field(pytree_node=False, **options)


@overload
def struct(cls: type[T], /) -> type[T]: ...
@overload
def struct(*, eq: bool = False, name: str | None = None, formerly: Sequence[str] = ()) -> Callable[[type[T]], type[T]]: ...
@dataclass_transform(frozen_default=True, eq_default=False, field_specifiers=(dataclasses.field, static))
def struct(cls: Any = None, /, *, eq: bool = False, name: str | None = None, formerly: Sequence[str] = ()) -> Any:
    """Make `cls` a frozen, slotted dataclass that is a pytree node for optree and for torch.func alike.

    Fields are children, except those made with `static()`. A subclass of a struct is a struct only under its own `@struct`.
    Equality is identity unless `eq=True` (tensors have no single truth value): compare with `tree.equal`.

    - `name`: what checkpoints call it, by default `module:qualname`. With a name of its own it can move to another module.
    - `formerly`: the names under which earlier checkpoints hold it. A struct that has been given a `name` is found under its default too.

    Raises ValueError where another struct has the name, or had it formerly. The same class declared again replaces the one before.

    >>> @struct
    ... class Point:
    ...     x: torch.Tensor
    ...     y: torch.Tensor
    ...     unit: str = static(default="m")
    >>> map(lambda t: t * 2, Point(torch.tensor(1.0), torch.tensor(2.0)))
    Point(x=tensor(2.), y=tensor(4.), unit='m')
    """
    if cls is None:
        return lambda cls: struct(cls, eq=eq, name=name, formerly=formerly)  # pyright: ignore[reportCallIssue]
    texts = (*formerly, *([] if name is None else [name]))
    if isinstance(formerly, str) or not all(isinstance(each, str) and each for each in texts):
        raise TypeError(f"struct {cls.__qualname__}: name= is a text and formerly= a list of texts, and not {name!r} and {formerly!r}")
    _check_names(cls, name, formerly)
    cls = dataclasses.dataclass(frozen=True, slots=True, weakref_slot=True, eq=eq, repr=cls.__repr__ is object.__repr__)(cls)
    cls.__setattr__, cls.__delattr__ = _refusing(cls), _refusing(cls)
    names = tuple(f.name for f in dataclasses.fields(cls) if f.metadata.get("pytree_node", True))
    statics = tuple(f.name for f in dataclasses.fields(cls) if f.name not in names)

    get, get_static = _getter(names), _getter(statics)

    def flatten(node: Any) -> tuple[Any, Any, tuple[str, ...]]:
        return get(node), get_static(node), names

    def unflatten(context: Any, children: Any) -> Any:
        # Past `__init__`: what stands in a field while a tree is mapped (a mask, an axis, a spec) need not be a valid value.
        node = cls.__new__(cls)
        for name, value in (*zip(names, children, strict=True), *zip(statics, context, strict=True)):
            object.__setattr__(node, name, value)
        return node

    def flatten_for_torch(node: Any) -> Any:  # in what its compiler can follow
        return [getattr(node, name) for name in names], tuple(getattr(node, name) for name in statics)

    def flatten_with_keys(node: Any) -> Any:
        return [(torch_pytree.GetAttrKey(name), getattr(node, name)) for name in names], flatten_for_torch(node)[1]

    optree.register_pytree_node(cls, flatten, unflatten, path_entry_type=optree.DataclassEntry, namespace=EVERYWHERE)
    torch_pytree.register_pytree_node(
        cls,
        flatten_for_torch,
        lambda children, context: unflatten(context, children),
        flatten_with_keys_fn=flatten_with_keys,
    )
    if name is not None and name != class_name(cls):
        _structs.pop(class_name(cls), None)  # declared again, now with a name
    _names[cls] = name or class_name(cls)
    _structs[_names[cls]] = cls
    for each in (*formerly, class_name(cls)):
        _former[each] = cls
    return cls


def _check_names(cls: type, name: str | None, formerly: Sequence[str]) -> None:
    """Raise ValueError where another struct has a name of this one. One of the same module and qualname is the same, declared again."""
    own = name or class_name(cls)
    for each, other, how in [
        (own, _structs.get(own), "is the name of"),
        (own, _former.get(own), "is a name of"),
        *((each, _former.get(each), "was formerly the name of") for each in formerly),
    ]:
        if other is not None and class_name(other) != class_name(cls):
            raise ValueError(
                f"struct {class_name(cls)}: {each!r} {how} {class_name(other)}, and a checkpoint could mean either: rename one"
            )


def _refusing(cls: Any) -> Callable[..., None]:
    """What sets or deletes a field of a struct: it says how one gets another value instead. A subclass that is no struct keeps its own."""
    fields = tuple(field.name for field in dataclasses.fields(cls))

    def refuse(self: Any, name: str, *value: Any) -> None:
        if type(self) is not cls and name not in fields:
            object.__setattr__(self, name, *value) if value else object.__delattr__(self, name)
            return
        if name in fields:
            change = f"{name}={value[0]!r}" if value and type(value[0]) in (bool, int, float) else f"{name}=..."
            hint = f"make another one, {f'state.replace({change})' if hasattr(cls, 'replace') else f'dataclasses.replace(it, {change})'}"
        else:
            hint = f"it has the fields {', '.join(fields)}, and a subclass under @fnrun.struct adds some"
        raise dataclasses.FrozenInstanceError(f"{name!r} cannot be changed, for {a(cls.__name__)} is immutable: {hint}")

    return refuse


def _getter(names: tuple[str, ...]) -> Callable[[Any], tuple[Any, ...]]:
    """What gets these attributes of a node as a tuple; at each step states are flattened, so in one call where there are several."""
    if len(names) > 1:
        return operator.attrgetter(*names)
    return lambda node: tuple(getattr(node, name) for name in names)


def module_name(module: str) -> str:
    """The name by which others import `module`; it differs only for the one that runs as `__main__`."""
    if module != "__main__":
        return module
    main = sys.modules["__main__"]
    if spec := getattr(main, "__spec__", None):
        return spec.name.removesuffix(".__main__")
    try:
        parts = Path(main.__file__ or "").resolve().relative_to(Path.cwd()).with_suffix("").parts
    except (AttributeError, ValueError):
        return module
    return ".".join(parts) if parts and all(part.isidentifier() for part in parts) else module


def class_name(cls: type) -> str:
    """`module:qualname`, with the real name of a module that runs as `__main__`: the same in the run and in what imports it later."""
    return f"{module_name(cls.__module__)}:{cls.__qualname__}"


def struct_class(name: str) -> type | None:
    """The struct of that name, or which was formerly called so; None where none is declared."""
    return _structs.get(name) or _former.get(name)


def struct_name(cls: type) -> str | None:
    """The name of a struct, `name=` or `module:qualname`; None for a class that is none."""
    return _names.get(cls)


# --- leaves and paths --------------------------------------------------------------------------------------------------


def map(fn: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """`fn` over the leaves of `tree` (and the matching leaves of `rest`); None is structure, not a leaf."""
    return optree.tree_map(fn, tree, *rest)


def leaves(tree: Any) -> list[Any]:
    """The leaves in canonical order: dictionaries by sorted key, structs by field."""
    return optree.tree_leaves(tree)


def paths(tree: Any) -> list[str]:
    """The path of each leaf, in the order of `leaves`.

    >>> paths({"params": {"0.weight": 1}, "opt_state": (2, 3)})
    ['opt_state/0', 'opt_state/1', 'params/0.weight']
    """
    return [join(path) for path in optree.tree_paths(tree)]


def join(path: tuple[Any, ...]) -> str:
    """A path as text: entries between slashes; `~` and `/` within an entry are `~0` and `~1`, as in a JSON pointer (RFC 6901)."""
    entries = (entry if isinstance(entry, str) else words(entry) for entry in path)
    return "/".join(entry.replace("~", "~0").replace("/", "~1") for entry in entries)


def words(value: Any) -> str:
    """`repr` of a scalar or a tuple of scalars. An integer too long for Python to write in decimals (4,300 digits) is in hexadecimals.

    >>> words((1, "a")), words(-(2**20_000))[:8]
    ("(1, 'a')", '-0x10000')
    """
    try:
        return repr(value)
    except ValueError:
        if isinstance(value, int):
            return hex(value)
        items = [words(item) for item in value]
        return f"({items[0]},)" if len(items) == 1 else f"({', '.join(items)})"


def split(path: str) -> tuple[str, ...]:
    """The entries of which `join` made a path, as text.

    >>> split(join(("params", "a/b~c")))
    ('params', 'a/b~c')
    """
    return tuple(entry.replace("~1", "/").replace("~0", "~") for entry in path.split("/"))


def snapshot(tree: Any) -> Any:
    """An independent copy: every tensor and array is copied, so that nothing done in place elsewhere reaches it."""

    def copy(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            return leaf.detach().clone()
        return leaf.copy() if isinstance(leaf, np.ndarray) else leaf

    return optree.tree_map(copy, tree)


_CONTAINERS = dict, list, tuple


class Node(NamedTuple):
    """One level of a tree: what kind of node it is, and its children with their entries, in canonical order."""

    kind: str
    entries: tuple[Any, ...]
    children: tuple[Any, ...]
    static: tuple[Any, ...] = ()


def node(value: Any) -> Node | None:
    """`value` as a container with its exact kind (a tuple is not a list, a NamedTuple not a tuple), or None for a leaf.

    One that only knows more than a plain container says so by `_fnrun_like`, as a batch that a stream speaks for.
    """
    cls: Any = type(value)
    cls = getattr(cls, "_fnrun_like", cls) if issubclass(cls, _CONTAINERS) and cls not in _CONTAINERS else cls
    if cls in SCALARS or isinstance(value, (torch.Tensor, np.ndarray)):
        return None
    if cls in (dict, OrderedDict, defaultdict):
        keys = sorted(value, key=lambda key: (type(key).__name__, key))
        return Node(cls.__name__, tuple(keys), tuple(value[key] for key in keys))
    if cls in (list, tuple, deque):
        return Node(cls.__name__, tuple(range(len(value))), tuple(value))
    if isinstance(value, tuple) and hasattr(cls, "_fields"):
        return Node(f"namedtuple {class_name(cls)}", cls._fields, tuple(value))
    if (name := _names.get(cls)) is not None:
        fields = dataclasses.fields(cls)
        names = tuple(f.name for f in fields if f.metadata.get("pytree_node", True))
        constant = tuple((f.name, getattr(value, f.name)) for f in fields if f.name not in names)
        return Node(f"struct {name}", names, tuple(getattr(value, n) for n in names), constant)
    return None


# --- bits --------------------------------------------------------------------------------------------------------------


def array(value: torch.Tensor | np.ndarray) -> np.ndarray:
    """The bits of a tensor or an array as a contiguous uint8 array, flat; on the CPU without a copy where it is contiguous."""
    if isinstance(value, np.ndarray):
        return np.ascontiguousarray(value).reshape(-1).view(np.uint8) if value.nbytes else np.empty(0, np.uint8)
    t = value.detach().resolve_conj().resolve_neg().cpu().contiguous()
    return t.reshape(-1).view(torch.uint8).numpy() if t.numel() else np.empty(0, np.uint8)


def equal(a: Any, b: Any) -> bool:
    """Whether `a` and `b` are the same bit for bit: structure, types, dtypes, shapes and values.

    >>> equal({"x": torch.tensor(0.0)}, {"x": torch.tensor(-0.0)}), equal(float("nan"), float("nan")), equal(1, True)
    (False, True, False)
    """
    return next(_differences(a, b, ()), None) is None


class Difference(NamedTuple):
    """One place where two trees differ: the leaf's path, what differs there (`dtype`, `value`, `missing`, ...), and by how much."""

    path: str
    what: str
    detail: str

    def __str__(self) -> str:
        return f"{self.path or '(root)'}: {self.what}: {self.detail}"


def diff(a: Any, b: Any) -> list[Difference]:
    """Every place where `b` differs from `a`, in canonical order; empty exactly where `equal(a, b)`.

    >>> print(*diff({"x": torch.tensor([1.0, 2.0])}, {"x": torch.tensor([1.0, 2.5]), "y": 3}), sep="\\n")
    y: unexpected: 3
    x: value: 1 of 2 elements differ, by at most 0.5
    """
    return list(_differences(a, b, ()))


def _differences(a: Any, b: Any, path: tuple[Any, ...]) -> Iterator[Difference]:
    if a is b:
        return
    left, right = node(a), node(b)
    if left is None and right is None:
        if (found := _leaf_difference(a, b)) is not None:
            yield Difference(join(path), *found)
    elif left is None or right is None or left.kind != right.kind:
        yield Difference(join(path), "type", f"{_kind(a, left)} and {_kind(b, right)}")
    else:
        if words(left.static) != words(right.static):  # as in the fingerprint: 1 is not True, a NaN is itself
            yield Difference(join(path), "static fields", f"{words(left.static)} and {words(right.static)}")
        ours, theirs = ({_typed(entry): child for entry, child in zip(n.entries, n.children, strict=True)} for n in (left, right))
        for key in [key for key in ours if key not in theirs]:
            yield Difference(join((*path, key[1])), "missing", _brief(ours[key]))
        for key in [key for key in theirs if key not in ours]:
            yield Difference(join((*path, key[1])), "unexpected", _brief(theirs[key]))
        for key in [key for key in ours if key in theirs]:
            yield from _differences(ours[key], theirs[key], (*path, key[1]))


def _leaf_difference(a: Any, b: Any) -> tuple[str, str] | None:
    if type(a) is not type(b) and not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)):
        return "type", f"{_brief(a)} and {_brief(b)}"
    if isinstance(a, torch.Tensor):
        if a.dtype != b.dtype:
            return "dtype", f"{a.dtype} and {b.dtype}"
        if a.shape != b.shape:
            return "shape", f"{tuple(a.shape)} and {tuple(b.shape)}"
        if np.array_equal(array(a), array(b)):
            return None
        wrong = (array(a) != array(b)).reshape(a.numel(), -1).any(1)
        wide = torch.complex128 if a.is_complex() else torch.float64
        far = (a.detach().cpu().to(wide) - b.detach().cpu().to(wide)).abs().max().item()
        return "value", f"{int(wrong.sum())} of {a.numel()} elements differ, by at most {far:.3g}"
    return None if _leaf_bytes(a, ()) == _leaf_bytes(b, ()) else ("value", f"{_brief(a)} and {_brief(b)}")


def _typed(key: Any) -> tuple[str, Any]:
    return type(key).__name__, key  # 1, True and 1.0 are one key to a dictionary, but not the same key


def _kind(value: Any, node: Node | None) -> str:
    return node.kind if node else _brief(value)


def _brief(value: Any) -> str:
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return f"{type(value).__name__} {value.dtype} {tuple(value.shape)}"
    if (kind := node(value)) is not None:
        return f"{kind.kind} of {len(kind.children)}"
    text = words(value)
    return text if len(text) <= 60 else text[:57] + "..."


# --- identity ----------------------------------------------------------------------------------------------------------


def fingerprint(tree: Any) -> str:
    """A digest (sha256, 64 hex digits) of structure and bits: equal exactly where `equal` holds, in every process and on every machine.

    Raises TypeError, with the path, for a leaf that is not data (a function, a module).

    >>> fingerprint({"a": 1, "b": torch.zeros(2)}) == fingerprint({"b": torch.zeros(2), "a": 1})
    True
    """
    return _digest(tree, ()).hex()


def _digest(value: Any, path: tuple[Any, ...]) -> bytes:
    at = node(value)
    if at is None:
        return hashlib.sha256(_leaf_bytes(value, path)).digest()
    head = [at.kind, words(at.static), *(words(entry) for entry in at.entries)]
    digest = hashlib.sha256(repr(head).encode())
    for entry, child in zip(at.entries, at.children, strict=True):
        digest.update(_digest(child, (*path, entry)))
    return digest.digest()


def _leaf_bytes(value: Any, path: tuple[Any, ...]) -> bytes:
    if isinstance(value, torch.Tensor):
        return f"tensor {value.dtype} {tuple(value.shape)} ".encode() + array(value).tobytes()
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        return f"ndarray {value.dtype.str} {value.shape} ".encode() + value.tobytes()
    if type(value) not in SCALARS:
        raise TypeError(f"leaf {join(path) or '(root)'} is {a(type(value).__name__)}: a state holds tensors, arrays and plain scalars only")
    if isinstance(value, float):
        return f"float {np.float64(value).tobytes().hex()}".encode()
    if isinstance(value, complex):
        return f"complex {np.complex128(value).tobytes().hex()}".encode()
    return f"{type(value).__name__} {words(value)}".encode()
