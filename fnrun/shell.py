"""An `nn.Module` as a function of its tensors.

Calling a module reads its tensors from slots: entries of each submodule's `_parameters` and `_buffers`. A `Shell` knows these slots. For the
length of a call it puts a state's tensors there, and then the module's own back. That costs less than `torch.func.functional_call`, which
looks the slots up by name at each call, and any module works unchanged.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

_locks: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()


class Shell:
    """The slots of `model`: parameters and buffers by name, tied ones in every place where they stand.

    `modes` are the train/eval modes of the submodules now; `run` sets them, so that what somebody does to the module later changes nothing.
    """

    def __init__(self, model: nn.Module) -> None:
        parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
        self.name = type(model).__name__
        self.params = tuple(parameters)
        self.trained = tuple(name for name, p in parameters.items() if p.requires_grad)
        self.buffers = tuple(buffers)
        self.modes = [(module, module.training) for module in model.modules()]
        self.eval_modes = [(module, False) for module, _ in self.modes]
        self.lock = _locks.setdefault(model, threading.RLock())
        self.device_type = next((t.device.type for t in (*parameters.values(), *buffers.values())), "cpu")
        index = {id(tensor): i for i, tensor in enumerate((*parameters.values(), *buffers.values()))}
        containers: list[dict[str, Any]] = [c for module in model.modules() for c in (module._parameters, module._buffers)]
        entries = [(container, key, tensor) for container in containers for key, tensor in container.items()]
        self._slots = [(container, key, index[id(tensor)]) for container, key, tensor in entries if tensor is not None]
        self._empty = [(container, key) for container, key, tensor in entries if tensor is None]
        # Recurrent layers keep a second list of their weights, which they make anew in a call that finds others in the slots.
        recurrent = [module.__dict__ for module in model.modules() if isinstance(module, nn.RNNBase)]
        self._lists = [(d, key) for d in recurrent for key in ("_flat_weights", "_flat_weight_refs") if key in d]
        self._buffer_slots = {i: (container, key) for container, key, i in self._slots if i >= len(self.params)}

    def tensors(self, what: str, tensors: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """`tensors` in the order of the model's names. Raises ValueError, with the names, where the two don't match."""
        names = self.params if what == "params" else self.buffers
        if len(tensors) != len(names) or any(name not in tensors for name in names):
            missing, extra = sorted(set(names) - set(tensors)), sorted(set(tensors) - set(names))
            raise ValueError(f"the state's {what} are not those of {self.name}: missing {missing}, unexpected {extra}")
        return [tensors[name] for name in names]

    def run(
        self, fn: Callable[[], Any], params: list[torch.Tensor], buffers: Mapping[str, torch.Tensor], *, train: bool
    ) -> tuple[Any, dict[str, torch.Tensor]]:
        """`fn()` while the module holds these tensors, and the buffers that it leaves behind; those passed in are never written to."""
        tensors = [*params, *(b.clone() for b in self.tensors("buffers", buffers))]
        modes = self.modes if train else self.eval_modes
        with self.lock:
            saved = [container[key] for container, key, _ in self._slots]
            lists = [container[key] for container, key in self._lists]
            changed = [(module, module.training) for module, mode in modes if module.training != mode]
            try:
                for container, key, i in self._slots:
                    container[key] = tensors[i]
                if changed:
                    for module, mode in modes:
                        module.training = mode
                result = fn()
                after = [self._buffer_slots[i] for i in range(len(params), len(tensors))]
                values = [container[key] for container, key in after]
            finally:
                for (container, key, _), tensor in zip(self._slots, saved, strict=True):
                    container[key] = tensor
                for container, key in self._empty:
                    container[key] = None
                for (container, key), value in zip(self._lists, lists, strict=True):
                    container[key] = value
                for module, mode in changed:
                    module.training = mode
        # All are new, also those that nobody wrote to: batch norm's kernels write without counting up `_version`, so one cannot tell.
        return result, {name: b.detach() if b.requires_grad else b for name, b in zip(self.buffers, values, strict=True)}


def call(
    model: nn.Module, params: Mapping[str, torch.Tensor], buffers: Mapping[str, torch.Tensor], *args: Any, train: bool = True, **kwargs: Any
) -> tuple[Any, dict[str, torch.Tensor]]:
    """`model(*args, **kwargs)` with these tensors in place of its own: the outputs, and the buffers after the call.

    Gradients flow to `params`. With `train` the submodules run in the modes in which they are, without in eval mode. Neither the module nor
    what is passed in changes. Raises ValueError where names are missing or unexpected.

    >>> model = nn.BatchNorm1d(2)
    >>> params, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    >>> outputs, after = call(model, params, buffers, torch.ones(4, 2))
    >>> int(after["num_batches_tracked"]), int(model.num_batches_tracked)
    (1, 0)
    """
    shell = Shell(model)
    return shell.run(lambda: model(*args, **kwargs), shell.tensors("params", params), buffers, train=train)
