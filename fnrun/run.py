"""A run: a directory that holds a training from its first step to its last. And an experiment: what can be run.

    runs/<experiment>/<name>/
        config.yaml         the experiment's module and its config
        environment.json    versions and machine, when the run began
        checkpoints/        whole states
        metrics.jsonl       one line a record
        run.log             what was said, and when

Nothing in it depends on where it lies: a run can be moved.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import yaml

if TYPE_CHECKING:
    from fnrun.checkpoint import Checkpoints

C = TypeVar("C")


class RunError(ValueError):
    """A run directory that cannot be made or opened, or a config that cannot be read."""


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What `build(config, run)` returns: values and functions, nothing started.

    `state()` makes the fresh state; `program` trains it over `data`, whose values may be functions that make the streams; `evaluate` is a
    loop over the same data that a restored state is evaluated with.
    """

    state: Callable[[], Any]
    program: Callable[..., tuple[Any, dict[str, Any]]]
    data: Mapping[str, Any]
    evaluate: Callable[..., tuple[Any, dict[str, Any]]] | None = None


@dataclasses.dataclass(frozen=True)
class Run:
    """A run directory. `Run.create` makes one, `Run.open` opens one."""

    path: Path
    experiment: str
    config: Any

    @classmethod
    def create(cls, experiment: str, config: Any, path: str | Path | None = None) -> Run:
        """A new run of `experiment` (a module's name) at `path`, by default `runs/<experiment>/<date and time>`.

        The directory appears with its config or not at all. Raises RunError where `path` holds something already, or cannot be written.
        """
        short = experiment.rpartition(".")[2]
        if path is not None:
            target = Path(path)
            if not cls._place(target, experiment, config):
                raise RunError(f"{target} already holds {_contents(target)}")
            return cls(target, experiment, config)
        stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        for suffix in ["", *(f"-{n}" for n in range(2, 100))]:
            target = Path("runs") / short / f"{stamp}{suffix}"
            if cls._place(target, experiment, config):
                return cls(target, experiment, config)
        raise RunError(f"no free name for a run in {Path('runs') / short}")

    @staticmethod
    def _place(target: Path, experiment: str, config: Any) -> bool:
        """Write the new directory beside its place and rename it there; False where the place is taken."""
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            return False
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            made = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
            try:
                made.chmod(0o777 & ~_umask())
                content = {"experiment": experiment, "config": msgspec.to_builtins(config)}
                _write(made / "config.yaml", msgspec.yaml.encode(content))
                _write(made / "environment.json", json.dumps(environment(), indent=2).encode() + b"\n")
                made.rename(target)
            finally:
                shutil.rmtree(made, ignore_errors=True)
        except OSError as error:
            if target.is_dir() and any(target.iterdir()):
                return False
            raise RunError(f"cannot make the run directory {target}: {error.strerror or error}") from error
        return True

    @classmethod
    def open(cls, path: str | Path, config_type: type | None = None, experiment: str | None = None) -> Run:
        """The run at `path`, its config decoded as `config_type` (without one: as plain dictionaries).

        Raises RunError where there is none, where it is one of another experiment, or where the config cannot be read (naming the field).
        """
        path = Path(path)
        file = path / "config.yaml"
        if not path.is_dir():
            raise RunError(f"there is no run at {path}")
        try:
            raw = yaml.safe_load(file.read_bytes())
        except FileNotFoundError:
            raise RunError(f"{path} is no run: it has no config.yaml") from None
        except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
            raise RunError(f"{file} is damaged, it is not YAML: {' '.join(str(error).split())}") from error
        except OSError as error:
            raise RunError(f"cannot read {file}: {error.strerror or error}") from error
        if not isinstance(raw, dict) or not isinstance(raw.get("experiment"), str) or "config" not in raw:
            raise RunError(f"{file} is damaged: a run's config has the fields experiment and config")
        if experiment is not None and raw["experiment"] != experiment:
            raise RunError(f"{path} is a run of {raw['experiment']}, not of {experiment}")
        return cls(path, raw["experiment"], decode(raw["config"], config_type, str(file)) if config_type else raw["config"])

    def write_config(self) -> None:
        """Make the config on disk this run's own; the file is replaced whole."""
        new = self.path / ".config.yaml.new"
        try:
            _write(new, msgspec.yaml.encode({"experiment": self.experiment, "config": msgspec.to_builtins(self.config)}))
            new.replace(self.path / "config.yaml")
        except OSError as error:
            raise RunError(f"cannot write {self.path / 'config.yaml'}: {error.strerror or error}") from error

    @functools.cached_property
    def checkpoints(self) -> Checkpoints:
        from fnrun.checkpoint import Checkpoints

        return Checkpoints(self.path / "checkpoints", config=msgspec.to_builtins(self.config))

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def log(self) -> Path:
        return self.path / "run.log"


def _contents(target: Path) -> str:
    if (target / "config.yaml").exists():
        return f"a run. To go on with it: resume {target}"
    return "a file" if target.is_file() else "other files"


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def decode(raw: Any, config_type: type[C], where: str) -> C:
    """`raw` (plain dictionaries) as a config. Raises RunError with the field: a wrong type, a missing field, one that does not exist."""
    try:
        config = msgspec.convert(raw, config_type, strict=True)
    except (msgspec.ValidationError, ValueError, TypeError) as error:
        raise RunError(f"{where}: {str(error).replace('`$.', '`config.').replace('`$`', '`config`')}") from error
    if unknown := list(_unknown(raw, msgspec.to_builtins(config), "config")):
        raise RunError(f"{where}: there is no field {', '.join(unknown)}")
    return config


def _unknown(raw: Any, known: Any, path: str) -> Any:
    if isinstance(raw, dict) and isinstance(known, dict):
        for name, value in raw.items():
            if name not in known:
                yield f"{path}.{name}"
            else:
                yield from _unknown(value, known[name], f"{path}.{name}")


def environment() -> dict[str, Any]:
    """What bits may depend on besides the state: versions, machine, threads."""
    from importlib.metadata import PackageNotFoundError, version

    import torch

    versions = {}
    for name in ("fnrun", "torch", "numpy", "optree", "orbax-checkpoint", "msgspec"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    cuda = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "versions": versions,
        "threads": torch.get_num_threads(),
        "devices": cuda,
    }
