"""Curves: where their points lie, which are shown, and that gaps are gaps; in a picture and as text."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from matplotlib import image

from fnrun.runs.curves import Curve, chosen, curves, records
from fnrun.runs.plot import draw, text


def line(step: int, epoch: int = 1, *, elapsed: float = 0.0, began: float = 1e9, **metrics: Any) -> dict[str, Any]:
    names = {name.replace("_", "/"): value for name, value in metrics.items()}
    return {"ticks": step, "at": "", "step": step, "epoch": epoch, **names, "clock": {"time": began + elapsed, "elapsed": elapsed}}


def test_what_is_no_whole_record_is_left_out(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text(json.dumps(line(1, loss=0.5)) + '\n[1]\n"x"\n{"loss": 1}\n{"step": 2, "lo')
    assert curves(list(records(file))) == {"loss": ([1], [0.5])}
    odd = line(1, loss="NaN", name="wide", list=[1], flag=True, none=None)
    assert {name: (x, str(y)) for name, (x, y) in curves([odd]).items()} == {"loss": ([1], "[nan]"), "flag": ([1], "[1.0]")}


def test_time_is_that_of_training():
    """The second process began an hour later, at a step before the last line of the first."""
    lines = [line(1, elapsed=10, loss=1), line(2, elapsed=20, loss=1), line(3, elapsed=5, began=1e9 + 3600, loss=1)]
    assert curves(lines, "time")["loss"][0] == [10, 20, 25]


def test_epochs_are_finished_at_their_last_line():
    lines = [line(5, 1, loss=1), line(10, 1, loss=1), line(12, 2, loss=1), line(20, 2, loss=1), line(25, 3, loss=1)]
    assert curves(lines, "epoch")["loss"][0] == [0.5, 1.0, 1.2, 2.0, 2.5]


@pytest.mark.parametrize(
    "place", [{"step": "1"}, {"step": True}, {"step": 1, "epoch": "x"}, {"step": 1, "clock": 3}, {"step": 1, "ticks": None}]
)
def test_a_line_that_nothing_here_has_logged_is_left_out(place, tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text(f'{json.dumps(line(1, loss=1))}\n{json.dumps(place | {"loss": 1})}\n[1]\n{"[" * 10**5}\n{{"step": 2')
    assert list(records(file)) == [line(1, loss=1)]


def test_what_is_shown():
    lines = [line(1, train_loss=1, train_lr=0.1, val_loss=1, val_bleu=1)]
    assert [curve.metric for curve in chosen({"a": lines})] == ["train/loss", "val/loss", "val/bleu"]
    assert [curve.metric for curve in chosen({"a": lines}, only=["val/*", "*/lr"])] == ["train/lr", "val/loss", "val/bleu"]
    assert [curve.metric for curve in chosen({"a": [line(1, train_loss=1, train_lr=0.1)]})] == ["train/loss", "train/lr"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(), min_size=1, max_size=20), st.booleans(), st.sampled_from([40, 80, 120]), st.booleans())
def test_any_values_can_be_shown_as_text(values, log, width, color):
    """plotille colors for a terminal only, unless it is told to."""
    (curve,) = chosen({"a": [line(step, loss=value) for step, value in enumerate(values)]}, log=log)
    drawable = [value for value in values if math.isfinite(value) and (value > 0 or not log)]
    assert curve.missing == len(values) - len(drawable)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FORCE_COLOR", "1")
        patch.delenv("NO_COLOR", raising=False)
        shown = text([curve], width=width, color=color, log=log)
    assert ("nothing to draw" in shown) == (not drawable)
    assert ("\x1b" in shown) == (color and bool(drawable))
    plain = re.sub(r"\x1b\[[0-9;]*m", "", shown)
    assert all(len(row) <= width for row in plain.splitlines()) or not drawable


def test_without_colors_each_curve_has_a_letter():
    runs = {name: [line(step, val_loss=step * (i + 1)) for step in range(4)] for i, name in enumerate(["first", "second"])}
    shown = text(chosen(runs))
    assert shown.splitlines()[0] == "val/loss"
    assert shown.splitlines()[-1] == "a first   b second"
    assert {"a", "b"} <= set("".join(row.partition("|")[2] for row in shown.splitlines()[:-3]))


@given(st.lists(st.integers(-1000, 1000), min_size=2, max_size=5, unique=True), st.integers(1, 10**6))
def test_no_point_is_lost_at_an_edge(values, stride):
    runs = {"first": [line(step * stride, val_loss=value) for step, value in enumerate(values)], "second": [line(0, val_loss=values[0])]}
    shown = text(chosen(runs))
    points = [column for row in shown.splitlines() for column, char in enumerate(row.partition("|")[2]) if char in "ab"]
    assert len(set(points)) == len(values)  # the second run's only point lies on the first's


def colors(picture: Path) -> int:
    """How many saturated hues there are."""
    pixels = image.imread(picture)[..., :3].reshape(-1, 3)
    vivid = pixels[pixels.max(axis=1) - pixels.min(axis=1) > 0.5]
    return len(np.unique((vivid * 4).round(), axis=0))


def test_a_picture_of_one_run_has_a_panel_a_kind(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text("\n".join(json.dumps(line(s, train_loss=1 / s, val_loss=2 / s, val_accuracy=s / 9, train_lr=1)) for s in range(1, 9)))
    draw(chosen({"run": list(records(file))}), tmp_path / "curves.png", title="run")
    assert image.imread(tmp_path / "curves.png").shape[1] == 1500  # two panels of five inches at 150 dpi
    assert not (tmp_path / "none.png").exists()


def test_panels_that_the_grid_has_too_many_of_are_hidden(tmp_path):
    """Five kinds in a grid of two rows and three columns: what is drawn beyond them is white."""
    found = chosen({"a": [line(1, val_a=1, val_b=1, val_c=1, val_d=1, val_e=1)]})
    draw(found, tmp_path / "five.png")
    corner = image.imread(tmp_path / "five.png")[-500:, -650:, :3]
    assert corner.min() == 1.0


def test_runs_are_told_apart_by_color(tmp_path):
    runs = {f"run{i}": [line(step, val_loss=step + 10 * i) for step in range(1, 30)] for i in range(8)}
    draw(chosen(runs), tmp_path / "eight.png")
    draw(chosen({"run0": runs["run0"]}), tmp_path / "one.png")
    assert colors(tmp_path / "eight.png") >= 8
    assert colors(tmp_path / "one.png") <= 2


def test_a_gap_is_a_gap(tmp_path):
    """A value between two gaps is a dot; a curve that is nothing but gaps leaves its panel empty."""
    lonely = Curve("a", "val/loss", [1, 2, 3], [math.nan, 1.0, math.nan])
    draw([lonely], tmp_path / "lonely.png")
    draw([lonely._replace(y=[math.nan] * 3)], tmp_path / "empty.png")
    pictures = [image.imread(tmp_path / name) for name in ("lonely.png", "empty.png")]
    assert colors(tmp_path / "lonely.png") > 0
    assert pictures[0].shape == pictures[1].shape


def test_another_kind_of_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not supported"):
        draw([Curve("a", "loss", [1], [1.0])], tmp_path / "curves.txt")


def test_a_metric_of_two_logs_is_one_curve_without_kinks():
    """Means over an epoch and means over some steps, of a loss that falls, are two curves: one is drawn."""
    inner = [{"step": step, "ticks": step, "at": f"0.0.{step}", "train/loss": 100.0 - step} for step in (50, 100)]
    outer = [{"step": step, "ticks": step, "at": str(step // 23), "train/loss": 90.0 - step, "val/loss": 1.0} for step in (23, 46, 69)]
    lines = sorted([*inner, *outer], key=lambda line: line["step"])
    assert curves(lines) == {"train/loss": ([23, 46, 69], [67.0, 44.0, 21.0]), "val/loss": ([23, 46, 69], [1.0, 1.0, 1.0])}
