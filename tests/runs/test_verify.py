"""A run is proven by replaying it: what holds is said to hold, and what was changed is found by step and leaf."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings, strategies as st

import fnrun
from experiments import digits
from fnrun.checkpoint import Checkpoints, Entry
from fnrun.cli.commands import main
from fnrun.core import tree
from fnrun.runs.verify import Pair, _replay, order, verify
from fnrun.testing import states_seen
from tests import programs
from tests.experiments.commands import ENVIRONMENT, Process
from tests.runs import replayed
from tests.runs.replayed import command, trained


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> fnrun.Run:
    """Checkpoints of steps 5, 10 and 15."""
    return trained(tmp_path_factory.mktemp("runs") / "finished", "--epochs", 3)


@pytest.fixture
def copied(finished: fnrun.Run, tmp_path: Path) -> fnrun.Run:
    """The same, to be damaged."""
    return fnrun.Run.open(shutil.copytree(finished.path, tmp_path / "copied"))


@pytest.fixture
def terminated() -> Iterator[list[int]]:
    """The steps at which a SIGTERM arrives."""
    yield replayed.terminated_at
    replayed.terminated_at.clear()


def outcomes(pairs: Iterator[Pair]) -> list[tuple[int | None, int, str]]:
    return [(pair.begin and pair.begin.step, pair.end.step, pair.outcome) for pair in pairs]


def contents(directory: Path) -> dict[str, Any]:
    files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    return {str(path.relative_to(directory)): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest()) for path in files}


# --- what holds --------------------------------------------------------------------------------------------------------


def test_a_finished_run_is_proven_and_nothing_is_written(finished):
    before, observed = contents(finished.path.parent), len(replayed.observed)
    assert outcomes(verify(finished.path, from_start=True)) == [(None, 5, "equal"), (5, 10, "equal"), (10, 15, "equal")]
    assert contents(finished.path.parent) == before
    assert len(replayed.observed) == observed  # observers do not act


def test_a_fresh_state_that_nobody_seeded_is_told(finished):
    def unseeded(config: replayed.Config, run: fnrun.Run) -> fnrun.Experiment:
        made = replayed.build(config, run)
        params = {name: torch.randn_like(value) for name, value in made.state().params.items()}
        return dataclasses.replace(made, state=lambda: made.state().replace(params=params))

    first, *others = verify(finished, from_start=True, build=unseeded)
    assert (first.outcome, first.reason) == ("different", "the fresh state is another one each time the experiment is built: seed it")
    assert outcomes(iter(others)) == [(5, 10, "equal"), (10, 15, "equal")]


def test_pairs_are_chosen_by_where_they_end(finished):
    assert outcomes(verify(finished, to=[5, 15])) == [(None, 5, "equal"), (10, 15, "equal")]
    with pytest.raises(fnrun.RunError, match=r"no checkpoint of step 7, 8; there are: 5, 10, 15"):
        verify(finished, to=[8, 5, 7])


@pytest.mark.parametrize("flags", [[], ["--donate"]])
def test_interrupted_stopped_and_extended(tmp_path, terminated, flags):
    """Saved in mid-epoch by a signal, in mid-epoch at a stop, and at the ends of a program that went on with another config twice."""
    path = tmp_path / "run"
    terminated[:] = [7]
    command("train", "--out", path, "--log-level", "error", "--stop-after", 13, *flags, code=128 + signal.SIGTERM)
    terminated.clear()
    command("resume", path, "--log-level", "error")
    command("resume", path, "--log-level", "error", "--epochs", 3)
    command("resume", path, "--log-level", "error", "--stop-after", 1000)
    checkpoints, like = Checkpoints(path / "checkpoints"), replayed.build(replayed.Config(), fnrun.Run.open(path)).state()
    for entry in checkpoints.entries():
        assert order(checkpoints.manifest(entry)) == checkpoints.restore(like, entry).position.order
    pairs = list(verify(path, from_start=True))
    assert [(pair.end.step, pair.outcome) for pair in pairs] == [(step, "equal") for step in (5, 7, 10, 13, 15)]


@settings(max_examples=60, deadline=None)
@given(programs.programs, programs.lengths, st.integers(0, 6), st.data())
def test_from_every_state_to_every_later_one(program, lengths, stop_at, draw):
    """The replay meets each state that was ever seen, whatever loops are open there, hidden ones and validation included."""

    class Gathers:
        name = "gathers"

        def fold(self, folded: Any, before: Any, metrics: Any, examples: int) -> Any:
            return (folded or 0) + examples

        def __call__(self, state: Any, metrics: Any) -> None: ...

    loop, data = programs.build(program, lengths, stop_at=stop_at, observers=[Gathers()])
    assume(isinstance(loop, fnrun.loops.Loop))
    seen, (end, _) = states_seen(loop, programs.fresh(), data)
    states = [programs.fresh(), *seen, end]
    i = draw.draw(st.integers(0, len(states) - 2))
    j = draw.draw(st.integers(i + 1, len(states) - 1))
    begin, target = states[i], states[j]
    assume(not begin.stop and begin.position.order < target.position.order)
    experiment = fnrun.Experiment(state=programs.fresh, program=loop, data=data)
    reached = _replay(experiment, begin, target.position)
    if target is end and end.stop:  # the call returned what was last seen
        target = seen[-1]
    assert not tree.diff(target, reached)


def test_the_only_checkpoint_is_proven_from_the_start(tmp_path):
    run = trained(tmp_path / "run", "--epochs", 2, "--keep", 1)
    run.checkpoints.prune(1)
    for entry in run.checkpoints.entries()[:-1]:
        shutil.rmtree(run.checkpoints.directory / entry.name)
    assert outcomes(verify(run)) == [(None, 10, "equal")]


def test_with_as_many_threads_as_the_run_had(finished):
    threads = torch.get_num_threads()
    then = int(finished.checkpoints.manifest(5).environment["threads"])
    seen: list[int] = []

    def build(config: replayed.Config, run: fnrun.Run) -> fnrun.Experiment:
        seen.append(torch.get_num_threads())
        return replayed.build(config, run)

    torch.set_num_threads(then + 1)
    try:
        (pair,) = verify(finished, to=[10], build=build)
        assert (pair.outcome, seen, torch.get_num_threads()) == ("equal", [then], then + 1)
        assert pair.notes == (f"with {then} threads, as when the checkpoint was made, and not {then + 1}",)
    finally:
        torch.set_num_threads(threads)


# --- what does not -----------------------------------------------------------------------------------------------------


def test_one_bit_flipped_on_disk_is_found_by_step_and_leaf(copied, capsys):
    file = next((copied.checkpoints.directory / "00000010-00000018" / "arrays" / "state").glob("*/0*"))
    data = bytearray(file.read_bytes())
    data[0] ^= 1
    file.write_bytes(data)
    assert main(["verify", str(copied.path), "--json"]) == 1
    first, second = json.loads(capsys.readouterr().out)["pairs"]
    assert [first["outcome"], second["outcome"]] == ["damaged", "damaged"]
    assert [leaf["path"] for leaf in first["leaves"]] == ["params/0.weight"]
    assert "00000010-00000018" in first["reason"]


def test_a_damaged_manifest_is_passed_over(copied):
    """The pair that ends there is damaged; the next one begins at the checkpoint before it."""
    (copied.checkpoints.directory / "00000010-00000018" / "manifest.json").write_text("{}")
    assert outcomes(verify(copied)) == [(5, 10, "damaged"), (5, 15, "equal")]


def test_a_bit_changed_consistently_is_found_by_step_and_leaf(copied, capsys):
    """Every digest agrees: only a replay can tell."""
    entry = copied.checkpoints.find(10)
    like = replayed.build(replayed.Config(), copied).state()
    state, manifest = copied.checkpoints.restore(like, entry), copied.checkpoints.manifest(entry)
    bias = state.params["3.bias"].clone()
    bias.view(torch.int32)[0] ^= 1 << 20  # a lower one the next steps may round away
    shutil.rmtree(copied.checkpoints.directory / entry.name)
    later = copied.checkpoints.directory / "00000015-00000027"
    later.rename(copied.path / "aside")
    with Checkpoints(copied.checkpoints.directory, config=manifest.config, environment=manifest.environment) as checkpoints:
        checkpoints.save(state.replace(params={**state.params, "3.bias": bias}), manifest.metrics)
    (copied.path / "aside").rename(later)
    first, second = verify(copied)
    assert (first.end.step, first.outcome, [difference.path for difference in first.differences]) == (10, "different", ["params/3.bias"])
    assert second.outcome == "different"  # it began with the wrong bit
    assert main(["verify", str(copied.path), "--to", "10"]) == 1
    assert capsys.readouterr().out.splitlines()[1].startswith("  params/3.bias: value: 1 of 1 elements differ, by at most ")


def test_other_data_are_named(finished):
    def build(config: replayed.Config, run: fnrun.Run) -> fnrun.Experiment:
        return replayed.build(replayed.Config(rows=16), run)

    first, pair = verify(finished, to=[5, 10], build=build)
    assert first.outcome == "different"
    assert pair.outcome == "different"
    assert "the data of 'train' is not what the state's position" in pair.reason


def test_a_replay_that_passes_by_is_a_difference(finished):
    """In other data a pass is shorter, so the end of the epoch comes at another step."""

    def build(config: replayed.Config, run: fnrun.Run) -> fnrun.Experiment:
        return replayed.build(replayed.Config(rows=16), run)

    (pair,) = verify(finished, to=[5], build=build)
    assert "the replay never stands where the checkpoint stands, step 5" in pair.reason


def test_a_config_that_the_experiment_no_longer_takes(copied):
    path = copied.path / "aside"
    with Checkpoints(path, config={"epochs": 3, "gone": 1}) as checkpoints:
        like = replayed.build(replayed.Config(), copied).state()
        checkpoints.save(copied.checkpoints.restore(like, 5))
    shutil.rmtree(copied.checkpoints.directory)
    path.rename(copied.checkpoints.directory)
    (pair,) = verify(copied)
    assert pair.outcome == "different"
    assert "there is no field config.gone" in pair.reason


# --- what cannot be proven ---------------------------------------------------------------------------------------------


def test_a_change_of_which_no_checkpoint_is_kept_is_no_failure(tmp_path, capsys):
    path = tmp_path / "run"
    command("train", "--out", path, "--log-level", "error", "--epochs", 2)
    command("resume", path, "--log-level", "error", "--epochs", 4)
    checkpoints = Checkpoints(path / "checkpoints")
    shutil.rmtree(checkpoints.directory / checkpoints.find(10).name)
    assert outcomes(verify(path)) == [(5, 15, "unproven"), (15, 20, "equal")]
    assert main(["verify", str(path)]) == 0
    said = capsys.readouterr().out
    assert "step 5 -> 15: not proven: the config was changed at step 10, of which no checkpoint is kept" in said
    assert "1 of 2 proven, 1 not proven" in said
    assert main(["verify", str(path), "--to", "15"]) == 2
    assert "nothing could be proven" in capsys.readouterr().err


def test_what_was_overtaken_is_told_apart(copied):
    """At one step and tick stand two states: the run goes on from the newer one."""
    like = replayed.build(replayed.Config(), copied).state()
    old = copied.checkpoints.find(15)
    state, manifest = copied.checkpoints.restore(like, old), copied.checkpoints.manifest(old)
    (copied.checkpoints.directory / old.name).rename(copied.checkpoints.directory / Entry(old.ticks, old.step, 1).name)
    with Checkpoints(copied.checkpoints.directory, config=manifest.config) as checkpoints:
        other = checkpoints.directory / Entry(old.ticks, old.step, 1).name
        other.rename(copied.path / "aside")
        checkpoints.save(state.replace(params={name: -p for name, p in state.params.items()}), manifest.metrics)
        checkpoints.wait()
        (copied.path / "aside").rename(other)
    pairs = list(verify(copied, to=[15]))
    assert [(pair.end.version, pair.outcome) for pair in pairs] == [(0, "unproven"), (1, "equal")]
    assert "overtaken" in pairs[0].reason


def test_no_run_no_checkpoint_no_experiment(tmp_path, capsys):
    assert main(["verify", str(tmp_path)]) == 2
    empty = fnrun.Run.create("tests.runs.replayed", replayed.Config(), tmp_path / "empty")
    assert main(["verify", str(empty.path)]) == 2
    run = trained(tmp_path / "run", "--epochs", 1)
    config = run.path / "config.yaml"
    config.write_text(config.read_text().replace("tests.runs.replayed", "no.such.experiment"))
    assert main(["verify", str(run.path)]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3
    assert "has no checkpoint: there is nothing to prove" in errors[1]
    assert "no.such.experiment" in errors[2]


# --- a real experiment -------------------------------------------------------------------------------------------------


def test_digits_interrupted_and_extended(tmp_path, monkeypatch, capsys):
    """Its processes have one thread, and workers; here are as many threads as there are, and no workers are needed for the same bits."""
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    with Process("train", "--epochs", 2, "--workers", 1, "--batch-size", 32, "--out", run) as process:
        process.read_until("epoch 1 ", "step 50")
        process.popen.send_signal(signal.SIGTERM)
        assert process.finish() == 143, process.output
    monkeypatch.setenv("OMP_NUM_THREADS", ENVIRONMENT["OMP_NUM_THREADS"])
    command("resume", run, "--workers", 0, experiment=digits.build)
    command("resume", run, "--epochs", 3, experiment=digits.build)
    capsys.readouterr()
    assert main(["verify", str(run), "--from-start", "--json"]) == 0
    proven = json.loads(capsys.readouterr().out)
    assert proven["proven"] == len(proven["pairs"]) >= 3
    assert {pair["outcome"] for pair in proven["pairs"]} == {"equal"}


@pytest.mark.parametrize(
    ("line", "edited"),
    [
        ("nn.Dropout(dropout)", "nn.Dropout(dropout / 2)"),
        ("torch.randint(0, 3, (2,))", "torch.randint(0, 2, (2,))"),
    ],
)
def test_one_changed_line_of_the_experiment_is_found(tmp_path, monkeypatch, capsys, line, edited):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    name = f"edited_{abs(hash(line))}"
    file = tmp_path / name / "digits.py"
    file.parent.mkdir()
    (file.parent / "__init__.py").touch()
    shutil.copy(digits.__file__, file)
    module = importlib.import_module(f"{name}.digits")
    command("train", "--epochs", 2, "--batch-size", 256, "--out", "run", "--log-level", "error", experiment=module.build)
    assert main(["verify", "run"]) == 0
    source = file.read_text()
    assert source.count(line) == 1
    file.write_text(source.replace(line, edited))
    del sys.modules[module.__name__]
    importlib.invalidate_caches()
    capsys.readouterr()
    assert main(["verify", "run"]) == 1
    said = capsys.readouterr().out
    assert "step 6 -> 12: different" in said
    assert "params/" in said
    assert f"experiment: {name}.digits sha256:" in said
