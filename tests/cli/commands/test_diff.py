"""`fnrun diff`: equal means every bit of the training, and what differs is measured."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

import fnrun
from fnrun import observers
from fnrun.checkpoint import Checkpoints
from fnrun.cli.commands.diff import fields, measure
from tests.cli.commands.made import Config, document, flip, largest_file, newest, told, train


def saved(directory: Path, state: Any) -> Path:
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(state)
    return directory


def state(**changes: Any) -> fnrun.TrainState:
    fresh = fnrun.TrainState.create(torch.nn.Linear(2, 2), seed=0)
    params = {"weight": torch.arange(4.0).view(2, 2), "bias": torch.zeros(2)}
    return fresh.replace(**{"params": params, "memory": {"count": 1}, **changes})


def compared(capsys: Any, tmp_path: Path, a: Any, b: Any) -> Any:
    return document(capsys, "diff", saved(tmp_path / "a", a), saved(tmp_path / "b", b))


# --- runs ------------------------------------------------------------------------------------------------------------


def test_a_run_that_was_interrupted_is_equal_to_one_that_was_not(runs, capsys):
    code, out, err = told(capsys, "diff", runs / "whole", runs / "resumed")
    assert (code, err) == (0, "")
    assert out.endswith("\nequal, bit for bit\n")
    found = document(capsys, "diff", runs / "whole", runs / "resumed")
    assert found["equal"]
    assert found["logged"] is None


def test_another_seed_is_another_state(runs, capsys):
    code, out, _ = told(capsys, "diff", runs / "whole", runs / "other")
    assert code == 1
    assert "rng/seed" in out
    found = document(capsys, "diff", runs / "whole", runs / "other")
    assert found["config"] == [{"field": "seed", "a": 0, "b": 1}]
    a, b = (fnrun.Run.open(runs / name).checkpoints.restore() for name in ("whole", "other"))
    rows = {row["path"]: row for row in found["state"]}
    for name in a.params:
        difference = (a.params[name].double() - b.params[name].double()).abs().max().item()
        assert rows[f"params/{name}"]["largest"] == pytest.approx(difference, rel=1e-12)
    assert rows["rng/seed"] == {"path": "rng/seed", "a": 0, "b": 1}


def test_the_first_logged_line_that_differs_is_found(runs, capsys):
    found = document(capsys, "diff", runs / "whole", runs / "other")["logged"]
    lines = [[json.loads(line) for line in (runs / name / "metrics.jsonl").read_text().splitlines()] for name in ("whole", "other")]
    first, second = lines[0][0], lines[1][0]
    assert found == {"step": first["step"], "metrics": [{"field": "train/loss", "a": first["train/loss"], "b": second["train/loss"]}]}


def test_a_line_that_only_one_run_has_is_said(runs, tmp_path, capsys):
    shutil.copytree(runs / "whole", tmp_path / "short")
    lines = (runs / "whole" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "short" / "metrics.jsonl").write_text("".join(lines[:-1]))
    found = document(capsys, "diff", runs / "whole", tmp_path / "short")
    assert found["equal"]  # what is logged does not count
    assert found["logged"] == {"step": 6, "only": "a"}
    assert "only A has a line there" in told(capsys, "diff", runs / "whole", tmp_path / "short")[1]


def test_what_observers_gather_does_not_count(runs, tmp_path, capsys):
    """One with a log more, stopped within an epoch: its frames hold what the log has gathered."""
    from tests.cli.commands.made import after

    train(tmp_path / "watched", interrupt=after(3), watching=[observers.log(5, to=[], name="more")])
    train(tmp_path / "not", interrupt=after(3))
    found = document(capsys, "diff", tmp_path / "watched", tmp_path / "not")
    assert found["equal"]
    assert found["observers"]
    assert "what observers gather, which does not count" in told(capsys, "diff", tmp_path / "watched", tmp_path / "not")[1]


def test_a_run_that_trained_longer_is_different(runs, tmp_path, capsys):
    train(tmp_path / "longer", config=Config(epochs=3))
    found = document(capsys, "diff", runs / "whole", tmp_path / "longer")
    assert {"path": "step", "a": 6, "b": 9} in found["state"]
    assert found["logged"] == {"step": 8, "only": "b"}


def test_a_flipped_bit_is_damage_and_not_a_difference(runs, tmp_path, capsys):
    shutil.copytree(runs / "whole", tmp_path / "whole")
    flip(largest_file(newest(tmp_path / "whole")))
    for pair in ((runs / "whole", tmp_path / "whole"), (tmp_path / "whole", runs / "other")):
        code, out, err = told(capsys, "diff", *pair)
        assert (code, out) == (2, "")
        assert "is damaged" in err
        assert "params/weight" in err


# --- states ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "row"),
    [
        ({"params": {"weight": torch.arange(4.0).view(2, 2)}}, {"path": "params/bias", "a": "tensor float32 (2,)"}),
        ({"memory": {"count": 1, "deep": {"a": 1, "b": {"c": 2}}}}, {"path": "memory/deep", "b": "dict"}),
        ({"memory": {"count": True}}, {"path": "memory/count", "a": 1, "b": True}),
        ({"memory": {"count": {"a": 1}}}, {"path": "memory/count", "a": "int", "b": "dict"}),
        ({"stop": "enough"}, {"path": "stop", "a": None, "b": "enough"}),
        (
            {"params": {"weight": torch.arange(4.0).view(2, 2), "bias": torch.zeros(2, dtype=torch.float16)}},
            {"path": "params/bias", "a": "tensor float32 (2,)", "b": "tensor float16 (2,)"},
        ),
        (
            {"params": {"weight": torch.arange(4.0).view(2, 2), "bias": torch.tensor([0.0, -0.0])}},
            {"path": "params/bias", "elements": 1, "of": 2, "largest": 0.0},
        ),
        (
            {"params": {"weight": torch.tensor([[0.0, 1.5], [math.nan, 3.0]]), "bias": torch.zeros(2)}},
            {"path": "params/weight", "elements": 2, "of": 4, "largest": 0.5, "nonfinite": 1},
        ),
        (
            {"params": {"bias": torch.zeros(2), "weight": torch.arange(4.0).view(2, 2)}},
            {"path": "params", "a": "dict, in this order: params/weight, params/bias", "b": "in this one: params/bias, params/weight"},
        ),
    ],
)
def test_each_kind_of_difference(change, row, tmp_path, capsys):
    found = compared(capsys, tmp_path, state(), state(**change))
    assert not found["equal"]
    assert found["state"] == [row]
    assert row["path"] in told(capsys, "diff", tmp_path / "a", tmp_path / "b")[1]
    assert document(capsys, "diff", tmp_path / "a", tmp_path / "a")["equal"]


def test_tensors_that_are_one_and_tensors_that_are_equal_differ(tmp_path, capsys):
    one = torch.zeros(2)
    found = compared(capsys, tmp_path, state(memory={"a": one, "b": one}), state(memory={"a": one, "b": one.clone()}))
    assert found["state"] == [{"path": "memory/b", "a": "tensor float32 (2,), the same as memory/a", "b": "tensor float32 (2,)"}]


def test_nan_is_equal_to_itself(tmp_path, capsys):
    bad = {"x": torch.tensor([math.nan]), "y": math.nan, "z": np.array([math.inf])}
    assert compared(capsys, tmp_path, state(memory=bad), state(memory={**bad, "x": bad["x"].clone()}))["equal"]


@settings(max_examples=50, deadline=None)
@given(a=st.lists(st.floats(width=32), min_size=1, max_size=8), data=st.data())
def test_measure_counts_by_bits_and_measures_by_value(a, data):
    b = [data.draw(st.one_of(st.just(x), st.floats(width=32))) for x in a]
    x, y = np.array(a, np.float32), np.array(b, np.float32)
    found = measure(torch.tensor(x), torch.tensor(y))
    unequal = [i for i in range(len(a)) if x[i].tobytes() != y[i].tobytes()]
    pairs = [(float(x[i]), float(y[i])) for i in unequal]
    assert (found["elements"], found["of"]) == (len(unequal), len(a))
    finite = [abs(p - q) for p, q in pairs if math.isfinite(p) and math.isfinite(q)]
    assert found.get("largest") == (max(finite) if finite else None)
    assert found.get("nonfinite", 0) == len(pairs) - len(finite)


# --- configs ---------------------------------------------------------------------------------------------------------


def test_configs_are_compared_by_their_fields(runs, tmp_path, capsys):
    mine, other = runs / "whole" / "config.yaml", runs / "other" / "config.yaml"
    assert told(capsys, "diff", mine, runs / "resumed" / "config.yaml") == (0, "equal\n", "")
    assert document(capsys, "diff", mine, other) == {"equal": False, "config": [{"field": "seed", "a": 0, "b": 1}]}
    assert told(capsys, "diff", mine, other)[0] == 1
    (tmp_path / "damaged.yaml").write_text("a: [")
    assert "damaged.yaml is no config that can be read" in told(capsys, "diff", mine, tmp_path / "damaged.yaml")[2]
    code, _, err = told(capsys, "diff", mine, runs / "other")
    assert code == 2
    assert err.startswith(f"error: {mine} is a file, and {runs / 'other'} is none: it is a run")


plain = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text("abc", min_size=1, max_size=2), inner, max_size=3)),
    max_leaves=6,
)


@given(plain)
def test_a_config_has_no_difference_with_itself(value):
    assert fields(value, json.loads(json.dumps(value))) == []


@given(st.dictionaries(st.text("abc", min_size=1), st.integers(), min_size=1), st.data())
def test_what_was_changed_is_what_differs(config, data):
    name = data.draw(st.sampled_from(sorted(config)))
    changed = {**config, name: config[name] + 1}
    assert fields(config, changed) == [{"field": name, "a": config[name], "b": changed[name]}]
