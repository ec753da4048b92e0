"""What hooks and observers are able to do is looked at once, when their loop is made."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fnrun
from fnrun import hooks
from fnrun.loops.contracts import hook_contract, observer_contract


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
