"""What hooks and observers are able to do is looked at once, when their loop is made."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import pytest
import torch

import fnrun
from fnrun import hooks, observers, optim
from fnrun.loops.contracts import hook_contract, observer_contract
from fnrun.loops.data_loops import EpochLoop
from fnrun.testing import assert_resumable


@fnrun.step
def count(state: Any, batch: Any) -> Any:
    return state, {"mean": batch.mean()}


def look(state: Any, metrics: Any) -> None:
    pass


def named(what: str, methods: dict[str, Any]) -> Any:
    base = {"name": "mine", "init": lambda self, state: 0, "after": lambda self, state, metrics: state}
    return type(
        "Mine", (), base | methods if what == "hook" else {"__call__": lambda self, state, metrics: None, "name": "mine"} | methods
    )()


@pytest.mark.parametrize(
    ("what", "method", "called"),
    [
        ("hook", {"before": lambda self, batch: batch}, "`before` of a hook is called before(state, batch), and this one has before(batch)"),
        ("hook", {"init": lambda self: 0}, "`init` of a hook is called init(state), and this one has init()"),
        ("observer", {"open": lambda self, path: None}, "`open` of an observer is called open(program, state), and this one has open(path)"),
        ("observer", {"close": lambda self: None}, "`close` of an observer is called close(state, reason), and this one has close()"),
        ("observer", {"fold": lambda self, folded, metrics: None}, r"is called fold(folded, before, metrics, examples), and this one has fold("),
        ("observer", {"fold_each": lambda self, ticks: None}, "`fold_each` of an observer is called fold_each(folded, before, ticks)"),
        ("observer", {"carry": lambda self, folded, more: None}, "`carry` of an observer is called carry(folded)"),
        ("observer", {"flush": lambda self, hard: None}, "`flush` of an observer is called flush()"),
        ("observer", {"open": "a file"}, "`open` of an observer is called open(program, state), and this one has 'a file'"),
    ],
    ids=lambda value: "" if isinstance(value, str) and " " in value else None,
)  # fmt: skip
def test_a_method_of_another_signature_is_refused_when_the_loop_is_made(what: str, method: dict[str, Any], called: str) -> None:
    with pytest.raises(TypeError) as refused:
        fnrun.epoch_loop(count, **{f"{what}s": [named(what, method)]})
    assert called in str(refused.value)
    assert "mine" in str(refused.value)


def test_a_hook_that_is_held_back_is_known_by_what_it_holds() -> None:
    held = hook_contract(hooks.every(2, hooks.at(4, named("hook", {}))))
    assert held.name == held.innermost.name == "mine"
    assert not held.innermost.ours
    assert held.ours
    with pytest.raises(TypeError, match="`before` of a hook is called"):
        hook_contract(hooks.every(2, named("hook", {"before": lambda self: 0})))


def test_a_function_is_an_observer_that_does_nothing_else() -> None:
    contract = observer_contract(look)
    assert contract.observe is look
    assert [contract.open, contract.close, contract.fold, contract.flush, contract.every, contract.monitors] == [None] * 5 + [()]
    assert not contract.saves
    assert not contract.idle_between


def test_a_finished_program_holds_no_state() -> None:
    """Without a cycle of references, which would keep the last state alive until Python looks for cycles."""
    import gc
    import weakref

    gc.disable()
    try:
        state, _ = fnrun.epoch_loop(count, observers=[look])(fnrun.TrainState.create(torch.nn.Linear(1, 1)), [torch.ones(2)] * 3)
        end = weakref.ref(state)
        del state
        assert end() is None
    finally:
        gc.enable()


def test_an_observer_that_folds_and_is_idle_between_gathers_ticks_together() -> None:
    gathers = named("observer", {"fold": lambda self, folded, before, metrics, examples: 0, "idle_between": True, "every": 3})
    with pytest.raises(TypeError, match="needs fold_each"):
        fnrun.epoch_loop(count, observers=[gathers])


@pytest.mark.parametrize(
    ("what", "method", "said"), [("observer", "flushh", "'flush' meant"), ("hook", "after_epoch", "a hook has init, before, after")]
)
def test_a_method_that_no_loop_calls_is_said(what: str, method: str, said: str) -> None:
    with pytest.warns(UserWarning, match=f"{method}.*{said}"):
        fnrun.epoch_loop(count, **{f"{what}s": [named(what, {method: lambda self: None})]})


def test_what_an_observer_draws_is_its_own() -> None:
    """In each of its methods: two runs draw the same, and no other generator moves."""
    drawn: list[list[float]] = []

    def draw(*_: Any) -> float:
        drawn[-1].append(torch.rand(()).item())
        return drawn[-1][-1]

    methods = {
        "open": lambda self, program, state: draw(),
        "close": lambda self, state, reason: draw(),
        "fold": lambda self, folded, before, metrics, examples: draw(),
        "__call__": lambda self, state, metrics: draw() and None,
    }
    state = fnrun.TrainState.create(torch.nn.Linear(1, 1))
    for _ in range(2):
        drawn.append([])
        before = torch.get_rng_state()
        loop = fnrun.epoch_loop(count, observers=[named("observer", methods)])
        loop(state, [torch.ones(2)] * 5)
        assert torch.equal(torch.get_rng_state(), before)
    assert len(drawn[0]) == len(set(drawn[0])) == 12
    assert drawn[0] == drawn[1]


def test_what_would_never_run_is_refused() -> None:
    async def later(state: Any, metrics: Any) -> None: ...

    def bit_by_bit(state: Any, metrics: Any) -> Any:
        yield state

    for part in (later, bit_by_bit):
        with pytest.raises(TypeError, match="async or a generator"):
            fnrun.epoch_loop(count, observers=[part])
        with pytest.raises(TypeError, match="async or a generator"):
            fnrun.epoch_loop(count, hooks=[part])


def test_a_monitor_that_is_no_name_is_refused() -> None:
    with pytest.raises(TypeError, match="monitor is the name of a metric"):
        fnrun.epoch_loop(count, observers=[named("observer", {"monitor": 3})])
    fnrun.epoch_loop(count, observers=[named("observer", {"monitor": None, "monitors": None})])


def test_a_hook_that_returns_a_state_of_elsewhere_is_named() -> None:
    away = lambda state, metrics: state.replace(position=fnrun.Position())  # noqa: E731
    with pytest.raises(ValueError, match="a hook of epoch_loop returned a state with another position"):
        fnrun.epoch_loop(count, hooks=[away])(fnrun.TrainState.create(torch.nn.Linear(1, 1)), [torch.ones(2)])


def test_an_observer_may_wait_at_the_end_for_a_thread_that_evaluates() -> None:
    evaluate = fnrun.make_eval_step(model := torch.nn.Linear(1, 1), lambda model, x: {"mean": model(x).mean()})
    state, found = fnrun.TrainState.create(model), []

    def close(self: Any, last: Any, reason: Any) -> None:
        thread = threading.Thread(target=lambda: found.append(evaluate(state, torch.ones(2, 1))))
        thread.start()
        thread.join(60)

    fnrun.epoch_loop(count, observers=[named("observer", {"close": close})])(state, [torch.ones(2)])
    assert len(found) == 1


# --- kinds of loops of one's own ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Twice(EpochLoop):
    """Each batch is trained on two times."""

    def title(self) -> str:
        return "epoch_loop, each batch twice"

    def turn(self, state: Any, x: Any, frame: Any, at: Any) -> Any:
        state, _ = super().turn(state, x, frame, at)
        return super().turn(state, x, frame, at)


def test_a_kind_of_loop_of_ones_own_has_its_say_at_each_tick() -> None:
    step = fnrun.make_train_step(model := torch.nn.Linear(1, 1), lambda model, x: model(x).square().mean(), rule := optim.sgd(0.1))
    state, batches = fnrun.TrainState.create(model, rule), [torch.ones(2, 1)] * 5
    assert Twice(step=step)(state, batches)[0].step == 10
    fit = fnrun.repeat(fnrun.sequence(train=Twice(step=step, observers=[observers.log(2)])), 2)
    assert "train: epoch_loop, each batch twice" in str(fit)
    assert_resumable(fit, state, {"train": batches}, restored=lambda state, like: state)


def test_a_loop_of_training_steps_is_of_a_kind_that_frames_know() -> None:
    with pytest.raises(TypeError, match=r"kind='twice'.*say what else it is in title"):
        dataclasses.make_dataclass("Other", [], bases=(Twice,), namespace={"kind": "twice"}, frozen=True, kw_only=True)(step=count)
    with pytest.raises(TypeError, match="it is an observer"):
        Twice(step=count, hooks=[observers.log(2)])
