"""Parameter groups as labels: which leaf goes to which optimizer, and the rules that people write by hand."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import optree
import torch
from torch import Tensor

from fnrun.optim.base import Optimizer, Transform
from fnrun.optim.hyper import Hyper
from fnrun.reports import collect, report
from fnrun.schedules import multiply
from fnrun.tree import join

#: A pytree of labels with the structure of the parameters, or a function of a leaf's path and the leaf (of its name, shape and dtype).
Labels = Any

#: From the leaves by path to a factor on the learning rate of each.
Multipliers = Callable[[Mapping[str, Tensor]], Mapping[str, float]]


class _Groups:
    """The leaves by label; worked out anew only when names, shapes or dtypes change."""

    def __init__(self, label_all: Callable[[Any, Any, list[str], list[Any]], list[Any]]) -> None:
        self.label_all = label_all
        self.last: Any = None

    def of(self, params: Any) -> tuple[list[Any], Any, list[str], dict[Any, list[int]]]:
        """The leaves of `params`, their structure and paths, and for each label the places of its leaves."""
        leaves, spec = optree.tree_flatten(params, none_is_leaf=True)
        if self.last is not None and torch.compiler.is_compiling():  # which cannot compare structures; they are those that it began with
            return leaves, spec, self.last[2], self.last[3]
        shapes = [(getattr(leaf, "shape", None), getattr(leaf, "dtype", None)) for leaf in leaves]
        last = self.last
        if last is None or last[0] != spec or last[1] != shapes:
            paths = [join(path) for path in optree.treespec_paths(spec)]
            groups: dict[Any, list[int]] = {}
            for i, label in enumerate(self.label_all(params, spec, paths, leaves)):
                groups.setdefault(label, []).append(i)
            self.last = last = (spec, shapes, paths, groups)
        return leaves, spec, last[2], last[3]


def _labelled(labels: Labels) -> _Groups:
    def label_all(params: Any, spec: Any, paths: list[str], leaves: list[Any]) -> list[Any]:
        return [labels(path, leaf) for path, leaf in zip(paths, leaves, strict=True)] if callable(labels) else spec.flatten_up_to(labels)

    return _Groups(label_all)


def partition(labels: Labels, optimizers: Mapping[str, Optimizer]) -> Optimizer:
    """One optimizer for each label. `labels` is a pytree of labels or a function `(path, tensor) -> label` (of name, shape and dtype).

    Each optimizer sees its leaves alone, as a dictionary by path: a norm is that of the group. The state is a dictionary by label. What an
    optimizer reports gets the label before its name (`decay/lr`). Raises ValueError for a label without an optimizer.

    >>> import torch
    >>> from fnrun import optim
    >>> optimizer = optim.partition(optim.decay_labels, {"decay": optim.adamw(1e-3), "no_decay": optim.adamw(1e-3, weight_decay=0.0)})
    >>> state = optimizer.init({"0.weight": torch.zeros(2, 2), "0.bias": torch.zeros(2)})
    >>> sorted(optim.hyperparams(state))
    ['decay/lr_scale', 'no_decay/lr_scale']
    """
    for label, optimizer in optimizers.items():
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"partition: {label!r} is a {type(optimizer).__name__}, not an Optimizer: put transforms into a chain with one")
        if optimizer.scale_loss is not None:
            raise ValueError(f"partition: {label!r} scales the loss, which is one for all: put dynamic_loss_scale around the partition")

    def optimizer_of(label: Any) -> Optimizer:
        if label not in optimizers:
            raise ValueError(f"partition: no optimizer for label {label!r}; there are: {', '.join(map(repr, optimizers))}")
        return optimizers[label]

    return _partition(_labelled(labels), optimizer_of, list(optimizers), list(optimizers.values()))


def _partition(
    grouped: _Groups, optimizer_of: Callable[[Any], Optimizer], labels: list[str] | None, like: Sequence[Optimizer]
) -> Optimizer:
    """`labels` are those that are known; `like` the optimizers, or one that all will be like."""

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
            new, states[label] = _apart(label, optimizer_of(label).update, chosen, key, step)
            for i in members:
                leaves[i] = new[paths[i]]
        return spec.unflatten(leaves), states

    def eval_params(state: Any, params: Any) -> Any:
        leaves, spec, paths, groups = grouped.of(params)
        for label, members in groups.items():
            own = optimizer_of(label).eval_params
            if own is not None:
                new = own(state[label], {paths[i]: leaves[i] for i in members})
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


def _apart(label: Any, update: Any, arguments: tuple[Any, Any, Any], key: Any, step: int | None) -> Any:
    """One group's update: with a key of its own, and its reports under its label."""
    if torch.compiler.is_compiling():  # which can follow neither
        return update(*arguments, key=key, step=step)
    with collect() as reports:
        result = update(*arguments, key=None if key is None else key.fold_in("partition", label), step=step)
    for name, value in reports.items():
        report(f"{label}/{name}", value)
    return result


def masked(inner: Any, mask: Labels) -> Any:
    """A transform (or an optimizer) for some of the leaves; the rest passes untouched.

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
    if not isinstance(inner, Optimizer) or inner.scale_loss is not None or inner.eval_params is not None:
        raise TypeError("masked takes a transform or a plain optimizer: put loss scaling and schedule-free around or into a partition")
    return Optimizer(init, update, donatable=inner.donatable, keyed=inner.keyed)


# --- ready rules --------------------------------------------------------------------------------------------------------


def decay_labels(path: str, p: Tensor) -> str:
    """`"decay"` for weights, `"no_decay"` for norms and biases: leaves of fewer than two dimensions."""
    return "decay" if p.ndim > 1 else "no_decay"


def name_multipliers(factors: Mapping[str, float]) -> Multipliers:
    """Factors by name: a leaf takes that of the longest pattern that occurs in its path, or 1.

    Raises ValueError for a pattern that occurs in no path, with the names that come near.
    """

    def rule(leaves: Mapping[str, Tensor]) -> dict[str, float]:
        for pattern in factors:
            _found(pattern, [path for path in leaves if pattern in path], leaves)
        patterns = sorted(factors, key=lambda pattern: (-len(pattern), pattern))
        return {path: next((factors[p] for p in patterns if p in path), 1.0) for path in leaves}

    return rule


#: Where block numbers stand in the names of transformers and ResNets: blocks.3, layers.3, encoder.layer.3, h.3, stages.3, layer3.
BLOCKS = r"(?:^|\.)(?:blocks?|layers?|h|stages?)\.?(\d+)(?:\.|$)"


#: Where the names of common models put what comes after the last block.
HEAD = ("head", "heads", "lm_head", "classifier", "cls", "score", "fc", "norm", "fc_norm", "ln_f", "ln_post", "final_layer_norm")


def layer_decay(rate: float, blocks: str = BLOCKS, head: Sequence[str] = HEAD) -> Multipliers:
    """Factors that fall by `rate` from block to block towards the input: 1 for the head, `rate` for the last block, and so on.

    A path that `blocks` (a regular expression whose first group is the block's number) finds belongs to that block; of the rest, one whose
    first part is in `head` to the head, any other to the input, below the first block. Raises ValueError where no path has a block.
    """

    def rule(leaves: Mapping[str, Tensor]) -> dict[str, float]:
        matches = {path: re.search(blocks, path) for path in leaves}
        numbers = {path: int(match[1]) for path, match in matches.items() if match}
        _found(blocks, numbers, leaves)
        depths = {number: i + 1 for i, number in enumerate(sorted(set(numbers.values())))}
        top = len(depths) + 1
        return {path: rate ** (top - (depths[numbers[path]] if path in numbers else top if _is_head(path, head) else 0)) for path in leaves}

    return rule


def _is_head(path: str, head: Sequence[str]) -> bool:
    return any(part in head for part in path.split(".")[:-1]) or path in head


def _found(pattern: str, matching: Iterable[str], leaves: Mapping[str, Tensor]) -> None:
    if not any(True for _ in matching):
        parts = sorted({part for path in leaves for part in (path, path.rpartition(".")[0], *path.split(".")) if part})
        near = difflib.get_close_matches(pattern, parts, n=5, cutoff=0.4) or sorted(leaves)[:5]
        raise ValueError(f"pattern {pattern!r} matches no parameter; near names: {', '.join(near)}")


def scaled_lr(make: Callable[[Hyper], Optimizer], lr: Any, multipliers: Multipliers) -> Optimizer:
    """`make(lr · factor)` for each group of leaves with the same factor: `lr` is a number or a schedule.

    The groups are a partition labelled `x0.1`, `x1` and so on; the rules are `name_multipliers` and `layer_decay`.

    >>> import torch
    >>> from fnrun import optim
    >>> optimizer = optim.scaled_lr(lambda lr: optim.adamw(lr), 1e-3, optim.name_multipliers({"backbone": 0.1}))
    >>> state = optimizer.init({"backbone.weight": torch.zeros(2, 2), "head.weight": torch.zeros(2, 2)})
    >>> sorted(optim.hyperparams(state))
    ['x0.1/lr_scale', 'x1/lr_scale']
    """
    probe = make(lr)
    if probe.scale_loss is not None:
        raise ValueError("dynamic_loss_scale goes around scaled_lr, not into it: the loss has one scale for all groups")
    made: dict[str, Optimizer] = {}

    def label_all(params: Any, spec: Any, paths: list[str], leaves: list[Any]) -> list[str]:
        factors = multipliers(dict(zip(paths, leaves, strict=True)))
        for factor in factors.values():
            if (label := _times(factor)) not in made:
                made[label] = make(multiply(lr, factor) if callable(lr) else lr * factor)
        return [_times(factors[path]) for path in paths]

    return _partition(_Groups(label_all), lambda label: made[label], None, [probe])


def _times(factor: float) -> str:
    """A label of its own for each factor, as short as it can be."""
    short = f"{factor:g}"
    return f"x{short if float(short) == factor else repr(factor)}"
