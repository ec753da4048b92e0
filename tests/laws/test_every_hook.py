"""Laws 2 and 3 with every hook and observer in the program at once: each of them acts, and some of them more than once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fnrun
from fnrun import data, hooks, metrics, observers, optim
from fnrun.core import tree
from fnrun.testing import assert_observers_do_not_matter, assert_resumable, assert_same, states_seen


class Training:
    """Up to 6 epochs of 5 steps, with dropout, batch norm, shuffling, losses that explode now and then, and validation of three averages."""

    def __init__(self, *, seed=3, look=1, donate=False):
        with fnrun.Key(0).scope():
            model = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Linear(4, 2))
            x = torch.randn(18, 2)
        optimizer = optim.chain(observers.watch_gradients(), optim.clip_by_global_norm(1.0), optim.adamw(0.05))

        def loss_fn(model, batch):
            logits = model(batch["x"])
            loss = F.cross_entropy(logits, batch["label"])
            explodes = torch.rand(()) < 0.1  # drawn from the step's key
            return torch.where(explodes, torch.tensor(torch.nan), loss), {"accuracy": metrics.accuracy(logits, batch["label"])}

        def half(state, metrics):
            return state.replace(opt_state=optim.set_hyperparam(state.opt_state, "lr_scale", 0.5))

        def evaluate(weights):
            return fnrun.make_eval_step(
                model, lambda model, batch: {"loss": F.cross_entropy(model(batch["x"]), batch["label"])}, weights=weights
            )

        per_step = [
            hooks.every(look, hooks.rollback("loss", when=lambda value, good: value > 5 * good, max_retries=9, lr_factor=0.9)),
            hooks.compose(hooks.ema(0.8, warmup=2, start=3, buffers="average"), hooks.annealed_ema(0.9, gamma=3, every=2)),
            hooks.every(4, hooks.ema(0.5, name="slow")),
            hooks.between(5, 9, hooks.swa(every=2, name="early")),
            hooks.at([7, 8], half),
            hooks.when(lambda state: state.step % 11 == 0, half),
            hooks.stop_after(tokens=1000, count=lambda batch: batch["x"].numel() + len(batch["label"]), name="tokens"),
            hooks.sync_buffers,
        ]
        per_round = [
            hooks.swa(2, buffers="average"),
            hooks.reduce_on_plateau("val/loss", patience=0, threshold=0.5, cooldown=1, factor=0.7),
            hooks.early_stopping("val/loss", patience=9, threshold=0.01),
            hooks.rollback("val/loss", name="round", when=lambda value, good: value > 0.9 * good, max_retries=9),
            hooks.stop_after(steps=27),
            hooks.stop_after(epochs=9, stream="train", name="epochs"),
        ]
        statistics = {"loss": ["mean", "max", ("mean", 4), ("min", "epoch")], "lr": "last"}
        watching = [
            observers.log(3, to=[], statistics=statistics),
            observers.progress(),
            observers.memory(5),
            observers.watch(4, to=[]),
        ]
        self.fresh = fnrun.TrainState.create(model, optimizer, seed=seed)
        self.program = fnrun.repeat(
            fnrun.sequence(
                train=fnrun.epoch_loop(fnrun.make_train_step(model, loss_fn, optimizer), hooks=per_step, observers=watching, donate=donate),
                val=fnrun.eval_loop(evaluate("ema")),
                averages=fnrun.every(
                    2, fnrun.sequence(swa=fnrun.eval_loop(evaluate("swa")), slow=fnrun.eval_loop(evaluate("slow"), steps=1))
                ),
            ),
            7,
            hooks=per_round,
            observers=[observers.log(to=[], name="rounds")],
        )
        batches = data.arrays({"x": x, "label": (x[:, 0] > 0).long()}, 4, shuffle=True)
        self.data = {"train": batches, "val": batches, "averages": {"swa": batches, "slow": batches}}

    def run(self, **options):
        return self.program(self.fresh, self.data, **options)


@pytest.fixture(scope="module")
def training():
    return Training()


def test_every_hook_acts(training):
    """So that the laws below are not about hooks that sleep."""
    end, _ = training.run()
    memory = end.memory
    assert memory["rollback"]["retries"] >= 2
    assert memory["round"]["retries"] >= 1
    assert memory["tokens"]["tokens"] > 0
    assert memory["ema"]["updates"] > 5
    assert memory["annealed_ema"]["updates"] > 5
    assert memory["slow"]["updates"] > 2
    assert memory["early"]["updates"] == 2
    assert memory["swa"]["updates"] >= 3
    assert not tree.equal(memory["reduce_on_plateau"], hooks.reduce_on_plateau("val/loss").init(training.fresh))
    assert optim.hyperparams(end.opt_state)["lr_scale"] < 0.5 * 0.9**2
    assert memory["early_stopping"]["best"] is not None
    assert end.stop == "stop_after: 30 steps"
    assert end.position.frames


def test_resumes_from_every_state(training):
    assert_resumable(training.program, training.fresh, training.data, limit=100, restored=lambda state, like: tree.snapshot(state))


def test_resumes_through_real_checkpoints(training):
    assert_resumable(training.program, training.fresh, training.data, limit=8)


def test_goes_on_from_interrupts_to_the_same_end(training):
    end, state = training.run(), training.fresh
    while not state.stop:
        polls = iter([None] * 12)
        state, found = training.program(state, training.data, interrupt=lambda polls=polls: next(polls, "now"))
    assert_same((state, found), end, "interrupted again and again")


def test_observers_do_not_matter(training):
    assert_observers_do_not_matter(training.program, training.fresh, training.data)


def test_no_state_is_written_to(training):
    """What hooks keep by reference stays as it was: no later tick reaches the tensors of an earlier state."""
    kept = []
    note = fnrun.repeat(training.program.step, 7, hooks=training.program.hooks, observers=[lambda state, metrics: kept.append((state, tree.snapshot(state)))])  # fmt: skip
    states_seen(note, training.fresh, training.data)
    for state, snapshot in kept:
        assert_same(state, snapshot, "a later tick wrote to it")


def test_a_loop_that_donates_leaves_what_hooks_keep_alone():
    """The bits of a loop that writes into new memory, with hooks that keep references and look now and then."""
    donating = Training(seed=4, look=2, donate=True)
    assert_same(Training(seed=4, look=2).run(), donating.run(), "donated")
    assert donating.run()[0].memory["rollback"]["retries"] >= 1
    assert_resumable(donating.program, donating.fresh, donating.data, limit=5)
