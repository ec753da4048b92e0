"""The code of docs/debugging.md runs as it stands, from top to bottom."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "debugging.md").read_text()


def test_the_code_runs_and_shows_what_the_page_says(tmp_path, monkeypatch, capsys, caplog):
    pytest.importorskip("tensorboard")
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO, "fnrun")
    names: dict = {"__name__": "docs"}
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(compile(block, "docs/debugging.md", "exec", dont_inherit=True), names)
    printed, run = capsys.readouterr().out, tmp_path / "runs" / "debug"
    assert re.search(r"^    val: eval_loop +\d\.\d{3} s  loss$", printed, re.MULTILINE)
    assert "the first module with an output that is not finite: 1.1 (Divide)" in printed
    assert "not finite after it: 0.bias, 0.weight, 2.bias, 2.weight" in printed
    assert (run / "profile" / "steps-10-12.json").exists()
    assert "memory: the state takes" in caplog.text
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = {name for line in lines for name in line} | {name for line in lines for name in line["clock"]}
    assert {"state_mib", "resident_mib", "norm/0.weight", "update_norm/0.weight", "gradient_norm/0.weight"} <= found
    (first, *_) = (run / "predictions.jsonl").read_text().splitlines()
    assert json.loads(first).keys() == json.loads(re.findall(r'^    (\{"ticks".*)$', PAGE, re.MULTILINE)[0]).keys()
