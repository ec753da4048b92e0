"""`fnrun show`: the content of a run or a checkpoint, without its classes and its code."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import msgspec

from fnrun.checkpoint import CheckpointError, DamagedError, Manifest
from fnrun.checkpoint.manifest import Leaf, constant
from fnrun.checkpoint.match import paths, selector
from fnrun.cli.commands import CommandError, Show
from fnrun.cli.commands.output import document, say, shown_path
from fnrun.cli.commands.stored import checkpoint_at, run_of, statistics
from fnrun.core.tables import number, size, table
from fnrun.core.tree import words


def run(flags: Show) -> int:
    checkpoints, entry = checkpoint_at(flags.path, flags.checkpoint)
    manifest = checkpoints.manifest(entry)
    only = list(flags.only) or None
    try:
        wanted = selector(only, list(paths(manifest.structure)))
    except CheckpointError as error:
        raise CommandError(str(error).replace("select:", "--only:")) from error
    damage, values = None, {}
    try:
        values = checkpoints.read(entry, only)
    except DamagedError as error:  # the manifest is whole, and says what was there
        damage = error
    lost = damage.leaves if damage is not None else ()
    leaves = [_row(leaf, manifest, values, lost) for leaf in manifest.leaves if wanted(leaf.path)]
    about = {"checkpoint": shown_path(checkpoints.directory / entry.name), **_about(manifest, run_of(checkpoints))}
    if flags.json:
        document({**about, "leaves": leaves, "totals": _totals(leaves), "damage": damage and {"error": str(damage), "lost": lost}})
    else:
        _print(about, leaves)
    if damage is not None:
        raise damage
    return 0


# --- the content -------------------------------------------------------------------------------------------------------


def _about(manifest: Manifest, found: Any) -> dict[str, Any]:
    about = {name: getattr(manifest, name) for name in ("step", "ticks", "created", "metrics", "monitors", "config", "environment")}
    about["metrics"] = {name: float(value) for name, value in manifest.metrics.items()}
    return about if found is None else {"experiment": found.experiment, "history": found.history, **about}


def _row(leaf: Leaf, manifest: Manifest, values: dict[str, Any], lost: Collection[str]) -> dict[str, Any]:
    """A leaf in plain values; of a damaged checkpoint, those in the manifest."""
    if not leaf.stored:
        return {"path": leaf.path, "kind": leaf.kind, "value": constant(leaf.value)}
    row: dict[str, Any] = {"path": leaf.path, "kind": leaf.kind, "dtype": leaf.dtype, "shape": list(leaf.shape), "bytes": leaf.nbytes}
    if leaf.shares is not None:
        row["shares"] = manifest.leaves[leaf.shares].path
    if leaf.path in lost:
        row["lost"] = True
    if leaf.path in values:
        row |= statistics(values[leaf.path])
        if math.prod(leaf.shape) == 1 and (leaf.kind == "tensor" or values[leaf.path].dtype.kind in "biufc"):
            row["value"] = values[leaf.path].item()
    return row


def _totals(leaves: list[dict[str, Any]]) -> dict[str, int]:
    """The number of leaves, of bytes and of parameters. Bytes that several leaves share count once."""
    stored = [row for row in leaves if "bytes" in row and "shares" not in row]
    parameters = sum(math.prod(row["shape"]) for row in stored if row["path"].startswith("params/"))
    return {"leaves": len(leaves), "bytes": sum(row["bytes"] for row in stored), "parameters": parameters}


# --- the output --------------------------------------------------------------------------------------------------------


def _print(about: dict[str, Any], leaves: list[dict[str, Any]]) -> None:
    sections = {name: about.pop(name, None) for name in ("config", "history", "environment", "metrics")}
    about["monitors"] = ", ".join(f"{name} ({mode})" for name, mode in about["monitors"].items())
    say("\n".join(f"{name:12}{value}" for name, value in about.items() if value != ""))
    for name, value in sections.items():
        if value:
            say(f"\n{name}\n{_indented(value)}")
    columns = ["leaf", "dtype", "shape", "size", "norm", "min", "max", "value"]
    say(f"\n{table(columns, [_cells(row) for row in leaves], right=columns[2:7])}")
    totals = _totals(leaves)
    say(
        f"\n{totals['leaves']} {'leaf' if totals['leaves'] == 1 else 'leaves'}, {size(totals['bytes'])}, "
        f"{totals['parameters']:,} parameters"
    )


def _indented(value: Any) -> str:
    try:
        lines = msgspec.yaml.encode(value).decode().splitlines()
    except RecursionError:
        lines = ["(too deep to be shown)"]
    return "\n".join(f"  {line}" for line in lines)


def _cells(row: dict[str, Any]) -> list[str]:
    kind = row.get("dtype", row["kind"]) if row["kind"] != "ndarray" else f"ndarray {row['dtype']}"
    shape = "x".join(map(str, row["shape"])) or "()" if "shape" in row else ""
    numbers = [number(row[name]) if name in row and "value" not in row else "" for name in ("norm", "min", "max")]
    return [row["path"], kind, shape, size(row["bytes"]) if "bytes" in row else "", *numbers, _value(row)]


def _value(row: dict[str, Any]) -> str:
    """A scalar's value, the shares of NaN and infinities, the leaf that is the same, and whether it is lost."""
    parts = []
    if "value" in row and row["kind"] != "NoneType":
        text = number(row["value"]) if isinstance(row["value"], float) else words(row["value"])
        parts.append(text if len(text) <= 60 else f"{text[:57]}...")
    parts += [f"{share:.3g} {name}" for share, name in ((row.get("nan"), "NaN"), (row.get("inf"), "infinite")) if share]
    parts += [f"is {row['shares']}"] if "shares" in row else []
    return ", ".join([*parts, *(["LOST"] if "lost" in row else [])])
