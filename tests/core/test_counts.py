"""Counts, periods and sizes: a whole number, or an error that names the option, when it is made and not in the first tick."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

import fnrun
from fnrun import data, hooks, metrics, observers, optim, schedules
from fnrun.checkpoint import Checkpoints
from fnrun.testing import assert_resumable
from tests.programs import train

MODEL = torch.nn.Linear(2, 1)
NOTHING = Checkpoints("nowhere")  # it writes nothing before the first save
ROWS = torch.zeros(4, 2)


def make_step(**options: Any) -> Any:
    return fnrun.make_train_step(MODEL, lambda model, x: model(x).mean(), optim.sgd(0.1), **options)


#: Each with the name that its error says, and whether 0 is a count too.
OPTIONS: dict[str, tuple[Any, str, bool]] = {
    "repeat": (lambda n: fnrun.repeat(train, n), "times", True),
    "step_loop": (lambda n: fnrun.step_loop(train, n), "steps", True),
    "until_step": (lambda n: fnrun.step_loop(train, 1, until_step=n), "until_step", True),
    "fused_steps": (lambda n: fnrun.step_loop(make_step(compile=True), 2, fused_steps=n), "fused_steps", False),
    "eval_loop": (lambda n: fnrun.eval_loop(train, steps=n), "steps", True),
    "predict_loop": (lambda n: fnrun.predict_loop(train, steps=n), "steps", True),
    "workflow": (lambda n: fnrun.workflow([("a", 1)], times=n, a=train), "times", True),
    "phase": (lambda n: fnrun.workflow([("a", n)], times=1, a=train), "the count of 'a'", False),
    "every loop": (lambda n: fnrun.every(n, train), "an interval", False),
    "every begin": (lambda n: fnrun.every(1, train, begin=n), "begin", False),
    "every pairs": (lambda n: fnrun.every([(0, 1), (5, n)], train), "an interval", False),
    "microbatches": (lambda n: make_step(microbatches=n), "microbatches", False),
    "optim.accumulate": (optim.accumulate, "n", False),
    "lookahead": (lambda n: optim.lookahead(sync_period=n), "sync_period", False),
    "freeze_until": (optim.freeze_until, "step", True),
    "growth_interval": (lambda n: optim.dynamic_loss_scale(growth_interval=n), "growth_interval", False),
    "muon": (lambda n: optim.muon(0.1, ns_steps=n), "ns_steps", False),
    "patience": (lambda n: hooks.early_stopping("loss", patience=n), "patience", False),
    "plateau patience": (lambda n: hooks.reduce_on_plateau("loss", patience=n), "patience", True),
    "cooldown": (lambda n: hooks.reduce_on_plateau("loss", cooldown=n), "cooldown", True),
    "stop_after": (lambda n: hooks.stop_after(steps=n), "steps", False),
    "tokens": (lambda n: hooks.stop_after(tokens=n), "tokens", False),
    "rollback": (lambda n: hooks.rollback("loss", max_retries=n), "max_retries", False),
    "ema": (lambda n: hooks.ema(0.9, every=n), "every", False),
    "ema start": (lambda n: hooks.ema(0.9, start=n), "start", True),
    "swa": (lambda n: hooks.swa(n), "start", True),
    "every hook": (lambda n: hooks.every(n, hooks.ema(0.9)), "n", False),
    "between": (lambda n: hooks.between(n, None, hooks.ema(0.9)), "begin", True),
    "between end": (lambda n: hooks.between(0, n, hooks.ema(0.9)), "end", False),
    "at": (lambda n: hooks.at(n, hooks.ema(0.9)), "a step", False),
    "one of at": (lambda n: hooks.at([5, n], hooks.ema(0.9)), "a step", False),
    "stop_after epochs": (lambda n: hooks.stop_after(epochs=n), "epochs", False),
    "window": (lambda n: observers.log(window=n), "a window", False),
    "log": (lambda n: observers.log(n), "every", False),
    "checkpoint": (lambda n: observers.checkpoint(NOTHING, every=n), "every", False),
    "keep": (lambda n: observers.checkpoint(NOTHING, keep=n), "keep", False),
    "keep_every": (lambda n: observers.checkpoint(NOTHING, keep=1, keep_every=n), "keep_every", False),
    "max_failures": (lambda n: observers.checkpoint(NOTHING, max_failures=n), "max_failures", False),
    "prune": (lambda n: NOTHING.prune(n), "keep", False),
    "memory": (observers.memory, "every", False),
    "watch": (lambda n: observers.watch(n, to=[]), "every", False),
    "histogram": (lambda n: observers.histogram(torch.zeros(2), bins=n), "bins", False),
    "batch_size": (lambda n: data.arrays(ROWS, n), "batch_size", False),
    "loader": (lambda n: data.loader(torch.utils.data.TensorDataset(ROWS), n), "batch_size", False),
    "workers": (lambda n: data.loader(torch.utils.data.TensorDataset(ROWS), 2, workers=n), "workers", True),
    "k": (lambda n: metrics.accuracy(torch.eye(3), torch.arange(3), k=n), "k", False),
    "ks": (lambda n: metrics.top_k(torch.eye(3), torch.arange(3), ks=(n,)), "ks", False),
    "classes": (lambda n: metrics.confusion(torch.arange(1), torch.arange(1), n), "classes", False),
    "permutation": (lambda n: data.permutation(fnrun.Key(0), n, np.arange(1)), "n", False),
    "split": (lambda n: fnrun.Key(0).split(n), "n", True),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_what_is_no_count_is_refused_by_name(option):
    make, name, zero = OPTIONS[option]
    for bad in (2.5, math.nan, math.inf, -3, True, "3", np.float64(2.0), *(() if zero else (0,))):
        with pytest.raises(ValueError, match=rf"(^|\W){name}\W.* at least [01]"):
            make(bad)


@pytest.mark.parametrize("option", OPTIONS)
def test_numpys_integers_are_counts(option):
    OPTIONS[option][0](np.int64(1))


@pytest.mark.parametrize(
    "make",
    [
        lambda n: schedules.linear(1.0, 0.0, n),
        lambda n: schedules.cosine(1.0, n),
        lambda n: schedules.warmup_cosine(1.0, 1, n),
        lambda n: schedules.step(1.0, n, 0.5),
        lambda n: schedules.multistep(1.0, [1, n], 0.5),
        lambda n: schedules.epochs(n, 10),
        lambda n: schedules.inverse_sqrt(1.0, n),
        lambda n: schedules.flat_cosine(1.0, 0, n),
        lambda n: schedules.trapezoid(1.0, 0, 10, n),
        lambda n: schedules.piecewise([1.0, 2.0], [n]),
        lambda n: schedules.join([schedules.constant(1.0), schedules.constant(2.0)], [n]),
        lambda n: schedules.cyclic(0.0, 1.0, n),
        lambda n: schedules.cosine_restarts(1.0, [n]),
    ],
)
def test_a_schedule_has_a_length(make):
    for bad in (math.nan, -1, math.inf, True):
        with pytest.raises(ValueError, match=r"nan|-1|inf|True"):
            make(bad)


def test_numbers_that_would_never_act_are_refused():
    for make in (
        lambda: fnrun.deadline(hours=1, spent=math.nan),
        lambda: hooks.ema(0.9, warmup=math.inf),
        lambda: hooks.annealed_ema(0.9, gamma=math.inf),
        lambda: metrics.iou(torch.arange(2), torch.arange(2), 2, ignore_index=0.5),  # pyright: ignore[reportArgumentType]
        lambda: assert_resumable(train, None, None, limit=1),
    ):
        with pytest.raises(ValueError, match=r"spent|warmup|gamma|ignore_index|limit"):
            make()
