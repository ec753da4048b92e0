"""Norms and histograms of each parameter, its updates and its gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fnrun.core import tree
from fnrun.core.counts import count
from fnrun.core.donation import shared
from fnrun.core.position import is_due
from fnrun.core.reports import report
from fnrun.core.state import LoopState
from fnrun.observers.writing import Writer
from fnrun.optim import Transform
from fnrun.sinks import Sink
from fnrun.sinks.media import histogram


class _Watch(Writer):
    name = "watch"

    def __init__(self, every: int, sinks: Sequence[Sink], histograms: bool) -> None:
        super().__init__(sinks)
        self.every, self.histograms = every, histograms
        self._kept: tuple[int, Mapping[str, Tensor]] | None = None  # the step before a line, and its parameters

    def __str__(self) -> str:
        return f"watch every {self.every}"

    def open(self, program: Any, state: Any) -> None:
        super().open(program, state)
        self._keep(state)  # a resumed run may be right before a record

    def __call__(self, state: Any, metrics: dict[str, Any]) -> None:
        if is_due(state, self.every):
            self.write(state, self._values(state))
        self._keep(state)

    def _keep(self, state: Any) -> None:
        self._kept = (state.step, shared(state.params)) if (state.step + 1) % self.every == 0 else None

    def _values(self, state: Any) -> dict[str, Any]:
        found: dict[str, Any] = {f"norm/{name}": torch.linalg.vector_norm(value) for name, value in state.params.items()}
        if self._kept is not None and self._kept[0] + 1 == state.step:
            before = self._kept[1]
            found.update((f"update_norm/{name}", torch.linalg.vector_norm(value - before[name])) for name, value in state.params.items())
        if self.histograms:
            found.update((f"histogram/{name}", histogram(value)) for name, value in state.params.items() if not value.is_complex())
        return found

    def close(self, state: LoopState, reason: str | BaseException | None) -> None:
        self._kept = None
        super().close(state, reason)


def watch(every: int, *, to: Sequence[Sink], histograms: bool = True) -> Any:
    """On each n-th step a record of every parameter: `norm/NAME`, `update_norm/NAME` and `histogram/NAME`, to the sinks `to`.

    - `every`: steps from record to record.
    - `to`: the sinks of the records.
    - `histograms=True`: whether the records have histograms.

    The norms are Euclidean. `update_norm` is that of the change in the last step, hooks included: divided by `norm` it says how fast a
    parameter moves (a thousandth is usual). A resumed run writes the same records. In a loop whose ticks are more than one step each the
    records have no `update_norm`. Gradients: `watch_gradients`.

    Raises ValueError for an `every` below 1.
    """
    return _Watch(count("watch: every", every), to, histograms)


def watch_gradients(*, histograms: bool = False) -> Transform:
    """A member of an `optim.chain` that changes nothing and reports each gradient's Euclidean norm as the metric `gradient_norm/NAME`.

    It sees the gradients as they are at its place: before or after clipping. With `histograms` it also reports `gradient_histogram/NAME`,
    at a cost on each step; a line shows the newest.

    >>> from fnrun import optim
    >>> grads, _ = optim.chain(watch_gradients(), optim.scale(2.0)).update({"x": torch.tensor([3.0, 4.0])}, ((), ()), {"x": torch.zeros(2)})
    >>> grads
    {'x': tensor([6., 8.])}
    """

    def update(grads: Any, state: Any, params: Any, /, *, key: Any = None, step: int | None = None) -> tuple[Any, Any]:
        for name, value in zip(tree.paths(grads), tree.leaves(grads), strict=True):
            report(f"gradient_norm/{name}", torch.linalg.vector_norm(value))
            if histograms and not value.is_complex():
                report(f"gradient_histogram/{name}", histogram(value))
        return grads, state

    return Transform(lambda params: (), update, donatable=True)
