"""The training step of a module, a loss and an optimizer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any, Never

from torch import nn

from fnrun.core.counts import count
from fnrun.core.inplace import FIRST
from fnrun.core.state import check_apart, check_model, check_optimizer
from fnrun.core.words import kind, unknown
from fnrun.steps.checks import autocast, check_function
from fnrun.steps.compiled import Compiled
from fnrun.steps.cutting import examples_option
from fnrun.steps.functional import FunctionalModule
from fnrun.steps.gradients import Gradients, Loss
from fnrun.steps.microbatches import Cut
from fnrun.steps.recompute import Recomputed
from fnrun.steps.surroundings import Surroundings
from fnrun.steps.train import IN_TURN, TrainStep
from fnrun.steps.update import Update

if TYPE_CHECKING:
    from fnrun.optim import Optimizer


_OURS = {
    "accumulate": "it is microbatches=n here. The batch is cut into n pieces, each with its own randomness, and the loss may be a fold, so "
    "that masked means and sums are those of the whole batch: metrics.mean(values, weight), metrics.sum(values). To update once in n "
    "batches: optim.accumulate(n, optimizer)"
}


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
    **others: Never,
) -> TrainStep:
    """The training step of `model`: a pure function `(state, batch) -> (state, metrics)`, a `TrainStep` of loss, gradient and update.

    `loss_fn(model, batch)` calls `model` as usual, while the model's tensors are the state's. It returns the loss, or `(loss, metrics)`:

    - a real scalar: the mean over the batch's examples. Microbatches silently change the gradient of a scalar that is another mean (class
      weights, `ignore_index=`) or a sum: return one of these folds instead;
    - `metrics.mean(values, weight)`: a weighted mean, as over the tokens that are not padding. A batch whose weights are all 0 makes no
      update, and its only metric is `skipped`, 1;
    - `metrics.sum(values)`: a sum, which is not divided.

    The metrics are `loss`, those of `loss_fn` and those of `fnrun.report`, as detached tensors; nothing waits for the device.

    - Submodules run in the train/eval modes that they have when the step is made. Buffers (batch statistics) are returned in the new state.
    - A parameter with `requires_grad=False` is not trained. A parameter that the loss does not reach keeps its value, as in torch.
    - No gradient goes through a step (ValueError, except under `torch.no_grad()`): not to a batch that has a graph, to leaves that were put
      into the state, to a hyperparameter, nor by a transform of torch.func. A leaf of the batch may require grad, for a penalty in the
      loss. `step.loss` and `optimizer.update` are differentiable.

    Options:

    - `microbatches=1`: n cuts the batch into n pieces, rows `rows * i // n` to `rows * (i + 1) // n`, computed one after the other, with
      1/n of the memory for activations. The gradient is that of the whole batch if the loss is a fold or a mean over examples and the
      module treats examples independently. Piece i draws from `state.rng.fold_in("train", step, i)`. Gradients, metrics and batch norm's
      averages are added in a balanced tree. ValueError for a parameter that the forward changes, a buffer that differs between pieces or
      counts examples (a count of calls is kept), and a metric with a value for each example.
    - `examples=None`: the number of examples in a batch, where its lengths and its stream do not say it: a key or path (`"x"`,
      `"inputs/ids"`, `"0"`), a number, or a function `batch -> int`. Plain metrics are weighted by it, and microbatches cut what has this
      length. With several keys, `("x", "y")`, nothing else is cut, whatever its length.
    - `split=None`: `split(batch, n)` cuts the batch instead, for graphs and packed sequences: a list of at most n pieces, each a batch, or
      None for one that is absent. `examples` then counts a piece.
    - `precision=None`: `"bf16"` or `"fp16"` runs `loss_fn` under autocast; parameters keep their dtype. fp16 needs
      `optim.dynamic_loss_scale`.
    - `checkpoint_activations=None`: the parts of the model whose activations are recomputed in the backward, for less memory and the same
      bits. `"blocks"`: the entries of each `nn.ModuleList` or `nn.Sequential` that share a class and have submodules. A list of patterns:
      the modules whose path contains one (`["encoder.layer"]`) or matches it as a glob (with `*`); of nested ones the outer. Forward hooks
      on modules within a part run in both computations, those on the part itself once. `step.loss`, evaluation steps and compiled graphs
      ignore it.
    - `compile=False`: compile the whole step as one graph (inductor), one static graph for each shape of the batch. The numbers are eager's
      up to rounding, the same bits from run to run. A step that depends on a tensor's value in Python runs eagerly, with a warning.
    - `host_random=False`: seed Python's and NumPy's generators too (100 us a step), for a model that draws from them.

    Raises ValueError for a model without trained parameters, a loss that is not a scalar, a state of another model, and a batch that cannot
    be cut without doubt.

    >>> import torch
    >>> from fnrun import TrainState, optim
    >>> model = nn.Linear(3, 1)
    >>> train_step = make_train_step(model, lambda model, x: model(x).square().mean(), optim.sgd(0.1))
    >>> state = TrainState.create(model, optim.sgd(0.1))
    >>> state, metrics = train_step(state, torch.ones(4, 3))
    >>> state.step, sorted(metrics)
    (1, ['loss', 'lr'])
    """
    if others:
        raise unknown("make_train_step", others, _OURS)
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
    loss = Loss(functional, loss_fn, autocast(precision, functional.device_type), Surroundings(name, host_random))
    recomputed = None if checkpoint_activations is None else Recomputed(functional, checkpoint_activations, host_random)
    gradients = Gradients(loss, optimizer.loss_scale, cut, recomputed)
    return TrainStep(loss, gradients, Update(optimizer, functional), name, Compiled() if compile else IN_TURN, cut.examples)


def _check_split(split: Any, microbatches: int, examples: Any) -> None:
    check_function("make_train_step: split=", split, 2, "split(batch, n)", "n pieces, each a batch")
    if microbatches == 1:
        raise ValueError("make_train_step: split= cuts a batch into microbatches, and there is one: microbatches=n, with n above 1")
    if isinstance(examples, Integral):
        raise ValueError(
            f"make_train_step: examples={examples} is of a whole batch, and says nothing of the pieces of split=: give a key or a function"
        )


def _warn_of_eval_mode(model: nn.Module, name: str) -> None:
    """Warn of a model in eval mode, as loaded ones often are, if a forward depends on it."""
    if not model.training and (kinds := {type(m).__name__ for m in model.modules() if not m.training and _depends_on_mode(m)}):
        warnings.warn(
            f"{name}: the model is in eval mode, and so it is trained: {', '.join(sorted(kinds))} work as in evaluation (no dropout, batch "
            "statistics as they are). Call model.train() before the step is made; to keep parts as they are, put those in eval "
            "mode after it",
            stacklevel=3,
        )


def _depends_on_mode(module: nn.Module) -> bool:
    """Whether a module's forward reads `training`, and its rate of dropout, if any, is not 0."""
    code = getattr(getattr(type(module), "forward", None), "__code__", None)
    if code is None or "training" not in code.co_names or type(module).__module__ == "torch.nn.modules.transformer":
        return False
    rate = getattr(module, "p", getattr(module, "dropout", None))
    return not isinstance(rate, (int, float)) or rate > 0
