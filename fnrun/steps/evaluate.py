"""Steps that cannot change a state: evaluation and prediction."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from fnrun.core.entering import differentiates
from fnrun.core.inplace import FIRST
from fnrun.core.state import check_model, is_state, no_state, weights_of
from fnrun.core.words import kind
from fnrun.steps.checks import autocast as autocast_of, check_function, loss_and_metrics, reported
from fnrun.steps.cutting import examples_option
from fnrun.steps.functional import FunctionalModule
from fnrun.steps.kinds import EvalStep, Function, Metrics
from fnrun.steps.surroundings import Surroundings


def make_eval_step(
    model: nn.Module,
    metric_fn: Callable[[nn.Module, Any], Any],
    *,
    weights: str | Callable[[Any], Any] = "params",
    examples: Any = None,
    precision: str | None = None,
    host_random: bool = False,
) -> EvalStep:
    """The evaluation step `(state, batch) -> metrics`, in eval mode and without gradients.

    `metric_fn(model, batch)` returns a dict of metrics, or what a `loss_fn` returns. Random draws in it are keyed by the training step and
    the batch's place in the pass.

    - `weights="params"`: the state's parameters. Otherwise the name of a hook that remembers some (`"ema"`), or a function of the state
      that returns `params` or `(params, buffers)`.
    - `examples`, `precision`, `host_random`: as in `make_train_step`.
    """
    check_function("make_eval_step", metric_fn, 2, "metric_fn(model, batch)", "a dict of metrics, or a loss")
    run = _evaluation("make_eval_step", model, metric_fn, weights, precision, host_random)

    def eval_step(state: Any, batch: Any) -> Metrics:
        result, reports = run(state, batch)
        if not isinstance(result, Mapping):
            loss, metrics = loss_and_metrics(result)
            result = {"loss": loss, **metrics}
        return reported(result, reports)

    return Function(eval_step, name=f"eval_step({type(model).__name__})", examples=examples_option("make_eval_step", examples))


def make_predict_step(
    model: nn.Module,
    predict_fn: Callable[[nn.Module, Any], Any],
    *,
    weights: str | Callable[[Any], Any] = "params",
    precision: str | None = None,
    host_random: bool = False,
) -> Callable[[Any, Any], Any]:
    """The prediction step `(state, batch) -> outputs`, any pytree of `predict_fn(model, batch)`. Options: see `make_eval_step`."""
    check_function("make_predict_step", predict_fn, 2, "predict_fn(model, batch)", "outputs")
    run = _evaluation("make_predict_step", model, predict_fn, weights, precision, host_random)
    return Function(lambda state, batch: run(state, batch)[0], name=f"predict_step({type(model).__name__})")


def _evaluation(
    who: str, model: nn.Module, fn: Callable[..., Any], weights: str | Callable[[Any], Any], precision: str | None, host: bool
) -> Callable[[Any, Any], tuple[Any, dict[str, Any]]]:
    """`(state, batch) -> (fn(model, batch), reports)`."""
    check_model(who, model)
    if not isinstance(weights, str) and not callable(weights):
        named = getattr(weights, "name", None)
        hint = f": the name of the hook, weights={named!r}" if isinstance(named, str) else ""
        raise TypeError(f"weights= takes 'params', a hook's name or a function of the state, and not {kind(weights)}{hint}")
    name = f"the evaluation of {type(model).__name__}"
    functional = FunctionalModule(model, name, watched=FIRST)
    within = Surroundings(name, host)
    autocast = autocast_of(precision, functional.device_type) or nullcontext

    def run(state: Any, batch: Any) -> tuple[Any, dict[str, Any]]:
        if not is_state(state) or not hasattr(state, "rng"):
            raise no_state(name, state, batch, "batch")
        if differentiates():
            raise ValueError(
                f"{name} is computed without gradients, and one within torch.func.grad, torch.func.jvp or forward differentiation would "
                "be 0: differentiate fnrun.call(model, params, buffers, ...), or step.loss of a training step"
            )
        frames = state.position.frames
        params, buffers = weights_of(state, weights)
        place = frames[-1].ticks if frames else 0
        with within(state.rng, "eval", state.step, place) as reports, torch.no_grad(), autocast():
            outputs, _, _ = functional.run(lambda: fn(model, batch), functional.tensors("params", params), buffers, train=False)
        return outputs, reports

    return run
