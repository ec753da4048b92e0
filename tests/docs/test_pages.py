"""The code of each page of docs/ runs as it stands, from top to bottom, and shows what the page says; links lead somewhere."""

from __future__ import annotations

import copy
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import fnrun
from fnrun import hooks, metrics, observers, optim
from tests.docs import pages

PAGES = sorted(path.name for path in pages.DOCS.glob("*.md"))


class Ran(NamedTuple):
    """What a page left behind: what it defined, printed and logged, and the directory that it ran in."""

    names: dict[str, Any]
    printed: str
    logged: str
    directory: Path


def checkpoints(ran: Ran) -> None:
    printed = " ".join(ran.printed.replace(f"{ran.directory}/", "").split())
    for shown in re.findall(r"^    (runs/.*?does not match(?:.|\n)*?)\n\n", pages.text("checkpoints.md"), re.MULTILINE):
        assert " ".join(shown.split()) in printed
    assert "Lost: params/0.weight; restore another checkpoint of runs/docs/checkpoints" in printed


def debugging(ran: Ran) -> None:
    run = ran.directory / "runs" / "debug"
    assert re.search(r"^    val: eval_loop +\d\.\d{3} s  loss$", ran.printed, re.MULTILINE)
    assert "the first module with an output that is not finite: 1.1 (Divide)" in ran.printed
    assert "not finite after it: 0.bias, 0.weight, 2.bias, 2.weight" in ran.printed
    assert (run / "profile" / "steps-10-12.json").exists()
    assert "memory: the state takes" in ran.logged
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = {name for line in lines for name in line} | {name for line in lines for name in line["clock"]}
    assert {"state_mib", "resident_mib", "norm/0.weight", "update_norm/0.weight", "gradient_norm/0.weight"} <= found
    (first, *_) = (run / "predictions.jsonl").read_text().splitlines()
    (shown,) = re.findall(r'^    (\{"ticks".*)$', pages.text("debugging.md"), re.MULTILINE)
    assert json.loads(first).keys() == json.loads(shown).keys()


def logged(ran: Ran) -> None:
    for name in ("metrics.jsonl", "metrics.csv", "tensorboard", "wandb.id", "run.log"):
        assert (ran.directory / "runs" / "logged" / name).exists()


def measured(ran: Ran) -> None:
    assert sorted(ran.names["results"]) == [
        "accuracy/top1", "accuracy/top5", "auroc", "loss", "loss_of_examples/p50", "loss_of_examples/p90", "loss_of_examples/p99",
        "test/f1", "test/precision", "test/recall",
    ]  # fmt: skip
    assert sorted(ran.names["adapted"]) == ["calibration", "hinge", "several/MulticlassF1Score", "several/MulticlassMatthewsCorrCoef"]


def donated(ran: Ran) -> None:
    assert "wrote the next one over it" in ran.printed


def sam_is_sam(ran: Ran) -> None:
    """The page's SAM is the one that everybody writes by hand."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1)).double()
    x, y = torch.randn(6, 3).double(), torch.randn(6, 1).double()
    loss_fn = lambda model, batch: (model(batch[0]) - batch[1]).square().mean()  # noqa: E731
    step = ran.names["sam"](fnrun.make_train_step(model, loss_fn, optim.sgd(0.1, momentum=0.9)), rho=0.1)
    state = fnrun.TrainState.create(model, optim.sgd(0.1, momentum=0.9))

    theirs = copy.deepcopy(model)
    optimizer = torch.optim.SGD(theirs.parameters(), 0.1, momentum=0.9)
    for _ in range(4):
        state, _ = step(state, (x, y))

        loss_fn(theirs, (x, y)).backward()
        statistics = [b.clone() for b in theirs.buffers()]
        with torch.no_grad():
            start = [p.clone() for p in theirs.parameters()]
            norm = torch.stack([p.grad.norm() for p in theirs.parameters()]).norm()  # pyright: ignore[reportOptionalMemberAccess]
            for p in theirs.parameters():
                p.add_(p.grad, alpha=(0.1 / norm).item())  # pyright: ignore[reportArgumentType]
        optimizer.zero_grad()
        loss_fn(theirs, (x, y)).backward()
        with torch.no_grad():
            for p, before in zip(theirs.parameters(), start, strict=True):
                p.copy_(before)
            for b, before in zip(theirs.buffers(), statistics, strict=True):
                b.copy_(before)
        optimizer.step()
        optimizer.zero_grad()

    torch.testing.assert_close(state.params, dict(theirs.named_parameters()))
    torch.testing.assert_close(state.buffers, dict(theirs.named_buffers()))


SHOWS: dict[str, Callable[[Ran], None]] = {
    "checkpoints.md": checkpoints,
    "debugging.md": debugging,
    "logging.md": logged,
    "metrics.md": measured,
    "speed.md": donated,
    "steps.md": sam_is_sam,
}
assert SHOWS.keys() <= set(PAGES)


@pytest.mark.filterwarnings("ignore:Metric .* will save all:UserWarning")  # torchmetrics, of one on the metrics' page
@pytest.mark.parametrize("page", [page for page in PAGES if "```python" in pages.text(page)])
def test_the_code_runs_and_shows_what_the_page_says(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_SILENT", "true")
    caplog.set_level(logging.INFO, "fnrun")
    torch.manual_seed(0)
    names = pages.run(page)
    if page in SHOWS:
        SHOWS[page](Ran(names, capsys.readouterr().out, caplog.text, tmp_path))


@pytest.mark.parametrize("page", [*PAGES, "../README.md"])
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)]*)\)", re.sub(r"```.*?```", "", pages.text(page), flags=re.DOTALL)):
        file, _, anchor = target.partition("#")
        if file.startswith("https://"):
            continue
        path = (pages.DOCS / page).parent / file if file else pages.DOCS / page
        assert path.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles], target


def test_every_hook_observer_and_metric_is_on_its_page() -> None:
    assert [name for name in hooks.__all__ if f"`{name}`" not in pages.text("hooks.md")] == []
    code = "\n".join(pages.blocks("metrics.md"))
    functions = {name for name in metrics.__all__ if callable(getattr(metrics, name)) and name.islower()} - {"values", "examples"}
    assert [name for name in sorted(functions) if f"metrics.{name}(" not in code] == []
    for name in (
        "log", "progress", "console", "jsonl", "csv", "tensorboard", "wandb", "mlflow", "trackio", "record", "Image", "Histogram", "Text",
        "histogram", "Sink",
    ):  # fmt: skip
        assert name in pages.text("logging.md")
        assert hasattr(observers, name)
