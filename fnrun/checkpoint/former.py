"""Earlier formats: the one table of their names, and their manifests migrated to the format of today.

Formats 1 and 2 name a struct by module and class, a frame holds the name of its loop in one text, and digests are SHA-256.
"""

from __future__ import annotations

import re
from typing import Any

from fnrun.checkpoint.manifest import constant, encode_constant

_STRUCTS = {  # by their module in formats 1 and 2 and by their package in format 3
    ("fnrun.state", "fnrun"): "Cursor Frame Position TrainState",
    ("fnrun.rng", "fnrun"): "Key",
    ("fnrun.optim.from_torch", "fnrun.optim"): "TorchState",
    ("fnrun.optim.hyper", "fnrun.optim"): "Hyperparams",
    ("fnrun.optim.rule", "fnrun.optim"): "Misses RuleState",
    ("fnrun.optim.transforms", "fnrun.optim"): "TraceState",
    ("fnrun.optim.wrappers", "fnrun.optim"): "AccumulateState FreezeState LookaheadState ScaleState SkipState",
    ("fnrun.metrics", "fnrun.loops"): "Means Totals",
    ("fnrun.metrics", "fnrun.metrics"): "AUROC Chunks ClassCounts Confusion ExactAUROC Last Max Mean Min Moments Pearson Perplexity "
    "Quantiles R2 RootMean Sum TopK TorchmetricsInputs TorchmetricsState",
    ("fnrun.observers.media", "fnrun.observers"): "Histogram Image Text",
}
#: The structs of formats 1 and 2 by the names of format 3. Whoever renames one later says so where it is declared (`formerly=`).
STRUCTS = {f"{module}:{name}": f"{package}.{name}" for (module, package), names in _STRUCTS.items() for name in names.split()}

#: `epoch_loop /a/train #2`: the kind, the path, and the number of the loop in its call where it is not the first.
_LOOP = re.compile(r"(?P<kind>\S*)( /?(?P<path>.*?))?( #(?P<nth>[2-9]|[1-9]\d+))?", re.DOTALL)


def migrate(raw: dict[str, Any]) -> dict[str, Any]:
    """A manifest of an earlier format, as JSON, migrated to this one."""
    if raw["format"] == 1:  # one monitored metric at most; and orbax's OCDBT, which tells its arrays apart from ours by itself
        monitor = raw.pop("monitor", None)
        raw = {**raw, "format": 2, "monitors": {} if monitor is None else {monitor: raw.get("mode", "min")}}
    if raw["format"] == 2:
        raw = _in_pieces(raw)
        structure, leaves = _renamed(raw["structure"], raw["leaves"])
        raw = {**raw, "format": 3, "structure": structure, "leaves": leaves}
    return raw


_ARRAY_FILE = re.compile(r"arrays/state/(\d{5})/([^/]+)")


def _in_pieces(raw: dict[str, Any]) -> dict[str, Any]:
    """A manifest of format 2 with each leaf in one piece: it had one sha256, in the array of that number, and each file another.

    The arrays of format 1 are in files of orbax: a piece names the directory of its array.
    """
    names = {int(place[1]): name for name in raw.get("files", {}) if (place := _ARRAY_FILE.fullmatch(name)) and place[2] != ".zarray"}
    leaves = []
    for leaf in raw["leaves"]:
        leaf = dict(leaf)
        sha256, array, offset = leaf.pop("sha256", ""), leaf.pop("array", None), leaf.pop("offset", None)
        if array is not None:
            file = names.get(array, f"arrays/state/{array:05d}")
            leaf["pieces"] = [{"file": file, "digest": f"sha256:{sha256}", "offset": offset or 0}]
        leaves.append(leaf)
    files = {name: {"size": file["size"], "digest": f"sha256:{file['sha256']}"} for name, file in raw.get("files", {}).items()}
    return {**raw, "leaves": leaves, "files": files}


def _renamed(structure: Any, leaves: list[dict[str, Any]]) -> tuple[Any, list[dict[str, Any]]]:
    """Structs under their names of today, and frames with fields. Leaves are numbered in the order of the structure."""
    made: list[dict[str, Any]] = []
    number: dict[int, int] = {}

    def walk(node: Any, depth: int = 0) -> Any:
        if not isinstance(node, dict):
            if node in number:
                raise ValueError("the structure does not name each leaf once")
            number[node] = len(made)
            made.append(leaves[node])
            return number[node]
        family, _, name = node["kind"].partition(" ")
        if family != "struct" or name not in STRUCTS:
            return {**node, "children": [walk(child, depth + 1) for child in node["children"]]}
        keys, children = list(node.get("keys", [])), list[Any]()
        for key, child in zip(node.get("keys", []), node["children"], strict=True):
            if (name, key) == ("fnrun.state:Frame", "loop"):
                keys[len(children) : len(children) + 1] = ("kind", "path", "nth")
                children += named(child)
                continue
            begin = len(made)
            children.append(walk(child, depth + 1))
            if (name, key) == ("fnrun.state:Cursor", "memo"):
                keys[keys.index("memo")] = "loader_state"
                for leaf in range(begin, len(made)):
                    parts = made[leaf]["path"].split("/")
                    made[leaf] = {**made[leaf], "path": "/".join([*parts[:depth], "loader_state", *parts[depth + 1 :]])}
        return {**node, "kind": f"struct {STRUCTS[name]}", "keys": keys, "children": children}

    def named(loop: int) -> list[int]:
        old = leaves[loop]
        found = _LOOP.fullmatch(constant(old["value"]))
        assert found is not None  # whatever the text is
        fields = {"kind": found["kind"], "path": found["path"] or "", "nth": int(found["nth"] or 1) - 1}
        number[loop] = len(made)
        for field, value in fields.items():
            path = old["path"].removesuffix("loop") + field
            made.append({"path": path, "kind": type(value).__name__, "value": encode_constant(value)})
        return [*range(number[loop], len(made))]

    structure = walk(structure)
    if set(number) != set(range(len(leaves))):
        raise ValueError("the structure does not name each leaf once")
    return structure, [{**leaf, "shares": number[leaf["shares"]]} if leaf.get("shares") is not None else leaf for leaf in made]
