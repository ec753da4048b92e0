"""Going on with another batch size, other rows, another seed: what happens is said, and happens only where it was asked for."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import fnrun
from fnrun import data, observers, optim
from fnrun.cli.commands import main
from fnrun.loops.exits import ProgramError
from fnrun.runs.run import Run
from tests.experiments.tiny import at, happens, tiny

#: The rows of each step, in order.
TRAINED: list[list[int]] = []


@dataclasses.dataclass(frozen=True)
class Config:
    epochs: int = 2
    batch_size: int = 2
    rows: int = 12
    seed: int = 0
    drop_last: bool = False


def build(config: Config, run: fnrun.Run) -> fnrun.Experiment:
    torch.manual_seed(0)
    model, optimizer = torch.nn.Linear(1, 1), optim.sgd(0.01)
    inner = fnrun.make_train_step(model, lambda model, batch: model(batch).pow(2).mean(), optimizer)

    def train_step(state: Any, batch: Any) -> Any:
        happens(f"step {state.step}")
        TRAINED.append([int(x) for x in batch[:, 0]])
        return inner(state, batch)

    rows = torch.arange(float(config.rows)).unsqueeze(1)
    return fnrun.Experiment(
        state=lambda: fnrun.TrainState.create(model, optimizer, seed=config.seed),
        program=fnrun.repeat(fnrun.epoch_loop(train_step), config.epochs, observers=[observers.checkpoint(run.checkpoints)]),
        data=data.arrays(rows, config.batch_size, shuffle=True, drop_last=config.drop_last, name="train"),  # pyright: ignore[reportArgumentType]
    )


def call(*args: Any, code: int = 0) -> str:
    TRAINED.clear()
    return tiny(*args, code=code, build=build)


def trained() -> list[int]:
    return [row for batch in TRAINED for row in batch]


@pytest.fixture
def half(tmp_path: Path) -> tuple[Path, list[int]]:
    """A run after 6 of the 12 rows of its first epoch, and these rows."""
    with at("step 2", lambda: os.kill(os.getpid(), signal.SIGTERM)):
        call("train", "--out", tmp_path / "run", code=143)
    return tmp_path / "run", trained()


def files(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run.iterdir() if path.name in ("config.yaml", "status.json", "metrics.jsonl")}


@pytest.mark.parametrize("size", [3, 4, 6])
def test_another_batch_size_goes_on_behind_the_same_examples(size: int, half: tuple[Path, list[int]]):
    run, before = half
    kept = files(run)
    refused = call("resume", run, "--batch-size", size, code=1)
    assert f"resume {run} --batch-size {size} --other-data" in refused
    assert "epoch 1 goes on behind its first 6 examples" in refused
    assert (trained(), files(run)) == ([], kept)
    said = call("resume", run, "--batch-size", size, "--other-data")
    twice = 6 % size
    assert (
        f"data of 'train': epoch 1 goes on behind its first 6 examples{f', {twice} of which come a second time' if twice else ''}" in said
    )
    epoch = trained()[: 6 + twice]
    assert sorted({*before, *epoch}) == list(range(12))
    assert [row for row in before if row in epoch] == before[6 - twice :]
    assert sorted(trained()[6 + twice :]) == list(range(12))
    (entry,) = Run.open(run).history
    assert (entry["changed"], entry["other_data"]) == ({"batch_size": [2, size]}, True)


def test_a_batch_that_is_larger_than_what_was_done_is_not_begun_in_its_middle(half: tuple[Path, list[int]]):
    run, _ = half
    assert "the rest of epoch 1 is left out, and epoch 2 begins" in call("resume", run, "--batch-size", 12, "--other-data")
    assert [len(batch) for batch in TRAINED] == [12]


def test_a_short_batch_that_would_be_dropped_ends_the_epoch(tmp_path: Path):
    with at("step 4", lambda: os.kill(os.getpid(), signal.SIGTERM)):
        call("train", "--drop-last", "--out", tmp_path / "run", code=143)
    said = call("resume", tmp_path / "run", "--batch-size", 5, "--other-data")
    assert "the rest of epoch 1 is left out, and epoch 2 begins with the new data" in said
    assert list(map(len, TRAINED)) == [5, 5]


def test_other_rows_begin_with_the_next_epoch(half: tuple[Path, list[int]]):
    run, _ = half
    said = call("resume", run, "--rows", 20, "--other-data")
    assert "the rest of epoch 1 is left out, and epoch 2 begins with the new data" in said
    assert sorted(trained()) == list(range(20))
    order = trained()
    call("train", "--rows", 20, "--out", run.parent / "whole")
    assert trained()[20:] == order  # its second epoch


def test_it_is_agreed_to_once_and_for_this_place_only(half: tuple[Path, list[int]], tmp_path: Path):
    run, _ = half
    with at("step 3", fail), pytest.raises(KeyError):
        fnrun.main(build, ["resume", str(run), "--batch-size", "3", "--other-data"])
    call("resume", run)
    assert len(Run.open(run).history) == 1
    assert "--other-data" in call("resume", run, "--epochs", 3, "--batch-size", 2, code=1)


def fail() -> None:
    raise KeyError("power cut")


@pytest.mark.parametrize("step", [3, 6])
def test_a_fork_with_another_batch_size_can_go_on(step: int, half: tuple[Path, list[int]], tmp_path: Path):
    run, before = half
    call("resume", run)
    before += trained()
    assert main(["fork", str(run), "--step", str(step), "--out", str(tmp_path / "new"), "--batch-size", "3"]) == 0
    call("resume", tmp_path / "new")
    assert trained() == before[2 * step :]


def test_another_seed_would_change_nothing(half: tuple[Path, list[int]], tmp_path: Path):
    run, _ = half
    kept = files(run)
    said = call("resume", run, "--seed", 1, code=1)
    assert said.splitlines()[-1].startswith("error: seed 0 -> 1: ")
    assert said.rstrip().endswith(f"fnrun fork {run} --step latest --out NEW --seed 1")
    assert (trained(), files(run)) == ([], kept)
    assert main(["fork", str(run), "--step", "latest", "--out", str(tmp_path / "new"), "--seed", "1"]) == 0
    said = call("resume", tmp_path / "new")
    assert "going on with the randomness of the config's own seed" in said
    assert "the rest of epoch 1 is left out" in said
    order = trained()
    assert sorted(order) == list(range(12))
    call("train", "--seed", 1, "--out", tmp_path / "other")
    assert trained()[12:] == order
    call("resume", tmp_path / "new", "--epochs", 3)  # and keeps it
    call("train", "--seed", 1, "--epochs", 3, "--out", tmp_path / "longer")
    assert Run.open(tmp_path / "new").status().step == 15


def test_a_finished_run_stays_what_it_was(tmp_path: Path):
    run = tmp_path / "run"
    call("train", "--out", run)
    before = files(run)
    said = call("resume", run, "--rows", 48)
    assert "nothing was trained with the config as it was changed: it stays what it was" in said
    assert {name: content for name, content in files(run).items() if name == "config.yaml"} == {"config.yaml": before["config.yaml"]}
    assert Run.open(run).status().state == "finished"


def test_the_message_of_the_library_says_what_to_do(tmp_path: Path):
    stream = data.arrays(torch.arange(12.0).unsqueeze(1), 2, shuffle=True, name="train")
    other = data.arrays(torch.arange(12.0).unsqueeze(1), 4, shuffle=True, name="train")
    seen: list[Any] = []

    @fnrun.step
    def train_step(state: Any, batch: Any) -> Any:
        seen.extend(batch[:, 0].tolist())
        return state.replace(step=state.step + 1), {}

    loop, asked = fnrun.epoch_loop(train_step), iter([None, None, "stop"])
    state, _ = loop(fnrun.TrainState.create(torch.nn.Linear(1, 1)), stream, interrupt=lambda: next(asked))
    with pytest.raises(ProgramError) as caught:
        loop(state, other)
    assert str(caught.value).endswith("  state.replace(position=state.position.moved('train', stream.source))")
    assert "where epoch 1 goes on behind its first 4 examples:" in str(caught.value)
    loop(state.replace(position=state.position.moved("train", other.source)), other)
    assert sorted(seen) == list(range(12))
