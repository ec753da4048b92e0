"""Names of torchmetrics' metrics, for checkpoints: the same in all processes."""

from __future__ import annotations

import enum
import functools
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fnrun.core import tree


def name_of(what: str, metric: Any) -> str:
    """A name of a metric by its class and a digest of its settings."""
    kind = getattr(metric, "__qualname__", type(metric).__qualname__)
    try:
        described = repr(_described(metric, "it"))
    except _Opaque as error:
        raise ValueError(
            f"from_torchmetrics: {kind}: {error}, which cannot be told from another: "
            f"give the {what} a name, from_torchmetrics(..., name=...)"
        ) from None
    return f"{kind} {hashlib.sha256(described.encode()).hexdigest()[:16]}"


class _Opaque(Exception):
    pass


def _described(value: Any, where: str) -> Any:
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, torch.dtype, torch.device, enum.Enum)):
        return repr(value)
    if isinstance(value, Tensor):
        return tree.fingerprint(value)
    if isinstance(value, (list, tuple)):
        return type(value).__name__, [_described(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, (set, frozenset)):
        return type(value).__name__, sorted(repr(_described(item, where)) for item in value)
    if isinstance(value, Mapping):
        return type(value).__name__, [(_described(k, where), _described(v, f"{where}[{k!r}]")) for k, v in value.items()]
    if isinstance(value, functools.partial):
        return "partial", *(_described(part, where) for part in (value.func, value.args, value.keywords))
    if isinstance(value, nn.Module):
        return tree.class_name(type(value)), *_described_module(value, where)
    qualname = getattr(value, "__qualname__", "<")
    if (isinstance(value, type) or callable(value)) and "<" not in qualname and getattr(value, "__self__", None) is None:
        return f"{value.__module__}:{qualname}"
    raise _Opaque(f"{where} is {value!r}")


def _described_module(module: nn.Module, where: str) -> Iterator[Any]:
    """A metric by its settings; another module by its tensors and its repr."""
    import torchmetrics

    if isinstance(module, (torchmetrics.Metric, torchmetrics.MetricCollection)):
        passing = _bookkeeping() | {*getattr(module, "_defaults", ())}
        yield [(key, _described(value, f"its {key}")) for key, value in sorted(vars(module).items()) if key not in passing]
        yield [(key, _described(value, f"its {key}")) for key, value in (*module._buffers.items(), *module._modules.items())]
    else:
        yield repr(module)
        yield tree.fingerprint({key: value for key, value in module.state_dict().items() if isinstance(value, Tensor)})


@functools.cache
def _bookkeeping() -> frozenset[str]:
    """The attributes of all metrics, without those of their states."""
    import torchmetrics

    class Bare(torchmetrics.Metric):
        def update(self) -> None: ...
        def compute(self) -> None: ...

    return frozenset({*vars(Bare()), *vars(torchmetrics.MetricCollection([]))} - {"_reductions", "_defaults", "prefix", "postfix"})
