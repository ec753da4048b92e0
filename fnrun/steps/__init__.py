"""Steps: pure functions `(state, batch) -> (state, metrics)`, made of a module, a loss and an optimizer, or written by hand.

From top to bottom, each of what stands above it:

    kinds          what a step is
    given          what a user's functions are given and return: detached, of the right kinds, or refused in words
    surroundings   what a step runs in: generators seeded from its key, its reports collected
    watch          the first calls of a module, looked at: what it does besides outputs and buffers
    functional     a module as a function of its tensors
    recompute      parts of a module whose activations are computed again in the backward
    pieces         a batch in microbatches, and what they come to together
    gradients      a loss, and its gradient for a batch or its pieces
    update         the optimizer alone
    train          the step as a value: a loss, gradients, an update, and how they are combined
    draws          what a graph draws at random, drawn outside of it
    capture        a function of tensors as one graph
    compiled       a step's parts combined as one graph
    make           the training step of a model, a loss function and an optimizer
    evaluate, handwritten   other steps
    transforms     steps made of steps
"""

from fnrun.steps.evaluate import make_eval_step, make_predict_step
from fnrun.steps.gradients import value_and_grad
from fnrun.steps.handwritten import step
from fnrun.steps.kinds import EvalStep, Metrics, PureStep, Step
from fnrun.steps.make import make_train_step
from fnrun.steps.train import TrainStep
from fnrun.steps.transforms import skip_nonfinite

__all__ = [
    "EvalStep",
    "Metrics",
    "PureStep",
    "Step",
    "TrainStep",
    "make_eval_step",
    "make_predict_step",
    "make_train_step",
    "skip_nonfinite",
    "step",
    "value_and_grad",
]
