"""What enters a state: detached, so that nothing in it holds a graph, and no variable of a module's own."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fnrun.core import tree

#: Fields by which no tensors enter.
BARE = frozenset({"rng", "step", "position", "stop"})
#: The attribute of a tensor that required grad when it was put into a state: a hyperparameter, or another leaf.
_CUT = "_cut_by_a_state"
any_cut = False  # by any state of this process, which hardly ever happens
_requires_grad = operator.attrgetter("requires_grad")


class Entered(type):
    """The class of states: whoever makes one by calling its class, `dataclasses.replace` too, puts in what is detached."""

    def __call__(cls, *args: Any, **given: Any) -> Any:
        state = super().__call__(*args, **given)
        for name in (field.name for field in dataclasses.fields(cls)):  # pyright: ignore[reportArgumentType]
            if name not in BARE and (new := entering(value := getattr(state, name), None, name)) is not value:
                object.__setattr__(state, name, new)
        return state


def entering(value: Any, held: Any, name: str) -> Any:
    """`value`, which becomes the field `name` of a state, where `held` stood: tensors that require grad detached, Parameters copied.

    A Parameter is copied because its module's optimizer and `load_state_dict` write to it. The same object where nothing is to be done.
    Raises ValueError within a transform of torch.func that differentiates by it.
    """
    if value is held:
        return value
    if type(value) is dict and type(held) is dict:
        new = [each for key, each in value.items() if held.get(key) is not each]
    else:
        new = value
    try:
        brings = _brings(new)
    except RecursionError:  # what holds itself is refused where it is saved, in words
        return value
    return tree.map(lambda leaf: _entered(name, leaf), value) if brings else value


def _brings(value: Any) -> bool:
    """Whether a tensor in `value` is foreign to a state.

    Plain containers are walked through here, at a fifth of what optree takes: hooks bring some at each tick.
    """
    kind = type(value)
    if kind is torch.Tensor:
        return value.requires_grad
    if kind is dict:
        return any(map(_brings, value.values()))
    if kind is list or kind is tuple:
        return any(map(_brings, value))
    return kind not in tree.SCALARS and any(map(_foreign, tree.leaves(value)))


def _foreign(leaf: Any) -> bool:
    if type(leaf) is torch.Tensor:
        return leaf.requires_grad
    return isinstance(leaf, torch.Tensor) and (leaf.requires_grad or isinstance(leaf, nn.Parameter))


def _entered(name: str, leaf: Any) -> Any:
    if not _foreign(leaf):
        return leaf
    if isinstance(leaf, nn.Parameter):
        return leaf.detach().clone()
    if torch._C._functorch.peek_interpreter_stack() is not None:  # pyright: ignore[reportAttributeAccessIssue]
        raise ValueError(
            f"state.{name}: torch.func differentiates by a tensor that is put into a state, and what enters a state is detached: "
            "differentiate a function of the tensors themselves (step.loss, fnrun.call, optimizer.update)"
        )
    asked = torch.is_grad_enabled() and (name == "opt_state" or leaf.is_leaf)
    leaf = leaf.detach()
    if asked:
        global any_cut
        any_cut = True
        setattr(leaf, _CUT, True)
    return leaf


def check_uncut(hyperparameters: Any) -> None:
    """Raise ValueError where one of these leaves required grad when it was put into a state: a gradient through it would lack a part."""
    if (path := cut(hyperparameters)) is not None:
        raise ValueError(
            f"the hyperparameter {tree.split(path)[-1]} required grad when it was put into a state, and what enters a state is detached: "
            "put in value.detach(). To differentiate by it call optimizer.update(grads, opt_state, params) with an opt_state of "
            "set_hyperparam that was in no state, and step.loss for the gradients"
        )


def cut(tensors: Any) -> str | None:
    """The path of the first leaf through which a gradient was asked for when it was put into a state."""
    if not any_cut:
        return None
    pairs = zip(tree.paths(tensors), tree.leaves(tensors), strict=True)
    return next((path for path, leaf in pairs if isinstance(leaf, torch.Tensor) and _CUT in leaf.__dict__), None)


def differentiates() -> bool:
    """Whether a transform of torch.func differentiates what is computed here, forward or backward, or a forward gradient is computed."""
    functorch: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    if torch.autograd.forward_ad._current_level >= 0:
        return True
    if functorch.peek_interpreter_stack() is None:
        return False
    gradients = {functorch.TransformType.Grad, functorch.TransformType.Jvp}
    return any(interpreter.key() in gradients for interpreter in functorch.get_interpreter_stack())


def asks(value: Any, how: Callable[[Any], Any] = _requires_grad) -> bool:
    """Whether a gradient is asked for through what a step is given: one of its tensors requires grad, or is what `how` says."""
    kind = type(value)
    if kind is torch.Tensor:
        return bool(how(value))
    if kind is dict:
        value = value.values()
    elif kind is not tuple and kind is not list:
        value = tree.leaves(value)
    try:
        return any(map(how, value))
    except AttributeError:
        return any(how(leaf) for leaf in tree.leaves(list(value)) if isinstance(leaf, torch.Tensor))
