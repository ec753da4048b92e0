"""Steps: pure functions `(state, batch) -> (state, metrics)`, made of a module, a loss and an optimizer, or written by hand.

From top to bottom: `kinds` says what a step is, `surroundings` what it runs in, `shell` calls a module with other tensors (`watch` looks at
its first calls), `gradients` takes the gradient of a batch, in `pieces` if it must be, `train` puts loss, gradients and update together,
`compiled` does that as one graph (`capture`), `evaluate` and `handwritten` make other steps, `transforms` make steps of steps.
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
