"""Lines of metrics: windows, names, sinks."""

from __future__ import annotations

import json
import logging
import math
import subprocess
import sys

import pytest
import torch

import fnrun
from fnrun import observers, optim, schedules
from fnrun.sinks import Record
from tests.programs import fresh


def counted(**hooks_and_observers):
    step = fnrun.step(lambda state, batch: (state, {"n": float(state.step), "vector": torch.tensor([1.0, float(state.step)])}))
    return fnrun.epoch_loop(step, **hooks_and_observers)


class Kept:
    """A sink that keeps its records."""

    def __init__(self):
        self.records = []

    def open(self, state):
        pass

    def write(self, record):
        self.records.append(record)

    def flush(self):
        pass

    def close(self):
        pass


def test_a_line_is_the_mean_of_its_window_weighted_by_examples():
    kept = Kept()
    loop = fnrun.repeat(fnrun.sequence(train=counted(observers=[observers.log(2, to=[kept])])), 2)
    loop(fresh(), {"train": [torch.zeros(1), torch.zeros(3), torch.zeros(1)]})
    # steps 0 1 | 2 and, in the next epoch, 3 | 4 5: a window ends at each second step, wherever the epoch does
    assert [(r.step, r.epoch, r.metrics["train/n"]) for r in kept.records] == [(2, 1, 0.75), (4, 2, 2.5), (6, 2, pytest.approx(4.25))]
    assert kept.records[0].metrics["train/vector"] == [1.0, 0.75]
    assert [r.order for r in kept.records] == [(2, 0, 0, 2), (4, 1, 0, 1), (6, 1, 0, 3)]
    assert {"time", "elapsed", "seconds_per_tick", "eta", "peak_mib"} <= kept.records[0].clock.keys()


def test_in_an_outer_loop_it_counts_rounds_and_keeps_the_names():
    kept = Kept()
    loop = fnrun.repeat(fnrun.sequence(train=counted()), 4, observers=[observers.log(2, to=[kept])])
    loop(fresh(), {"train": [torch.zeros(1)]})
    assert [(r.step, r.metrics["train/n"]) for r in kept.records] == [(2, 0.5), (4, 2.5)]


def test_two_logs_in_one_loop_need_two_names_only_if_their_windows_differ():
    kept = Kept()
    counted(observers=[observers.log(1, to=[kept], name="a"), observers.log(3, to=[kept], name="b")])(fresh(), [torch.zeros(1)] * 3)
    assert [r.metrics["n"] for r in kept.records] == [0.0, 1.0, 2.0, 1.0]


def test_jsonl_has_no_numbers_that_json_lacks(tmp_path):
    sink = observers.jsonl(tmp_path / "deep" / "metrics.jsonl")
    sink.open(fresh())
    sink.write(Record((3, 1), 3, 1, {"a": math.nan, "b": -math.inf, "c": [1.0, math.inf], "d": {"x": 1}}, {"time": 1.0}))
    sink.flush()
    sink.close()
    line = json.loads((tmp_path / "deep" / "metrics.jsonl").read_text(), parse_constant=lambda name: pytest.fail(name))
    metrics = {"a": "NaN", "b": "-Infinity", "c": [1.0, "Infinity"], "d": {"x": 1}}
    assert line == {"ticks": 3, "at": "1", "step": 3, "epoch": 1, **metrics, "clock": {"time": 1.0}}


def test_jsonl_refuses_a_metric_by_the_name_of_a_field(tmp_path):
    sink = observers.jsonl(tmp_path / "m.jsonl")
    sink.open(fresh())
    with pytest.raises(ValueError, match=r"metrics cannot be named \['step'\]"):
        sink.write(Record((0,), 0, 0, {"step": 1.0}, {}))
    sink.close()


def test_console_prints_a_line_of_the_logger(caplog):
    with caplog.at_level(logging.INFO, logger="fnrun"):
        observers.console().write(
            Record((1,), 50, 3, {"train/loss": 0.51234, "train/lr": 1e-5, "val/accuracy": 1.0, "train/clipped": 1.0}, {})
        )
    assert caplog.messages == ["epoch 3   step 50    train: loss 0.5123  lr 1.00e-5  val: accuracy 1.0000"]


def test_the_line_of_a_whole_loop_is_told_from_those_of_its_steps(caplog):
    def log(name):
        return observers.log(name=name)

    step = fnrun.step(lambda state, batch: (state, {"loss": float(state.step)}))
    train = fnrun.epoch_loop(step, observers=[log("a")])
    loop = fnrun.repeat(fnrun.sequence(train=train, observers=[log("b")]), 2, observers=[log("c")])
    with caplog.at_level(logging.INFO, logger="fnrun"):
        loop(fresh(), {"train": [torch.zeros(1)] * 2})
    assert [line.partition("  0:00")[0] for line in caplog.messages[-4:]] == [
        "epoch 2   step 3     train: loss 2.0000",
        "epoch 2   step 4     train: loss 3.0000",
        "epoch 2   step 4     whole loop  train: loss 2.5000",
        "epoch 2   step 4     round 2  train: loss 2.5000",
    ]


def test_without_configured_logging_the_console_is_the_standard_output():
    import subprocess
    import sys

    code = (
        "import torch, fnrun; from fnrun import observers;"
        "step = fnrun.step(lambda state, batch: (state, {'loss': 1.5}));"
        "fnrun.epoch_loop(step, observers=[observers.log(1)])(fnrun.TrainState.create(torch.nn.Linear(1, 1)), [torch.zeros(1)])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout == "epoch 1   step 1     loss 1.5000\n"
    assert out.stderr == ""


def test_log_every_none():
    with pytest.raises(ValueError, match="at least 1"):
        observers.log(0)


def test_a_finished_program_that_trains_again_loses_no_line(tmp_path):
    path = tmp_path / "m.jsonl"
    inner = counted(observers=[observers.log(1, to=[observers.jsonl(path)])])
    loop = fnrun.repeat(inner, 2, observers=[observers.log(to=[observers.jsonl(path)])])
    state, _ = loop(fresh(), [torch.zeros(1)] * 2)
    state, _ = loop(state, [torch.zeros(1)] * 2)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["ticks"], line["at"]) for line in lines] == [
        (1, "0.1"), (2, "0.2"), (2, "1"), (3, "1.1"), (4, "1.2"), (4, "2"),
        (5, "0.1"), (6, "0.2"), (6, "1"), (7, "1.1"), (8, "1.2"), (8, "2"),
    ]  # fmt: skip


def test_a_program_that_refuses_its_data_does_not_cut_the_log(tmp_path):
    path = tmp_path / "m.jsonl"
    loop = counted(observers=[observers.log(1, to=[observers.jsonl(path)])])
    loop(fresh(), [torch.zeros(1)] * 3)
    before = path.read_text()
    with pytest.raises(ValueError, match="empty"):
        loop(fresh(), [])
    with pytest.raises(TypeError, match=r"data\.loader"):
        loop(fresh(), torch.utils.data.DataLoader([1]))
    assert path.read_text() == before


def test_a_learning_rate_is_the_last_one_at_every_depth():
    kept, curve = Kept(), schedules.cosine(0.1, 12)
    model = torch.nn.Linear(1, 1)
    optimizer = optim.partition(optim.decay_labels, {"decay": optim.sgd(curve), "no_decay": optim.sgd(0.5)})
    step = fnrun.make_train_step(model, lambda model, x: model(x).square().mean(), optimizer)
    loop = fnrun.repeat(fnrun.sequence(train=fnrun.epoch_loop(step)), 4, observers=[observers.log(2, to=[kept])])
    _, result = loop(fnrun.TrainState.create(model, optimizer), {"train": [torch.ones(1, 1)] * 3})
    assert [r.metrics["train/decay/lr"] for r in kept.records] == [curve(5), curve(11)]  # of the newest update before the line
    assert result["train/decay/lr"] == curve(11)


@pytest.mark.parametrize(("level", "lines"), [(logging.NOTSET, ["epoch 1   step 1     loss 1.0000"]), (logging.ERROR, [])])
def test_console_prints_where_the_root_logger_shows_warnings_only_unless_our_level_was_chosen(level, lines, monkeypatch):
    """As after `logging.basicConfig()`: a handler, and the level WARNING at the root."""
    seen: list[str] = []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", lambda record: seen.append(record.getMessage()))
    root, ours = logging.getLogger(), logging.getLogger("fnrun")
    monkeypatch.setattr(root, "handlers", [handler])
    monkeypatch.setattr(ours, "handlers", [])
    before = root.level, ours.level
    try:
        root.setLevel(logging.WARNING)
        ours.setLevel(level)
        sink = observers.console()
        sink.open(fnrun.TrainState.create(torch.nn.Linear(1, 1)))
        sink.write(Record((1,), 1, 1, {"loss": 1.0}, {}))
    finally:
        root.setLevel(before[0])
        ours.setLevel(before[1])
    assert seen == lines


def test_a_program_that_stops_early_says_so_though_nobody_listens(tmp_path):
    """In a process of its own, as a script calls it: no logging, no observer; and with a log."""
    script = """
import sys, torch, fnrun
from fnrun import hooks, observers, optim
model = torch.nn.Linear(1, 1)
step = fnrun.make_train_step(model, lambda model, x: model(x).mean() * float(sys.argv[1]), optim.sgd(0.1))
logs = [observers.log()] if len(sys.argv) > 2 else []
loop = fnrun.repeat(fnrun.epoch_loop(step), 3, hooks=[hooks.stop_after(steps=4)], observers=logs)
loop(fnrun.TrainState.create(model, optim.sgd(0.1)), [torch.ones(1, 1)] * 2)
"""
    for args, said in (
        (["1"], ["stopped at step 4: stop_after: 4 steps"]),
        (["nan"], ["stopped at step 4", "loss is nan at the end, step 4"]),
    ):
        for more in ([], ["log"]):
            done = subprocess.run([sys.executable, "-c", script, *args, *more], capture_output=True, text=True, check=True)
            for words in said:
                assert (done.stdout + done.stderr).count(words) == 1, (args, more, done)
