"""The config of a run: config.yaml read and written; configs checked, decoded and compared."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
import yaml

from fnrun.core import files
from fnrun.runs.writer import RunError

C = TypeVar("C")

CONFIG = "config.yaml"


class _Departure(msgspec.Struct):
    """The fields of a history's entry that are read; see `Run`."""

    step: Annotated[int, msgspec.Meta(ge=0)]
    ticks: Annotated[int, msgspec.Meta(ge=0)]
    changed: dict[str, tuple[Any, Any]] = {}
    forked: str | None = None
    sha256: str | None = None


def read(run: Path, config_type: type | None, experiment: str | None) -> tuple[str, Any, list[dict[str, Any]]]:
    """Experiment, config and history in the config.yaml of a run. Arguments and errors as in `Run.open`."""
    file = run / CONFIG
    try:
        raw = read_yaml(file)
    except FileNotFoundError:
        raise RunError(f"{run} is no run: it has no config.yaml") from None
    except OSError as error:
        raise RunError(f"cannot read {file}: {error.strerror or error}") from error
    if not isinstance(raw, dict) or not isinstance(raw.get("experiment"), str) or "config" not in raw:
        raise RunError(f"{file} is damaged: a run's config has the fields experiment and config")
    if experiment is not None and raw["experiment"] != experiment:
        raise RunError(f"{run} is a run of {raw['experiment']}, not of {experiment}")
    history = raw.get("history", [])
    _convert(history, list[_Departure], str(file), "history")
    return raw["experiment"], decode(raw["config"], config_type, str(file)) if config_type else raw["config"], history


def write(run: Path, experiment: str, config: Any, history: list[dict[str, Any]]) -> None:
    """Write the config.yaml of a run; the file is replaced whole."""
    content = {"experiment": experiment, "config": msgspec.to_builtins(config)}
    files.write(run / CONFIG, msgspec.yaml.encode(content | ({"history": history} if history else {})))


class _Loader(yaml.SafeLoader):
    """YAML with aliases of scalars only: a few lines with others can expand to more than memory holds, or without end."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        alias = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        if alias and isinstance(node, yaml.CollectionNode):
            raise yaml.YAMLError(f"an alias stands for the list or mapping in line {node.start_mark.line + 1}: write it out")
        return node


_FAST: Any = getattr(yaml, "CSafeLoader", _Loader)


def read_yaml(file: Path) -> Any:
    """The content of a YAML file, in plain values. Raises OSError, and RunError where it is no YAML."""
    content = file.read_bytes()
    try:
        # libyaml is ten times as fast, for what has no aliases and is too short to be nested deeply.
        return yaml.load(content, _FAST if b"*" not in content and len(content) < 1500 else _Loader)
    except Exception as error:  # also KeyError, AttributeError, ... from values that make no sense
        raise RunError(f"{file} is damaged, it is not YAML: {' '.join(str(error).split()) or type(error).__name__}") from error


def check(config: Any) -> None:
    """Raise RunError, with the field, for a config that cannot be written and read again: its run could never be resumed."""
    if not dataclasses.is_dataclass(config) and not isinstance(config, msgspec.Struct):
        return
    hint = (
        "A config is a frozen dataclass of numbers, texts, lists, dictionaries and other such classes; a choice is a union of "
        "msgspec.Struct(frozen=True, tag=True) classes; a path is a text"
    )
    names = [field.name for field in (dataclasses.fields(config) if dataclasses.is_dataclass(config) else msgspec.structs.fields(config))]  # pyright: ignore[reportArgumentType]
    for name in names:
        try:
            msgspec.yaml.encode(msgspec.to_builtins(getattr(config, name)))
        except (TypeError, ValueError) as error:
            raise RunError(f"the config's field {name!r} cannot be written to config.yaml: {error}. {hint}") from error
    try:
        decode(msgspec.yaml.decode(msgspec.yaml.encode(msgspec.to_builtins(config))), type(config), "config.yaml")
    except RunError as error:
        raise RunError(f"this config could not be read again, and its run not be resumed: {error}. {hint}") from error


def decode(raw: Any, config_type: type[C], where: str) -> C:
    """`raw` (plain dictionaries) as a config. Raises RunError with the field: a wrong type, a missing field, one that does not exist."""
    config = _convert(raw, config_type, where, "config")
    if unknown := list(_unknown(raw, msgspec.to_builtins(config), "config")):
        raise RunError(f"{where}: there is no field {', '.join(unknown)}")
    return config


def _convert(raw: Any, kind: Any, where: str, name: str) -> Any:
    try:
        return msgspec.convert(raw, kind, strict=True)
    except (msgspec.ValidationError, ValueError, TypeError) as error:
        text = str(error).replace("`$", f"`{name}")
        raise RunError(f"{where}: {text if ' - at `' in text else f'{text} - at `{name}`'}") from error


def _unknown(raw: Any, known: Any, path: str) -> Any:
    if isinstance(raw, dict) and isinstance(known, dict):
        for name, value in raw.items():
            if name not in known:
                yield f"{path}.{name}"
            else:
                yield from _unknown(value, known[name], f"{path}.{name}")


def changes(old: Any, new: Any) -> dict[str, list[Any]]:
    """The differences of two configs: `[old, new]` by the field's name, with dots for a config within another one.

    >>> changes({"epochs": 5, "optimizer": {"type": "SGD", "lr": 0.1}}, {"epochs": 8, "optimizer": {"type": "SGD", "lr": 0.1}})
    {'epochs': [5, 8]}
    """
    return dict(_changes(msgspec.to_builtins(old), msgspec.to_builtins(new), ""))


def words(changed: dict[str, Any]) -> str:
    """The result of `changes` as text: `epochs 5 -> 8, optimizer.lr 0.1 -> 0.01`."""
    return ", ".join(f"{name} {old} -> {new}" for name, (old, new) in changed.items())


def _changes(old: Any, new: Any, name: str) -> Iterator[tuple[str, list[Any]]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            yield from _changes(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif old != new:
        yield name, [old, new]


def config_type(build: Callable[..., Any]) -> type:
    """The annotation of the first parameter of `build`. Raises TypeError where there is none."""
    parameters = list(inspect.signature(build).parameters)
    hint = typing.get_type_hints(build).get(parameters[0]) if parameters else None
    if not isinstance(hint, type):
        raise TypeError(f"{build.__name__}: annotate its first parameter with the config dataclass: def build(config: Config, run: Run)")
    return hint
