"""A step as one compiled graph, for one update or several."""

from __future__ import annotations

import warnings
import weakref
from typing import Any

import optree
import torch

from fnrun.core import entering
from fnrun.core.donation import Owner, contents, fields, writable
from fnrun.core.inplace import FIRST, Guard
from fnrun.core.state import carried, check_state, made
from fnrun.metrics.basic import Mean
from fnrun.optim import hyperparams
from fnrun.steps.capture import Captured
from fnrun.steps.checks import check_unasked
from fnrun.steps.draws import Draws, TracedKey, Uncapturable
from fnrun.steps.gradients import Gradients, Loss
from fnrun.steps.kinds import Metrics
from fnrun.steps.train import IN_TURN, TrainStep, composed, each, together
from fnrun.steps.update import Update


class Compiled:
    """A step's parts as one graph. A step that cannot be captured runs eagerly, with one warning."""

    donates = fuses = True
    text = "compiled"

    def __init__(self) -> None:
        self._graphs: weakref.WeakKeyDictionary[TrainStep, _Graphs] = weakref.WeakKeyDictionary()

    def __call__(self, step: TrainStep, state: Any, batches: list[Any], owner: Owner | None) -> tuple[Any, Metrics]:
        check_state(step.name, state, batches[0], "batch")
        if torch.is_grad_enabled():
            for batch in batches:
                check_unasked(step.name, state, batch)
            if entering.any_cut:  # the graph has other tensors in their places
                entering.check_uncut(hyperparams(state.opt_state))
        if isinstance(step.gradients, Gradients):
            for batch in batches:
                step.gradients.cut.check(batch)
        if (graphs := self._graphs.get(step)) is None:
            graphs = self._graphs[step] = _Graphs(step)
        if len(batches) > 1 and not _alike(batches):
            return each(lambda state, batch: self(step, state, [batch], owner), state, batches, step.examples)
        counts = [step.examples(batch) for batch in batches] if len(batches) > 1 else []
        graphs.rehearse(state, batches[0])
        if graphs.captured.reason is None and (result := graphs(state, batches, counts, owner)) is not None:
            loss = result[1].get("loss")
            if isinstance(loss, Mean) and isinstance(step.loss, Loss) and loss.weight.is_cpu and not loss.weight:
                return result[0], {**step.loss.of_nothing(), "skipped": result[1]["skipped"]}
            return result
        failed_now = not graphs.warned
        graphs.warned = True
        result = IN_TURN(step, state, batches, owner)  # before the warning: an error of the step is none of the compiler
        if failed_now:
            warnings.warn(f"{step.name} is not compiled and goes on without: {graphs.captured.reason}", stacklevel=4)
        return result


class _Graphs:
    """The graphs of one step."""

    def __init__(self, step: TrainStep) -> None:
        self.gradients, self.update, self.name = step.gradients, step.update, step.name
        self._loss = step.loss
        self.warned = False
        self.captured = Captured(self._several, step.name)
        self._like: Any = None  # the state of the call that is captured
        self._rehearsals = FIRST
        self._guard = Guard(step.name)
        self._culprit = self.update.culprit if isinstance(self.update, Update) else None

    def rehearse(self, state: Any, batch: Any) -> None:
        """Run the watched first calls eagerly, and discard their results: a recorded call cannot be watched."""
        if isinstance(self._loss, Loss):
            self._rehearsals = self._loss.functional.first.remaining
        while self._rehearsals:
            self.gradients(state, batch)
            self._rehearsals -= 1

    def __call__(self, state: Any, batches: list[Any], counts: list[Any], owner: Owner | None) -> tuple[Any, Metrics] | None:
        if isinstance(self._loss, Loss):
            self._loss.functional.check()
        trained = self.update.trained if isinstance(self.update, Update) else tuple(state.params)
        count, params = state.step, {name: state.params[name] for name in trained}
        whole = len(params) == len(state.params)
        kept = state.buffers, {} if whole else {name: p for name, p in state.params.items() if name not in params}
        self._like = state
        try:
            found = self.captured((params, state.opt_state), kept, (batches, counts), count, self._check, inplace=owner is not None)
        finally:
            self._like = None  # also after an error: a reference would keep the state alive
        if found is None:
            return None
        (graph, leaves), key = found, state.rng
        every = contents(state)
        if owner is None:
            marks = self._guard.look({"params": state.params, "opt_state": state.opt_state})
            ((params, memory), (buffers, frozen)), metrics = graph(leaves, count, key)
            self._guard.check(marks, self._culprit)
        else:
            by = count + len(batches) - 1, self.name
            ((params, memory), (buffers, frozen)), metrics = owner.update(
                by, state, lambda: graph(graph.writing_to(leaves, writable), count, key)
            )
        params = params if whole else {**every["params"], **frozen, **params}
        every.update(params=params, buffers=buffers, opt_state=memory, step=count + len(batches))
        new = made(type(state), every)
        if owner is not None:
            owner.accept(new)
        return new, metrics

    def _check(self) -> None:
        if isinstance(self.update, Update):
            self.update.check(self._like)

    def _several(self, given: Any, kept: Any, x: tuple[list[Any], list[Any]], count: Any, draws: Draws) -> tuple[Any, Metrics]:
        """The function that is captured: `given` are trained parameters and optimizer state, `kept` buffers and frozen parameters."""
        (params, memory), (buffers, frozen), (batches, counts), seen = given, kept, x, []
        state = carried(_blind(self._like), params={**params, **frozen}, buffers=buffers, opt_state=memory, rng=TracedKey(draws))
        for i, batch in enumerate(batches):
            step = count + i if i else count
            draws.note_step(step, i)
            state, metrics = composed(self, state.replace(step=step), batch)  # pyright: ignore[reportArgumentType]
            seen.append(metrics)
        new = {name: state.params[name] for name in params}, {name: state.params[name] for name in frozen}
        return ((new[0], state.opt_state), (state.buffers, new[1])), seen[0] if len(seen) == 1 else together(seen, batches, counts)


class _Unseen:
    """Stands for a field of the state that a compiled step does not have."""

    def __init__(self, name: str) -> None:
        self._name = name

    def _refuse(self, *args: Any) -> Any:
        raise Uncapturable(f"it reads state.{self._name}, and a compiled step is given params, buffers, opt_state, rng and step alone")

    __getitem__ = __contains__ = __iter__ = __len__ = __bool__ = _refuse

    def __getattr__(self, name: str) -> Any:
        return self._refuse() if not name.startswith("__") else super().__getattribute__(name)


_SEEN = {"params", "buffers", "opt_state", "rng", "step"}


def _blind(state: Any) -> Any:
    return carried(state, **{name: _Unseen(name) for name in fields(type(state)) if name not in _SEEN})


def _alike(batches: list[Any]) -> bool:
    """Whether the batches have the same structure and shapes."""
    shapes = {
        (spec, *(leaf.shape if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves))
        for leaves, spec in map(optree.tree_flatten, batches)
    }
    return len(shapes) == 1
