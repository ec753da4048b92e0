"""The optimizer's hyperparameters on which hooks act."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fnrun.optim import hyperparams, set_hyperparam


def named(opt_state: Any, name: str) -> dict[str, torch.Tensor]:
    """The hyperparameters called `name`: one, or one for each group (`decay/lr_scale`, `no_decay/lr_scale`)."""
    return {full: value for full, value in hyperparams(opt_state).items() if full == name or full.endswith(f"/{name}")}


def put(opt_state: Any, values: Mapping[str, torch.Tensor]) -> Any:
    """The optimizer state with these values of its hyperparameters."""
    for name in sorted(values, key=len):  # a short name sets all that end so, before the longer names do
        opt_state = set_hyperparam(opt_state, name, values[name])
    return opt_state


def check(who: str, opt_state: Any, name: str) -> None:
    """Raise ValueError where the optimizer state has no such hyperparameter."""
    if not named(opt_state, name):
        there = ", ".join(hyperparams(opt_state)) or "none"
        raise ValueError(
            f"{who}: the optimizer's state has no hyperparameter {name!r}; there are: {there}. optim.in_state(value) makes one"
        )
