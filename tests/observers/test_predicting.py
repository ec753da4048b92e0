from __future__ import annotations

import json

import pytest
import torch

import fnrun
from fnrun import data, observers
from fnrun.testing import assert_observers_do_not_matter, assert_same
from tests.observers.small import Small


def predicting(path, *, fn=None):
    """A predict_loop over 5 batches of 4, the last of 2, with what it writes."""
    small = Small()

    def outputs(model, batch):
        return {"y": model(batch["x"]).squeeze(1), "pair": (batch["x"][:, :2], [f"row {v:.2f}" for v in batch["x"][:, 0].tolist()])}

    step = fnrun.make_predict_step(small.model, fn or outputs)
    batches = data.arrays({"x": small.x[:18]}, 4)
    return small, fnrun.predict_loop(step, observers=[observers.predictions(path)]), batches


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def shards(path):
    assert all(p.suffix == ".pt" for p in path.iterdir())
    return [torch.load(p, weights_only=True) for p in sorted(path.iterdir())]


def test_a_line_for_each_example(tmp_path):
    path = tmp_path / "new" / "predictions.jsonl"
    small, loop, batches = predicting(path)
    _, outputs = loop(small.state(), batches)
    found = lines(path)
    assert [(line["batch"], line["row"]) for line in found] == [(b, r) for b, n in enumerate([4, 4, 4, 4, 2]) for r in range(n)]
    assert [line["output"]["y"] for line in found] == [y for each in outputs for y in each["y"].tolist()]
    assert found[0]["output"]["pair"] == [small.x[0, :2].tolist(), "row -1.00"]


def test_a_file_for_each_batch(tmp_path):
    path = tmp_path / "predictions"
    small, loop, batches = predicting(path)
    _, outputs = loop(small.state(), batches)
    assert_same(shards(path), outputs, "the shards")


@pytest.mark.parametrize("name", ["predictions.jsonl", "predictions"])
@pytest.mark.parametrize("ticks", [1, 3])
def test_what_a_killed_run_wrote_behind_its_state_comes_once(tmp_path, name, ticks):
    small, loop, batches = predicting(tmp_path / "whole" / name)
    loop(small.state(), batches)
    small, loop, batches = predicting(tmp_path / "cut" / name)
    asked = iter(range(100))
    half, _ = loop(small.state(), batches, interrupt=lambda: "enough" if next(asked) == ticks else None)
    loop(half, batches)  # the run that is killed: it has written more than the state that is left of it knows
    if name == "predictions":
        (tmp_path / "cut" / name / ".tmp-0123456789abcdef").write_bytes(b"half a file")
    loop(half, batches)
    read = shards if name == "predictions" else lines
    assert_same(read(tmp_path / "cut" / name), read(tmp_path / "whole" / name), "after the resume")


@pytest.mark.parametrize("name", ["predictions.jsonl", "predictions"])
def test_a_state_in_the_middle_keeps_what_belongs_to_it(tmp_path, name):
    path = tmp_path / name
    small, loop, batches = predicting(path)
    asked = iter(range(100))
    half, _ = loop(small.state(), batches, interrupt=lambda: "enough" if next(asked) == 3 else None)
    loop(half, batches)
    if name == "predictions":
        (path / ".tmp-0123456789abcdef").write_bytes(b"half a file")
        (path / "notes.pt").write_bytes(b"somebody else's")
    loop(half, batches, interrupt=lambda: "at once")
    if name == "predictions":
        assert sorted(p.name for p in path.iterdir()) == [f"{n:09}.pt" for n in (1, 2, 3)] + ["notes.pt"]
    else:
        assert {line["batch"] for line in lines(path)} == {0, 1, 2}


def test_of_a_piece_of_a_tensor_only_the_piece_is_written(tmp_path):
    big = torch.zeros(1 << 18)
    small, loop, batches = predicting(tmp_path / "p", fn=lambda model, batch: big[:4])
    loop(small.state(), batches)
    assert all(p.stat().st_size < 10_000 for p in (tmp_path / "p").iterdir())


@pytest.mark.parametrize("name", ["predictions.jsonl", "predictions"])
def test_a_call_from_the_beginning_begins_the_file_anew(tmp_path, name):
    path = tmp_path / name
    small, loop, batches = predicting(path)
    read = shards if name == "predictions" else lines
    trained, _ = fnrun.step_loop(small.step, 2)(small.state(), small.batches)
    older, _ = fnrun.step_loop(small.step, 1)(small.state(), small.batches)
    loop(trained, batches)
    expected = read(path)
    loop(older, batches)
    assert not fnrun.tree.equal(read(path), expected)
    loop(trained, batches)
    assert_same(read(path), expected, "the predictions of the same state")


@pytest.mark.parametrize("name", ["predictions.jsonl", "predictions"])
def test_rounds_follow_each_other(tmp_path, name):
    path = tmp_path / name
    small, loop, batches = predicting(path)
    fnrun.repeat(fnrun.sequence(train=fnrun.epoch_loop(small.step), test=loop), 2)(small.state(), {"train": small.batches, "test": batches})
    if name == "predictions":
        assert len(shards(path)) == 10
    else:
        assert [line["step"] for line in lines(path)] == [5] * 18 + [10] * 18


def test_writing_changes_nothing(tmp_path):
    small, loop, batches = predicting(tmp_path / "predictions.jsonl")
    assert_observers_do_not_matter(loop, small.state(), batches)


def test_outputs_that_cannot_be_cut_into_examples_are_named(tmp_path):
    small, loop, batches = predicting(tmp_path / "p.jsonl", fn=lambda model, batch: {"y": model(batch["x"]), "mean": batch["x"].mean()})
    with pytest.raises(ValueError, match=r"'y': 'Tensor \[4, 1\]', 'mean': 'Tensor \[\]'"):
        loop(small.state(), batches)


def test_other_loops_have_no_outputs(tmp_path):
    small = Small()
    with pytest.raises(ValueError, match="'loss', 'lr' and no outputs: give it to a predict_loop"):
        fnrun.epoch_loop(small.step, observers=[observers.predictions(tmp_path / "p.jsonl")])(small.state(), small.batches)


def test_what_is_no_number_is_what_float_reads(tmp_path):
    small, loop, batches = predicting(tmp_path / "p.jsonl", fn=lambda model, batch: batch["x"][:, 0] / 0.0)
    loop(small.state(), batches)
    assert {line["output"] for line in lines(tmp_path / "p.jsonl")} == {"Infinity", "-Infinity"}
