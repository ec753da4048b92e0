"""Optimizers as pure functions `(grads, opt_state, params) -> (params, opt_state)`.

base           Optimizer, Transform, Wrapper, chain
hyper          hyperparameters: numbers, schedules, and those in the state
lists          arithmetic on lists of tensors
rule           from a rule to an optimizer
sgd, adam, adam_variants, adaptive, adafactor, muon, schedule_free   the rules
from_torch     any class of torch.optim
transforms     of gradients, for a chain
wrappers       when an update happens: accumulate, apply_if_finite, ...
partition      parameter groups
"""

from fnrun.optim.adafactor import adafactor
from fnrun.optim.adam import adam, adamw
from fnrun.optim.adam_variants import adamax, lamb, lion, nadam, radam
from fnrun.optim.adaptive import adadelta, adagrad, rmsprop, rprop
from fnrun.optim.base import Optimizer, Transform, Wrapper, chain
from fnrun.optim.from_torch import from_torch
from fnrun.optim.hyper import applied_updates, hyperparams, in_state, set_hyperparam
from fnrun.optim.muon import muon
from fnrun.optim.partition import decay_labels, layer_decay, masked, name_multipliers, partition, scaled_lr
from fnrun.optim.schedule_free import schedule_free_adamw
from fnrun.optim.sgd import sgd
from fnrun.optim.transforms import (
    adaptive_clip,
    add_decayed_weights,
    add_noise,
    centralize,
    clip_by_global_norm,
    clip_by_norm,
    clip_by_value,
    scale,
    scale_by_schedule,
    trace,
    zero_nonfinite,
)
from fnrun.optim.wrappers import accumulate, apply_if_finite, dynamic_loss_scale, freeze, freeze_until, lookahead

__all__ = [
    "Optimizer",
    "Transform",
    "Wrapper",
    "accumulate",
    "adadelta",
    "adafactor",
    "adagrad",
    "adam",
    "adamax",
    "adamw",
    "adaptive_clip",
    "add_decayed_weights",
    "add_noise",
    "applied_updates",
    "apply_if_finite",
    "centralize",
    "chain",
    "clip_by_global_norm",
    "clip_by_norm",
    "clip_by_value",
    "decay_labels",
    "dynamic_loss_scale",
    "freeze",
    "freeze_until",
    "from_torch",
    "hyperparams",
    "in_state",
    "lamb",
    "layer_decay",
    "lion",
    "lookahead",
    "masked",
    "muon",
    "nadam",
    "name_multipliers",
    "partition",
    "radam",
    "rmsprop",
    "rprop",
    "scale",
    "scale_by_schedule",
    "scaled_lr",
    "schedule_free_adamw",
    "set_hyperparam",
    "sgd",
    "trace",
    "zero_nonfinite",
]


def __getattr__(name: str) -> None:
    hint = ": optim.leaf(value) is optim.in_state(value) now" if name == "leaf" else ""
    raise AttributeError(f"module 'fnrun.optim' has no attribute {name!r}{hint}")
