"""TorchOpt's functional optimizer over `torch.func.functional_call`: out of place, or (its default) writing over what it is given."""

from __future__ import annotations

import functools

import torch
import torchopt

from benchmarks.measure import Turns
from benchmarks.problems import Problem, loss_fn


def train(turns: Turns, problem: Problem, inplace: bool) -> None:
    optimizer = torchopt.adamw(1e-3)
    params = {name: p.detach().clone().requires_grad_() for name, p in problem.model.named_parameters()}
    opt_state = optimizer.init(params)
    while True:
        for batch in turns:
            loss = loss_fn(functools.partial(torch.func.functional_call, problem.model, params), batch)
            grads = dict(zip(params, torch.autograd.grad(loss, tuple(params.values())), strict=True))
            updates, opt_state = optimizer.update(grads, opt_state, params=params, inplace=inplace)
            params = torchopt.apply_updates(params, updates, inplace=inplace)
