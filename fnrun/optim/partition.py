"""Parameter groups by labels: an optimizer for each label, and the usual rules for weight decay and learning rates."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import optree
from torch import Tensor

from fnrun.core.reports import collect, report
from fnrun.core.tree import join
from fnrun.core.words import a, kind
from fnrun.optim.base import Optimizer, Transform
from fnrun.optim.hyper import Hyper
from fnrun.schedules import multiply

#: A pytree of labels with the structure of the parameters, or a function of a leaf's path and the leaf (of its name, shape and dtype).
Labels = Any

#: From the leaves by path, in the order of the model, to a factor on the learning rate of each.
Multipliers = Callable[[Mapping[str, Tensor]], Mapping[str, float]]


class _Groups:
    """The leaves by label; computed again only if names, shapes or dtypes change."""

    def __init__(self, label_all: Callable[[Any, Any, list[str], list[Any]], list[Any]]) -> None:
        self.label_all = label_all
        self.last: Any = None

    def of(self, params: Any) -> tuple[list[Any], Any, list[str], dict[Any, list[int]]]:
        """The leaves of `params`, their structure and paths, and the places of each label's leaves."""
        leaves, spec = optree.tree_flatten(params, none_is_leaf=True)
        shapes = [(getattr(leaf, "shape", None), getattr(leaf, "dtype", None)) for leaf in leaves]
        last = self.last
        if last is None or last[0] != spec or last[1] != shapes:
            paths = [join(path) for path in optree.treespec_paths(spec)]
            groups: dict[Any, list[int]] = {}
            labels = self.label_all(params, spec, paths, leaves)
            for i in _written(params, paths):
                groups.setdefault(labels[i], []).append(i)
            self.last = last = (spec, shapes, paths, groups)
        return leaves, spec, last[2], last[3]


def _written(params: Any, paths: list[str]) -> list[int]:
    """The places of the leaves in a dictionary's order of insertion, that of the model; optree sorts by name."""
    places = {path: i for i, path in enumerate(paths)}
    names = [join((name,)) for name in params] if isinstance(params, Mapping) else []
    return [places[name] for name in names] if places.keys() == set(names) else list(range(len(paths)))


def _labelled(labels: Labels) -> _Groups:
    def label_all(params: Any, spec: Any, paths: list[str], leaves: list[Any]) -> list[Any]:
        return [labels(path, leaf) for path, leaf in zip(paths, leaves, strict=True)] if callable(labels) else spec.flatten_up_to(labels)

    return _Groups(label_all)


def partition(labels: Labels, optimizers: Mapping[str, Optimizer]) -> Optimizer:
    """One optimizer for each label. `labels` is a pytree of labels or a function `(path, tensor) -> label` (of name, shape and dtype).

    Each optimizer sees its leaves alone, as a dictionary by path: a norm is that of the group. The state is a dictionary by label. Reports
    are prefixed with the label (`decay/lr`).

    Raises ValueError for a label without an optimizer, and for an optimizer that scales the loss.

    >>> import torch
    >>> from fnrun import optim
    >>> optimizer = optim.partition(optim.decay_labels, {"decay": optim.adamw(1e-3), "no_decay": optim.adamw(1e-3, weight_decay=0.0)})
    >>> state = optimizer.init({"0.weight": torch.zeros(2, 2), "0.bias": torch.zeros(2)})
    >>> sorted(optim.hyperparams(state))
    ['decay/lr_scale', 'no_decay/lr_scale']
    """
    if not isinstance(optimizers, Mapping):
        raise TypeError(
            f"partition takes labels and then a dict of optimizers by label, {{'decay': optim.adamw(1e-3)}}, and not {kind(optimizers)}"
        )
    for label, optimizer in optimizers.items():
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"partition: {label!r} is {a(type(optimizer).__name__)}, not an Optimizer: put transforms into a chain with one"
            )
        if optimizer.loss_scale is not None:
            raise ValueError(f"partition: {label!r} scales the loss, which is one for all: put dynamic_loss_scale around the partition")

    def optimizer_of(label: Any) -> Optimizer:
        if label not in optimizers:
            raise ValueError(f"partition: no optimizer for label {label!r}; there are: {', '.join(map(repr, optimizers))}")
        return optimizers[label]

    return _partition(_labelled(labels), optimizer_of, list(optimizers), list(optimizers.values()))


def _partition(
    grouped: _Groups,
    optimizer_of: Callable[[Any], Optimizer],
    labels: list[str] | None,
    like: Sequence[Optimizer],
    named: Callable[[Any, str], str | None] = "{}/{}".format,
) -> Optimizer:
    """The optimizer of groups.

    - `labels`: all labels, None if they depend on the parameters.
    - `like`: the optimizers, or one that stands for all.
    - `named`: `(label, name) -> name`, for reports; None omits one.
    """

    def order(groups: Mapping[Any, Any]) -> list[Any]:
        for label in groups:
            optimizer_of(label)
        return sorted(groups if labels is None else labels)

    def init(params: Any, /) -> dict[str, Any]:
        leaves, _, paths, groups = grouped.of(params)
        return {label: optimizer_of(label).init({paths[i]: leaves[i] for i in groups.get(label, ())}) for label in order(groups)}

    def update(grads: Any, state: Any, params: Any, /, *, key: Any = None, step: int | None = None) -> Any:
        leaves, spec, paths, groups = grouped.of(params)
        flat, states = spec.flatten_up_to(grads), {}
        for label in order(groups):
            members = groups.get(label, ())
            chosen = ({paths[i]: flat[i] for i in members}, state[label], {paths[i]: leaves[i] for i in members})
            new, states[label] = _apart(label, optimizer_of(label).update, chosen, key, step, named)
            for i in members:
                leaves[i] = new[paths[i]]
        return spec.unflatten(leaves), states

    def eval_params(state: Any, params: Any) -> Any:
        leaves, spec, paths, groups = grouped.of(params)
        for label, members in groups.items():
            fn = optimizer_of(label).eval_params
            if fn is not None:
                new = fn(state[label], {paths[i]: leaves[i] for i in members})
                for i in members:
                    leaves[i] = new[paths[i]]
        return spec.unflatten(leaves)

    return Optimizer(
        init,
        update,
        eval_params=eval_params if any(optimizer.eval_params is not None for optimizer in like) else None,
        donatable=all(optimizer.donatable for optimizer in like),
        keyed=any(optimizer.keyed for optimizer in like),
    )


def _apart(
    label: Any, update: Any, arguments: tuple[Any, Any, Any], key: Any, step: int | None, named: Callable[[Any, str], str | None]
) -> Any:
    """One group's update, with a derived key and renamed reports."""
    with collect() as reports:
        result = update(*arguments, key=None if key is None else key.fold_in("partition", label), step=step)
    for name, value in reports.items():
        if (called := named(label, name)) is not None:
            report(called, value)
    return result


def masked(inner: Any, mask: Labels) -> Any:
    """A transform (or an optimizer) for some of the leaves; the others pass unchanged.

    `mask` is a pytree of bools or a function `(path, tensor) -> bool` (of name, shape and dtype).

    >>> from fnrun import optim
    >>> decay = optim.masked(optim.add_decayed_weights(0.1), lambda path, p: p.ndim > 1)
    """
    grouped = _labelled(mask)

    def init(params: Any, /) -> Any:
        leaves, _, paths, groups = grouped.of(params)
        return inner.init({paths[i]: leaves[i] for i in groups.get(True, ())})

    def update(grads: Any, state: Any, params: Any, /, *, key: Any = None, step: int | None = None) -> Any:
        leaves, spec, paths, groups = grouped.of(params)
        flat, members = spec.flatten_up_to(grads), groups.get(True, ())
        chosen = {paths[i]: leaves[i] for i in members}
        new, state = inner.update({paths[i]: flat[i] for i in members}, state, chosen, key=key, step=step)
        result = flat if isinstance(inner, Transform) else leaves
        for i in members:
            result[i] = new[paths[i]]
        return spec.unflatten(result), state

    if isinstance(inner, Transform):
        return Transform(init, update, keyed=inner.keyed, donatable=inner.donatable)
    if not isinstance(inner, Optimizer) or inner.loss_scale is not None or inner.eval_params is not None:
        raise TypeError("masked takes a transform or a plain optimizer: put loss scaling and schedule-free around or into a partition")
    return Optimizer(init, update, donatable=inner.donatable, keyed=inner.keyed)


# --- ready rules --------------------------------------------------------------------------------------------------------


def decay_labels(path: str, p: Tensor) -> str:
    """`"decay"` for weights, `"no_decay"` for norms and biases: leaves of fewer than two dimensions."""
    return "decay" if p.ndim > 1 else "no_decay"


def name_multipliers(factors: Mapping[str, float]) -> Multipliers:
    """Factors by name: a leaf has that of the longest pattern that occurs in its path, or 1.

    Raises ValueError for a pattern that occurs in no path, with similar names.
    """

    def rule(leaves: Mapping[str, Tensor]) -> dict[str, float]:
        for pattern in factors:
            _found(pattern, [path for path in leaves if pattern in path], leaves)
        patterns = sorted(factors, key=lambda pattern: (-len(pattern), pattern))
        return {path: next((factors[p] for p in patterns if p in path), 1.0) for path in leaves}

    return rule


#: Block numbers in the usual names: blocks.3, layers.3, encoder.layer.3, h.3, stages.3, layer3.
BLOCKS = r"(?:^|\.)(?:blocks?|layers?|h|stages?)\.?(\d+)(?:\.|$)"

#: Block numbers in a model without such names: resblocks.3, encoder_layer_3.
OTHER_BLOCKS = r"(?:^|\.)\w*(?:block|layer|stage)s?[._]?(\d+)(?:\.|$)"

#: Parts of a path that make it a head, as does one that ends in "head" or "classifier".
HEAD = ("heads", "cls", "score", "fc", "proj_out", "text_projection", "logit_scale", "logit_bias", "embed_out", "class_embed", "bbox_embed")

#: Parts of a path that make it an input: many models make their token embeddings last.
_INPUT = re.compile(r"embed|position|tokens?$|(?:^|_)(?:stem|pos|wte|wpe)(?:_|$)")


def layer_decay(rate: float, blocks: str = BLOCKS, head: Sequence[str] = HEAD) -> Multipliers:
    """Layer-wise decay of learning rates: the factor is `rate` for the last block, `rate ** 2` for the block before, and so on.

    In the order of the model's parameters:

    - leaves before the first block, and embeddings anywhere, have `rate` times the first block's factor;
    - a leaf between two blocks has the factor of the former;
    - leaves after the last block (norms, poolers, projections), and heads anywhere, have 1.

    The blocks under one module are a tower. A model may have several (text and images, encoder and decoder), each with its own count. A
    leaf outside of blocks belongs to the tower with which it shares more of its path.

    - `rate`: the factor from block to block.
    - `blocks`: a regular expression whose first group is a block's number.
    - `head`: the parts of a path that make a leaf a head.

    Raises ValueError where no path has a block.

    >>> names = ["patch_embed.weight", "blocks.0.weight", "blocks.1.weight", "norm.weight", "head.weight"]
    >>> list(layer_decay(0.5)(dict.fromkeys(names, Tensor())).values())
    [0.125, 0.25, 0.5, 1.0, 1.0]

    Source: Clark et al. 2020 (ELECTRA), Bao et al. 2021 (BEiT).
    """

    def rule(leaves: Mapping[str, Tensor]) -> dict[str, float]:
        towers = _towers(blocks, list(leaves), head)
        if not towers and blocks == BLOCKS:
            towers = _towers(OTHER_BLOCKS, list(leaves), head)
        _found(blocks, towers, leaves)
        below: dict[str, int] = {}  # the exponent of each leaf
        for tower in towers:
            below.update({path: len(tower.order) - i for i, block in enumerate(tower.order) for path in tower.members[block]})
        for place, path in enumerate(leaves):
            if path not in below:
                below[path] = _below(path, place, towers, below, list(leaves), head)
        return {path: rate ** below[path] for path in leaves}

    return rule


class _Tower:
    """The blocks under one module, by list and number."""

    def __init__(self, parent: list[str]) -> None:
        self.parent = parent
        self.members: dict[tuple[str, int], list[str]] = {}

    @property
    def order(self) -> list[tuple[str, int]]:
        """The blocks in order: lists as they come, within a list by number."""
        lists = list(dict.fromkeys(name for name, _ in self.members))
        return sorted(self.members, key=lambda block: (lists.index(block[0]), block[1]))


def _towers(blocks: str, paths: list[str], head: Sequence[str]) -> list[_Tower]:
    towers: dict[str, _Tower] = {}
    for path in paths:
        match = re.search(blocks, path)
        if match is None:
            continue
        parts = path[: match.start(1)].rstrip("._").split(".")
        parent = parts[:-1]
        if _in_head(parent, head) or _in_input(parent, head):
            continue
        towers.setdefault(".".join(parent), _Tower(parent)).members.setdefault((parts[-1], int(match[1])), []).append(path)
    return list(towers.values())


def _below(path: str, place: int, towers: list[_Tower], below: Mapping[str, int], paths: list[str], head: Sequence[str]) -> int:
    """The exponent of a leaf outside of all blocks."""
    parts = path.split(".")
    if _in_head(parts, head):
        return 0
    shared = [
        sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(tower.parent, parts, strict=False))) for tower in towers
    ]
    nearest = [tower for tower, length in zip(towers, shared, strict=True) if length == max(shared)]
    inside = {path for tower in nearest for members in tower.members.values() for path in members}
    lowest = max(len(tower.members) for tower in nearest) + 1
    before = [other for other in paths[:place] if other in inside]
    if _in_input(parts, head) or not before:
        return lowest
    return below[before[-1]] if any(other in inside for other in paths[place:]) else 0


def _in_head(parts: Sequence[str], head: Sequence[str]) -> bool:
    named = any(part in head or part.endswith(("head", "classifier")) for part in parts)
    return named or parts[-1:] == ["proj"]  # a parameter of the model itself, which comes before its submodules


def _in_input(parts: Sequence[str], head: Sequence[str]) -> bool:
    return any(_INPUT.search(part) for part in parts) and not _in_head(parts, head)


def _found(pattern: str, matching: Iterable[Any], leaves: Mapping[str, Tensor]) -> None:
    if not any(True for _ in matching):
        parts = sorted({part for path in leaves for part in (path, path.rpartition(".")[0], *path.split(".")) if part})
        near = difflib.get_close_matches(pattern, parts, n=5, cutoff=0.4) or sorted(leaves)[:5]
        raise ValueError(f"pattern {pattern!r} matches no parameter; near names: {', '.join(near)}")


def scaled_lr(make: Callable[[Hyper], Optimizer], lr: Any, multipliers: Multipliers) -> Optimizer:
    """`make(lr · factor)` for each group of leaves with the same factor.

    - `make`: `lr -> optimizer`.
    - `lr`: a number or a schedule.
    - `multipliers`: `name_multipliers`, `layer_decay`, or another function `leaves by path -> factor by path`.

    The groups are a partition with the labels `x0.1`, `x1` and so on. The reported `lr` is that of the largest factor.

    >>> import torch
    >>> from fnrun import optim
    >>> optimizer = optim.scaled_lr(lambda lr: optim.adamw(lr), 1e-3, optim.name_multipliers({"backbone": 0.1}))
    >>> state = optimizer.init({"backbone.weight": torch.zeros(2, 2), "head.weight": torch.zeros(2, 2)})
    >>> sorted(optim.hyperparams(state))
    ['x0.1/lr_scale', 'x1/lr_scale']
    """
    probe = make(lr)
    if probe.loss_scale is not None:
        raise ValueError("dynamic_loss_scale goes around scaled_lr, not into it: the loss has one scale for all groups")
    made: dict[str, Optimizer] = {}

    def label_all(params: Any, spec: Any, paths: list[str], leaves: list[Any]) -> list[str]:
        factors = multipliers({paths[i]: leaves[i] for i in _written(params, paths)})
        for factor in factors.values():
            if (label := _times(factor)) not in made:
                made[label] = make(multiply(lr, factor) if callable(lr) else lr * factor)
        return [_times(factors[path]) for path in paths]

    def named(label: str, name: str) -> str | None:
        if name != "lr":
            return f"{label}/{name}"
        return name if float(label[1:]) == max(float(other[1:]) for other in made) else None

    return _partition(_Groups(label_all), lambda label: made[label], None, [probe], named)


def _times(factor: float) -> str:
    """The label of a factor, as short as it is unique."""
    short = f"{factor:g}"
    return f"x{short if float(short) == factor else repr(factor)}"
