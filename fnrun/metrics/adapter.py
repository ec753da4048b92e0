"""Metrics of torchmetrics as folds: their states, merged as torchmetrics merges them over ranks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fnrun.core import tree
from fnrun.core.key import Key
from fnrun.core.tree import static, struct
from fnrun.core.words import a
from fnrun.metrics.base import check_same
from fnrun.metrics.collect import Chunks, collect, joined
from fnrun.metrics.naming import name_of

#: The adapted metrics of this process, by name: a fold holds data and the name.
_adapted: dict[str, Any] = {}


@struct(name="fnrun.metrics.TorchmetricsState")
class TorchmetricsState:
    """The states of a metric by name, the number of updates, and the name of the metric."""

    states: dict[str, Any]
    updates: int
    metric: str = static()

    def merge(self, other: TorchmetricsState) -> TorchmetricsState:
        check_same("from_torchmetrics", "metric", self.metric, other.metric)
        states = _find(self.metric).merged(self, other)
        return TorchmetricsState(states, self.updates + other.updates, self.metric)

    def compute(self) -> Any:
        return _find(self.metric).computed(self)


@struct(name="fnrun.metrics.TorchmetricsInputs")
class TorchmetricsInputs:
    """The collected arguments of a function, and the name of the function."""

    inputs: Chunks
    metric: str = static()

    def merge(self, other: TorchmetricsInputs) -> TorchmetricsInputs:
        check_same("from_torchmetrics", "function", self.metric, other.metric)
        return TorchmetricsInputs(self.inputs.merge(other.inputs), self.metric)

    def compute(self) -> Any:
        return _find(self.metric).computed(self.inputs.compute())


def from_torchmetrics(metric: Any, *, name: str | None = None) -> Callable[..., TorchmetricsState | TorchmetricsInputs]:
    """A function of the arguments of `metric.update` that makes the fold of one batch. Make it once, beside the model; call it in a step.

    - `metric`: one of
        - a `torchmetrics.Metric` or `MetricCollection`, of which an empty copy is used. The fold holds its states, merged by their
          reductions (`dist_reduce_fx`), as over ranks. Its size is fixed, except for lists ("cat") and states without a reduction, of which
          there is one a batch;
        - a function of tensors, as in `torchmetrics.functional`: all inputs are collected, and it is called once. `functools.partial` sets
          options.
    - `name=None`: the metric's name in checkpoints; by default its class and settings. It is needed where these cannot be written, as a
      lambda. A process that restores the fold must have made the same metric.

    The value is a tensor, or a dict of tensors. It is computed under a fixed key, so that random numbers repeat. With `validate_args=True`,
    their default, most metrics wait for the device at each update.

    Raises ImportError without torchmetrics, TypeError for anything that is neither a metric nor a function, ValueError for a metric that
    needs a name, and for one whose value depends on the order of updates (`Running`, `MinMaxMetric`).

    >>> from torchmetrics.classification import MulticlassF1Score
    >>> f1 = from_torchmetrics(MulticlassF1Score(num_classes=3))
    >>> f1(torch.tensor([0, 1]), torch.tensor([0, 2])).merge(f1(torch.tensor([2]), torch.tensor([2]))).compute()
    tensor(0.5556)
    """
    torchmetrics = _torchmetrics()
    if isinstance(metric, torchmetrics.MetricCollection):
        # Without groups of metrics that share states: finding them compares values, which waits for the device.
        members = dict(metric.items(keep_base=True, copy_state=False))
        members = {key.removeprefix(metric.prefix or "").removesuffix(metric.postfix or ""): one for key, one in members.items()}
        plain = torchmetrics.MetricCollection(members, prefix=metric.prefix, postfix=metric.postfix, compute_groups=False)
        adapter = _Metric(plain.clone(), name)
    elif isinstance(metric, torchmetrics.Metric):
        adapter = _Metric(metric.clone(), name)
    elif callable(metric) and not isinstance(metric, (nn.Module, type)):
        adapter = _Function(metric, name)
    else:
        what = f"the class {metric.__name__}: give an object, {metric.__name__}(...)" if isinstance(metric, type) else type(metric).__name__
        raise TypeError(f"from_torchmetrics: wanted a torchmetrics.Metric, a MetricCollection or a function, not {what}")
    _adapted[adapter.name] = adapter
    return adapter


def _torchmetrics() -> Any:
    try:
        import torchmetrics
    except ImportError as error:
        raise ImportError("from_torchmetrics needs torchmetrics: pip install 'fnrun[torchmetrics]'") from error
    return torchmetrics


def _find(name: str) -> Any:
    if name not in _adapted:
        raise LookupError(
            f"a fold of {name} is merged or computed where this metric was not made: make the same one with metrics.from_torchmetrics(...) "
            "before the program runs, outside of its steps"
        )
    return _adapted[name]


class _Function:
    """A function that is called with all inputs."""

    def __init__(self, fn: Callable[..., Any], name: str | None) -> None:
        self.fn, self.name = fn, name or name_of("function", fn)

    def __call__(self, *args: Tensor, **kwargs: Tensor) -> TorchmetricsInputs:
        inputs = {str(i): value for i, value in enumerate(args)} | kwargs
        for key, value in inputs.items():
            if not isinstance(value, Tensor):
                raise TypeError(
                    f"{self.name}: argument {key} is {a(type(value).__name__)}: only tensors are collected, "
                    "options go into functools.partial"
                )
        return TorchmetricsInputs(collect(inputs), self.name)

    def computed(self, inputs: dict[str, Tensor]) -> Any:
        args = [inputs[key] for key in sorted((key for key in inputs if key.isdigit()), key=int)]
        with Key(0).scope(), torch.no_grad():
            return _values(self.fn(*args, **{key: value for key, value in inputs.items() if not key.isdigit()}))


class _Metric:
    """A copy of a metric: empty for an update, with the states of a fold to compute."""

    def __init__(self, metric: Any, name: str | None) -> None:
        self.metric, self.parts = metric, dict(_parts(metric))
        for part in self.parts.values():
            if type(part).__name__ in ("Running", "MinMaxMetric"):
                raise ValueError(
                    f"from_torchmetrics: the value of {type(part).__name__} depends on the order of updates, which merging loses"
                )
            part.sync_on_compute = part.dist_sync_on_step = part._to_sync = False  # loops merge the folds
        metric.reset()
        self.name = name or name_of("metric", metric)
        self.reductions = {f"{at}{key}": fn for at, part in self.parts.items() for key, fn in part._reductions.items()}
        self.lists = {
            f"{at}{key}" for at, part in self.parts.items() for key, default in part._defaults.items() if isinstance(default, list)
        }
        self._lock = threading.Lock()

    def __call__(self, *args: Any, **kwargs: Any) -> TorchmetricsState:
        with self._lock:
            self._move_to_device_of(tree.leaves((args, kwargs)))
            self.metric.reset()
            try:
                self.metric.update(*args, **kwargs)
                states = {f"{at}{key}": getattr(part, key) for at, part in self.parts.items() for key in part._defaults}
                return TorchmetricsState({key: self._taken(key, value) for key, value in states.items()}, 1, self.name)
            finally:
                self.metric.reset()

    def _taken(self, key: str, state: Any) -> Any:
        """A state in a fold: a list is a tuple; a state without a reduction is a tuple of tensors, with one row a batch."""
        state = tree.map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, state)
        if key in self.lists:
            return tuple(state)
        return (state.unsqueeze(0),) if self.reductions[key] is None else state

    def merged(self, one: TorchmetricsState, other: TorchmetricsState) -> dict[str, Any]:
        from torchmetrics.utilities.data import dim_zero_cat, dim_zero_max, dim_zero_mean, dim_zero_min, dim_zero_sum

        share = other.updates / (one.updates + other.updates)
        merges: dict[Any, Callable[[Any, Any], Any]] = {
            dim_zero_cat: lambda ours, theirs: dim_zero_cat([ours, theirs]),
            dim_zero_sum: torch.add,
            dim_zero_mean: lambda ours, theirs: ours + (theirs - ours) * share,
            dim_zero_max: torch.maximum,
            dim_zero_min: torch.minimum,
        }
        merged: dict[str, Any] = {}
        for key, ours in one.states.items():
            reduction, theirs = self.reductions[key], other.states[key]
            if isinstance(ours, tuple):
                apart = key in self.lists and reduction != dim_zero_cat  # entries are separate, as an image's boxes
                merged[key] = (*ours, *theirs) if apart else _joined((*ours, *theirs))
            else:
                merge = merges.get(reduction)
                merged[key] = merge(ours, theirs) if merge is not None else reduction(torch.stack([ours, theirs]))
        return merged

    def computed(self, fold: TorchmetricsState) -> Any:
        with self._lock, Key(0).scope(), torch.no_grad():
            self._move_to_device_of(tree.leaves(fold.states))
            self.metric.reset()
            try:
                for at, part in self.parts.items():
                    part._update_count = fold.updates
                    for key in part._defaults:
                        state = tree.snapshot(fold.states[f"{at}{key}"])  # a copy, for a metric may write to its states
                        setattr(part, key, self._lent(f"{at}{key}", state))
                return _values(self.metric.compute())
            finally:
                self.metric.reset()

    def _lent(self, key: str, state: Any) -> Any:
        if not isinstance(state, tuple):
            return state
        if key in self.lists:
            return list(state)
        rows = torch.cat(state)
        return rows[0] if len(rows) == 1 else rows

    def _move_to_device_of(self, leaves: list[Any]) -> None:
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                if any(part.device != leaf.device for part in self.parts.values()):
                    self.metric.to(leaf.device)
                return


def _parts(metric: Any) -> Iterator[tuple[str, Any]]:
    """The metric and those within it, with a prefix for their states."""
    cls = _torchmetrics().Metric
    yield from ((f"{path}." if path else "", part) for path, part in metric.named_modules() if isinstance(part, cls))


def _joined(parts: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same rows in a few tensors."""
    rows = tuple(part if part.ndim else part.unsqueeze(0) for part in parts)
    return joined(rows, lambda a, b: len(a) <= len(b) and a.shape[1:] == b.shape[1:], lambda a, b: torch.cat([a, b]))


def _values(found: Any) -> Any:
    """A metric's value, as a tensor or a flat dict of tensors."""
    if isinstance(found, Mapping):
        pairs = {str(key): _values(value) for key, value in found.items()}
    elif isinstance(found, (list, tuple)):
        pairs = {str(i): _values(value) for i, value in enumerate(found)}
    else:
        return torch.as_tensor(found)
    nested = ({f"{key}/{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value} for key, value in pairs.items())
    return {key: value for part in nested for key, value in part.items()}
