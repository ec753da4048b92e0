"""Law 2 for what stands around steps: whatever a function of the user's draws from torch's generator is keyed, and a resume draws it again."""

from __future__ import annotations

import functools
import random
from typing import Any

import pytest
import torch

import fnrun
from fnrun import data, hooks, optim
from fnrun.testing import assert_observers_do_not_matter, assert_pure, assert_resumable, assert_same, states_seen
from tests.programs import evaluate, fresh, train

STREAM = [torch.full((2,), float(i)) for i in range(4)]
HELD: dict[str, Any] = {"restored": lambda state, like: state}


def noisy(state: Any, batch: torch.Tensor) -> Any:
    return train(state, batch + torch.randn_like(batch))


def noisy_scores(state: Any, batch: torch.Tensor) -> Any:
    return evaluate(state, batch + torch.randn_like(batch))


def adds_noise(state: Any, metrics: Any) -> Any:
    return state.replace(params={name: p + torch.randn_like(p) for name, p in state.params.items()})


class Remembers:
    name = "remembers"

    def init(self, state: Any) -> Any:
        return torch.rand(2)

    def before(self, state: Any, batch: Any) -> Any:
        return state.replace(params={"x": state.params["x"] + torch.rand(2)})

    def after(self, state: Any, metrics: Any) -> Any:
        return state.replace(memory={**state.memory, self.name: state.memory[self.name] + torch.rand(2)})


INNER = fnrun.epoch_loop(train, hooks=[Remembers()])


def scales_a_loop(state: Any, batches: Any) -> Any:
    """It draws before the loop, and after it."""
    drawn = torch.rand(1)
    state, metrics = INNER(state, batches)
    return state.replace(params={"x": state.params["x"] + drawn + torch.rand(2)}), metrics


PROGRAMS = {
    "step": lambda: fnrun.repeat(fnrun.epoch_loop(noisy), 2),
    "steps": lambda: fnrun.step_loop(functools.partial(noisy), 6),
    "evaluation": lambda: fnrun.repeat(fnrun.eval_loop(noisy_scores), 2),
    "some batches": lambda: fnrun.repeat(fnrun.eval_loop(noisy_scores, steps=3), 2),
    "hook": lambda: fnrun.repeat(fnrun.epoch_loop(train, hooks=[adds_noise, hooks.every(2, adds_noise)]), 2, hooks=[adds_noise]),
    "remembering hook": lambda: fnrun.repeat(fnrun.epoch_loop(train, hooks=[Remembers()]), 2),
    "loop": lambda: fnrun.repeat(scales_a_loop, 3),
    "told loop": lambda: fnrun.repeat(fnrun.wraps(INNER)(scales_a_loop), 3),
    "now and then": lambda: fnrun.repeat(fnrun.every(2, scales_a_loop), 4),
}


@pytest.mark.parametrize("kind", PROGRAMS)
def test_what_is_drawn_around_steps_is_drawn_again_after_a_resume(kind):
    program = PROGRAMS[kind]()
    assert_resumable(program, fresh(), STREAM, **HELD)
    assert_pure(program, fresh(), STREAM)
    torch.manual_seed(1)
    first = program(fresh(), STREAM)
    torch.manual_seed(2)
    assert_same(first, program(fresh(), STREAM), "the global generator matters")


def test_through_real_checkpoints_with_a_made_step():
    """The pattern of the page on MMEngine: a function gives the batch something before the step, here noise."""
    with fnrun.Key(0).scope():
        model = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Dropout(0.5), torch.nn.Linear(4, 1))
    optimizer = optim.adamw(1e-2)
    step = fnrun.make_train_step(model, lambda model, batch: model(batch["x"]).square().mean(), optimizer)

    def with_noise(state, batch):
        return step(state, {**batch, "x": batch["x"] + 0.1 * torch.randn_like(batch["x"])})

    program = fnrun.repeat(fnrun.epoch_loop(with_noise), 2)
    stream = data.arrays({"x": torch.linspace(-1, 1, 24).view(12, 2)}, 4, shuffle=True)
    assert_resumable(program, fnrun.TrainState.create(model, optimizer, seed=3), stream, limit=4)


def test_no_two_ticks_and_no_two_hooks_draw_the_same():
    drawn: list[float] = []

    def draws(state, *_):
        drawn.append(float(torch.rand(())))
        return state

    def around(state, batch):
        return train(draws(state), batch)

    def scores(state, batch):
        draws(state)
        return {"x": 1.0}

    inner = fnrun.epoch_loop(around, hooks=[draws, draws], observers=[draws])
    val = fnrun.eval_loop(scores)
    program = fnrun.repeat(
        fnrun.sequence(train=lambda state, x: inner(draws(state), x), val=val, hooks=[draws]), 2, hooks=[draws], observers=[draws]
    )
    state, _ = program(fresh(), {"train": STREAM, "val": STREAM})
    program(state, {"train": STREAM, "val": STREAM})
    repeated = len(drawn) - len(set(drawn))
    assert repeated == 2  # a function around whole loops counts rounds, and both calls begin at the first


def test_the_numbers_of_made_steps_are_those_without_a_function_around_them():
    with fnrun.Key(0).scope():
        model = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Dropout(0.5))
    optimizer = optim.sgd(0.1)
    step = fnrun.make_train_step(model, lambda model, x: model(x).square().mean(), optimizer)
    state, stream = fnrun.TrainState.create(model, optimizer), [torch.ones(3, 2)] * 3

    def around(state, batch):
        torch.rand(3)
        return step(state, batch)

    assert_same(fnrun.epoch_loop(step)(state, stream), fnrun.epoch_loop(around)(state, stream), "around")


def test_an_observer_that_draws_changes_nothing_and_moves_no_generator():
    def draws(state, metrics):
        torch.randn(3)

    loop = fnrun.repeat(fnrun.epoch_loop(noisy, hooks=[adds_noise], observers=[draws]), 2, observers=[draws])
    assert_observers_do_not_matter(loop, fresh(), STREAM)
    assert_pure(loop, fresh(), STREAM)


def test_python_and_numpy_generators_are_told_of():
    def around(state, batch):
        return train(state, batch + random.random())

    def hook(state, metrics):
        random.random()
        return state

    with pytest.warns(UserWarning, match=r"around draws from Python's global generator \(random\), which is not keyed"):
        fnrun.epoch_loop(around)(fresh(), STREAM)
    with pytest.warns(UserWarning, match=r"the hook .*hook draws from Python's global generator"):
        fnrun.epoch_loop(train, hooks=[hook])(fresh(), STREAM)


def test_a_module_that_is_imported_may_draw(tmp_path, monkeypatch):
    (tmp_path / "draws_at_import.py").write_text("import random; random.random()")
    monkeypatch.syspath_prepend(tmp_path)

    def around(state, batch):
        import draws_at_import  # noqa: F401  # pyright: ignore[reportMissingImports]

        return train(state, batch)

    fnrun.epoch_loop(around)(fresh(), STREAM)


def test_a_function_around_loops_keeps_no_other_thread_waiting():
    """The generators are locked around a step, and not around an epoch."""
    import threading

    inner, reached = fnrun.epoch_loop(train), threading.Event()

    def waits(state, x):
        def other() -> None:
            with fnrun.Key(1).scope():
                reached.set()

        thread = threading.Thread(target=other)
        thread.start()
        assert reached.wait(30)
        thread.join()
        return inner(state, x)

    fnrun.repeat(waits, 1)(fresh(), STREAM)


def test_skip_nonfinite_around_a_step_is_a_step():
    from fnrun.steps import PureStep

    assert isinstance(fnrun.skip_nonfinite(train), PureStep)
    assert not isinstance(fnrun.skip_nonfinite(noisy), PureStep)
    seen, _ = states_seen(fnrun.epoch_loop(fnrun.skip_nonfinite(train)), fresh(), STREAM)
    assert len(seen) == 4
