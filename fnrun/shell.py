"""An `nn.Module` as a function of its tensors.

Calling a module reads its tensors from slots: entries of each submodule's `_parameters` and `_buffers`. A `Shell` knows these slots. For the
length of a call it puts a state's tensors there, and then the module's own back. That costs less than `torch.func.functional_call`, which
looks the slots up by name at each call, and any module works unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from fnrun import rng
from fnrun.state import buffers_of


class Shell:
    """The slots of `model`: parameters and buffers by name, tied ones in every place where they stand.

    `modes` are the train/eval modes of the submodules now; `run` sets them, so that what somebody does to the module later changes nothing.
    """

    def __init__(self, model: nn.Module) -> None:
        parameters, buffers = dict(model.named_parameters()), buffers_of(model)
        named = {**parameters, **buffers}
        self.name = type(model).__name__
        self.params = tuple(parameters)
        self.trained = tuple(name for name, p in parameters.items() if p.requires_grad)
        self.buffers = tuple(buffers)
        self.modes = [(module, module.training) for module in model.modules()]
        self.eval_modes = [(module, False) for module, _ in self.modes]
        self.device_type = next((t.device.type for t in named.values()), "cpu")
        index = {id(tensor): i for i, tensor in enumerate(named.values())}
        self._slots: list[tuple[dict[str, Any], str, int]] = []
        self._empty: list[tuple[dict[str, Any], str, str]] = []
        for path, module in model.named_modules():
            for container in (module._parameters, module._buffers):
                for key, tensor in container.items():
                    if tensor is None:
                        self._empty.append((container, key, f"{path}.{key}".lstrip(".")))
                    else:
                        self._slots.append((container, key, index[id(tensor)]))
        places = {i: (container, key) for container, key, i in self._slots}
        self._places = [places[len(parameters) + i] for i in range(len(buffers))]
        borrowed = [_Attributes(path, module) for path, module in model.named_modules()]
        self._borrowed = [(a, a.dict, len(a.dict), a.buffers, len(a.buffers)) for a in borrowed]
        self._changing = [a for a in borrowed if a.kept or a.unset]

    def tensors(self, what: str, tensors: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """`tensors` in the order of the model's names. Raises ValueError, with the names, where the two don't match."""
        names = self.params if what == "params" else self.buffers
        if len(tensors) == len(names):
            try:
                return [tensors[name] for name in names]
            except KeyError:
                pass
        missing, extra = sorted(set(names) - set(tensors)), sorted(set(tensors) - set(names))
        raise ValueError(f"the state's {what} are not those of {self.name}: missing {missing}, unexpected {extra}")

    def run(
        self, fn: Callable[[], Any], params: list[torch.Tensor], buffers: Mapping[str, torch.Tensor], *, train: bool
    ) -> tuple[Any, dict[str, torch.Tensor]]:
        """`fn()` while the module holds these tensors, and the buffers that it leaves behind; those passed in are never written to.

        Raises ValueError, with the name, for a buffer that the call makes, or takes away: the state has no place for it.
        """
        tensors = [*params, *(b.clone() for b in self.tensors("buffers", buffers))] if self.buffers or buffers else params
        modes = self.modes if train else self.eval_modes
        with rng.ambient_lock:
            saved = [container[key] for container, key, _ in self._slots]
            changed = [(module, module.training) for module, mode in modes if module.training != mode]
            try:
                for container, key, i in self._slots:
                    container[key] = tensors[i]
                if changed:
                    for module, mode in modes:
                        module.training = mode
                result = fn()
                values = [container.get(key) for container, key in self._places]
                strays = self._strays(values)
            finally:
                for attributes in self._changing:
                    attributes.put_back()
                for attributes, entries, size, held, count in self._borrowed:
                    if len(entries) != size or len(held) != count:
                        attributes.put_back()
                for (container, key, _), tensor in zip(self._slots, saved, strict=True):
                    container[key] = tensor
                for container, key, _ in self._empty:
                    container[key] = None
                for module, mode in changed:
                    module.training = mode
        if strays:
            raise ValueError(
                f"{self.name}: the call made or took away the buffers {strays}, and the state cannot follow: give them a tensor in "
                "__init__, or run the module once before you create the state and the step"
            )
        # All are new, also those that nobody wrote to: batch norm's kernels write without counting up `_version`, so one cannot tell.
        return result, {name: b.detach() if b.requires_grad else b for name, b in zip(self.buffers, values, strict=True)}  # pyright: ignore[reportOptionalMemberAccess,reportReturnType]  # fmt: skip

    def _strays(self, values: list[Any]) -> list[str]:
        strays = [name for name, value in zip(self.buffers, values, strict=True) if value is None]
        strays += [path for container, key, path in self._empty if container.get(key) is not None]
        for attributes, _, _, buffers, count in self._borrowed:
            if len(buffers) != count:
                strays += attributes.new_buffers()
        return strays


class _Attributes:
    """What a call may leave in a module besides tensors in slots, and how it is taken out again.

    Tensors that are plain attributes (the weight of `weight_norm`, what a forward keeps for later) would keep a graph alive and tell one
    call from the next. Recurrent layers make a second list of their weights anew in a call that finds others in the slots.
    """

    __slots__ = ("buffers", "dict", "entries", "kept", "names", "path", "unset")

    def __init__(self, path: str, module: nn.Module) -> None:
        self.path, self.dict = path, module.__dict__
        self.buffers, self.names = module._buffers, frozenset(module._buffers)
        lists = ("_flat_weights", "_flat_weight_refs") if isinstance(module, nn.RNNBase) else ()
        self.kept = {k: v for k, v in self.dict.items() if isinstance(v, torch.Tensor) or k in lists}
        never = (*lists, "_is_full_backward_hook")  # torch's own, in every module
        self.entries, self.unset = frozenset(self.dict), tuple(k for k, v in self.dict.items() if v is None and k not in never)

    def new_buffers(self) -> list[str]:
        return [f"{self.path}.{key}".lstrip(".") for key in self.buffers if key not in self.names]

    def put_back(self) -> None:
        attributes = self.dict
        if self.kept:
            attributes.update(self.kept)
        for key in self.unset:
            if isinstance(attributes.get(key), torch.Tensor):
                attributes[key] = None
        if len(attributes) > len(self.entries):
            for key in [key for key, value in attributes.items() if isinstance(value, torch.Tensor) and key not in self.entries]:
                del attributes[key]
        for key in [key for key in self.buffers if key not in self.names]:
            del self.buffers[key]


def call(
    model: nn.Module, params: Mapping[str, torch.Tensor], buffers: Mapping[str, torch.Tensor], *args: Any, train: bool = True, **kwargs: Any
) -> tuple[Any, dict[str, torch.Tensor]]:
    """`model(*args, **kwargs)` with these tensors in place of its own: the outputs, and the buffers after the call.

    Gradients flow to `params`; take them of a model without `torch.utils.checkpoint`, which calls the module again in the backward, when it has its own
    tensors back (`make_train_step` takes them before). With `train` the submodules run in the modes in which they are, without in eval mode. Neither the module nor
    what is passed in changes. Raises ValueError where names are missing or unexpected.

    >>> model = nn.BatchNorm1d(2)
    >>> params, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    >>> outputs, after = call(model, params, buffers, torch.ones(4, 2))
    >>> int(after["num_batches_tracked"]), int(model.num_batches_tracked)
    (1, 0)
    """
    shell = Shell(model)
    return shell.run(lambda: model(*args, **kwargs), shell.tensors("params", params), buffers, train=train)
