"""`fnrun plot`: several runs, and everything that is not drawn is said."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.cli.commands.made import document, told


def test_several_runs_in_the_terminal(runs, capsys):
    code, out, err = told(capsys, "plot", runs / "whole", runs / "other", "--only", "val/*")
    assert (code, err) == (0, "")
    assert "\x1b" not in out
    assert out.splitlines()[0] == "val/loss"
    assert out.count("a whole   b other") == 2
    assert max(map(len, out.splitlines())) <= 80


def test_json_holds_the_points(runs, capsys):
    (curve,) = document(capsys, "plot", runs / "whole", "--only", "val/loss", "--by", "epoch")["curves"]
    values = [json.loads(line) for line in (runs / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert curve["x"] == [1.0, 2.0]
    assert curve["y"] == [line["val/loss"] for line in values if "val/loss" in line]


def test_a_picture(runs, tmp_path, capsys):
    picture = tmp_path / "curves.png"
    code, out, _ = told(capsys, "plot", runs / "whole", runs / "other", "--out", picture, "--by", "time", "--log")
    assert code == 0
    assert out.splitlines()[0] == str(picture)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_gaps_and_what_is_left_out_are_said(runs, tmp_path, capsys):
    shutil.copytree(runs / "whole", tmp_path / "whole")
    file = tmp_path / "whole" / "metrics.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()]
    records[-1] |= {"val/loss": "NaN", "train/lr": 0.1}
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    out = told(capsys, "plot", tmp_path / "whole")[1]
    assert "gaps: 1 of the 2 values of val/loss in whole are not finite, at step 6" in out
    assert "not shown: train/lr (--only '*' shows all)" in out


def test_runs_of_one_name_are_told_apart(runs, tmp_path, capsys):
    shutil.copytree(runs / "other", tmp_path / "other" / "whole")
    found = document(capsys, "plot", runs / "whole", tmp_path / "other" / "whole")
    assert sorted({curve["run"] for curve in found["curves"]}) == sorted([f"{runs.name}/whole", "other/whole"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["RUNS/whole", "--only", "test/*"], "no metric matches test/*; there are: train/loss, train/lr, val/accuracy, val/loss"),
        (["RUNS/whole", "--out", "NEW/curves.txt"], "curves.txt cannot be drawn: Format 'txt' is not supported"),
        (["RUNS/whole", "--out", "NEW/none/curves.png"], "cannot write NEW/none/curves.png: No such file or directory"),
        ([], "name a run, or several: fnrun plot RUN..."),
        (["NEW/empty"], "nothing is logged yet in empty"),
    ],
)
def test_messages(flags, message, runs, tmp_path, capsys):
    shutil.copytree(runs / "whole", tmp_path / "empty")
    (tmp_path / "empty" / "metrics.jsonl").unlink()
    code, out, err = told(capsys, "plot", *(flag.replace("RUNS", str(runs)).replace("NEW", str(tmp_path)) for flag in flags))
    assert (code, out) == (2, "")
    assert message.replace("NEW", str(tmp_path)) in err
