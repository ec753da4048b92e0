"""Whatever happens to a run, each sink ends with what an uninterrupted run's would hold, once."""

from __future__ import annotations

import importlib.util
import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fnrun
from fnrun import observers
from fnrun.core import tree
from fnrun.core.position import Position
from fnrun.observers import Record
from fnrun.sinks.media import histogram
from fnrun.testing import assert_observers_do_not_matter, assert_resumable, states_seen
from tests.observers.held import NEEDS, SINKS, held, sink
from tests.observers.training import training
from tests.programs import fresh

ROOT = Path(__file__).parents[2]


def here(kind: str) -> bool:
    return all(importlib.util.find_spec(name) for name in NEEDS.get(kind, []))


INSTALLED = [kind for kind in SINKS if here(kind)]


@pytest.fixture(autouse=True)
def _in_a_directory_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))


def process(path: Path, *kill_at: int) -> subprocess.Popen:
    path.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "tests.observers.training", str(path), ",".join(INSTALLED), *map(str, kill_at)]
    # A service of its own: one that an earlier test has started outlives the kill, and holds the run's id.
    own = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_SERVICE")}
    environment = {**own, "TRACKIO_DIR": str(path / "trackio"), "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:]])}
    return subprocess.Popen(command, env=environment, cwd=path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def ends(running: subprocess.Popen, code: int) -> None:
    output, _ = running.communicate(timeout=300)
    assert running.returncode == code, output


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One run that nobody disturbed, and one that was killed and resumed twice."""
    path = tmp_path_factory.mktemp("runs")
    whole = process(path / "whole")
    for kill_at in (13, 28):
        ends(process(path / "cut", kill_at), -signal.SIGKILL)
    ends(process(path / "cut"), 0)
    ends(whole, 0)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("kind", SINKS)
def test_killed_and_resumed_twice(kind, runs, monkeypatch):
    if not here(kind):
        pytest.skip(f"{' and '.join(NEEDS[kind])} are not installed here")
    found = []
    for run in ("whole", "cut"):
        if kind in ("mlflow", "trackio"):  # in a process of its own: trackio reads where its projects are once, when it is imported
            found.append(read_elsewhere(kind, runs / run))
        else:
            found.append(held(kind, runs / run))
    assert found[0] == found[1]
    assert str(found[0]).count("loss_mean_3") > 0


def read_elsewhere(kind: str, path: Path) -> str:
    code = f"from tests.observers.held import held; from pathlib import Path; print(held({kind!r}, Path({str(path)!r})))"
    environment = {**os.environ, "TRACKIO_DIR": str(path / "trackio"), "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:]])}
    return subprocess.run([sys.executable, "-c", code], env=environment, cwd=path, capture_output=True, text=True, check=True).stdout


def test_laws_hold_with_everything_that_logs(tmp_path):
    """Resumed from every state that an observer sees; and no observer changes a bit."""
    program, streams, state = training(tmp_path, ["jsonl", "csv", "tensorboard"])
    assert_resumable(program, state, streams, limit=12)
    plain = fnrun.repeat(
        fnrun.sequence(
            train=fnrun.epoch_loop(program.step.steps["train"].step, observers=[observers.log(2, to=[], window=3)]),
            val=program.step.steps["val"],
        ),
        4,
        observers=program.observers,
    )  # without the window of the whole run, which is a hook too
    assert_observers_do_not_matter(plain, state, streams)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tensorboard"])
def test_cut_at_every_state(kind, tmp_path):
    """Restored where it stood, after all was written: what came later is cut off and written again."""
    program, streams, state = training(tmp_path / "whole", [kind])
    seen, _ = states_seen(program, state, streams)
    expected = held(kind, tmp_path / "whole")
    for one in seen[::3]:
        again, streams, _ = training(tmp_path / "whole", [kind])
        again(tree.snapshot(one), streams)
        assert held(kind, tmp_path / "whole") == expected, one.position.order


def lines(values):
    return [Record((i + 1,), i + 1, 1, dict(row), {"time": 0.0}) for i, row in enumerate(values)]


def at(ticks):
    return fresh().replace(position=Position((), {}, ticks), step=ticks)


@pytest.mark.parametrize("kind", [kind for kind in INSTALLED if kind != "trackio"])
def test_opened_twice_closed_twice_and_opened_again(kind, tmp_path):
    opened = sink(kind, tmp_path)
    for row in lines([{"a": 1.0}, {"a": 2.0}]):
        opened.open(at(0) if row.step == 1 else at(1))
        opened.write(row)
        opened.flush()
        if row.step == 1:
            opened.close()
            opened.close()
    opened.close()
    one = sink(kind, tmp_path / "one")
    one.open(at(0))
    one.open(at(0))
    for row in lines([{"a": 1.0}, {"a": 2.0}]):
        one.write(row)
    one.close()
    assert held(kind, tmp_path) == held(kind, tmp_path / "one")


def test_a_table_keeps_its_columns_when_more_come(tmp_path):
    table = observers.csv(tmp_path / "m.csv")
    table.open(at(0))
    for row in lines([{"a": 1.5}, {"a": float("nan"), "b": [1.0, 2.0]}, {"c": 3}]):
        table.write(row)
    table.close()
    assert (tmp_path / "m.csv").read_text().splitlines() == [
        "ticks,at,step,epoch,a,clock/time,b,c",
        "1,,1,1,1.5,0.0,,",
        '2,,2,1,nan,0.0,"[1.0, 2.0]",',
        "3,,3,1,,0.0,,3",
    ]


@pytest.mark.parametrize("cut", [1, 4, 8])
def test_the_power_went_while_a_line_was_written(cut, tmp_path):
    """A tail of any length is missing: what is whole stays."""
    for kind in ("jsonl", "csv", "tensorboard"):
        written = sink(kind, tmp_path)
        written.open(at(0))
        for row in lines([{"a": 1.0}, {"a": 2.0}]):
            written.write(row)
        written.close()
        expected = held(kind, tmp_path)
        (file,) = [
            p for p in tmp_path.rglob("*") if p.is_file() and (p.suffix == f".{kind}" or "tfevents" in p.name or p.name == "metrics.csv")
        ]
        with file.open("r+b") as opened:
            opened.truncate(file.stat().st_size - cut)
        again = sink(kind, tmp_path)
        again.open(at(2))
        again.close()
        left = held(kind, tmp_path)
        again.open(at(1))
        again.write(lines([{"a": 1.0}, {"a": 2.0}])[1])
        again.close()
        assert left != expected
        assert held(kind, tmp_path) == expected
        for p in list(tmp_path.rglob("*")):
            if p.is_file():
                p.unlink()


def test_a_service_gets_what_a_killed_process_still_held_and_nothing_twice(tmp_path):
    from fnrun.sinks.journal import Journaled

    class Service:
        """Holds `sent`, which survives; a process may lose its newest lines, or have sent some that are later than the checkpoint."""

        def __init__(self, sent):
            self.sent = sent

        def start(self):
            return len(self.sent)

        def send(self, number, record):
            assert number == len(self.sent)
            self.sent.append((record.step, record.metrics["a"]))

        def finish(self):
            pass

    rows = lines([{"a": float(i)} for i in range(6)])
    for survived, checkpoint in itertools.product(range(7), range(7)):
        path = tmp_path / f"{survived}-{checkpoint}.jsonl"
        first = Journaled(path, Service([]))
        first.open(at(0))
        for row in rows:
            first.write(row)
        first.close()
        again = Service([(row.step, row.metrics["a"]) for row in rows[:survived]])
        second = Journaled(path, again)
        second.open(at(checkpoint))
        for row in rows[checkpoint:]:
            second.write(row)
        second.close()
        assert again.sent == [(row.step, row.metrics["a"]) for row in rows]


def test_images_histograms_and_texts_come_out_of_a_journal_as_they_went_in(tmp_path):
    from fnrun.sinks.journal import _decoded, _encoded

    shown = {
        "grey": observers.Image(torch.rand(5, 7)),
        "colour": observers.Image((torch.rand(3, 5, 7) * 255).to(torch.uint8)),
        "said": observers.Text("ä"),
        "spread": histogram(torch.randn(100), 5),
        "odd": float("inf"),
    }
    row = Record((3, 1, 2), 2, 1, shown, {"time": 1.0})
    back = _decoded(_encoded(row))
    assert back[:3] == row[:3]
    assert back.metrics["odd"] == float("inf")
    assert (back.metrics["colour"].pixels() == shown["colour"].pixels()).all()
    assert (back.metrics["grey"].pixels() == shown["grey"].pixels()).all()
    assert back.metrics["said"].text == "ä"
    assert back.metrics["spread"].counts.tolist() == shown["spread"].counts.tolist()


def test_a_tensorboard_that_looks_on_sees_each_event_once(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = observers.tensorboard(tmp_path)
    board.open(at(0))
    for row in lines([{"a": 1.0}, {"a": 2.0}]):
        board.write(row)
    board.flush()
    watching = EventAccumulator(str(tmp_path)).Reload()
    assert [e.step for e in watching.Scalars("a")] == [1, 2]
    board.close()
    board.open(at(1))
    board.write(lines([{"a": 1.0}, {"a": 3.0}])[1])
    board.close()
    assert [(e.step, e.value) for e in watching.Reload().Scalars("a")] == [(1, 1.0), (2, 3.0)]


def test_wandb_is_one_run_with_its_config_axes_and_summary(tmp_path):
    from tests.observers.held import wandb_records

    run = sink("wandb", tmp_path)
    run.open(at(0))
    for row in lines([{"train/loss": 1.0}, {"train/loss": 3.0}]):
        run.write(row)
    run.close()
    records = list(wandb_records(tmp_path))
    _, config, summary = held("wandb", tmp_path)
    assert config == {"lr": 0.1, "model": {"layers": 2}}
    assert summary["train/loss"] == {"min": 1.0}
    (one,) = {record.run.run_id for record in records if record.HasField("run")}
    assert one == (tmp_path / "wandb.id").read_text().strip()
    axes = {(r.metric.name or r.metric.glob_name): r.metric.step_metric for r in records if r.HasField("metric")}
    assert axes["*"] == axes["train/loss"] == "step"
