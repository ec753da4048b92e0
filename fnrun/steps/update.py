"""The update: the optimizer's part of a step."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import optree
import torch

from fnrun.core import tree
from fnrun.core.donation import Owner, contents
from fnrun.core.entering import asks
from fnrun.core.inplace import Guard
from fnrun.core.reports import collect
from fnrun.core.state import check_state, made
from fnrun.core.words import kind
from fnrun.steps.checks import detached_all, no_gradient
from fnrun.steps.functional import FunctionalModule
from fnrun.steps.kinds import Metrics

if TYPE_CHECKING:
    from fnrun.optim import Optimizer


class Update:
    """The part `step.update` of a step: `(state, grads) -> (state, metrics)`."""

    def __init__(self, optimizer: Optimizer, functional: FunctionalModule) -> None:
        self.name, self.optimizer, self.trained = functional.whose, optimizer, functional.trained
        self._whole, self._buffers = len(functional.trained) == len(functional.params), frozenset(functional.buffers)
        self._guard = Guard(self.name)
        self._known: list[Any] = []  # structures and shapes of optimizer states that were checked
        self._made: Any = None  # references to the last one returned, which needs no check

    def __call__(self, state: Any, grads: Mapping[str, Any]) -> tuple[Any, Metrics]:
        check_state(f"{self.name}: its update", state, grads, "grads")
        self.check_grads(state, grads)
        return self.updated(state, grads, state.buffers, None)

    def updated(self, state: Any, grads: Mapping[str, Any], buffers: Any, owner: Owner | None) -> tuple[Any, Metrics]:
        """The update of `state` with these buffers, in the memory that `owner` may write over."""
        memory, every = state.opt_state, state.params
        if not _is_marked(memory, self._made):
            self.check(state)
        if not self._buffers.issuperset(buffers):
            every, buffers = with_written(every, buffers)
        kept = contents(state)
        for grad in grads.values():
            if grad is not None:
                break
        else:
            return made(type(state), {**kept, "params": every, "buffers": buffers, "step": kept["step"] + 1}), {}
        params = every if self._whole else {name: every[name] for name in self.trained}
        with collect() as reports:
            if owner is None:
                marks = self._guard.look({"params": params, "opt_state": memory}) if self._guard.on else ()
                params, memory = self._optimize(kept, grads, memory, params)
                if marks:
                    self._guard.check(marks, self.culprit)
            else:
                params, memory = owner.update((kept["step"], self.name), state, lambda: self._optimize(kept, grads, memory, params))
        if torch.is_grad_enabled() and asks(params):
            raise no_gradient(self.name, "a hyperparameter of the optimizer, or what its schedule returns,")
        self._made = _mark(memory)
        kept.update(params=params if self._whole else {**every, **params}, buffers=buffers, opt_state=memory, step=kept["step"] + 1)
        new = made(type(state), kept)
        if owner is not None:
            owner.accept(new)
        return new, {name: detached_all(value) for name, value in reports.items()}

    def _optimize(self, fields: dict[str, Any], grads: Any, memory: Any, params: Any) -> tuple[Any, Any]:
        optimizer, step = self.optimizer, fields["step"]
        if not optimizer.keyed:
            return optimizer.update(grads, memory, params, key=None, step=step)
        key = fields["rng"].fold_in("optimizer", step)
        with key.scope():
            return optimizer.update(grads, memory, params, key=key, step=step)

    def check(self, state: Any) -> None:
        """Raise ValueError where `state.opt_state` is not one of this optimizer for these parameters. Each structure is checked once."""
        memory = state.opt_state
        leaves, structure = optree.tree_flatten(memory)
        shapes = list(map(_shape, leaves))
        if (structure, shapes) in self._known:
            return
        fresh = self.optimizer.init({name: state.params[name] for name in self.trained if name in state.params})
        wanted, present = tree.paths({"opt_state": fresh}), tree.paths({"opt_state": memory})
        if wanted != present:
            missing, extra = [p for p in wanted if p not in present][:5], [p for p in present if p not in wanted][:5]
            raise ValueError(
                f"{self.name}: the state's opt_state is not that of this optimizer and these trained parameters: missing {missing}, "
                f"unexpected {extra}. {'It was created without an optimizer. ' if memory is None else ''}Create the state with the same "
                "optimizer, and freeze parameters before both; to go on with another optimizer, "
                "state.replace(opt_state=optimizer.init(state.params))"
            )
        for path, shape, leaf in zip(present, shapes, tree.leaves(fresh), strict=True):
            if shape and _shape(leaf) not in (shape, ()):
                raise ValueError(
                    f"{self.name}: the state's {path} has the shape {shape}, and for these parameters it would be {_shape(leaf)}"
                )
        self._known.append((structure, shapes))

    def check_grads(self, state: Any, grads: Any) -> None:
        """Raise ValueError, with the names, for gradients that are not those of the trained parameters, or that require grad.

        Kernels that write in place do not look, and an optimizer that gathers gradients would keep their graph in the state.
        """
        who = f"{self.name}: the gradients"
        if not isinstance(grads, Mapping):
            raise TypeError(f"{who} are a dictionary by the names of the trained parameters, and not {kind(grads)}")
        if grads.keys() != (names := set(self.trained)):
            missing, extra = sorted(names - grads.keys())[:5], sorted(grads.keys() - names)[:5]
            raise ValueError(
                f"{who} are those of other parameters than are trained: missing {missing}, unexpected {extra}. None stands for one that "
                "is not to be updated"
            )
        for name, grad in grads.items():
            if torch.is_grad_enabled() and isinstance(grad, torch.Tensor) and grad.requires_grad:
                raise no_gradient(f"{self.name}: its update", f"the gradient of {name!r}")
            param = state.params[name]
            if grad is None or (isinstance(grad, torch.Tensor) and _like(grad) == _like(param)):
                continue
            what = "{} of shape {} on {}".format(*_like(grad)) if isinstance(grad, torch.Tensor) else kind(grad)
            raise ValueError(f"{who}: that of {name!r} is {what}, and the parameter {'{} of shape {} on {}'.format(*_like(param))}")

    def culprit(self, path: str) -> str:
        """The name of the part of the optimizer that writes to the leaf at `path`."""
        field, _, rest = path.partition("/")
        place, parts = rest.partition("/")[0], getattr(self.optimizer, "parts", ())
        if field == "opt_state" and place.isdecimal() and int(place) < len(parts):
            parts = (parts[int(place)],)
        updates = [getattr(part, "update", None) for part in parts or (self.optimizer,)]
        named = [getattr(update, "__qualname__", repr(update)) for update in updates if update]
        return f"{self.name}: the optimizer ({', '.join(named)})"


def with_written(params: Mapping[str, Any], buffers: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """`params` and `buffers`, with the parameters that the forward wrote to moved from the buffers to the parameters."""
    written = {name: buffers[name] for name in buffers.keys() & params.keys()}
    return {**params, **written}, {name: value for name, value in buffers.items() if name not in written}


def _mark(memory: Any) -> Any:
    """Weak references to the structs in an optimizer state, by which `_is_marked` recognizes it; None for a leaf."""
    if type(memory) is tuple:
        return tuple(map(_mark, memory))
    if type(memory) is dict:
        return {name: _mark(part) for name, part in memory.items()}
    if isinstance(memory, torch.Tensor):
        return None
    try:
        return weakref.ref(memory)
    except TypeError:
        return None


def _is_marked(memory: Any, mark: Any) -> bool:
    """Whether `memory` holds the structs of `mark`, the same objects in the same containers."""
    if type(mark) is tuple:
        return type(memory) is tuple and len(memory) == len(mark) and all(map(_is_marked, memory, mark))
    if type(mark) is dict:
        return type(memory) is dict and memory.keys() == mark.keys() and all(_is_marked(memory[name], m) for name, m in mark.items())
    return memory is not None and mark is not None and mark() is memory


def _shape(leaf: Any) -> tuple[int, ...]:
    return tuple(leaf.shape) if isinstance(leaf, torch.Tensor) else ()


def _like(tensor: torch.Tensor) -> tuple[Any, ...]:
    return str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), tensor.device
