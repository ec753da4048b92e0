import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from fnrun import TrainState, metrics
from fnrun.checkpoint import Checkpoints
from fnrun.core import tree
from fnrun.loops import totals as running
from tests.metrics.folds import close, floats, unhurried

values = st.one_of(st.none(), floats)
ticks = st.lists(st.tuples(values, values, values, st.integers(1, 40)), min_size=1, max_size=8)


def folded(ticks, totals=None):
    for *three, n in ticks:
        named = {name: torch.tensor(v) for name, v in zip("abc", three, strict=True) if v is not None}
        if three[0] is not None:
            named |= {"number": three[0], "fold": metrics.mean(torch.full((n,), three[0]))}
        totals = running.fold(totals, named, n)
    return totals


@unhurried
@given(ticks)
def test_totals_are_means_weighted_by_examples(ticks):
    found = running.compute(folded(ticks))
    for i, name in enumerate("abc"):
        seen = [(tick[i], tick[3]) for tick in ticks if tick[i] is not None]
        assert (name in found) == bool(seen)
        if seen:
            expected = np.average([v for v, _ in seen], weights=[n for _, n in seen])
            assert close(found[name], expected)
            if i == 0:
                assert close(found["number"], expected)
                assert close(found["fold"], expected)
                assert type(found["number"]) is float


@unhurried
@given(ticks, st.integers(0, 8))
def test_totals_are_a_function_of_the_ticks(ticks, at):
    """Kept between any two ticks and taken up again: the same bits."""
    kept = folded(ticks[:at])
    assert tree.equal(folded(ticks[at:], tree.snapshot(kept)), folded(ticks))
    if kept is not None:
        before = tree.snapshot(kept)
        folded(ticks[at:], kept)
        assert tree.equal(kept, before)


@unhurried
@given(ticks)
def test_a_name_is_folded_alone(ticks):
    """What else is measured changes no bit of a metric."""
    alone = running.compute(folded([(None, b, None, n) for _, b, _, n in ticks]))
    assert tree.equal(alone.get("b"), running.compute(folded(ticks)).get("b"))


@unhurried
@given(st.floats(-1e6, 1e6), st.integers(1, 1000))
def test_the_mean_of_one_batch_is_its_value(value, n):
    found = running.compute(running.fold(None, {"x": torch.tensor(value, dtype=torch.float64), "y": value}, n))
    assert float(found["x"]) == found["y"] == value


def test_totals_do_not_grow():
    totals, first = None, None
    for i in range(300):
        named = {f"m{j}": torch.tensor(1.0) for j in range(6) if i % (j + 1) == 0}
        totals = running.fold(totals, named, 3)
        first = first if i != 60 else len(tree.leaves(running.flushed(totals)))
    assert len(tree.leaves(running.flushed(totals))) == first
    assert all(float(value) == 1 for value in running.compute(totals).values())


def test_names_come_in_the_order_in_which_they_first_came():
    totals = running.fold(None, {"z": torch.tensor(1.0), "lr": 0.1}, 1)
    totals = running.fold(totals, {"b": torch.ones(2), "a": torch.tensor(1), "z": torch.tensor(2.0)}, 1)
    assert list(running.compute(totals)) == ["z", "lr", "b", "a"]


def test_vmapped_members_keep_their_own_means():
    totals = running.fold(None, {"loss": torch.tensor([1.0, 2.0]), "seen": torch.tensor(1.0)}, 4)
    totals = running.fold(totals, {"loss": torch.tensor([3.0, 4.0]), "seen": torch.tensor(1.0)}, 4)
    assert running.compute(totals)["loss"].tolist() == [2, 3]


def test_a_number_may_become_a_tensor():
    totals = running.fold(running.fold(None, {"aux": 0.0}, 3), {"aux": torch.tensor(4.0)}, 1)
    assert float(running.compute(totals)["aux"]) == 1
    assert float(running.compute(running.fold(totals, {"aux": 1}, 4))["aux"]) == pytest.approx(1)


def test_totals_keep_no_graph():
    loss = torch.ones((), requires_grad=True) * 2
    assert not any(leaf.requires_grad for leaf in tree.leaves(running.fold(None, {"loss": loss}, 1)) if isinstance(leaf, torch.Tensor))


def test_what_does_not_fit_is_refused():
    plain, fold = {"x": torch.tensor(1.0)}, {"x": metrics.sum(1)}
    for first, second in ((plain, fold), (fold, plain), ({"x": 1.0}, fold), (fold, {"x": 1.0})):
        with pytest.raises(TypeError, match="'x' is a Sum in one tick and a plain value in another"):
            running.fold(running.fold(None, first, 1), second, 1)
    with pytest.raises(TypeError, match="'x' is a Sum in one tick and a Mean in another"):
        running.fold(running.fold(None, fold, 1), {"x": metrics.mean(1.0)}, 1)
    with pytest.raises(TypeError, match="'x' is a str: a metric is a tensor, a number or a fold"):
        running.fold(None, {"x": "high"}, 1)
    with pytest.raises(ValueError, match=r"'x' has shape \(2,\), and had \(\) in the ticks before"):
        running.fold(running.fold(None, plain, 1), {"x": torch.ones(2)}, 1)


def test_values_are_those_of_one_tick():
    found = metrics.values({"loss": torch.tensor(1.0), "lr": 0.1, "top": metrics.max(torch.tensor([1, 3]))})
    assert tree.equal(found, {"loss": torch.tensor(1.0), "lr": 0.1, "top": torch.tensor(3)})


@tree.struct
class Range:
    """A fold that computes two values."""

    low: torch.Tensor
    high: torch.Tensor

    def merge(self, other):
        return Range(torch.minimum(self.low, other.low), torch.maximum(self.high, other.high))

    def compute(self):
        return {"low": self.low, "high": self.high}


def test_a_fold_of_several_values_is_named_by_each():
    ticks = [{"x": Range(torch.tensor(lo), torch.tensor(hi))} for lo, hi in ((1, 5), (0, 2))]
    assert {k: int(v) for k, v in metrics.values(ticks[0]).items()} == {"x/low": 1, "x/high": 5}
    totals = running.fold(running.fold(None, ticks[0], 1), ticks[1], 1)
    assert {k: int(v) for k, v in running.compute(totals).items()} == {"x/low": 0, "x/high": 5}


def test_examples_of_a_batch():
    assert metrics.examples({"id": torch.tensor(3), "x": torch.zeros(5, 2)}) == 5
    assert metrics.examples((np.zeros((4, 2)), torch.zeros(4))) == 4
    assert metrics.examples(torch.zeros(7)) == 7
    assert metrics.examples("text") == metrics.examples(None) == 1


def test_an_empty_batch_weighs_nothing():
    totals = running.fold(running.fold(None, {"x": torch.tensor(5.0)}, 0), {"x": torch.tensor(1.0)}, 2)
    assert float(running.compute(totals)["x"]) == 1


def test_an_int_keeps_its_bits_beside_a_float():
    first = {"a": torch.tensor(1.0), "b": torch.tensor(1.0)}
    totals = running.fold(running.fold(None, first, 1), {"a": torch.tensor(1.0), "b": torch.tensor(16777217)}, 1)
    assert running.compute(totals)["b"].item() == 8388609.0


@unhurried
@given(
    st.lists(
        st.tuples(
            st.integers(1, 5),
            st.sampled_from([("loss", "lr"), ("loss", "lr", "hits"), ("loss",), ("lr", "loss"), ("loss", "count")]),
            st.booleans(),
        ),
        max_size=50,
    )
)
def test_ticks_that_wait_are_folded_as_those_that_do_not(ticks: list[Any]) -> None:
    """Any order of names, kinds and batch sizes: the mean of each name is that over the ticks that had it, weighted by examples."""
    totals, seen, given = None, {}, []
    for i, (n, names, wide) in enumerate(ticks):
        loss = torch.tensor(1.0 + i, dtype=torch.float64 if wide else torch.float32)
        values = {"loss": loss, "lr": 0.5 * i, "hits": metrics.accuracy(torch.eye(n, 5), torch.full((n,), i % 2)), "count": torch.tensor(i)}
        given.append(({name: values[name] for name in names}, n))
        totals = running.fold(totals, *given[-1])
        for name in names:
            seen.setdefault(name, []).append((n, float(values[name].compute()) if name == "hits" else float(values[name])))
    found = running.compute(totals) if totals is not None else {}
    assert list(found) == list(seen)
    assert tree.equal(totals, running.fold_each(None, given))
    for name, values in seen.items():
        expected = np.average([value for _, value in values], weights=[n for n, _ in values])
        np.testing.assert_allclose(float(found[name]), expected, rtol=1e-12)


def test_few_ticks_wait() -> None:
    totals = None
    for i in range(100):
        totals = running.fold(totals, {"loss": torch.tensor(float(i)), "lr": 0.1}, 4)
        assert len(totals.waiting) < 16


def test_a_part_of_a_fold_and_a_metric_of_one_name_are_refused():
    both = metrics.precision_recall_f1(torch.eye(3), torch.arange(3))
    with pytest.raises(ValueError, match="two metrics are named 'prf/f1'"):
        metrics.values({"prf/f1": 1.0, "prf": both})


def test_saved_totals_are_restored_where_no_loop_was_imported(tmp_path):
    totals = running.fold(None, {"loss": torch.tensor(2.0)}, 4)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(TrainState.create(torch.nn.Linear(1, 1)).replace(memory={"totals": totals}))
    code = (
        "import sys; from fnrun.checkpoint import Checkpoints; before = 'fnrun.loops' in sys.modules;"
        "totals = Checkpoints(sys.argv[1]).restore().memory['totals']; print(before, totals.means[0].total.tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout == "False [2.0]\n"
