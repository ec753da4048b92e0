"""Steps: pure functions `(state, batch) -> (state, metrics)`, made of a module, a loss and an optimizer, or written by hand.

From top to bottom, each module imports only from those above it:

    kinds          what a step is: protocols and base classes
    checks         what a user's functions are passed and return: detached, of the right kinds, or refused
    draws          random numbers of a graph, drawn outside of it
    surroundings   seeded generators and collected reports around a call
    watch          the first calls of a module, watched for side effects
    functional     a module as a function of its tensors
    recompute      activation checkpointing
    cutting        slices of a batch; the option `examples=`
    microbatches   a batch in microbatches, and the sums of their gradients and metrics
    gradients      a loss, and its gradient for a batch or its microbatches
    update         the optimizer's part of a step
    train          the step as a value: loss, gradients, update, and how they are combined
    capture        a function of tensors as one graph
    compiled       a step as one graph
    make           `make_train_step`
    evaluate       `make_eval_step`, `make_predict_step`
    handwritten    `step`
    transforms     functions from step to step
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
