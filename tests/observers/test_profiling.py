from __future__ import annotations

import json
import logging

import pytest

import fnrun
from fnrun import observers
from fnrun.testing import assert_observers_do_not_matter
from tests.observers.small import Small


def ranges(path):
    """The steps that a trace shows, and whether it shows operations."""
    events = json.loads(path.read_text())["traceEvents"]
    steps = sorted({e["name"] for e in events if str(e.get("name", "")).startswith("step ") and e.get("cat") == "user_annotation"})
    return steps, {e["name"] for e in events if e.get("cat") == "cpu_op"}


@pytest.mark.parametrize(("first", "last"), [(1, 2), (2, 3), (3, 4), (4, 7)])
def test_the_trace_holds_these_steps_and_no_others(tmp_path, caplog, first, last):
    small = Small()
    fnrun.step_loop(small.step, 3)(small.state(), small.batches)  # in its first calls a step is looked at, and called twice
    caplog.set_level(logging.INFO, "fnrun")
    train = fnrun.epoch_loop(small.step, observers=[observers.profile(range(first, last + 1), to=tmp_path)])
    fnrun.repeat(train, 2)(small.state(), small.batches)
    name = f"steps-{first}-{last}"
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.json", f"{name}.txt"}
    steps, operations = ranges(tmp_path / f"{name}.json")
    assert steps == [f"step {n}" for n in range(first, last + 1)]
    assert "aten::addmm" in operations
    (message,) = [record.getMessage() for record in caplog.records]
    for text in ((tmp_path / f"{name}.txt").read_text(), message):
        assert "aten::addmm" in text
    assert "step 3" not in message
    forwards = 2 * (last - first + 1)  # two linear layers a step, each called once
    (row,) = [line.split() for line in message.splitlines() if "aten::addmm" in line]
    assert int(row[1]) == forwards


@pytest.mark.parametrize("why", ["the end", "an error", "a stop", "an interrupt"])
def test_where_the_program_ends_early_the_finished_steps_are_written(tmp_path, why):
    small = Small()

    def end(state, metrics):
        if why == "an error" and state.step == 4:
            raise RuntimeError("enough")
        return state.replace(stop="enough") if why == "a stop" and state.step == 4 else state

    loop = fnrun.epoch_loop(small.step, hooks=[end], observers=[observers.profile(range(3, 100), to=tmp_path)])
    asked = iter(range(100))
    interrupt = (lambda: "enough" if next(asked) == 4 else None) if why == "an interrupt" else None
    if why == "an error":
        with pytest.raises(RuntimeError, match="enough"):
            loop(small.state(), small.batches)
    else:
        loop(small.state(), small.batches, interrupt=interrupt)
    last = {"the end": 5, "an error": 3, "a stop": 4, "an interrupt": 4}[why]
    steps, _ = ranges(tmp_path / f"steps-3-{last}.json")
    assert steps[: last - 2] == [f"step {n}" for n in range(3, last + 1)]
    loop = fnrun.epoch_loop(small.step, observers=[observers.profile(range(1, 2), to=tmp_path)])
    loop(small.state(), small.batches)  # no profiler was left running
    assert (tmp_path / "steps-1-1.json").exists()


@pytest.mark.parametrize("first", [6, 7, 50])
def test_steps_that_never_come_leave_nothing(tmp_path, first):
    small = Small()
    fnrun.epoch_loop(small.step, observers=[observers.profile(range(first, first + 3), to=tmp_path)])(small.state(), small.batches)
    assert list(tmp_path.iterdir()) == []


def test_a_resumed_run_profiles_the_same_steps(tmp_path):
    small = Small()
    loop = fnrun.repeat(fnrun.step_loop(small.step, 5, observers=[observers.profile(range(6, 8), to=tmp_path)]), 2)
    asked = iter(range(100))
    half, _ = loop(small.state(), small.batches, interrupt=lambda: "enough" if next(asked) == 7 else None)
    assert half.step == 5
    assert list(tmp_path.iterdir()) == []
    loop(half, small.batches)
    assert ranges(tmp_path / "steps-6-7.json")[0] == ["step 6", "step 7"]


def test_profiling_changes_no_bit(tmp_path):
    small = Small()
    loop = fnrun.epoch_loop(small.step, observers=[observers.profile(range(2, 5), to=tmp_path)])
    assert_observers_do_not_matter(loop, small.state(), small.batches)


@pytest.mark.parametrize("steps", [range(3), range(3, 3), range(1, 9, 2), 10, [1, 2]])
def test_steps_that_are_none_are_refused(tmp_path, steps):
    with pytest.raises(ValueError, match="range\\(10, 13\\)"):
        observers.profile(steps, to=tmp_path)
