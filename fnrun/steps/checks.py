"""Checks of what a user's functions are passed and return: detached, of the right kinds, or refused."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping
from typing import Any

import torch

from fnrun.core import entering, tree
from fnrun.core.entering import asks, differentiates
from fnrun.core.words import bindable, kind, uncalled
from fnrun.steps.kinds import Metrics


def detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, torch.Tensor) and leaf.requires_grad else leaf


def detached_all(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach() if value.requires_grad else value
    return value if isinstance(value, (float, int)) else tree.map(detached, value)


def reported(metrics: Mapping[str, Any], reports: dict[str, Any]) -> Metrics:
    """The metrics, then the reports under other names."""
    if not reports:
        return metrics if type(metrics) is dict else dict(metrics)
    return {**metrics, **{name: value for name, value in reports.items() if name not in metrics}}


def check_unasked(who: str, state: Any, batch: Any) -> None:
    """Raise ValueError where a tensor of the state or the batch has a graph: a step is detached, and no gradient goes through it.

    A leaf of the batch may require grad, for a penalty on its gradient.
    """
    if differentiates():
        raise no_gradient(who, "within torch.func.grad, torch.func.jvp or forward differentiation: what it is given")
    if asks(batch, _grad_fn):
        raise no_gradient(who, f"a tensor of the batch, {_which(batch)},")
    if entering.any_cut and (path := entering.cut({"params": state.params, "buffers": state.buffers})) is not None:
        raise no_gradient(who, f"a tensor that was put into the state, {path!r},")
    if asks(state.params) or (state.buffers and asks(state.buffers)):
        raise no_gradient(who, f"a tensor of the state, {_which({'params': state.params, 'buffers': state.buffers})},")


_grad_fn = operator.attrgetter("grad_fn")


def _which(value: Any) -> str:
    named = zip(tree.paths(value), tree.leaves(value), strict=True)
    return next((repr(path) for path, leaf in named if path and isinstance(leaf, torch.Tensor) and leaf.requires_grad), "it itself")


def no_gradient(who: str, what: str) -> ValueError:
    """The error for a gradient that is asked for through a step."""
    return ValueError(
        f"{who}: {what} requires grad, and what a step returns is detached: a gradient through it would lack what went before, in silence. "
        "Give it detached, or call the step under torch.no_grad(). To take gradients through training differentiate step.loss(params, "
        "buffers, batch) and update by optimizer.update(grads, opt_state, params), with dictionaries of your own in the place of states"
    )


def check_function(who: str, function: Any, arguments: int, call: str, returns: str) -> None:
    """Raise TypeError unless `function` is callable with that number of arguments, and neither a class nor a loss of torch."""
    if isinstance(function, type):
        hint = ": a class is not called by it"
    elif uncalled(function) is not None:
        hint = ", which is of another kind"
    elif type(function).__module__ == "torch.nn.modules.loss" or getattr(function, "__module__", "") == "torch.nn.functional":
        hint = ", which takes outputs and targets: lambda model, batch: criterion(model(batch[0]), batch[1])"
    elif not callable(function):
        hint = ""
    elif not bindable(function, *range(arguments)):
        hint = ", which takes other arguments"
    else:
        return
    raise TypeError(f"{who} takes a function, {call} -> {returns}, and not {kind(function)}{hint}")


_RESERVED = {"loss": "the loss itself", "skipped": "what says that a batch made no update"}


def loss_and_metrics(result: Any) -> tuple[Any, Metrics]:
    if not isinstance(result, tuple):
        return result, {}
    if len(result) != 2 or not isinstance(result[1], Mapping):
        raise ValueError("loss_fn returns a loss, or (loss, metrics) with metrics a dict of names and values")
    for name, what in _RESERVED.items():
        if name in result[1]:
            raise ValueError(f"loss_fn: {name!r} is the name of {what}; call the metric something else")
    loss, metrics = result
    return loss, dict(metrics)


def check_scalar(loss: Any) -> None:
    """Raise ValueError unless the loss is a real scalar tensor with a graph."""
    if isinstance(loss, torch.Tensor) and loss.is_complex():
        raise ValueError("a loss is a real number, this one is complex: take loss.abs().square(), or its real part")
    if not isinstance(loss, torch.Tensor) or loss.ndim:
        if isinstance(loss, torch.Tensor):
            what, hint = f"a tensor of shape {tuple(loss.shape)}", "take its mean or sum"
        else:
            what, hint = kind(loss), "loss_fn returns it, or (loss, metrics), as it was computed"
        raise ValueError(f"a loss is a scalar tensor, this one is {what}: {hint}")
    if not loss.requires_grad:
        raise ValueError(
            "the loss depends on no trained parameter: was it detached, or made under torch.no_grad() or inference_mode()? The folds of "
            "fnrun.metrics are, but for metrics.mean and metrics.sum"
        )


def check_dense(who: str, grads: Mapping[str, Any]) -> None:
    """Raise ValueError, with the names, for sparse gradients."""
    sparse = [name for name, grad in grads.items() if grad is not None and grad.layout != torch.strided]
    if sparse:
        raise ValueError(
            f"{who}: the gradient of {', '.join(sparse)} is sparse, and optimizers here take dense ones: make the layer with sparse=False "
            "(nn.Embedding, nn.EmbeddingBag, functional.embedding)"
        )


def autocast(precision: str | None, device_type: str) -> functools.partial[Any] | None:
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    if precision is None:
        return None
    if precision not in dtypes:
        raise ValueError(f"precision is None, 'bf16' or 'fp16', not {precision!r}")
    return functools.partial(torch.autocast, device_type, dtypes[precision])
