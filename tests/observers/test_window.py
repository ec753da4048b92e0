"""Windows: against a plain list of all ticks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

import fnrun
from fnrun import metrics, observers
from fnrun.core import tree
from fnrun.observers.window import Window
from tests.observers.test_log import Kept
from tests.programs import fresh

STATISTICS = {
    "mean": lambda v, w: np.average(v, weights=w),
    "min": lambda v, w: v.min(),
    "max": lambda v, w: v.max(),
    "last": lambda v, w: v[-1],
}


def ticks(values, sizes):
    """Batches whose metrics are these values: as a tensor, a number and a fold."""
    return [torch.full((size,), float(value)) for value, size in zip(values, sizes, strict=True)]


@fnrun.step
def reads(state, batch):
    return state, {"tensor": batch.mean(), "number": float(batch[0]), "fold": metrics.mean(batch)}


def expected(values, sizes, every, window, epoch):
    """The lines as (step, first tick of the window): only a window of the epoch ends with it."""
    for step in range(every, len(values) + 1, every):
        began = (step - 1) // epoch * epoch
        first = {"line": step - every, "epoch": began, "run": 0}.get(window)
        first = max(0, step - window) if first is None else first
        yield step, np.array(values[first:step], dtype=float), np.array(sizes[first:step], dtype=float)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.integers(1, 6),
    st.one_of(st.integers(1, 12), st.integers(1, 12), st.sampled_from(["line", "epoch", "run"])),
    st.integers(1, 20),
    st.integers(1, 3),
    st.data(),
)
def test_a_window_is_over_the_ticks_that_it_says(every, window, epoch, rounds, draw):
    n = epoch * rounds
    sizes = draw.draw(st.lists(st.integers(1, 3), min_size=epoch, max_size=epoch)) * rounds
    values = draw.draw(st.lists(st.integers(-50, 50), min_size=epoch, max_size=epoch)) * rounds
    kept = Kept()
    for kind, oracle in STATISTICS.items():
        kept.records.clear()
        log = observers.log(every, to=[kept], window=window, statistics=dict.fromkeys(("tensor", "number", "fold"), kind))
        hooks = [log] if window == "run" else []
        loop = fnrun.repeat(fnrun.epoch_loop(reads, hooks=hooks, observers=[log]), rounds)
        loop(fresh(), ticks(values[:epoch], sizes[:epoch]))
        lines = list(expected(values, sizes, every, window, epoch))
        assert [r.step for r in kept.records] == [step for step, _, _ in lines] == list(range(every, n + 1, every))
        for record, (_, seen, weights) in zip(kept.records, lines, strict=True):
            for name in ("tensor", "number", "fold"):
                assert record.metrics[name] == pytest.approx(oracle(seen, weights)), (kind, name, record)


def test_names_tell_the_statistics_apart():
    kept = Kept()
    log = observers.log(
        4, to=[kept], statistics={"number": ["max", "mean", ("mean", 2), ("min", "epoch")], "tensor": ("last", "epoch"), "fold": []}
    )
    fnrun.epoch_loop(reads, observers=[log])(fresh(), ticks([1, 2, 3, 6], [1] * 4))
    assert kept.records[0].metrics == {"number": 6.0, "number_mean": 3.0, "number_mean_2": 4.5, "number_min_epoch": 1.0, "tensor": 6.0}


def test_a_learning_rate_is_that_of_the_line_and_not_a_mean():
    kept = Kept()
    step = fnrun.step(lambda state, batch: (state, {"lr": 0.1 * state.step}))
    fnrun.epoch_loop(step, observers=[observers.log(3, to=[kept])])(fresh(), [torch.zeros(1)] * 3)
    fnrun.epoch_loop(step, observers=[observers.log(3, to=[kept], statistics={"lr": "mean"})])(fresh(), [torch.zeros(1)] * 3)
    assert [r.metrics["lr"] for r in kept.records] == [0.2, pytest.approx(0.1)]


@pytest.mark.parametrize(("window", "most"), [("line", 1), ("epoch", 1), ("run", 1), (7, 1), (10, 1), (35, 7), (40, 4)])
def test_what_is_gathered_does_not_grow(window, most):
    one = Window(window, 10, {"a": [("mean", "a"), ("max", "a_max")]}, rest=True)
    parts, sizes = (), set()
    for i in range(1000):
        parts = one.fold(parts, i % 10, {"a": torch.tensor(1.0), "b": 2.0}, 4)
        sizes.add(len(tree.leaves(parts)))
    assert len(parts) == most
    assert max(sizes) <= most * 20 + 16 * 4, "what is folded, and the ticks that wait to be"


def test_a_window_of_the_run_asks_for_its_memory():
    kept = Kept()
    log = observers.log(1, to=[kept], window="run")
    fnrun.epoch_loop(reads, observers=[log])(fresh(), ticks([1, 2], [1, 1]))  # nothing repeats the loop: its frame lasts
    assert [r.metrics["tensor"] for r in kept.records] == [1.0, 1.5]
    with pytest.raises(ValueError, match=r"hooks=\[log\], observers=\[log\]"):
        fnrun.repeat(fnrun.epoch_loop(reads, observers=[log]), 2)(fresh(), ticks([1], [1]))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"window": 0}, "a window is at least 1, not 0"),
        ({"window": "week"}, "'line', 'epoch' or 'run', not 'week'"),
        ({"window": 501}, "more than 100 lines of every=5"),
        ({"statistics": {"loss": "median"}}, "'median' is none; there are mean, min, max, last"),
        ({"statistics": {"loss": [("max", "week")]}}, "not 'week'"),
    ],
)
def test_what_does_not_exist_is_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        observers.log(5, **arguments)


def test_a_statistic_of_what_no_step_reports_is_said_once(caplog):
    log = observers.log(1, to=[], statistics={"los": "max"})
    fnrun.epoch_loop(reads, observers=[log])(fresh(), ticks([1, 2], [1, 1]))
    assert caplog.messages == ["log: statistics of los: no step has reported it; reported: tensor, number, fold"]


def test_images_and_texts_are_the_newest(tmp_path):
    step = fnrun.step(
        lambda state, batch: (state, {"loss": batch.mean(), "image": observers.Image(batch), "said": observers.Text(str(state.step))})
    )
    kept = Kept()
    loop = fnrun.repeat(
        fnrun.epoch_loop(step, observers=[observers.log(2, to=[kept, observers.console(), observers.jsonl(tmp_path / "m.jsonl")])]), 1
    )
    _, results = loop(fresh(), [torch.zeros(2, 2), torch.ones(2, 2)])
    assert kept.records[0].metrics["said"].text == results["said"].text == "1"
    assert kept.records[0].metrics["image"].pixels().max() == 255


@pytest.mark.parametrize("window", ["line", 3, "epoch"])
def test_no_two_columns_share_a_name(window):
    step = fnrun.step(lambda state, batch: (state, {"loss": 1.0, "loss_max": 2.0}))
    for statistics in ({"loss": ["mean", "max"]}, {"loss": ["mean", "max"], "loss_max": "last"}):
        with pytest.raises(ValueError, match="loss_max"):
            fnrun.epoch_loop(step, observers=[observers.log(1, to=[], window=window, statistics=statistics)])(fresh(), [torch.zeros(1)])
    with pytest.raises(ValueError, match="two statistics are called loss_max"):
        observers.log(1, statistics={"loss": ["mean", "max", "max"]})


@pytest.mark.parametrize("name", ["step", "epoch", "ticks", "clock", "clock/eta"])
def test_no_metric_takes_the_place_of_a_field_in_any_sink(name, tmp_path):
    step = fnrun.step(lambda state, batch: (state, {name: 1.0}))
    with pytest.raises(ValueError, match=name):
        fnrun.epoch_loop(step, observers=[observers.log(1, to=[observers.csv(tmp_path / "m.csv")])])(fresh(), [torch.zeros(1)])
