"""`fnrun diff`: two states bit for bit, or two configs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from fnrun.checkpoint import Manifest
from fnrun.checkpoint.codec import named_today
from fnrun.checkpoint.manifest import Leaf, Node, constant, text
from fnrun.cli.commands import CommandError, Diff
from fnrun.cli.commands.output import document, say, shown_path
from fnrun.cli.commands.places import is_run, what_is_at
from fnrun.cli.commands.stored import checkpoint_at, numbers
from fnrun.core import tree
from fnrun.core.documents import dotted
from fnrun.core.tables import table
from fnrun.runs.config import read_yaml
from fnrun.runs.curves import records
from fnrun.runs.run import RunError

#: The folds of observers in the open loops: no part of what is trained.
OBSERVED = re.compile(r"position/frames/\d+/folds(/|$)")


def run(flags: Diff) -> int:
    if flags.a.is_file() or flags.b.is_file():
        found = fields(_config(flags.a, flags.b), _config(flags.b, flags.a))
        report = {"equal": not found, "config": found}
    else:
        report = states(flags.a, flags.b)
    if flags.json:
        document(report)
    else:
        _print(report)
    return 0 if report["equal"] else 1


# --- configs -----------------------------------------------------------------------------------------------------------


def _config(path: Path, other: Path) -> Any:
    if not path.is_file():
        raise CommandError(f"{other} is a file, and {path} is none: {what_is_at(path)}. Two configs are compared, or two states")
    try:
        raw = read_yaml(path)
    except (OSError, RunError) as error:
        raise CommandError(f"{path} is no config that can be read: {' '.join(str(error).split())}") from error
    return {"experiment": raw["experiment"], **raw["config"]} if isinstance(raw, dict) and {"experiment", "config"} <= raw.keys() else raw


def fields(a: Any, b: Any) -> list[dict[str, Any]]:
    """The fields in which two configs differ, by their dotted names, with the values of those that have the field.

    >>> fields({"lr": 0.1, "model": {"width": 8}}, {"lr": 0.1, "model": {"width": 16, "depth": 2}})
    [{'field': 'model.width', 'a': 8, 'b': 16}, {'field': 'model.depth', 'b': 2}]
    """
    left, right = dict(dotted(a)), dict(dotted(b))
    found = []
    for name in {**left, **right}:
        values = {side: flat[name] for side, flat in (("a", left), ("b", right)) if name in flat}
        if len(values) == 1 or _differ(*values.values()):
            found.append({"field": name, **values})
    return found


def _differ(a: Any, b: Any) -> bool:
    return (a != b and not (a != a and b != b)) or isinstance(a, bool) != isinstance(b, bool)


# --- states ------------------------------------------------------------------------------------------------------------


def states(a: Path, b: Path) -> dict[str, Any]:
    """The differences of the states, configs, environments and logs of two runs or checkpoints. Raises DamagedError for either."""
    left, right = _Side(a), _Side(b)
    found = list(_structure(left, right))
    pairs = {path: (left.leaves[path], right.leaves[path]) for path in left.leaves if path in right.leaves}
    described = {path: left.content(path) == right.content(path) for path in pairs}
    changed = {path: pair for path, pair in pairs.items() if not described[path] or left.digests(path) != right.digests(path)}
    measured = [path for path, (one, other) in changed.items() if one.stored and one.spec() == other.spec()]
    values = left.read(measured), right.read(measured)
    for path, (one, other) in changed.items():
        how = measure(values[0][path], values[1][path]) if path in measured else {"elements": 0}
        if how["elements"] or not described[path]:  # the same bits may lie in other pieces, or have digests of an earlier format
            found.append({"path": path, **(how if how["elements"] else {"a": _words(left, one), "b": _words(right, other)})})
    counting = [row for row in found if not OBSERVED.match(row["path"])]
    report = {"equal": not counting, "a": left.about(), "b": right.about(), "state": counting}
    report["observers"] = [row for row in found if OBSERVED.match(row["path"])]
    report["config"] = fields(left.manifest.config, right.manifest.config)
    report["environment"] = fields(left.manifest.environment, right.manifest.environment)
    report["logged"] = logged(a / "metrics.jsonl", b / "metrics.jsonl") if is_run(a) and is_run(b) else None
    return report


class _Side:
    """One of the two checkpoints: its manifest, and its leaves and containers by path."""

    def __init__(self, path: Path) -> None:
        self.checkpoints, self.entry = checkpoint_at(path)
        self.manifest: Manifest = self.checkpoints.manifest(self.entry)
        self.leaves = {leaf.path: leaf for leaf in self.manifest.leaves}
        self.containers = dict(_containers(named_today(self.manifest.structure)))

    def about(self) -> dict[str, Any]:
        directory = self.checkpoints.directory / self.entry.name
        return {"checkpoint": shown_path(directory), "step": self.manifest.step, "ticks": self.manifest.ticks, "leaves": len(self.leaves)}

    def content(self, path: str) -> Any:
        """Everything about a leaf but its bytes, with the path of the leaf that shares them."""
        leaf = self.leaves[path]
        return leaf.kind, repr(leaf.value), leaf.dtype, leaf.shape, leaf.strides, self.shares(leaf)

    def digests(self, path: str) -> Any:
        """The digests of a leaf's pieces, with their places in the leaf."""
        leaf = self.leaves[path]
        origin = leaf if leaf.shares is None else self.manifest.leaves[leaf.shares]
        return [(piece.start, piece.shape, piece.digest) for piece in origin.pieces]

    def shares(self, leaf: Leaf) -> str | None:
        return None if leaf.shares is None else self.manifest.leaves[leaf.shares].path

    def read(self, paths: list[str]) -> dict[str, Any]:
        """These leaves, after every file was compared with its digests."""
        self.checkpoints.check(self.entry)
        if not paths:
            return {}
        return self.checkpoints.read(self.entry, None if any(path.startswith("!") for path in paths) else paths)


def _containers(structure: Node | int, path: tuple[Any, ...] = ()) -> Iterator[tuple[str, tuple[str, str, list[str]]]]:
    """The containers by path: kind, static fields, and entries in order."""
    if isinstance(structure, Node):
        entries = [text((*path, key)) for key, _ in structure.items()]
        yield text(path), (structure.kind, repr(structure.static), entries)
        for key, child in structure.items():
            yield from _containers(child, (*path, key))


def _structure(left: _Side, right: _Side) -> Iterator[dict[str, Any]]:
    """The containers that differ, and what only one side has: of a whole subtree, its root."""
    for path in {**left.containers, **left.leaves, **right.containers, **right.leaves}:
        mine, yours = _node(left, path), _node(right, path)
        if mine is None or yours is None:
            parent = path.rpartition("/")[0]
            if not path or (parent in left.containers and parent in right.containers):
                yield {"path": path, **({"a": mine} if mine is not None else {"b": yours})}
        elif mine != yours and (path in left.containers or path in right.containers):
            yield {"path": path, "a": mine, "b": yours}
        elif path in left.containers and left.containers[path] != right.containers[path]:
            (_, static, entries), (_, other_static, other_entries) = left.containers[path], right.containers[path]
            if static != other_static:
                yield {"path": path, "a": f"{mine} {static}", "b": f"{yours} {other_static}"}
            elif sorted(entries) == sorted(other_entries):
                yield {"path": path, "a": f"{mine}, in this order: {', '.join(entries)}", "b": f"in this one: {', '.join(other_entries)}"}


def _node(side: _Side, path: str) -> str | None:
    """The kind of the container, or the spec of the leaf, at a path; None for nothing."""
    if path in side.containers:
        return side.containers[path][0]
    return side.leaves[path].spec() if path in side.leaves else None


def _words(side: _Side, leaf: Leaf) -> Any:
    if not leaf.stored:
        return constant(leaf.value)
    layout = f", strides {tuple(leaf.strides)}" if leaf.strides is not None else ""
    return leaf.spec() + layout + (f", the same as {side.shares(leaf)}" if leaf.shares is not None else "")


def measure(a: Any, b: Any) -> dict[str, Any]:
    """The differences of two arrays of one dtype and shape.

    `elements` of all elements (`of`) differ bit for bit. `largest` is the largest absolute difference of those that are finite in both;
    `nonfinite` counts the others.

    >>> measure(np.array([1.0, 2.0, np.nan]), np.array([1.0, 2.5, 3.0]))
    {'elements': 2, 'of': 3, 'largest': 0.5, 'nonfinite': 1}
    """
    size = int(np.prod(a.shape))
    unequal = (tree.array(a).reshape(size, -1) != tree.array(b).reshape(size, -1)).any(axis=1)
    found: dict[str, Any] = {"elements": int(unequal.sum()), "of": size}
    x, y = numbers(a), numbers(b)
    if x is None or y is None:
        return found
    x, y = x[unequal], y[unequal]
    finite = np.isfinite(x) & np.isfinite(y)
    if finite.any():
        found["largest"] = float(np.abs(x[finite] - y[finite]).max())
    if not finite.all():
        found["nonfinite"] = int((~finite).sum())
    return found


# --- logs --------------------------------------------------------------------------------------------------------------


def logged(a: Path, b: Path) -> dict[str, Any] | None:
    """The first difference of two `metrics.jsonl`, without their clocks; None where there is none."""
    left, right = (_by_order(records(path) if path.is_file() else []) for path in (a, b))
    for key in sorted({*left, *right}):
        for mine, yours in zip_longest(left.get(key, []), right.get(key, [])):
            if mine is None or yours is None:
                return {"step": next(line for line in (mine, yours) if line)["step"], "only": "a" if yours is None else "b"}
            if found := fields(mine, yours):
                return {"step": mine["step"], "metrics": found}
    return None


def _by_order(lines: Iterable[dict[str, Any]]) -> dict[tuple[int, ...], list[dict[str, Any]]]:
    """The lines, without their clocks, by their order; several logs may write at one tick."""
    found: dict[tuple[int, ...], list[dict[str, Any]]] = {}
    for line in lines:
        order = (line.get("ticks", line["step"]), *(int(n) for n in str(line.get("at", "")).split(".") if n.isdecimal()))
        found.setdefault(order, []).append({name: value for name, value in line.items() if name != "clock"})
    return found


# --- the output ----- ---------------------------------------------------------------------------------------------------


def _print(report: dict[str, Any]) -> None:
    if "state" not in report:
        say(_two("field", report["config"]) if report["config"] else "equal")
        return
    a, b = report["a"], report["b"]
    say("\n".join(f"{side}  {one['checkpoint']}, step {one['step']}, {one['leaves']} leaves" for side, one in (("A", a), ("B", b))))
    if report["equal"]:
        say("\nequal, bit for bit")
    else:
        say(f"\ndifferent\n\n{_state(report['state'])}")
    if report["observers"]:
        say(f"\nwhat observers gather, which does not count\n\n{_state(report['observers'])}")
    for name in ("config", "environment"):
        if report[name]:
            say(f"\n{name}, which does not count\n\n{_two('field', report[name])}")
    line = report["logged"]
    if line is not None:
        rest = f": only {line['only'].upper()} has a line there" if "only" in line else f"\n\n{_two('metric', line['metrics'])}"
        say(f"\nlogged metrics, which do not count, differ from step {line['step']} on{rest}")


def _two(what: str, rows: list[dict[str, Any]]) -> str:
    return table([what, "A", "B"], [[row["field"], *(_cell(row[side]) if side in row else "(none)" for side in "ab")] for row in rows])


def _state(rows: list[dict[str, Any]]) -> str:
    return table(["leaf", "difference"], [[row["path"] or "(the state)", _difference(row)] for row in rows])


def _difference(row: dict[str, Any]) -> str:
    if "elements" not in row:
        return ", ".join(f"{side.upper()} {_cell(row[side]) if side in row else 'nothing'}" for side in "ab")
    parts = [f"{row['elements']:,} of {row['of']:,} elements"]
    parts += [f"by {row['largest']:.4g} at most"] if "largest" in row else []
    return ", ".join(parts + ([f"{row['nonfinite']:,} of them NaN or infinite"] if "nonfinite" in row else []))


def _cell(value: Any) -> str:
    """A value with all its digits: a difference may be in the last one."""
    return value if isinstance(value, str) else repr(value)
