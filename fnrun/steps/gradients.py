"""Gradients: of any function, and of a model's loss over a batch, whole or in microbatches."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

import optree
import torch
from torch import Tensor

from fnrun.core import tree
from fnrun.core.examples import shapes
from fnrun.core.state import check_state
from fnrun.optim.lists import PLAIN, eager, host_value
from fnrun.steps.checks import check_dense, check_function, check_scalar, check_unasked, detached, detached_all, loss_and_metrics, reported
from fnrun.steps.functional import FunctionalModule, not_checkpointed
from fnrun.steps.kinds import Metrics
from fnrun.steps.microbatches import Cut, Joined, PairwiseSum, Part, Weighted
from fnrun.steps.recompute import Recomputed
from fnrun.steps.surroundings import Surroundings
from fnrun.steps.watch import described, leaves as leaves_of

logger = logging.getLogger("fnrun")


def value_and_grad(fn: Callable[[Any], Any], *, has_aux: bool = False) -> Callable[[Any], tuple[Any, Any]]:
    """The function `params -> (fn(params), gradient of fn at params)`; with `has_aux`, `fn` returns `(value, aux)`.

    `params` is a pytree of tensors. The gradient has its structure, with None for a tensor that the value does not depend on. Values, aux
    and gradients are detached. Raises ValueError where the value is not a scalar, or depends on none of the tensors.

    >>> value_and_grad(lambda p: (p["x"] ** 2).sum())({"x": torch.tensor([1.0, 3.0])})
    (tensor(10.), {'x': tensor([2., 6.])})
    """
    check_function("value_and_grad", fn, 1, "fn(params)", "a scalar")

    def wrapped(params: Any) -> tuple[Any, Any]:
        leaves, spec = optree.tree_flatten(params)
        leaves = [p.detach().requires_grad_() for p in leaves]
        with torch.enable_grad():
            result = fn(optree.tree_unflatten(spec, leaves))
            value = result[0] if has_aux else result
            check_scalar(value)
            grads = _backward(value, leaves)
        value = value.detach()
        grads = optree.tree_unflatten(spec, grads)
        return ((value, tree.map(detached, result[1])), grads) if has_aux else (value, grads)

    return wrapped


def _backward(scalar: Tensor, leaves: list[Tensor], *, through_leaves: bool = False) -> list[Tensor | None]:
    """The gradients of the leaves; with `through_leaves` from their `grad`, to which a backward within the backward adds its part."""
    if not PLAIN.issuperset(map(type, (scalar, *leaves))):
        if not through_leaves:
            return list(torch.autograd.grad(scalar, leaves, allow_unused=True))
        scalar.backward()
        return [leaf.grad for leaf in leaves]
    # `torch.autograd.grad` calls this too, and takes as long again for checks that one scalar does not need.
    grads = _engine((scalar,), (_one(scalar),), False, False, () if through_leaves else tuple(leaves), True, accumulate_grad=through_leaves)
    return [leaf.grad for leaf in leaves] if through_leaves else list(grads)


def _one(like: Tensor) -> Tensor:
    """The gradient of a scalar with respect to itself: one tensor for all steps, unless a backward hook has written to it."""
    kind = like.dtype, like.device
    one = _ones.get(kind)
    if one is None or one._version:
        one = _ones[kind] = torch.ones((), dtype=like.dtype, device=like.device)
    return one


_ones: dict[Any, Tensor] = {}
_engine: Any = torch.autograd.Variable._execution_engine.run_backward  # pyright: ignore[reportAttributeAccessIssue]


# --- a model's loss ----------------------------------------------------------------------------------------------------


class Loss:
    """`step.loss(params, buffers, batch, *, key=None) -> (loss, (buffers, metrics))`: the module as a function.

    It is differentiable in all tensors.

    - `params`, `buffers`: dictionaries of tensors by name, which are not written to.
    - `key=None`: the source of randomness, for the bits of a step `state.rng.fold_in("train", state.step)`. Without a key a random draw is
      a ValueError.

    `loss` is the result of `loss_fn`, a scalar or a fold. The new buffers include the parameters that the forward wrote to.
    `checkpoint_activations=` is ignored.

    Raises RuntimeError for a module that uses `torch.utils.checkpoint` itself, if an argument requires grad.
    """

    def __init__(
        self, functional: FunctionalModule, loss_fn: Callable[..., Any], autocast: functools.partial[Any] | None, within: Surroundings
    ) -> None:
        self.functional, self.loss_fn, self.autocast, self.within = functional, loss_fn, autocast, within
        self._warned = False

    def __call__(self, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor], batch: Any, *, key: Any = None) -> Any:
        functional = self.functional
        tensors = functional.tensors("params", params, apart=False)
        if functional.written:
            tensors = [t.clone() if name in functional.written else t for name, t in zip(functional.params, tensors, strict=True)]
        with self.within.undrawn() if key is None else self.within(key) as reports:
            (loss, metrics), buffers, written = not_checkpointed(
                self.functional.whose,
                lambda: functional.run(lambda: self.forward(batch), tensors, buffers, train=True),
                [tensors, dict(buffers), batch],
            )
        return loss, ({**buffers, **written}, reported(metrics, reports))

    def of_nothing(self) -> Metrics:
        """The metrics of a batch in which every weight is 0: no loss, which would be NaN. Logs a warning the first time."""
        if not self._warned:
            self._warned = True
            logger.warning("%s: a batch in which every weight of the loss is 0 makes no update (said once)", self.functional.whose)
        return {"skipped": 1.0}

    def forward(self, batch: Any) -> tuple[Any, Metrics]:
        """The loss and its metrics, within `functional.run`."""
        if self.autocast is None:
            result = self.loss_fn(self.functional.model, batch)
        else:
            with self.autocast():
                result = self.loss_fn(self.functional.model, batch)
        return (result, {}) if isinstance(result, Tensor) else loss_and_metrics(result)


class Gradients:
    """`step.gradients(state, batch) -> (grads, buffers, metrics)`.

    - `grads`: by name of the trained parameters, detached, never scaled; None for a parameter that the loss does not reach.
    - `buffers`: the buffers after the forward, and the parameters that it wrote to.
    """

    def __init__(self, loss: Loss, loss_scale: Callable[[Any], Tensor] | None, cut: Cut, recomputed: Recomputed | None) -> None:
        self.loss, self.loss_scale, self.cut, self.recomputed = loss, loss_scale, cut, recomputed
        self.within, functional = loss.within, loss.functional
        self.functional, self.name = functional, functional.whose
        places = {name: i for i, name in enumerate(functional.params)}
        self._trained = [places[name] for name in functional.trained]
        self._all = len(functional.trained) == len(functional.params)

    def __call__(self, state: Any, batch: Any) -> tuple[dict[str, Any], dict[str, Tensor], Metrics]:
        check_state(self.name, state, batch, "batch")
        take = self._whole if self.cut.pieces == 1 else self._in_pieces
        if torch.is_grad_enabled():
            check_unasked(self.name, state, batch)
            grads, buffers, metrics = take(state, batch)
        else:
            with torch.enable_grad():
                grads, buffers, metrics = take(state, batch)
        return dict(zip(self.functional.trained, grads, strict=True)), buffers, metrics

    def options(self) -> list[str]:
        """The options that are not defaults, as printed."""
        chosen = [f"{self.cut.pieces} microbatches"] if self.cut.pieces > 1 else []
        if self.loss.autocast is not None:
            chosen.append(f"autocast to {str(self.loss.autocast.args[1]).removeprefix('torch.')}")
        if self.recomputed is not None:
            chosen.append(f"{len(self.recomputed.parts)} parts computed twice")
        return chosen

    def _whole(self, state: Any, batch: Any) -> tuple[list[Any], Any, Metrics]:
        with self.within(state.rng, "train", state.step) as reports:
            grads, loss, buffers, metrics = self._of(state, batch)
            if reports:
                metrics = _with(metrics, reports)
        metrics = {name: detached_all(value) for name, value in metrics.items()}
        if not loss.divided:
            grads = [None if g is None else g * loss.weight for g in grads]
        elif loss.weight is not None:
            grads, metrics = self._unless_weightless(loss.weight, grads, metrics)
        return grads, buffers, metrics

    def _in_pieces(self, state: Any, batch: Any) -> tuple[list[Any], Any, Metrics]:
        joined, total = Joined(self.name, self.functional, state.buffers), PairwiseSum()
        for i, piece, n in self.cut(batch):
            total.add(i, self._piece(joined, state, i, piece, n))
        whole = total.result()
        if whole is None:
            raise ValueError(f"{self.name}: the batch has no examples, so no microbatch has")
        grads, buffers, metrics = joined.result(whole)
        if isinstance(whole.weight, Tensor):
            grads, metrics = self._unless_weightless(whole.weight, grads, metrics)
        return grads, buffers, metrics

    def _piece(self, joined: Joined, state: Any, i: int, piece: Any, n: int) -> Part:
        """A function, so that the local tensors of one piece are freed before the next."""
        moved: set[str] = set()
        with self.within(state.rng, "train", state.step, i) as reports:
            try:
                grads, loss, buffers, metrics = self._of(state, piece, n, moved)
            except Exception as error:
                error.add_note(f"raised in microbatch {i} of {self.cut.pieces}, which is {shapes(piece)}")
                raise
            metrics = _with(metrics, reports)
        if len(buffers) > len(self.functional.buffers):
            raise ValueError(
                f"{self.name}: the forward changes the parameters {sorted(buffers.keys() - set(self.functional.buffers))}, and each "
                "microbatch would change them in its own way: use microbatches=1, or optim.accumulate"
            )
        return joined.part(grads, loss, n, buffers, moved, metrics)

    def _unless_weightless(self, weight: Tensor, grads: list[Any], metrics: Metrics) -> tuple[list[Any], Metrics]:
        """No gradients and no metrics where the batch's whole weight is 0. Waits for the device, except in a graph."""
        skipped = host_value(weight == 0)
        if isinstance(skipped, Tensor) and not eager():  # `composed` selects by it
            return grads, {**metrics, "skipped": skipped.double()}
        if not skipped:
            return grads, {**metrics, "skipped": 0.0}
        return [None] * len(grads), self.loss.of_nothing()

    def _of(self, state: Any, batch: Any, n: int | None = None, moved: set[str] | None = None) -> tuple[list[Any], Weighted, Any, Metrics]:
        """Gradients, loss, buffers and metrics of a batch, or of a piece of `n` examples; the names of written buffers go to `moved`."""
        functional = self.functional
        scale = None if self.loss_scale is None else self.loss_scale(state.opt_state)
        tensors = functional.tensors("params", state.params)
        leaves = [tensors[i].detach().requires_grad_() for i in self._trained]
        if self._all:
            tensors = leaves
        else:
            for i, leaf in zip(self._trained, leaves, strict=True):
                tensors[i] = leaf
        functional.hook(self._trained, leaves)
        first = functional.first

        # Both while the module has the state's tensors: a checkpointed part runs again in the backward.
        def forward_and_backward() -> tuple[Any, Any, Metrics]:
            if self.recomputed is None or not eager():  # inductor would round the two computations differently
                loss, metrics = self.loss.forward(batch)
            else:
                loss, metrics = self.recomputed.run(self.loss.forward, batch, state.buffers)
            watching = first.watching
            if watching and any(leaf.grad is not None for leaf in leaves):
                raise ValueError(
                    f"{self.name}: the loss calls backward() itself, and a step takes the gradient of what loss_fn returns: add that loss "
                    "to it, or take gradients within by torch.autograd.grad"
                )
            weighed = self.cut.mean_of(loss, batch, n)
            value = weighed.mean
            check_scalar(value)
            if watching:
                first.check_graph(value, leaves, batch)
            grads = _backward(value if scale is None else value * scale, leaves, through_leaves=first.reentrant)
            if grads[0] is None and all(grad is None for grad in grads):
                raise ValueError(
                    f"{self.name}: the loss reaches no trained parameter of {functional.name}: does it call the model that it is given? "
                    f"It has a gradient to {', '.join(map(described, leaves_of(value)))}"
                )
            if watching:
                check_dense(self.name, dict(zip(functional.trained, grads, strict=True)))
            return grads, weighed, {"loss": loss, **metrics}

        run = forward_and_backward if self.recomputed is None else functools.partial(self.recomputed.over, forward_and_backward)
        (grads, weighed, metrics), buffers, written = functional.run(run, tensors, state.buffers, train=True, moved=moved)
        if scale is not None:
            factor = scale.double().reciprocal().to(scale.dtype)
            grads = [None if g is None else (g * factor.to(g.device)).to(g.dtype) for g in grads]
        if written:
            buffers = {**buffers, **written}
        return grads, weighed, buffers, metrics


def _with(metrics: Metrics, reports: dict[str, Any]) -> Metrics:
    if "skipped" in reports:
        raise ValueError("report: 'skipped' is the name of what says that a batch made no update; call the value something else")
    return reported(metrics, reports)
