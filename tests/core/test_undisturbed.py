"""Ctrl-C at every line of what puts things back: the module, the modes, the generators and the locks are as they were."""

from __future__ import annotations

import random
import signal
import sys
import threading

import pytest
import torch
from torch import nn

import fnrun
from fnrun import optim
from fnrun.core import key as rng, reports, undisturbed
from fnrun.steps import functional, watch


class Modal(nn.Module):
    """With a buffer, dropout, and its own way to change modes."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 1))

    def train(self, mode=True):
        return super().train(mode)

    def forward(self, x):
        return self.layers(x)


def loss(model, batch):
    return model(batch).pow(2).mean()


def hook(state, metrics):
    torch.rand(1)
    return state


def around(step):
    def call(state, batch):
        return step(state, batch)

    return call


@pytest.fixture(autouse=True)
def pythons_handler():
    """What runs in the background of a shell has Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def made():
    with fnrun.Key(0).scope():
        model = Modal()
    optimizer = optim.sgd(0.1)
    return model, fnrun.make_train_step(model, loss, optimizer, host_random=True), fnrun.TrainState.create(model, optimizer, seed=0)


def looks(model):
    """All that may be left changed."""
    free = []

    def elsewhere():
        if rng.ambient_lock.acquire(blocking=False):
            rng.ambient_lock.release()
            free.append(True)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert free == [True], "the lock is held"
    return (
        [id(t) for t in [*model.parameters(), *model.buffers()]],
        [t.tolist() for t in [*model.parameters(), *model.buffers()]],
        [m.training for m in model.modules()],
        torch.get_rng_state().tolist(),
        random.getstate(),
        reports.collecting(),
        list(functional._at_work),
        torch.is_grad_enabled(),
        torch.utils._python_dispatch._get_current_dispatch_mode_stack(),
    )


class AtLine:
    """A trace function that interrupts once, at the nth line that runs in these functions."""

    def __init__(self, n, codes, interrupt):
        self.left, self.codes, self.interrupt, self.came = n, codes, interrupt, False

    def __call__(self, frame, event, argument):
        if frame.f_code not in self.codes:
            return None
        if event == "line" and not self.came:
            self.left -= 1
            if self.left < 0:
                self.came = True
                self.interrupt()
        return self

    def interrupts(self, call):
        sys.settrace(self)
        try:
            call()
        finally:
            sys.settrace(None)


RESTORING = {
    rng.Scope._put_back.__code__,
    functional.FunctionalModule._put_back.__code__,
    functional.FunctionalModule._switch.__code__,
    functional._Attributes.put_back.__code__,
    watch.Operations.undo.__code__,
}


def raise_it():
    raise KeyboardInterrupt


@pytest.mark.parametrize("calls", [0, 5], ids=["first", "later"])
def test_a_step_by_itself_puts_back_what_an_exception_in_the_middle_left(made, calls):
    model, step, state = made
    for _ in range(calls):
        state, _ = step(state, torch.ones(4, 2))
    before, codes, n = looks(model), RESTORING | {functional.FunctionalModule._run.__code__}, 0
    while True:
        tracing = AtLine(n, codes, raise_it)
        try:
            tracing.interrupts(lambda: step(state, torch.ones(4, 2)))
        except KeyboardInterrupt:
            assert looks(model) == before, n
        if not tracing.came:
            break
        n += 1
    assert n > 40


def test_in_a_program_a_signal_waits_for_what_is_put_back(made):
    """Python's own handler would raise at the line."""
    model, step, state = made
    program = fnrun.step_loop(around(step), 100_000, hooks=[hook])
    before, codes = looks(model), undisturbed._codes
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    for n in range(0, 330, 3):
        tracing = AtLine(n, codes, lambda: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            tracing.interrupts(lambda: program(state, [torch.ones(4, 2)]))
        assert looks(model) == before, n
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_what_hangs_while_it_is_put_back_is_interrupted_all_the_same(made, monkeypatch):
    monkeypatch.setattr(undisturbed, "_PATIENCE", 0.05)
    never, waited = threading.Event(), []

    class Hangs(Modal):
        def train(self, mode=True):
            if armed:
                signal.raise_signal(signal.SIGINT)
                never.wait(60)
                waited.append(True)
            return super().train(mode)

    armed = False
    model, optimizer = Hangs(), optim.sgd(0.1)
    step, state = fnrun.make_eval_step(model, lambda m, b: {"loss": loss(m, b)}), fnrun.TrainState.create(model, optimizer, seed=0)
    armed = True
    with pytest.raises(KeyboardInterrupt):
        fnrun.eval_loop(step)(state, [torch.ones(4, 2)])
    assert not waited
