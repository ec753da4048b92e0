"""Weights & Biases."""

from __future__ import annotations

import html
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from fnrun.core import files
from fnrun.sinks.base import Record, Sink, media, numbers
from fnrun.sinks.journal import Journaled, identity
from fnrun.sinks.media import Histogram, Image, Media, Text

AXES = ("step", "epoch", "ticks")  # for the charts: `_step` numbers the lines, and wandb wants it for itself


class _WandbRun:
    def __init__(
        self, directory: Path, mode: Literal["online", "offline"], config: Any, summary: Mapping[str, str], options: dict[str, Any]
    ) -> None:
        self.mode: Literal["online", "offline"] = mode
        self.directory, self.config, self.summary, self.options = directory, config, dict(summary), options
        self._run: Any = None

    def start(self) -> int:
        import wandb

        own = identity(self.directory / "wandb.id", secrets.token_hex(4))
        offline = self.mode == "offline"
        if offline:  # written anew from the journal: one directory holds the whole run, once, and is what `wandb sync` uploads
            for before in (self.directory / "wandb").glob(f"offline-run-*-{own}"):
                shutil.rmtree(before)
        # run.log has what was printed, and a live display wants the terminal for itself.
        options = {"settings": wandb.Settings(console="off", silent=True), "config": msgspec.to_builtins(self.config or {}), **self.options}
        self._run = wandb.init(id=own, dir=str(self.directory), mode=self.mode, resume=None if offline else "allow", **options)
        for axis in AXES:
            self._run.define_metric(axis, hidden=True)
        self._run.define_metric("*", step_metric="step")
        for name, kind in self.summary.items():
            self._run.define_metric(name, step_metric="step", summary=kind)
        return 0 if offline else self._run.step

    def send(self, number: int, record: Record) -> None:
        axes = {"step": record.step, "epoch": record.epoch, "ticks": record.order[0]}
        shown = {name: _shown(value) for name, value in media(record).items()}
        clock = {f"clock/{name}": value for name, value in record.clock.items() if name != "time"}
        when = {"_timestamp": record.clock["time"]} if "time" in record.clock else {}
        self._run.log({**axes, **numbers(record), **shown, **clock, **when}, step=number)

    def finish(self) -> None:
        self._run.finish()


def _shown(value: Media) -> Any:
    import wandb

    match value:
        case Image():
            return wandb.Image(value.pixels().squeeze())
        case Text():
            return wandb.Html(f"<pre>{html.escape(value.text)}</pre>", inject=False)
        case Histogram():
            return wandb.Histogram(np_histogram=(value.counts.cpu().numpy(), value.edges.cpu().numpy()))


def wandb(
    directory: str | Path,
    *,
    project: str,
    mode: Literal["online", "offline"] = "online",
    config: Any = None,
    summary: Mapping[str, Literal["min", "max", "mean", "last"]] | None = None,
    **options: Any,
) -> Sink:
    """One run of Weights & Biases, however often the training is resumed: its id and a journal of its lines are in `directory`, the run's.

    Charts are over `step` (`epoch` and `ticks` are there too).

    - `config`: the run's: a dictionary, dataclass or msgspec struct.
    - `summary`: what wandb's summary holds of a metric instead of its last value: `{"val/accuracy": "max"}` is `val/accuracy.max`.
    - `options` go to `wandb.init` (`name`, `entity`, `tags`).

    Offline, the run lies in `directory/wandb/offline-run-*` for `wandb sync`, after a resume written anew from the journal. Online, lines
    that a killed process had not uploaded are sent again after a resume, and those that wandb has already are not: after an exact resume
    they are the same. Where you resume with other settings, wandb keeps the old lines between the checkpoint and the kill.
    """
    path = files.local_path(directory)
    run = _WandbRun(path, mode, config, summary or {}, {"project": project, **options})
    return Journaled(path / "wandb.jsonl", run)
