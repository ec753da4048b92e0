"""Where the tensors of a tree are: on another device, or written into tensors that somebody has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import optree
import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from fnrun.core import key as rng, tree
from fnrun.core.words import kind


def moved(value: Any, device: Any) -> Any:
    """`value` with its tensors on a device; those that are one stay one.

    What a struct's `on_host()` names stays in the host's memory, if it is there.
    """
    host: set[int] = set()

    def look(node: Any) -> bool:
        if hasattr(type(node), "on_host"):
            host.update(id(leaf) for leaf in tree.leaves(node.on_host()) if isinstance(leaf, Tensor) and leaf.is_cpu)
        return False

    optree.tree_leaves(value, is_leaf=look)
    new: dict[int, Tensor] = {}

    def move(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or id(leaf) in host:
            return leaf
        if id(leaf) not in new:
            new[id(leaf)] = leaf.to(device)
        return new[id(leaf)]

    return tree.map(move, value)


def check_device(who: str, device: Any, more: Any) -> None:
    """Raise TypeError for what is no device, or for a device and something else."""
    if isinstance(device, (str, torch.device)) or (isinstance(device, int) and not isinstance(device, bool)):
        if not more:
            return
        device = next(iter(more))
    dtype = isinstance(device, torch.dtype) or device == "dtype"
    hint = ". A state of another dtype is that of another model: TrainState.create(model.to(dtype), optimizer)" if dtype else ""
    raise TypeError(f"{who} takes a device and nothing else, and not {kind(device)}{hint}")


def write(who: str, targets: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Write `values` into the `targets` of the same names. Raises ValueError, before anything is written, with all that does not fit."""
    with rng.ambient_lock:  # not while another thread has other tensors in the module
        wrong = [f"missing {name}" for name in targets if name not in values]
        wrong += [f"unexpected {name}" for name in values if name not in targets]
        for name, target in targets.items():
            if name in values and (why := _unfit(target, values[name])):
                wrong.append(f"{name} {why}")
        if wrong:
            more = f"\n  and {len(wrong) - 20} more" if len(wrong) > 20 else ""
            raise ValueError(f"{who}: what is loaded does not fit, so nothing is:\n  " + "\n  ".join(wrong[:20]) + more)
        with torch.no_grad():
            for name, target in targets.items():
                target.copy_(values[name])


def _unfit(target: Tensor, value: Any) -> str:
    """Why `value` cannot be written into `target`; '' where it can."""
    if not isinstance(value, Tensor):
        return f"is {kind(value)} and no tensor"
    if is_lazy(target):
        return "has no shape yet in the model: run the lazy module once on an example before"
    if value.shape != target.shape:
        return f"has the shape {tuple(value.shape)}, and in the model {tuple(target.shape)}"
    if value.dtype != target.dtype:
        return f"is {_dtype(value)}, and in the model {_dtype(target)}: make the model that before, model.to(torch.{_dtype(value)})"
    if value.layout != target.layout:
        return f"is {value.layout}, and in the model {target.layout}"
    if type(value) is not Tensor and not isinstance(target, type(value)):
        return f"is {kind(value)}, and in the model {kind(target)}"
    if value.is_meta:
        return "is on the device meta, where it has no values"
    if target.is_meta:
        return "is on the device meta in the model: give it memory before, model.to_empty(device='cpu')"
    if target.is_inference() and not torch.is_inference_mode_enabled():
        return "was made under torch.inference_mode() in the model, and cannot be written to outside of it"
    if target.layout == torch.strided and torch._debug_has_internal_overlap(target) == 1:  # pyright: ignore[reportPrivateImportUsage]
        return "is expanded in the model, several elements in one place of memory: give the module a clone of it"
    return ""


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
