"""Validation anywhere: when it runs, with which data and weights, and that a killed run goes on in the same sequence.

The sequences are those of MMEngine's loops (`val_interval`, `val_begin`, `dynamic_intervals`) and of mmcv's workflow, recorded from both.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fnrun
from fnrun import data, hooks, metrics, optim
from fnrun.core import tree
from fnrun.testing import assert_resumable, assert_same, states_seen
from tests.programs import evaluate, fresh, train


class Traced:
    """A program whose steps write down what ran: `T` for a training step, `V` or another letter for a batch of evaluation."""

    def __init__(self, make, streams):
        self.log = []
        self.program = make(self.training(), self.evaluation)
        self.streams = {name: [torch.full((2,), float(i)) for i in range(n)] for name, n in streams.items()}

    def training(self):
        def step(state, batch):
            self.log.append("T")
            return train(state, batch)

        return step

    def evaluation(self, letter="V"):
        def step(state, batch):
            self.log.append(letter)
            return evaluate(state, batch)

        return step

    def run(self, state):
        """What ran, and the end."""
        self.log.clear()
        end = self.program(state, self.streams)
        return "".join(self.log), end


def epochs(times, n, **options):
    def make(step, evaluation):
        val = fnrun.every(n, fnrun.eval_loop(evaluation()), **options)
        return fnrun.repeat(fnrun.sequence(train=fnrun.epoch_loop(step), val=val), times)

    return make


def iterations(step, evaluation):
    inner = fnrun.sequence(train=fnrun.step_loop(step, 4, until_step=10), val=fnrun.eval_loop(evaluation()))
    return fnrun.repeat(inner, until=lambda state: state.step >= 10)


def workflow_by_epoch(step, evaluation):
    return fnrun.workflow([("train", 2), ("val", 1)], times=3, train=fnrun.epoch_loop(step), val=fnrun.eval_loop(evaluation()))


def workflow_by_iteration(step, evaluation):
    members = {"train": fnrun.step_loop(step, 1), "val": fnrun.eval_loop(evaluation(), steps=1)}
    return fnrun.workflow([("train", 2), ("val", 1)], times=5, **members)


ONE = {"train": 1, "val": 1}
SEQUENCES = {
    "7 epochs, each third: 3, 6, 7": (epochs(7, 3), ONE, "TTTV TTTV TV"),
    "7 epochs, each third from the fifth: 6, 7": (epochs(7, 3, begin=5), ONE, "TTTTTTV TV"),
    "12 epochs, each fifth, from the 11th each second: 5, 10, 12": (epochs(12, [(0, 5), (11, 2)]), ONE, "TTTTTV TTTTTV TTV"),
    "12 rounds of every([(0, 5), (10, 2)]): 5, 10, 12": (epochs(12, [(0, 5), (10, 2)]), ONE, "TTTTTV TTTTTV TTV"),
    "10 iterations, each fourth: 4, 8, 10": (iterations, {"train": 3, "val": 2}, "TTTTVV TTTTVV TTVV"),
    "a workflow of epochs": (workflow_by_epoch, {"train": 3, "val": 2}, "TTTTTT VV TTT VV"),
    "a workflow of iterations": (workflow_by_iteration, {"train": 3, "val": 2}, "TTVTTVTV"),
}


@pytest.mark.parametrize("name", SEQUENCES)
def test_sequences(name):
    """The sequence holds, and a run killed in any state does the rest of it, no batch more or less."""
    make, streams, expected = SEQUENCES[name]
    traced, expected = Traced(make, streams), expected.replace(" ", "")
    seen, _ = states_seen(traced.program, fresh(), traced.streams)
    found, end = traced.run(fresh())
    assert found == expected
    for state in seen:
        rest, again = traced.run(tree.snapshot(state))
        assert rest == expected[state.position.ticks :]
        assert_same(again, end, f"resumed after {state.position.ticks} ticks")


def test_before_the_first_step():
    """Once, and not again in a run that goes on."""

    def make(step, evaluation):
        rounds = fnrun.repeat(fnrun.sequence(train=fnrun.epoch_loop(step), val=fnrun.eval_loop(evaluation())), 2)
        return fnrun.sequence(before=fnrun.eval_loop(evaluation("B")), rounds=rounds)

    traced = Traced(make, {"train": 2, "val": 1})
    traced.streams = {"before": traced.streams["val"], "rounds": traced.streams}
    found, (_, values) = traced.run(fresh())
    assert found == "BTTVTTV"
    assert values["before/score"] == evaluate(fresh(), traced.streams["before"][0])["score"]
    assert set(values) == {"before/score", "rounds/train/loss", "rounds/train/size", "rounds/val/score"}
    for state in states_seen(traced.program, fresh(), traced.streams)[0]:
        assert traced.run(state)[0] == found[state.position.ticks :]


def test_inside_an_epoch():
    """Each third step of a pass of 7, and at the pass's end; the stream goes on where it stood."""

    def make(step, evaluation):
        inner = fnrun.sequence(train=fnrun.step_loop(step, 3), val=fnrun.eval_loop(evaluation()))
        last = fnrun.sequence(train=fnrun.epoch_loop(step), val=fnrun.eval_loop(evaluation()))
        return fnrun.sequence(parts=fnrun.repeat(inner, 2), rest=last)

    traced = Traced(make, {"train": 7, "val": 1})
    train_stream = data.arrays(torch.arange(7.0), 1, shuffle=True, name="train")
    traced.streams = {name: {"train": train_stream, "val": traced.streams["val"]} for name in ("parts", "rest")}
    found, (end, _) = traced.run(fresh())
    assert found == "TTTVTTTVTV"
    assert (end.position.streams["train"].epoch, end.position.streams["train"].batch) == (1, 0)
    plain, _ = fnrun.epoch_loop(train)(fresh(), train_stream)
    assert_same(plain.params, end.params, "validation within the epoch changed the training")


def test_several_sets_with_names_of_their_own_and_times_of_their_own():
    def make(step, evaluation):
        val = fnrun.sequence(clean=fnrun.eval_loop(evaluation("C")), noisy=fnrun.every(2, fnrun.eval_loop(evaluation("N"))))
        return fnrun.repeat(fnrun.sequence(train=fnrun.epoch_loop(step), val=val), 3)

    traced = Traced(make, {"train": 1, "clean": 1, "noisy": 2})
    traced.streams = {"train": traced.streams["train"], "val": {name: traced.streams[name] for name in ("clean", "noisy")}}
    found, (_, values) = traced.run(fresh())
    assert found == "TC TCNN TCNN".replace(" ", "")
    assert {name for name in values if name.startswith("val/")} == {"val/clean/score", "val/noisy/score"}


def test_losses_and_metrics_together():
    """The evaluation step takes the loss function of the training: its loss and its metrics are both of the whole set."""
    model = nn.Linear(2, 2)

    def loss_fn(model, batch):
        logits = model(batch["x"])
        loss = nn.functional.cross_entropy(logits, batch["label"])
        return loss, {"accuracy": metrics.accuracy(logits, batch["label"])}

    x, label = torch.linspace(-1, 1, 14).view(7, 2), torch.tensor([0, 1, 1, 0, 1, 0, 0])
    state = fnrun.TrainState.create(model)
    _, found = fnrun.eval_loop(fnrun.make_eval_step(model, loss_fn))(state, data.arrays({"x": x, "label": label}, 3))
    with torch.no_grad():
        logits = model(x)
    torch.testing.assert_close(found["loss"].float(), nn.functional.cross_entropy(logits, label))
    assert found["accuracy"].item() == pytest.approx((logits.argmax(1) == label).double().mean().item())


def averaged(name, hook):
    """A training that validates with its own weights and with those of an average; and the model and the loss."""
    with fnrun.Key(0).scope():
        model = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))

    def loss_fn(model, x):
        return (model(x) - x.sum(1, keepdim=True)).square().mean()

    optimizer = optim.sgd(0.1)
    program = fnrun.repeat(
        fnrun.sequence(
            train=fnrun.epoch_loop(fnrun.make_train_step(model, loss_fn, optimizer), hooks=[hook]),
            own=fnrun.eval_loop(fnrun.make_eval_step(model, loss_fn)),
            average=fnrun.eval_loop(fnrun.make_eval_step(model, loss_fn, weights=name)),
        ),
        2,
    )
    batches = data.arrays(torch.linspace(-1, 1, 24).view(12, 2), 4)
    return program, fnrun.TrainState.create(model, optimizer), {"train": batches, "own": batches, "average": batches}, model, loss_fn


@pytest.mark.parametrize(
    "hook", [hooks.ema(0.8), hooks.ema(0.8, buffers="average"), hooks.swa(2, buffers="average"), hooks.annealed_ema(0.9)]
)
def test_with_averaged_weights_and_nothing_swapped(hook):
    """The values are those of a module that holds the averages; the training is that without the evaluation, bit for bit."""
    program, state, streams, model, loss_fn = averaged(hook.name, hook)
    end, values = program(state, streams)
    memory = end.memory[hook.name]
    for field, tensors in (("own", {**end.params, **end.buffers}), ("average", {**memory["params"], **memory.get("buffers", end.buffers)})):
        model.load_state_dict(tensors)
        model.eval()
        with torch.no_grad():
            torch.testing.assert_close(values[f"{field}/loss"].float(), loss_fn(model, torch.linspace(-1, 1, 24).view(12, 2)))
    assert values["own/loss"] != values["average/loss"]
    model.train()
    plain, _ = fnrun.repeat(fnrun.sequence(train=program.step.steps["train"]), 2)(state, streams)
    for field in ("params", "buffers", "opt_state", "memory", "step"):
        assert_same(getattr(plain, field), getattr(end, field), f"evaluation changed {field}")


def test_resumes_in_the_middle_of_an_evaluation_with_averages():
    program, state, streams, *_ = averaged("ema", hooks.ema(0.8, buffers="average"))
    assert_resumable(program, state, streams, limit=100, restored=lambda state, like: tree.snapshot(state))
