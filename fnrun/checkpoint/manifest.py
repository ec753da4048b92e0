"""The manifest of a checkpoint, and how Python's scalars are written in JSON so that they come back bit for bit."""

from __future__ import annotations

import math
import re
import struct as binary
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import msgspec
import numpy as np
import torch

from fnrun.core import tree
from fnrun.core.documents import jsonable

#: The version of the format. Earlier ones are read too (`former.migrate`); a later one is refused.
FORMAT = 3

Mode = Literal["min", "max"]

TORCH_DTYPES = {str(d).removeprefix("torch."): d for d in vars(torch).values() if isinstance(d, torch.dtype)}
#: The kinds of NumPy's dtypes that can be saved.
ARRAY_KINDS = "biufcSUmM"
#: The kinds of containers whose keys are 0, 1, ...
SEQUENCES = ("list", "tuple", "deque")


class CheckpointError(Exception):
    """A checkpoint that could not be saved or restored: what was wrong, where, and what to do.

    Where a run ends because it cannot save, `state` is its last state.
    """

    state: Any = None


class DamagedError(CheckpointError):
    """A checkpoint on disk that is not as it was saved. The one before it may be whole.

    `leaves` are the paths of those that are lost, where that is known.
    """

    def __init__(self, text: str, leaves: Sequence[str] = ()) -> None:
        super().__init__(text)
        self.leaves = list(leaves)


# --- the manifest ------------------------------------------------------------------------------------------------------


class Piece(msgspec.Struct, omit_defaults=True):
    """A part of a leaf, whose bytes lie in the order of C.

    - `file`: relative to the checkpoint.
    - `digest`: an algorithm, a colon, and 64 hex digits.
    - `offset=0`: where its bytes begin in the file.
    - `start=None`, `shape=None`: where it begins along each axis, and its shape; without them it is the whole leaf.
    """

    file: str
    digest: str
    offset: int = 0
    start: tuple[int, ...] | None = None
    shape: tuple[int, ...] | None = None


class Leaf(msgspec.Struct, omit_defaults=True):
    """One leaf: a scalar with its value, or a tensor or an array with the pieces that it is stored in.

    Of several leaves that are one tensor the first has the pieces; the others name it in `shares`.
    """

    path: str
    kind: str
    value: Any = None
    dtype: str = ""
    shape: tuple[int, ...] = ()
    strides: tuple[int, ...] | None = None
    device: str = ""
    pieces: list[Piece] = []
    shares: int | None = None

    @property
    def stored(self) -> bool:
        """Whether it is a tensor or an array, with bytes outside of the manifest."""
        return self.kind in ("tensor", "ndarray")

    @property
    def itemsize(self) -> int:
        return TORCH_DTYPES[self.dtype].itemsize if self.kind == "tensor" else np.dtype(self.dtype).itemsize

    @property
    def nbytes(self) -> int:
        """How many bytes are stored of it."""
        return math.prod(self.shape) * self.itemsize

    def size(self, piece: Piece) -> int:
        """How many bytes one of its pieces has."""
        return math.prod(self.shape if piece.shape is None else piece.shape) * self.itemsize

    def origin(self, number: int) -> int:
        """The number of the leaf that has the bytes of this one: `number`, or that of the first of several that are one tensor."""
        return number if self.shares is None else self.shares

    def spec(self) -> str:
        """Kind, dtype and shape: two leaves that match have the same."""
        return f"{self.kind} {self.dtype} {tuple(self.shape)}" if self.stored else self.kind


class Node(msgspec.Struct, omit_defaults=True):
    """One container: its kind, its children (a leaf is a number), and their keys, except those of a sequence."""

    kind: str
    children: list[Node | int]
    keys: list[Any] = []
    static: list[Any] = []

    def items(self) -> list[tuple[Any, Node | int]]:
        """The children by key; keys are those of the container itself."""
        keys = range(len(self.children)) if self.kind in SEQUENCES else [constant(key) for key in self.keys]
        return list(zip(keys, self.children, strict=True))


class File(msgspec.Struct, omit_defaults=True):
    """One file of a checkpoint; without a digest it holds pieces of leaves, which have theirs."""

    size: int
    digest: str = ""


def ranked(value: Any, mode: Mode) -> float | None:
    """A metric as a number to be minimized; None for one that is not finite, which is never the best."""
    value = float(value)
    return None if not math.isfinite(value) else (-value if mode == "max" else value)


class Manifest(msgspec.Struct, kw_only=True):
    """Everything about a checkpoint except the bytes of its arrays."""

    format: int = FORMAT
    step: int
    ticks: int
    created: str
    metrics: dict[str, float | str] = {}
    monitors: dict[str, Mode] = {}
    config: Any = None
    environment: dict[str, str] = {}
    structure: Node | int
    leaves: list[Leaf]
    files: dict[str, File] = {}

    def value(self, metric: str, mode: Mode) -> float | None:
        """A monitored metric as a number to be minimized; None if it was not monitored, or is not finite."""
        return ranked(self.metrics.get(metric, "nan"), mode) if metric in self.monitors else None

    def check(self) -> None:
        """Raise ValueError unless the leaves are those of the structure, their pieces and digests can be read, and metrics are numbers."""
        placed = list(_placed(self.structure))
        if [number for number, _ in placed] != list(range(len(self.leaves))):
            raise ValueError("the structure does not name each leaf once")
        for (number, path), leaf in zip(placed, self.leaves, strict=True):
            if leaf.path != path:
                raise ValueError(f"{leaf.path} lies at {path}")
            if leaf.shares is not None:
                if not 0 <= leaf.shares < number or self.leaves[leaf.shares].spec() != leaf.spec() or leaf.pieces:
                    raise ValueError(f"{leaf.path} shares leaf {leaf.shares}")
            elif not leaf.stored and leaf.pieces:
                raise ValueError(f"{leaf.path} is stored, and no tensor")
            elif leaf.stored and (min(leaf.shape, default=0) < 0 or not _tiled(leaf)):
                raise ValueError(f"{leaf.path} is not what its pieces make up")
            if leaf.kind == "ndarray" and np.dtype(leaf.dtype).kind not in ARRAY_KINDS:
                raise ValueError(f"{leaf.path} is an array of {leaf.dtype}")
            if not leaf.stored and type(constant(leaf.value)).__name__ != leaf.kind:
                raise ValueError(f"{leaf.path} is said to be of kind {leaf.kind}, and its value is none")
            if leaf.strides is not None and not dense(leaf.shape, leaf.strides):
                raise ValueError(f"{leaf.path} has strides with gaps or overlaps")
        _check_places(self.leaves)
        holding = {piece.file for leaf in self.leaves for piece in leaf.pieces}
        for name in holding | self.files.keys():
            if "\0" in name or not {"", ".", ".."}.isdisjoint(name.split("/")):  # it could lie outside of the checkpoint
                raise ValueError(f"{name!r} names no file of a checkpoint")
        for leaf in self.leaves:
            for piece in leaf.pieces:
                if piece.file in self.files and piece.offset + leaf.size(piece) > self.files[piece.file].size:
                    raise ValueError(f"{leaf.path} lies beyond the end of {piece.file}")
        for name, file in self.files.items():
            if not 0 <= file.size < 2**63:
                raise ValueError(f"{name} has {file.size} bytes")
            if _DIGEST.fullmatch(file.digest) is None and not (name in holding and file.digest == ""):
                raise ValueError(f"the digest of {name} is {file.digest!r}")
        for value in self.metrics.values():
            float(value)


class Judgement(msgspec.Struct, kw_only=True):
    """The part of a manifest by which checkpoints are judged; its leaves are not parsed."""

    format: int
    step: int
    ticks: int
    metrics: dict[str, float | str] = {}
    monitors: dict[str, Mode] = {}

    value = Manifest.value


def _tiled(leaf: Leaf) -> bool:
    """Whether the pieces of a leaf are a grid that covers each of its elements once; there are none of one without elements."""
    if not leaf.nbytes:
        return not leaf.pieces
    cuts: list[dict[int, int]] = [{} for _ in leaf.shape]  # along each axis: where pieces begin, and how far they reach
    for piece in leaf.pieces:
        start = (0,) * len(leaf.shape) if piece.start is None else piece.start
        shape = leaf.shape if piece.shape is None else piece.shape
        if not len(start) == len(shape) == len(leaf.shape) or piece.offset < 0 or _DIGEST.fullmatch(piece.digest) is None:
            return False
        if any(cut.setdefault(begin, length) != length for cut, begin, length in zip(cuts, start, shape, strict=True)):
            return False
    for cut, length in zip(cuts, leaf.shape, strict=True):
        end = 0
        for begin in sorted(cut):
            if begin != end or cut[begin] < 1:
                return False
            end += cut[begin]
        if end != length:
            return False
    distinct = {piece.start for piece in leaf.pieces}
    return len(leaf.pieces) == len(distinct) == math.prod(map(len, cuts))


_DIGEST = re.compile(r"(blake3|sha256):[0-9a-f]{64}")


def _check_places(leaves: Sequence[Leaf]) -> None:
    """Raise ValueError where two pieces are read from the same bytes: then they could ask for more memory than the files hold."""
    end: dict[str, int] = {}
    placed = [(piece.file, piece.offset, leaf.size(piece), leaf.path) for leaf in leaves for piece in leaf.pieces]
    for file, begin, size, path in sorted(placed):
        if begin < end.get(file, 0):
            raise ValueError(f"{path} lies where another leaf lies")
        end[file] = begin + size


def dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether elements with these strides fill their memory without overlaps."""
    size = 1
    for stride, length in sorted((stride, length) for stride, length in zip(strides, shape, strict=True) if length > 1):
        if stride != size:
            return False
        size *= length
    return True


def _placed(structure: Node | int, path: tuple[Any, ...] = ()) -> Iterator[tuple[int, str]]:
    """The number of each leaf, and its path. Raises an error for a container that is none."""
    if isinstance(structure, int):
        yield structure, text(path)
        return
    items = structure.items()
    if len({key for key, _ in items}) < len(items):
        raise ValueError(f"{text(path)} has two entries of one key")
    if structure.kind == "deque":
        (most,) = structure.static
        if not (most is None or (type(most) is int and most >= len(items))):
            raise ValueError(f"{text(path)} is a deque of {len(items)} with room for {most!r}")
    elif structure.kind == "defaultdict":
        (factory,) = structure.static
        if not isinstance(factory, str):
            raise ValueError(f"{text(path)} is a defaultdict of {factory!r}")
    else:
        for name, value in structure.static:
            if not isinstance(name, str):
                raise ValueError(f"{text(path)} has a field {name!r}")
            hash(constant(value))
    for key, child in items:
        yield from _placed(child, (*path, key))


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
        return value if utf8(value) == value else {"str": value.encode("utf-8", "surrogatepass").hex()}
    if cls is bytes:
        return {"bytes": value.hex()}
    if cls is complex:
        return {"complex": [encode_constant(value.real), encode_constant(value.imag)]}
    if cls is tuple:
        return {"tuple": [encode_constant(item) for item in value]}
    raise TypeError(f"a {cls.__name__}")


def constant(value: Any) -> Any:
    """The inverse of `encode_constant`."""
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
    """The inverse of `encode_config`, in plain containers."""
    if isinstance(value, list):
        return [config(item) for item in value]
    if isinstance(value, dict):
        return constant(value) if set(value) == {"float"} and isinstance(value["float"], str) else {k: config(v) for k, v in value.items()}
    return value


def utf8(text: str) -> str:
    """`text` as UTF-8 can hold it: what it cannot, lone surrogates, is escaped."""
    return text.encode("utf-8", "backslashreplace").decode()


def text(path: tuple[Any, ...]) -> str:
    """A path as text."""
    return utf8(tree.join(path))


def scalars(metrics: Mapping[str, Any]) -> dict[str, float | str]:
    """The metrics that are one number, as JSON can hold them."""
    found: dict[str, float | str] = {}
    for name, value in metrics.items():
        if isinstance(value, (torch.Tensor, np.ndarray)) and math.prod(value.shape) == 1:
            value = value.item()
        if isinstance(value, (bool, int, float, np.number)):
            found[utf8(name)] = jsonable(float(value))
    return found
