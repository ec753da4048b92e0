"""MLflow."""

from __future__ import annotations

import time
from importlib import import_module
from pathlib import Path
from typing import Any

import msgspec

from fnrun.core import files
from fnrun.core.documents import dotted
from fnrun.sinks.base import Record, Sink, media, numbers, require
from fnrun.sinks.journal import Journaled, identity
from fnrun.sinks.media import Image, Text

LINE = "line"  # the metric with the number of the line, the last one of each
PARAMS = 100  # the most that MLflow takes at once


class _MlflowRun:
    def __init__(self, directory: Path, experiment: str, uri: str | None, name: str | None, config: Any) -> None:
        self.directory, self.experiment, self.uri, self.name, self.config = directory, experiment, uri, name, config
        self._client: Any = None
        self._id = ""

    def start(self) -> int:
        self._client = client = import_module("mlflow").MlflowClient(tracking_uri=self.uri)
        file = self.directory / "mlflow.id"
        if file.exists():
            self._id = identity(file, "")
            client.update_run(self._id, status="RUNNING")
        else:
            self._id = identity(file, self._create(client))
        return int(client.get_run(self._id).data.metrics.get(LINE, -1)) + 1

    def _create(self, client: Any) -> str:
        Param = import_module("mlflow.entities").Param
        experiment = client.get_experiment_by_name(self.experiment)
        number = experiment.experiment_id if experiment is not None else client.create_experiment(self.experiment)
        run = client.create_run(number, run_name=self.name or self.directory.name).info.run_id
        params = [Param(name, str(value)) for name, value in dotted(msgspec.to_builtins(self.config or {}), (dict,))]
        for i in range(0, len(params), PARAMS):
            client.log_batch(run, params=params[i : i + PARAMS])
        return run

    def send(self, number: int, record: Record) -> None:
        Metric = import_module("mlflow.entities").Metric
        when = int(1000 * record.clock.get("time", time.time()))
        for name, value in media(record).items():
            if isinstance(value, Image):
                self._client.log_image(self._id, value.pixels(), key=name, step=record.step, timestamp=when, synchronous=True)
            elif isinstance(value, Text):
                self._client.log_text(self._id, value.text, f"{name}/{record.step:09}.txt")
        clock = {f"clock/{name}": value for name, value in record.clock.items() if name != "time"}
        values = {**numbers(record), **clock, "epoch": record.epoch, LINE: number}
        self._client.log_batch(self._id, metrics=[Metric(name, float(value), when, record.step) for name, value in values.items()])

    def finish(self) -> None:
        self._client.set_terminated(self._id, "FINISHED")


def mlflow(directory: str | Path, *, experiment: str, tracking_uri: str | None = None, name: str | None = None, config: Any = None) -> Sink:
    """One run of an MLflow experiment, however often the training is resumed. Needs the extra `mlflow`, and raises
    ModuleNotFoundError without it.

    - `directory`: the run's directory, which gets the id and a journal of the lines.
    - `experiment`: the name of the experiment; it is made where there is none.
    - `tracking_uri=None`: a server or a database (`sqlite:///mlflow.db`), by default that of MLflow's configuration.
    - `name=None`: the name of the run, by default that of the directory.
    - `config=None`: the run's parameters when it is made. MLflow does not let them change.

    Numbers are metrics over `step`, images and texts are artifacts; histograms are left out. After a resume the lines that a killed process
    had not sent are sent again, and those that MLflow has already are not: after an exact resume they are the same. After a resume with
    other settings it keeps the old lines between the checkpoint and the kill.
    """
    require("mlflow", "mlflow", "mlflow")
    path = files.local_path(directory)
    return Journaled(path / "mlflow.jsonl", _MlflowRun(path, experiment, tracking_uri, name, config))
