"""A saved structure matched with a fresh state: a plan of the leaves to restore and to keep, or a table of the differences."""

from __future__ import annotations

import difflib
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
import torch

from fnrun.checkpoint.codec import DICTS, FREE, Branch, Container, Keep, Pick, container, leaf_of, named_today, picks
from fnrun.checkpoint.manifest import TORCH_DTYPES, CheckpointError, Leaf, Node, constant, encode_constant, text
from fnrun.core import tree
from fnrun.core.tables import printable, table
from fnrun.core.words import shortened

#: Fields of a state that must match `like` exactly. Elsewhere an empty container or None in `like` takes whatever was saved.
EXACT = ("params", "buffers", "opt_state")


class _Absent:
    pass


ABSENT = _Absent()


def selector(patterns: Sequence[str] | None, known: Sequence[str]) -> Callable[[str], bool]:
    """A predicate of paths: whether `patterns` select one.

    `*` matches anything within one entry, `**` any number of entries. A pattern that begins with `!` excludes; where all do, they exclude
    from everything. Raises CheckpointError for no patterns, and for one that matches none of the `known` paths, or only containers.

    >>> wanted = selector(["params/**", "!params/head.*"], ["params", "params/0.weight", "params/head.weight"])
    >>> wanted("params/0.weight"), wanted("params/head.weight"), wanted("buffers/0.mean")
    (True, False, False)
    """
    if patterns is None:
        return lambda path: True
    if not patterns:
        raise CheckpointError("select: there is no pattern in it; without it everything is selected")
    taken = [pattern.split("/") for pattern in patterns if not pattern.startswith("!")]
    left_out = [pattern[1:].split("/") for pattern in patterns if pattern.startswith("!")]
    containers = {path.rpartition("/")[0] for path in known if path}
    for glob in [*taken, *left_out]:
        pattern = "/".join(glob)
        found = [path for path in known if _matches(glob, path.split("/"))]
        if found and containers.issuperset(found):
            raise CheckpointError(f"select: {pattern!r} is a container, not what is in it: that is {f'{pattern}/**'.lstrip('/')!r}")
        if not found:
            near = difflib.get_close_matches(pattern.rstrip("*/"), list(dict.fromkeys(known)), cutoff=0.5)
            hint = f"near: {', '.join(near)}" if near else f"saved: {', '.join(path for path in known if path and '/' not in path)}"
            raise CheckpointError(f"select: nothing that was saved matches {pattern!r}; {hint}")

    def wanted(path: str) -> bool:
        entries = path.split("/")
        return (not taken or any(_matches(glob, entries) for glob in taken)) and not any(_matches(glob, entries) for glob in left_out)

    return functools.cache(wanted)


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


def children(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, Any]]:
    """The children by key of a container, saved or fresh; none of a leaf."""
    if isinstance(value, Node):
        return value.items()
    node = container(value, path)
    return node.items if node else []


def paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[str]:
    """The paths of all containers and leaves of a structure or of a state."""
    yield text(path)
    for key, child in children(value, path):
        yield from paths(child, (*path, key))


# --- other names -------------------------------------------------------------------------------------------------------

Rename = Mapping[str, str] | Callable[[str], str]


def renamed(structure: Node | int, leaves: list[Leaf], rename: Rename) -> tuple[Node | int, list[Leaf]]:
    """Structure and leaves under other paths. A leaf can be renamed from an entry of a dictionary to an entry of a dictionary.

    `rename` is a function of a leaf's path, or regular expressions with their replacements (`re.sub`), one after the other.
    Raises CheckpointError where it changes nothing, two leaves would get one path, or a path leads nowhere.
    """
    new = renaming(rename)
    new_paths = [new(leaf.path) for leaf in leaves]
    moved = {number: path for number, path in enumerate(new_paths) if path != leaves[number].path}
    if not moved:
        raise CheckpointError(f"rename: it changes no path that was saved; saved: {shortened([leaf.path for leaf in leaves])}")
    taken: dict[str, str] = {}
    for leaf, path in zip(leaves, new_paths, strict=True):
        if path in taken:
            raise CheckpointError(f"rename: {taken[path]} and {leaf.path} would both be {path}")
        taken[path] = leaf.path
    found: dict[str, Node] = {}
    root = _with_new_keys(structure, "", moved, found)
    for number, path in moved.items():
        parent, _, key = path.rpartition("/")
        if parent not in found:
            raise CheckpointError(f"rename: {leaves[number].path} cannot be {path}: no dictionary was saved at {parent or 'the root'}")
        if leaves[number].path.rpartition("/")[0] not in found:
            raise CheckpointError(f"rename: {leaves[number].path} cannot be {path}: it is not an entry of a dictionary")
        if leaves[number].path.rpartition("/")[0] != parent:
            found[parent].keys.append(_key(key))
            found[parent].children.append(number)
    return root, [msgspec.structs.replace(leaf, path=path) for leaf, path in zip(leaves, new_paths, strict=True)]


def renaming(rename: Rename) -> Callable[[str], str]:
    """`rename` as a function of a path."""
    return rename if callable(rename) else functools.partial(_substitute, {re.compile(pattern): put for pattern, put in rename.items()})


def _substitute(patterns: Mapping[re.Pattern[str], str], path: str) -> str:
    for pattern, put in patterns.items():
        path = pattern.sub(put, path)
    return path


def _with_new_keys(structure: Node | int, path: str, moved: Mapping[int, str], found: dict[str, Node]) -> Any:
    """A copy in which leaves that stay in their dictionary have their new key, and those that leave it are gone.

    `found` takes each dictionary of the copy by its path.
    """
    if isinstance(structure, int):
        return structure
    places = {key: f"{path}/{text((key,))}" if path else text((key,)) for key, _ in structure.items()}
    copies = [_with_new_keys(child, places[key], moved, found) for key, child in structure.items()]
    node = msgspec.structs.replace(structure, children=copies)
    if structure.kind in DICTS:
        kept = [
            (_key(moved[child].rpartition("/")[2]) if isinstance(child, int) and child in moved else key, child)
            for key, child in zip(structure.keys, copies, strict=True)
            if not isinstance(child, int) or moved.get(child, path + "/").rpartition("/")[0] == path
        ]
        node.keys, node.children = [key for key, _ in kept], [child for _, child in kept]
        found[path] = node
    return node


def _key(entry: str) -> Any:
    return encode_constant(*tree.split(entry))


# --- matching ----------------------------------------------------------------------------------------------------------


class Mismatch(NamedTuple):
    """One line of the table: a leaf or container, what was saved there and what `like` has there."""

    path: str
    saved: str
    expected: str


class Matcher:
    """Matches a saved structure with a fresh state (or ABSENT), for the leaves that the patterns select.

    Floating-point tensors may have the dtype `cast` in `like`, whatever their saved dtype is. Without `strict`, what is missing or
    unexpected is a line of `apart` and no error, as long as there is something to restore.
    """

    def __init__(
        self,
        structure: Node | int,
        leaves: list[Leaf],
        patterns: Sequence[str] | None,
        *,
        strict: bool = True,
        cast: torch.dtype | None = None,
    ) -> None:
        self.structure, self.leaves, self.patterns, self.cast = named_today(structure), leaves, patterns, cast
        self.all = patterns is None
        self.wrong: list[Mismatch] = []
        self.apart: list[Mismatch] = self.wrong if strict else []
        self.strict = strict
        self.numbered: dict[str, tuple[int, int]] = {}
        self.renamed: list[str] = []

    def plan(self, like: Any, where: str) -> Any:
        """A tree of Branch, Pick and Keep. Raises CheckpointError with a table of what does not match; `where` says what was saved."""
        try:
            self.wanted = selector(self.patterns, [] if self.all else [*paths(self.structure), *paths(like)])
        except CheckpointError as error:
            raise CheckpointError(f"{where}: {error}") from None
        self.growing = _growing(like)
        plan = self.match(self.structure, like)
        if not any(picks(plan)):
            self.wrong = self.wrong or self.apart  # nothing fits: that is an error without `strict` too
        if self.wrong:
            raise CheckpointError(f"{where} does not match the state that it is restored into:\n{self.table()}")
        return plan

    def match(self, saved: Any, like: Any, path: tuple[Any, ...] = ()) -> Any:
        """A tree of Branch, Pick and Keep; what does not match is added to `wrong`."""
        if saved is ABSENT:
            self._only_in_one(like, path, missing=True)
            return Keep(like)
        if not self.all and not self._any(saved, path) and not self._any(like, path):
            return Keep(None if like is ABSENT else like)
        if like is not ABSENT and self._rebuilt(saved, like, path):
            like = ABSENT
        node = None if like is ABSENT else container(like, path)
        if isinstance(saved, int):
            return self._leaf(saved, like, node, path)
        if node is not None and path == () and node.kind != saved.kind and node.kind[:7] == saved.kind[:7] == "struct ":
            self.renamed.append(f"saved as a {saved.kind[7:]}, restored as a {node.kind[7:]}")
        elif like is not ABSENT and (node is None or node.kind != saved.kind):
            self.wrong.append(Mismatch(text(path), self._words(saved), _words(like)))
            return Keep(like)
        if node is not None and not _is_free(path) and msgspec.json.encode(node.static) != msgspec.json.encode(saved.static):
            self.wrong.append(Mismatch(text(path), _statics(saved.static), _statics(node.static)))
        cls = None if like is ABSENT else type(like)
        fit = None if self.strict or not hasattr(cls, "numbered") else self._fit(saved, like, path)
        return self._branch(saved, node, path, cls)._replace(fit=fit)

    def _fit(self, saved: Node, like: Any, path: tuple[Any, ...]) -> tuple[Any, list[int | None]] | None:
        """For a part of an optimizer state in which leaves are known by number: the fresh one, and the saved number of each leaf.

        None where the numbers are the same.
        """
        inside = dict(saved.items())
        if not all(field in inside and self._any(inside[field], (*path, field)) for field in like.numbered):
            return None
        before, after = _names(saved, like.named), _names(like, like.named)
        if before == after != []:
            return None
        for field in like.numbered:
            self.numbered[text((*path, field))] = len(before), len(after)
        return like, [before.index(name) if name in before else None for name in after]

    def _rebuilt(self, saved: Any, like: Any, path: tuple[Any, ...]) -> bool:
        """Whether `like` does not count here: by its field, or because it is empty."""
        node = container(like, path)
        kind = node.kind if node else leaf_of(like, path).kind
        same = kind == (self.leaves[saved].kind if isinstance(saved, int) else saved.kind)
        empty = like is None or (node is not None and not node.items)
        return not same and (_is_free(path) or (empty and not _is_exact(path)))

    def _leaf(self, number: int, like: Any, node: Container | None, path: tuple[Any, ...]) -> Any:
        saved = self.leaves[number]
        if like is ABSENT:
            return Pick(number)
        if node is not None or (not _is_free(path) and not self._fits(leaf_of(like, path), saved)):
            self.wrong.append(Mismatch(saved.path, saved.spec(), _words(like)))
            return Keep(like)
        if not self.wanted(saved.path):
            return Keep(like)
        return Pick(number, like.device, like.dtype) if isinstance(like, torch.Tensor) else Pick(number)

    def _fits(self, like: Leaf, saved: Leaf) -> bool:
        if like.kind == "tensor" and like.path.startswith(self.growing) and math.prod(like.shape) <= 1:
            like = msgspec.structs.replace(like, shape=saved.shape)
        for prefix, (before, after) in self.numbered.items():
            vectors = len(like.shape) == len(saved.shape) == 1 and like.dtype == saved.dtype
            if f"{like.path}/".startswith(f"{prefix}/") and vectors and (not after or (saved.shape, like.shape) == ((before,), (after,))):
                return True
        return like.spec() == saved.spec() or (
            castable(saved) and like.kind == "tensor" and like.shape == saved.shape and TORCH_DTYPES[like.dtype] == self.cast
        )

    def _branch(self, saved: Node, node: Container | None, path: tuple[Any, ...], cls: type | None) -> Branch:
        free = _is_free(path)
        ours = {_typed(key): (key, child) for key, child in saved.items()}
        theirs = {_typed(key): (key, child) for key, child in node.items} if node else {}
        rebuilt = node is None or free or (not node.items and not _is_exact(path))
        keys, plans = [], []
        for typed, (key, child) in ours.items():
            if typed not in theirs and not rebuilt:
                self._only_in_one(child, (*path, key), missing=False)
                continue
            keys.append(key)
            plans.append(self.match(child, theirs.get(typed, (key, ABSENT))[1], (*path, key)))
        for typed, (key, child) in theirs.items():
            if typed not in ours and not (free and (self.all or saved.kind not in DICTS)):
                keys.append(key)
                plans.append(self.match(ABSENT, child, (*path, key)))
        return Branch(saved.kind, keys, saved.static, plans, cls)

    def _any(self, value: Any, path: tuple[Any, ...]) -> bool:
        """Whether a path here or below is selected."""
        return value is not ABSENT and any(map(self.wanted, paths(value, path)))

    def _only_in_one(self, value: Any, path: tuple[Any, ...], *, missing: bool) -> None:
        """Note the leaves of what is in `like` alone (missing), or in the checkpoint alone."""
        found = children(value, path)
        if not found and self.wanted(text(path)):
            row = ("(missing)", _words(value)) if missing else (self._words(value), "(unexpected)")
            self.apart.append(Mismatch(text(path), *row))
        for key, child in found:
            self._only_in_one(child, (*path, key), missing=missing)

    def _words(self, saved: Any) -> str:
        return self.leaves[saved].spec() if isinstance(saved, int) else f"{saved.kind} of {len(saved.children)}"

    def left(self) -> list[str]:
        """Warnings: what was left out without an error."""
        what = {"(missing)": "not in the checkpoint, left as they are", "(unexpected)": "in the checkpoint and left out"}
        names = {of: [row.path for row in self.apart if of in row] for of in what} if self.apart is not self.wrong else {}
        return self.renamed + [f"{what[of]}: {shortened(found)}" for of, found in names.items() if found]

    def table(self, rows: int = 30) -> str:
        """The mismatches, a line each, with near names for what is missing.

        Of more than `rows` lines these are some that are missing, some that are unexpected and some that differ.
        """
        unexpected = [row.path for row in self.wrong if row.expected == "(unexpected)"]
        sorts: dict[Any, list[Mismatch]] = {}
        for row in self.wrong:
            sorts.setdefault((row.saved == "(missing)", row.expected == "(unexpected)"), []).append(row)
        some = self.wrong if len(self.wrong) <= rows else [row for sort in sorts.values() for row in sort[: rows // len(sorts)]]
        cells = [[row.path or "(root)", row.saved, row.expected] for row in some]
        head, _, *lines = table(["leaf", "saved", "expected"], cells).splitlines()
        shown = [f"  {head}"]
        for row, line in zip(some, lines, strict=True):
            near = difflib.get_close_matches(row.path, unexpected, n=1) if row.saved == "(missing)" else []
            shown.append(f"  {line}" + (f"  (saved under a near name: {printable(near[0])})" if near else ""))
        if len(self.wrong) > len(some):
            shown.append(f"  ... and {len(self.wrong) - len(some)} more")
        return "\n".join(shown)


def _is_free(path: tuple[Any, ...]) -> bool:
    return path != () and path[0] in FREE


def _is_exact(path: tuple[Any, ...]) -> bool:
    return path == () or path[0] in EXACT


def _names(value: Any, within: Sequence[str]) -> list[Any]:
    """The paths of the leaves that lie `within`, in the order in which optimizers number them."""
    for entry in within:
        value = next((child for key, child in children(value) if entry in ("*", key)), ())

    def walk(value: Any, path: tuple[Any, ...]) -> Iterator[Any]:
        node = value if isinstance(value, Node) else container(value, path)
        if node is None:
            yield path
            return
        found = children(value)
        for key, child in sorted(found, key=lambda item: _typed(item[0])) if node.kind in ("dict", "defaultdict") else found:
            yield from walk(child, (*path, key))

    return list(walk(value, ()))


def _growing(like: Any) -> tuple[str, ...]:
    """Prefixes of the paths of buffers that take their shape from the data: those of a module in which a fresh buffer is empty.

    Such are torch's observers and fake quantizations: the minimum of each channel is `[]` before a batch was seen, its scale `[1.]`.
    """
    found: set[str] = set()
    buffers = getattr(like, "buffers", None) if not isinstance(like, Mapping) else like.get("buffers")
    for name, value in buffers.items() if isinstance(buffers, Mapping) else ():
        if isinstance(value, torch.Tensor) and not value.numel():
            *modules, _ = name.split(".")
            module = modules[:-1] if modules[-1:] == ["activation_post_process"] else modules
            found.add(f"{text(('buffers', '.'.join(module)))}." if module else text(("buffers", name)))
    return tuple(found)


def castable(leaf: Leaf) -> bool:
    """Whether a leaf is a floating-point tensor."""
    return leaf.kind == "tensor" and TORCH_DTYPES[leaf.dtype].is_floating_point


def check_cast(who: str, dtype: Any) -> None:
    """Raise CheckpointError for what is no floating-point dtype, nor None."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise CheckpointError(f"{who}: dtype is a floating-point one, such as torch.bfloat16, not {dtype!r}")


def _words(like: Any) -> str:
    node = container(like, ())
    return leaf_of(like, ()).spec() if node is None else f"{node.kind} of {len(node.items)}"


def _statics(static: list[Any]) -> str:
    """The static fields of a struct, the factory of a defaultdict or the maximum length of a deque, for the table."""
    fields = [f"{item[0]}={tree.words(constant(item[1]))}" if isinstance(item, list) else repr(item) for item in static]
    return f"static {', '.join(fields)}" if fields else "no static fields"


def _typed(key: Any) -> tuple[str, Any]:
    return type(key).__name__, key if key == key else repr(encode_constant(key))
