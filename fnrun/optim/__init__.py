"""Optimizers as pure functions: gradients, memory and parameters in, new memory and parameters out."""

from fnrun.optim.adam import adam, adamw
from fnrun.optim.base import Optimizer, Transform, Wrapper, chain
from fnrun.optim.hyper import hyperparams, leaf, set_hyperparam
from fnrun.optim.sgd import sgd
from fnrun.optim.transforms import clip_by_global_norm

__all__ = [
    "Optimizer",
    "Transform",
    "Wrapper",
    "adam",
    "adamw",
    "chain",
    "clip_by_global_norm",
    "hyperparams",
    "leaf",
    "set_hyperparam",
    "sgd",
]
