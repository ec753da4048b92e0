"""Donation: the same bits in the same memory, and nobody else's tensors are written to."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fnrun
from fnrun import DonatedStateError, Key, TrainState, data, hooks, observers, optim, snapshot
from fnrun.checkpoint import Checkpoints
from fnrun.core import tree
from fnrun.core.donation import Owner, shared
from fnrun.testing import assert_observers_do_not_matter, assert_resumable, assert_same, states_seen


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))


def loss_fn(model: nn.Module, batch: Any) -> Any:
    logits = model(batch["x"])
    return F.cross_entropy(logits, batch["y"]), {"bias": model[0].bias}  # a metric that is a parameter itself


ROWS = {"x": torch.randn(24, 4, generator=torch.Generator().manual_seed(1)), "y": torch.arange(24) % 3}
BATCHES = data.arrays(ROWS, 6, shuffle=True)
EVAL = data.arrays(ROWS, 12)
OPTIMIZERS = {
    "adamw": lambda: optim.adamw(1e-2),
    "clipped": lambda: optim.chain(optim.clip_by_global_norm(0.5), optim.adamw(lambda step: 1e-2 / (step + 1))),
    "momentum": lambda: optim.sgd(0.1, momentum=0.9),
    "accumulate": lambda: optim.chain(optim.accumulate(2), optim.adamw(1e-2)),
    "lookahead": lambda: optim.chain(optim.lookahead(sync_period=3), optim.adamw(1e-2)),
    "partition": lambda: optim.partition(optim.decay_labels, {"decay": optim.adamw(1e-2), "no_decay": optim.sgd(0.1, momentum=0.9)}),
    "schedule free": lambda: optim.schedule_free_adamw(1e-2),
    "trace": lambda: optim.chain(optim.trace(0.9), optim.adamw(1e-2)),
    "finite": lambda: optim.apply_if_finite(optim.adamw(1e-2)),
    "noise": lambda: optim.chain(optim.add_noise(0.1), optim.adamw(1e-2)),
    "torch": lambda: optim.from_torch(torch.optim.NAdam, lr=1e-2),
}


def program(step: Any, evaluate: Any, *, donate: bool, hooks: Any = (), observers: Any = ()) -> Any:
    return fnrun.repeat(
        fnrun.sequence(
            train=fnrun.epoch_loop(step, hooks=hooks, observers=observers, donate=donate),
            more=fnrun.step_loop(step, 3, donate=donate),
            val=fnrun.every(2, fnrun.eval_loop(evaluate)),
        ),
        3,
        observers=observers,
    )


DATA = {"train": BATCHES, "more": BATCHES, "val": EVAL}


def made(optimizer: Any) -> tuple[Any, Any, TrainState]:
    shell = model()
    step = fnrun.make_train_step(shell, loss_fn, optimizer)
    return step, fnrun.make_eval_step(shell, lambda m, b: {"loss": F.cross_entropy(m(b["x"]), b["y"])}), TrainState.create(shell, optimizer)


class Follows:
    """A hook that remembers parameters as they are, not copies of them, now and then."""

    name = "follows"

    def init(self, state: Any) -> Any:
        return {"weight": state.params["0.weight"], "part": state.params["4.weight"][0]}

    def after(self, state: Any, metrics: Any) -> Any:
        if state.step % 3:
            return state
        return state.replace(memory={**state.memory, self.name: self.init(state)})


def tied(state: Any, metrics: Any) -> Any:
    """A hook that makes two parameters the same memory, now and then."""
    return state if state.step % 4 else state.replace(params={**state.params, "1.weight": state.params["0.bias"]})


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_bits_are_those_of_new_memory(name: str) -> None:
    step, evaluate, state = made(OPTIMIZERS[name]())
    kept = snapshot(state)
    for more in ([], [hooks.ema(0.9)], [Follows()], [tied], [tied, Follows(), hooks.ema(0.5)]):
        plain = program(step, evaluate, donate=False, hooks=more)(state, DATA)
        assert_same(plain, program(step, evaluate, donate=True, hooks=more)(state, DATA), "donated, the program ends differently")
        assert_same(state, kept, "the caller's state was written to")


def test_parameters_and_moments_stay_where_they_are() -> None:
    step, evaluate, state = made(optim.adamw(1e-2))
    places: set[tuple[int, ...]] = set()

    def look(state: Any, metrics: Any) -> None:
        places.add(tuple(t.data_ptr() for t in tree.leaves((state.params, state.opt_state.slots))))

    end, _ = program(step, evaluate, donate=True, observers=[look])(state, DATA)
    assert len(places) == 1
    assert places.isdisjoint({tuple(t.data_ptr() for t in tree.leaves((state.params, state.opt_state.slots)))})
    places.clear()
    before = tuple(t.data_ptr() for t in tree.leaves((end.params, end.opt_state.slots)))
    program(step, evaluate, donate=True, observers=[look])(end.donate(), DATA)
    assert places == {before}, "a state that was given away is written over from the first step"


def test_a_donated_state_says_what_became_of_it() -> None:
    step, _, state = made(optim.adamw(1e-2))
    seen: list[Any] = []
    derived: list[Any] = []

    def keep(state: Any, metrics: Any) -> None:
        seen.append(state)
        derived.append(state.replace(stop="mine"))
        derived.append(dataclasses.replace(state, params={**state.params, "more": torch.ones(1)}))
        derived.append(tree.map(lambda leaf: leaf, state))

    end, _ = fnrun.epoch_loop(step, observers=[keep], donate=True)(state, BATCHES)
    for dead in (*seen[:-1], *derived[:-3]):
        for field in ("params", "opt_state", "step", "memory"):
            with pytest.raises(DonatedStateError, match=r"step \d \(train_step\(Sequential\)\) wrote the next one over it.*snapshot"):
                getattr(dead, field)
        with pytest.raises(DonatedStateError):
            tree.leaves(dead)
    assert end.step == seen[-1].step == 4
    assert not hasattr(end, "nonsense")


def test_a_state_that_is_given_away_is_dead_at_once() -> None:
    step, _, state = made(optim.adamw(1e-2))
    kept = snapshot(state)
    given = state.donate()
    with pytest.raises(DonatedStateError, match="given away"):
        _ = state.params
    assert_same(given, kept, "giving a state away changed it")
    expected = fnrun.epoch_loop(step)(kept, BATCHES)
    assert_same(expected, fnrun.epoch_loop(step, donate=True)(given, BATCHES), "given away, the program ends differently")
    with pytest.raises(DonatedStateError):
        _ = given.params


@pytest.mark.parametrize(
    "kept",
    [
        lambda a: a.replace(rng=Key(7)),
        lambda a: tree.map(lambda leaf: leaf, a),
        lambda a: dataclasses.replace(a, params=dict(a.params)),
        lambda a: a.params,
        lambda a: [a.params["0.weight"], a.opt_state.slots],
    ],
)
def test_what_others_hold_is_not_given_away(kept: Any) -> None:
    step, _, state = made(optim.adamw(1e-2))
    start, _ = fnrun.epoch_loop(step)(state, BATCHES)
    other = kept(start)
    bits = snapshot(other)
    expected = fnrun.epoch_loop(step)(snapshot(start), BATCHES)
    assert_same(fnrun.epoch_loop(step, donate=True)(start.donate(), BATCHES), expected, "given away, the program ends differently")
    assert_same(other, bits, "what somebody else held was written over")


def test_what_shares_memory_is_not_given_away() -> None:
    step, _, state = made(optim.adamw(1e-2))
    shared = state.replace(memory={"mine": {"view": state.params["0.weight"][0]}})
    kept = snapshot(shared)
    with pytest.warns(UserWarning, match="mine"):
        expected = fnrun.epoch_loop(step)(kept, BATCHES)
    with pytest.warns(UserWarning, match="mine"):
        end = fnrun.epoch_loop(step, donate=True)(shared.donate(), BATCHES)
    assert_same(end, expected, "what the memory shares was written over")


@pytest.mark.parametrize("more", [[], [hooks.ema(0.9), Follows(), tied]], ids=["plain", "hooks"])
def test_the_laws_hold(more: list[Any]) -> None:
    step, evaluate, state = made(optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(1e-2)))
    loop = program(step, evaluate, donate=True, hooks=more, observers=[observers.log(every=2, to=[])])
    assert_resumable(loop, state, DATA, limit=8)
    assert_observers_do_not_matter(loop, state, DATA)
    seen, _ = states_seen(loop, state, DATA)
    assert_same(seen, states_seen(program(step, evaluate, donate=False, hooks=more, observers=[observers.log(every=2, to=[])]), state, DATA)[0],
                "a state on the way differs")  # fmt: skip


def test_checkpoints_in_the_background_hold_what_was_saved(tmp_path: Path) -> None:
    """With a slow disk the next steps write over the tensors while the save before is still under way."""
    step, _, state = made(optim.adamw(1e-2))
    ends: dict[int, str] = {}

    def note(state: Any, metrics: Any) -> None:
        ends[state.step] = tree.fingerprint(shared(state))

    with Checkpoints(tmp_path) as checkpoints:
        loop = fnrun.epoch_loop(step, observers=[note, observers.checkpoint(checkpoints)], donate=True)
        loop(state, BATCHES)
        for saved in checkpoints.steps():
            assert tree.fingerprint(checkpoints.restore(like=state, step=saved)) == ends[saved]
        assert len(ends) == 4


def test_a_wrapper_keeps_the_state_that_it_was_given() -> None:
    step, _, state = made(optim.adamw(1e-2))

    def undo_every_second(loop: Any) -> Any:
        def call(state: Any, batches: Any) -> Any:
            new, metrics = loop(state, batches)
            return (state.replace(step=new.step, position=new.position) if new.step % 8 == 0 else new), metrics

        return call

    plain, donated = (fnrun.repeat(undo_every_second(fnrun.epoch_loop(step, donate=d)), 3) for d in (False, True))
    assert_same(plain(state, BATCHES), donated(state, BATCHES), "a wrapper around a loop saw another state")


def test_a_step_that_needs_the_old_state_is_not_donated() -> None:
    step, _, state = made(optim.adamw(1e-2))
    careful = fnrun.skip_nonfinite(step)
    with pytest.warns(UserWarning, match="donate=True"):
        loop = fnrun.epoch_loop(careful, donate=True)
    assert_same(loop(state, BATCHES), fnrun.epoch_loop(careful)(state, BATCHES), "donated, the program ends differently")


def test_an_optimizer_that_keeps_what_came_in_is_not_donated() -> None:
    inner = optim.adamw(1e-2)

    def update(grads: Any, state: Any, params: Any, /, *, key: Any = None, step: Any = None) -> Any:
        new, memory = inner.update(grads, state["inner"], params, key=key, step=step)
        return new, {"inner": memory, "before": params}

    keeps = optim.Optimizer(lambda params: {"inner": inner.init(params), "before": dict(params)}, update)
    shell = model()
    step = fnrun.make_train_step(shell, loss_fn, keeps)
    state = TrainState.create(shell, keeps)
    with pytest.warns(UserWarning, match="donate=True"):
        loop = fnrun.epoch_loop(step, donate=True)
    assert_same(loop(state, BATCHES), fnrun.epoch_loop(step)(state, BATCHES), "donated, the program ends differently")


def test_after_an_exception_the_last_checkpoint_is_the_good_state(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Failing(Exception):
        pass

    inner = optim.adamw(1e-2)

    def update(grads: Any, state: Any, params: Any, /, *, key: Any = None, step: Any = None) -> Any:
        result = inner.update(grads, state, params, key=key, step=step)
        if step == 2:
            raise Failing
        return result

    optimizer = optim.Optimizer(inner.init, update, donatable=True)
    shell = model()
    step, state = fnrun.make_train_step(shell, loss_fn, optimizer), TrainState.create(shell, optimizer)
    seen: list[Any] = []
    with Checkpoints(tmp_path) as checkpoints:
        saving = observers.checkpoint(checkpoints)
        with pytest.raises(Failing):
            fnrun.epoch_loop(step, observers=[lambda s, m: seen.append(snapshot(s)), saving], donate=True)(state, BATCHES)
        assert_same(checkpoints.restore(like=state), seen[-1], "the checkpoint is not the last good state")
    assert "step 2" in caplog.text
    assert "last checkpoint is the good state" in caplog.text


def test_an_exception_before_the_update_leaves_the_state_alive(tmp_path: Path) -> None:
    shell, optimizer = model(), optim.adamw(1e-2)

    def loss(model: nn.Module, batch: Any) -> Any:
        if len(batch["x"]) == 5:
            raise ZeroDivisionError
        return loss_fn(model, batch)

    step, state = fnrun.make_train_step(shell, loss, optimizer), TrainState.create(shell, optimizer)
    batches = data.arrays({name: rows[:17] for name, rows in ROWS.items()}, 6)
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(ZeroDivisionError):
            fnrun.epoch_loop(step, observers=[observers.checkpoint(checkpoints, every=100)], donate=True)(state, batches)
        assert checkpoints.restore(like=state).step == 2


def test_what_is_owned_ends_with_the_call() -> None:
    step, _, state = made(optim.adamw(1e-2))
    loop = fnrun.epoch_loop(step, donate=True)
    first, _ = loop(state, BATCHES)
    kept = snapshot(first)
    again, _ = loop(first, BATCHES)
    assert_same(first, kept, "the next call wrote over the state that the call before returned")
    assert again.step == 8
    assert shared(first) is first


def test_frozen_parameters_are_the_same_objects_to_the_end() -> None:
    shell, optimizer = model(), optim.adamw(1e-2)
    shell[0].weight.requires_grad_(False)
    step, state = fnrun.make_train_step(shell, loss_fn, optimizer), TrainState.create(shell, optimizer)
    end, _ = fnrun.epoch_loop(step, donate=True)(state, BATCHES)
    assert end.params["0.weight"] is state.params["0.weight"]


def test_two_in_the_same_memory_are_never_both_written_to() -> None:
    weight = torch.ones(4)
    state = TrainState({"a": weight, "b": weight[:2], "c": torch.ones(3)}, {}, {}, Key(0))
    owner = Owner.of(state)
    assert owner.share(state.params["c"]) is not state.params["c"]
    assert owner.share(weight) is weight


@tree.struct
class Checked(TrainState):
    """A state of one's own, which looks at itself when it is made."""

    extra: Any = None

    def __post_init__(self) -> None:
        assert self.step >= 0


def test_states_of_ones_own_die_too() -> None:
    shell, optimizer = model(), optim.adamw(1e-2)
    step, state = fnrun.make_train_step(shell, loss_fn, optimizer), Checked.create(shell, optimizer, extra=torch.ones(2))
    seen: list[Any] = []
    end, _ = fnrun.epoch_loop(step, observers=[lambda s, m: seen.append(s)], donate=True)(state, BATCHES)
    assert isinstance(end, Checked)
    assert end.extra is state.extra
    for dead in seen[:-1]:
        with pytest.raises(DonatedStateError):
            _ = dead.params
