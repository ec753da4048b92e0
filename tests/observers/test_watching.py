from __future__ import annotations

import pytest
import torch

import fnrun
from fnrun import observers, optim
from fnrun.testing import assert_observers_do_not_matter, assert_same, states_seen
from tests.observers.small import Kept, Small


def plain(records):
    return [(r.order, r.step, r.metrics) for r in records]


@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("donate", [False, True])
def test_norms_are_those_of_the_states(every, donate):
    small, sink = Small(), Kept()
    start = small.state()
    seen, _ = states_seen(fnrun.repeat(fnrun.epoch_loop(small.step), 2), start, small.batches)
    params = [start.params, *({s.step: s.params for s in seen}.values())]
    train = fnrun.epoch_loop(small.step, donate=donate, observers=[observers.watch(every, to=[sink])])
    fnrun.repeat(train, 2)(start, small.batches)
    assert [r.step for r in sink.records] == [n for n in range(1, 11) if n % every == 0]
    for record in sink.records:
        now, before = params[record.step], params[record.step - 1]
        for name, value in now.items():
            assert record.metrics[f"norm/{name}"] == pytest.approx(value.norm().item(), rel=1e-6)
            assert record.metrics[f"update_norm/{name}"] == pytest.approx((value - before[name]).norm().item(), rel=1e-6)
            counts = record.metrics[f"histogram/{name}"].counts
            assert counts.sum().item() == value.numel()


@pytest.mark.parametrize("at", [1, 2, 4, 5, 6])
def test_a_resumed_run_writes_the_same_records(at):
    small, whole, cut = Small(), Kept(), Kept()

    def program(sink):
        return fnrun.repeat(fnrun.epoch_loop(small.step, observers=[observers.watch(3, to=[sink], histograms=False)]), 2)

    program(whole)(small.state(), small.batches)
    half = next(s for s in states_seen(program(cut), small.state(), small.batches)[0] if s.step == at)
    program(cut)(half, small.batches)
    assert plain(cut.records) == plain(whole.records)
    assert all("update_norm/0.weight" in r.metrics for r in cut.records)


def test_outside_of_a_loop_of_steps_there_is_no_update():
    small, sink = Small(), Kept()
    fnrun.repeat(fnrun.epoch_loop(small.step), 2, observers=[observers.watch(1, to=[sink])])(small.state(), small.batches)
    assert len(sink.records) == 2
    assert "norm/0.weight" in sink.records[1].metrics
    assert not any(name.startswith("update_norm") for name in sink.records[1].metrics)


def test_histograms_can_be_left_out():
    small, sink = Small(), Kept()
    fnrun.epoch_loop(small.step, observers=[observers.watch(5, to=[sink], histograms=False)])(small.state(), small.batches)
    assert {name.partition("/")[0] for name in sink.records[0].metrics} == {"norm", "update_norm"}


def test_it_changes_no_bit():
    small = Small()
    loop = fnrun.epoch_loop(small.step, observers=[observers.watch(2, to=[Kept()])])
    assert_observers_do_not_matter(loop, small.state(), small.batches)


def test_gradients_are_seen_where_they_stand_in_the_chain():
    small = Small(observers.watch_gradients(histograms=True), optim.scale(0.5))
    batch = {"x": small.x[:4], "y": small.x[:4].sum(1, keepdim=True)}
    state = small.state()
    _, metrics = small.step(state, batch)
    with state.rng.scope("train", 0):
        expected = torch.func.grad(lambda params: small.loss(lambda x: torch.func.functional_call(small.model, params, x), batch))(
            state.params
        )
    assert set(expected) == {name.removeprefix("gradient_norm/") for name in metrics if name.startswith("gradient_norm/")}
    for name, gradient in expected.items():
        assert metrics[f"gradient_norm/{name}"].item() == pytest.approx(gradient.norm().item(), rel=1e-6)
        assert metrics[f"gradient_histogram/{name}"].counts.sum().item() == gradient.numel()


def test_watching_gradients_changes_no_bit():
    ends = []
    for transforms in [(), (observers.watch_gradients(histograms=True),)]:
        small = Small(*transforms)
        end, metrics = fnrun.epoch_loop(small.step, donate=True)(small.state(), small.batches)
        ends.append((end.params, metrics["loss"]))
    assert_same(*ends, "watching gradients")


def test_every_is_at_least_one():
    with pytest.raises(ValueError, match="at least 1"):
        observers.watch(0, to=[])
