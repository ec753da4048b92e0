"""The training step of a module, a loss and an optimizer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any

from torch import nn

from fnrun.core.counts import count
from fnrun.core.inplace import FIRST
from fnrun.core.state import check_apart, check_model, check_optimizer
from fnrun.core.words import kind
from fnrun.steps.compiled import Compiled
from fnrun.steps.cutting import examples_option
from fnrun.steps.functional import FunctionalModule
from fnrun.steps.given import autocast, check_function
from fnrun.steps.gradients import Gradients, Loss
from fnrun.steps.pieces import Cut
from fnrun.steps.recompute import Recomputed
from fnrun.steps.surroundings import Surroundings
from fnrun.steps.train import IN_TURN, TrainStep
from fnrun.steps.update import Update

if TYPE_CHECKING:
    from fnrun.optim import Optimizer


def make_train_step(
    model: nn.Module,
    loss_fn: Callable[[nn.Module, Any], Any],
    optimizer: Optimizer,
    *,
    microbatches: int = 1,
    examples: Any = None,
    split: Callable[[Any, int], Any] | None = None,
    precision: str | None = None,
    checkpoint_activations: str | Sequence[str] | None = None,
    compile: bool = False,
    host_random: bool = False,
    **gone: Any,
) -> TrainStep:
    """The training step of `model`, a pure function `(state, batch) -> (state, metrics)` made of loss, gradient and update: a `TrainStep`.

    `loss_fn(model, batch)` returns a scalar loss, or `(loss, metrics)`; it calls `model` as usual, whose tensors are the state's for that
    time. The metrics are `loss`, those of `loss_fn` and what was reported (`fnrun.report`), tensors that nobody has waited for.

    - Submodules run in the train/eval modes that they have now. Buffers (batch statistics) come back in the new state.
    - A parameter with `requires_grad=False` is not trained; one that the loss does not reach is left alone, as in torch.
    - The loss may be a fold: `metrics.mean(values, weight)`, as a mean over the tokens that are no padding, or `metrics.sum(values)`, which
      is not divided. A batch in which every weight is 0 makes no update, and its only metric is `skipped`, 1. A scalar is taken for a mean
      over the batch's examples. Of one that is another mean, as with `ignore_index=` or class weights, or a sum, microbatches have another
      gradient, in silence.
    - `microbatches=n` cuts the batch into n pieces, rows `rows * i // n` to `rows * (i + 1) // n`, computed one after the other: n times
      less memory for activations. The gradient is that of the whole batch, where the loss is a fold or a mean over examples and the module
      treats examples apart. Piece i draws from `state.rng.fold_in("train", step, i)`. Gradients, metrics and batch norm's averages are
      added in a balanced tree over the pieces. Refused (ValueError) are a parameter that the forward changes, a buffer that differs between
      pieces or counts what is in them (one that goes up by one in each call is kept), and a metric with a value for each example.
    - `examples` says how many examples a batch has, where its lengths and the stream that made it do not: a key or path of it (`"x"`,
      `"inputs/ids"`, `"0"`), a number, or a function `batch -> int`. Plain metrics are weighed by it, and microbatches cut what has this
      length. Several keys, `("x", "y")`, are all that is per example: nothing else is cut, whatever its length.
    - `split(batch, n)` cuts the batch in place of that: at most n pieces in a list, each a batch, None for one that is absent. For graphs
      and packed sequences. How many examples a piece has says `examples` too.
    - `precision="bf16"` or `"fp16"` runs `loss_fn` under autocast; parameters keep their dtype. fp16 wants `optim.dynamic_loss_scale`.
    - `checkpoint_activations` names parts of the model whose activations are not kept for the backward but computed once more in it, for
      less memory and the same bits: `"blocks"`, its repeated blocks (entries of an `nn.ModuleList` or `nn.Sequential` that are of one class
      and have parts of their own), or a list of patterns that occur in paths of modules (`["encoder.layer"]`; globs with a `*`); of two of
      which one is within the other the outer one. Forward hooks on modules within a part run again in the second computation, those on the
      part itself once. `step.loss`, steps that evaluate and compiled graphs do without.
    - `compile` makes the whole step one graph (inductor), for each shape of the batch one, static: eager's numbers up to rounding, and the
      same bits from run to run. What depends on a tensor's value in Python cannot be captured: then it runs as without, with a warning.
    - `host_random` seeds Python's and NumPy's generators too (100 us a step), for a model that draws from them.

    - What comes out is detached, and a gradient through a step is refused (ValueError), but under `torch.no_grad()`: a batch that was
      computed of what requires grad, leaves that were put into the state, a hyperparameter that requires grad, transforms of torch.func
      that differentiate. A leaf of the batch may require grad, for a penalty within the loss. `step.loss` and `optimizer.update` are
      differentiable.

    Raises ValueError for a model without trained parameters, a loss that is no scalar, a state of another model, a batch of which
    is not clear how it is cut.

    >>> import torch
    >>> from fnrun import TrainState, optim
    >>> model = nn.Linear(3, 1)
    >>> train_step = make_train_step(model, lambda model, x: model(x).square().mean(), optim.sgd(0.1))
    >>> state = TrainState.create(model, optim.sgd(0.1))
    >>> state, metrics = train_step(state, torch.ones(4, 3))
    >>> state.step, sorted(metrics)
    (1, ['loss', 'lr'])
    """
    if gone:
        raise TypeError(_gone(gone))
    check_model("make_train_step", model)
    check_function("make_train_step", loss_fn, 2, "loss_fn(model, batch)", "a scalar loss, or (loss, metrics)")
    check_optimizer("make_train_step", optimizer)
    if not isinstance(compile, bool):
        raise TypeError(f"make_train_step: compile= is True or False, and not {kind(compile)}")
    check_apart("make_train_step", model)
    name = f"train_step({type(model).__name__})"
    functional = FunctionalModule(model, name, watched=FIRST)
    if not functional.trained:
        raise ValueError(f"{functional.name} has no parameter to train: all have requires_grad=False, or there are none")
    cut = Cut(name, count("make_train_step: microbatches", microbatches), examples_option("make_train_step", examples), split)
    if split is not None:
        _check_split(split, microbatches, examples)
    functional.check_hooks()
    _warn_of_eval_mode(model, name)
    within = Surroundings(name, host_random)
    loss = Loss(functional, loss_fn, autocast(precision, functional.device_type), within)
    recomputed = None if checkpoint_activations is None else Recomputed(name, functional, checkpoint_activations, host_random)
    gradients = Gradients(name, loss, optimizer.loss_scale, cut, within, recomputed)
    update = Update(name, optimizer, functional)
    return TrainStep(loss, gradients, update, name, Compiled() if compile else IN_TURN, cut.examples)


def _check_split(split: Any, microbatches: int, examples: Any) -> None:
    check_function("make_train_step: split=", split, 2, "split(batch, n)", "n pieces, each a batch")
    if microbatches == 1:
        raise ValueError("make_train_step: split= cuts a batch into microbatches, and there is one: microbatches=n, with n above 1")
    if isinstance(examples, Integral):
        raise ValueError(
            f"make_train_step: examples={examples} is of a whole batch, and says nothing of the pieces of split=: give a key or a function"
        )


def _gone(options: dict[str, Any]) -> str:
    if "accumulate" in options:
        return (
            "make_train_step: accumulate=n is microbatches=n now. The batch is cut into n pieces, each with randomness of its own, and "
            "the loss may be a fold, so that masked means and sums are those of the whole batch: metrics.mean(values, weight), "
            "metrics.sum(values). To update once in n batches: optim.accumulate(n, optimizer)"
        )
    return f"make_train_step() got an unexpected keyword argument {next(iter(options))!r}"


def _warn_of_eval_mode(model: nn.Module, name: str) -> None:
    """Warn of a model that was handed over in eval mode, as loaded ones often are, where that makes a difference in training."""
    if not model.training and (kinds := {type(m).__name__ for m in model.modules() if not m.training and _minds(m)}):
        warnings.warn(
            f"{name}: the model is in eval mode, and so it is trained: {', '.join(sorted(kinds))} work as in evaluation (no dropout, batch "
            "statistics as they are). Call model.train() before the step is made; to keep parts as they are, put those in eval "
            "mode after it",
            stacklevel=3,
        )


def _minds(module: nn.Module) -> bool:
    """Whether a module's forward looks at its mode, and has a rate of dropout other than 0 if it has one."""
    code = getattr(getattr(type(module), "forward", None), "__code__", None)
    if code is None or "training" not in code.co_names or type(module).__module__ == "torch.nn.modules.transformer":
        return False
    rate = getattr(module, "p", getattr(module, "dropout", None))
    return not isinstance(rate, (int, float)) or rate > 0
