"""The arithmetic and the turn-taking behind every figure in `benchmarks/results.md`."""

from __future__ import annotations

import pytest

from benchmarks import measure
from benchmarks.measure import Turns, alternate, compared, ratios, spread, table, take_turns


def side(name):
    """Two sides of this module, for `take_turns`: one answers in both ways, one fails."""

    def both_ways(turns):
        while True:
            seen = [*turns]
            assert seen == ["a", "b"]
            with turns.turn(1):
                pass

    def failing(turns):
        raise OSError("no such framework")

    return {"both ways": both_ways, "failing": failing}[name], ["a", "b"]


def test_ratios_are_taken_within_a_round():
    slow_minute = ratios([2.0, 20.0, 2.0], [1.0, 10.0, 1.0])
    assert slow_minute == [2.0, 2.0, 2.0]
    assert spread(slow_minute) == "2.00 (2.00–2.00)"


def test_a_spread_is_the_median_and_the_quartiles():
    assert spread([5.0, 1.0, 3.0, 2.0, 4.0], digits=1) == "3.0 (2.0–4.0)"


def test_a_table_lines_up():
    lines = table(["", "us"], [["bare", "9.5"], ["a longer name", "10.25"]]).splitlines()
    assert lines[0] == "|               |    us |"
    assert lines[1] == "|---------------|------:|"
    assert lines[2] == "| bare          |   9.5 |"
    assert len({len(line) for line in lines}) == 1


def test_a_row_is_compared_with_each_reference():
    text = compared({"bare": [1.0, 2.0], "ours": [2.0, 4.0]}, ["bare"], "ms", 1000.0)
    assert text.splitlines()[-1] == "| ours | 3000.0 | 2.00 (2.00–2.00) |"


def test_every_side_has_a_turn_in_each_round_and_the_first_round_is_not_kept():
    turns = {"a": iter(range(10)), "b": iter(range(10, 20))}
    assert alternate({name: turns[name].__next__ for name in turns}, rounds=3) == {"a": [1, 2, 3], "b": [11, 12, 13]}


def test_a_turn_is_timed_by_step_also_when_the_pass_is_given_up(monkeypatch):
    clock = iter([10.0, 14.0, 20.0, 21.0])
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock))
    waited, answers = [], []
    turns = Turns(["a", "b"], lambda: waited.append("go"), answers.append)
    assert list(turns) == ["a", "b"]
    half = iter(turns)
    assert next(half) == "a"
    half.close()
    assert answers == [2.0, 0.5]
    assert len(waited) == 2


def test_sides_in_process_groups_take_turns_and_one_that_fails_is_left_out(capfd):
    times = take_turns(__name__, ["both ways", "failing"], rounds=3)
    assert list(times) == ["both ways"]
    assert len(times["both ways"]) == 3
    assert all(0 <= taken < measure.PATIENCE for taken in times["both ways"])
    assert "left out: failing: OSError: no such framework" in capfd.readouterr().err


def test_a_side_that_fails_later_ends_the_measurement_with_its_last_words():
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        take_turns("tests.benchmarks.dying", ["dying"], rounds=3)
