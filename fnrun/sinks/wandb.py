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

AXES = ("step", "epoch", "ticks")  # of the charts; wandb's `_step` is the number of the line


class _WandbRun:
    def __init__(
        self, directory: Path, mode: Literal["online", "offline"], config: Any, summary: Mapping[str, str], options: dict[str, Any]
    ) -> None:
        self.mode: Literal["online", "offline"] = mode
        self.directory, self.config, self.summary, self.options = directory, config, dict(summary), options
        self._run: Any = None

    def start(self) -> int:
        import wandb

        run_id = identity(self.directory / "wandb.id", secrets.token_hex(4))
        offline = self.mode == "offline"
        if offline:  # written anew from the journal: `wandb sync` uploads one directory with the whole run
            for before in (self.directory / "wandb").glob(f"offline-run-*-{run_id}"):
                shutil.rmtree(before)
        # run.log has what was printed, and a live display wants the terminal for itself.
        options = {"settings": wandb.Settings(console="off", silent=True), "config": msgspec.to_builtins(self.config or {}), **self.options}
        self._run = wandb.init(id=run_id, dir=str(self.directory), mode=self.mode, resume=None if offline else "allow", **options)
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
    """One run of Weights & Biases, however often the training is resumed. Charts are over `step`, or `epoch` and `ticks`.

    - `directory`: the run's directory, which gets the id and a journal of the lines.
    - `project`: the wandb project.
    - `mode="online"`: `"offline"` writes the run to `directory/wandb/offline-run-*` for `wandb sync`, after a resume anew from the journal.
    - `config=None`: the run's config: a dictionary, dataclass or msgspec struct.
    - `summary=None`: the statistics in wandb's summary in place of last values: `{"val/accuracy": "max"}` is `val/accuracy.max`.
    - `options`: for `wandb.init` (`name`, `entity`, `tags`).

    Online, after a resume the lines that a killed process had not uploaded are sent again, and those that wandb has already are not: after
    an exact resume they are the same. After a resume with other settings wandb keeps the old lines between the checkpoint and the kill.
    """
    path = files.local_path(directory)
    run = _WandbRun(path, mode, config, summary or {}, {"project": project, **options})
    return Journaled(path / "wandb.jsonl", run)
