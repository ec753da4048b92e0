"""Optimizers as pure functions: gradients, memory and parameters in, new memory and parameters out."""

from fnrun.optim.adafactor import adafactor
from fnrun.optim.adam import adam, adamw
from fnrun.optim.adam_variants import adamax, lamb, lion, nadam, radam
from fnrun.optim.adaptive import adadelta, adagrad, rmsprop, rprop
from fnrun.optim.base import Optimizer, Transform, Wrapper, chain
from fnrun.optim.hyper import hyperparams, leaf, set_hyperparam
from fnrun.optim.muon import muon
from fnrun.optim.schedule_free import schedule_free_adamw
from fnrun.optim.sgd import sgd
from fnrun.optim.transforms import clip_by_global_norm

__all__ = [
    "Optimizer",
    "Transform",
    "Wrapper",
    "adadelta",
    "adafactor",
    "adagrad",
    "adam",
    "adamax",
    "adamw",
    "chain",
    "clip_by_global_norm",
    "hyperparams",
    "lamb",
    "leaf",
    "lion",
    "muon",
    "nadam",
    "radam",
    "rmsprop",
    "rprop",
    "schedule_free_adamw",
    "set_hyperparam",
    "sgd",
]
