"""What each sink holds, read with the service's own reader, without what was timed."""

from __future__ import annotations

import csv
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fnrun import observers

SINKS = ["jsonl", "csv", "tensorboard", "wandb", "mlflow", "trackio"]
NEEDS = {"tensorboard": ["tensorboard"], "mlflow": ["mlflow", "sqlalchemy"], "trackio": ["trackio"]}
QUIET = {
    "x_disable_stats": True,
    "x_disable_meta": True,
    "x_disable_machine_info": True,
    "console": "off",
    "silent": True,
    "disable_git": True,
}


def sink(kind: str, path: Path) -> Any:
    """The sink of that kind in the run directory `path`."""
    if kind == "console":
        return observers.console()
    if kind == "jsonl":
        return observers.jsonl(path / "metrics.jsonl")
    if kind == "csv":
        return observers.csv(path / "metrics.csv")
    if kind == "tensorboard":
        return observers.tensorboard(path / "tensorboard")
    if kind == "wandb":
        import wandb

        config, summary = {"lr": 0.1, "model": {"layers": 2}}, {"train/loss": "min"}
        return observers.wandb(path, project="p", mode="offline", config=config, summary=summary, settings=wandb.Settings(**QUIET))
    if kind == "mlflow":
        return observers.mlflow(
            path, experiment="p", tracking_uri=f"sqlite:///{path}/mlflow.db", config={"lr": 0.1, "model": {"layers": 2}}
        )
    return observers.trackio(path, project="p", config={"lr": 0.1})


def held(kind: str, path: Path) -> Any:
    return globals()[f"_{kind}"](path)


def _jsonl(path: Path) -> Any:
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "clock"} for line in lines]


def _csv(path: Path) -> Any:
    with (path / "metrics.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if not k.startswith("clock/")} for row in csv.DictReader(file)]


def _tensorboard(path: Path) -> Any:
    """By tag; the loader checks each event's checksum."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(
        str(path / "tensorboard"), size_guidance=dict.fromkeys(("scalars", "images", "histograms", "tensors"), 0)
    ).Reload()
    tags = found.Tags()
    return {
        **{tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in tags["scalars"]},
        **{tag: [(e.step, e.encoded_image_string) for e in found.Images(tag)] for tag in tags["images"]},
        **{tag: [(e.step, e.histogram_value) for e in found.Histograms(tag)] for tag in tags["histograms"]},
        **{tag: [(e.step, e.tensor_proto.string_val[0]) for e in found.Tensors(tag)] for tag in tags["tensors"]},
    }


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of the one offline run in `path`: wandb's messages, in LevelDB's log format (blocks of 32 KiB, a header of 7 bytes)."""
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.teardown()  # its process writes a moment longer than `finish` takes; it ends with ours
    (file,) = path.glob("wandb/offline-run-*/run-*.wandb")
    data, at, parts = file.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(parts)
            parts = b""


def _wandb(path: Path) -> Any:
    rows, config, summary = [], {}, {}
    for record in wandb_records(path):
        if record.HasField("history"):
            row = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            rows.append({k: v for k, v in row.items() if not k.startswith("clock/") and k not in ("_timestamp", "_runtime")})
        if record.HasField("run"):
            config.update((item.key, json.loads(item.value_json)) for item in record.run.config.update if item.key != "_wandb")
        if record.HasField("summary"):
            summary.update(("/".join(item.nested_key) or item.key, json.loads(item.value_json)) for item in record.summary.update)
    return rows, config, {k: v for k, v in summary.items() if not k.startswith(("clock/", "_"))}


def _mlflow(path: Path) -> Any:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{path}/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'p'")
    (run,) = client.search_runs([experiment.experiment_id])
    names = [name for name in run.data.metrics if not name.startswith("clock/")]
    return run.info.status, run.data.params, {n: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, n)] for n in names}


def _trackio(path: Path) -> Any:
    from trackio.sqlite_storage import SQLiteStorage

    logs = SQLiteStorage.get_logs("p", (path / "trackio.id").read_text().strip())
    for row in logs:
        row["train/input"].pop("file_path")  # a name drawn at random
    return [{k: v for k, v in row.items() if not k.startswith("clock/") and k != "timestamp"} for row in logs]
