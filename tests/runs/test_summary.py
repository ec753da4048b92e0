"""What a run came to, in print: the same numbers however long the log is, in memory that does not grow with it."""

from __future__ import annotations

import json
import re
import tracemalloc
from pathlib import Path

import pytest

import fnrun
from fnrun.runs.curves import records, thinned
from fnrun.runs.summary import summary


def logged(path: Path, steps: int) -> fnrun.Run:
    """Each step has a loss, least at two thirds of the way; each 100th an accuracy, NaN at first and twice at its best."""
    run = fnrun.Run.create("some.experiment", {}, path)
    with run.metrics.open("w") as file:
        for step in range(1, steps + 1):
            line: dict[str, object] = {"ticks": step, "step": step, "loss": abs(step - 2 * steps // 3) + 0.5}
            if step % 100 == 0:
                line["val/accuracy"] = "NaN" if step == 100 else 0.75 if step in (200, 300) else 0.25
            file.write(json.dumps(line) + "\n")
    return run


@pytest.mark.parametrize("steps", [300, 9_000])
def test_the_best_and_the_last(steps: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    summary(logged(tmp_path / "run", steps), evaluates=True)
    rows = dict(re.findall(r"^(\S+)  +(\S+ \(step \d+\)  +\S+ \(step \d+\))", capsys.readouterr().out, re.MULTILINE))
    last = {300: "0.7500", 9_000: "0.2500"}[steps]
    assert {name: re.sub(" +", " ", row) for name, row in rows.items()} == {
        "loss": f"0.5000 (step {2 * steps // 3}) {steps / 3 + 0.5:.4f} (step {steps})",
        "val/accuracy": f"0.7500 (step 200) {last} (step {steps})",
    }


def test_memory_does_not_grow_with_the_log(tmp_path: Path):
    peaks = []
    for steps in (9_000, 90_000):
        run = logged(tmp_path / str(steps), steps)
        tracemalloc.start()
        kept = thinned(records(run.metrics))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert (kept[0]["step"], kept[-1]["step"]) == (1, steps)
    assert peaks[1] < 1.5 * peaks[0]
