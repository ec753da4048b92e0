"""`TrainStep`: a loss, its gradient, an update, and how the three are combined."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any, Protocol

import torch

from fnrun import metrics as folds
from fnrun.core import tree
from fnrun.core.donation import Owner
from fnrun.core.examples import example_count
from fnrun.core.inplace import Guard
from fnrun.core.state import carried, check_state, is_state
from fnrun.core.words import kind
from fnrun.metrics.base import to_accumulator_dtype
from fnrun.metrics.by_name import weight
from fnrun.optim.lists import eager
from fnrun.optim.wrappers import choose
from fnrun.steps.checks import detached, detached_all, reported
from fnrun.steps.gradients import Gradients
from fnrun.steps.kinds import Metrics, PureStep
from fnrun.steps.microbatches import Shapes
from fnrun.steps.surroundings import Surroundings
from fnrun.steps.update import Update, with_written


class Combine(Protocol):
    """How the parts of a step are combined: one update for each batch, in order, with merged metrics for several."""

    #: It may write the new state over the old one, through `owner`.
    donates: bool
    #: Several updates are one call.
    fuses: bool
    #: Its option, as printed.
    text: str

    def __call__(self, step: TrainStep, state: Any, batches: list[Any], owner: Owner | None, /) -> tuple[Any, Metrics]: ...


class InTurn:
    """Each part called in turn, eagerly."""

    donates, fuses, text = True, False, ""

    def __call__(self, step: TrainStep, state: Any, batches: list[Any], owner: Owner | None, /) -> tuple[Any, Metrics]:
        if len(batches) == 1:
            return composed(step, state, batches[0], owner)
        return each(lambda state, batch: composed(step, state, batch, owner), state, batches, step.examples)


IN_TURN = InTurn()


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class TrainStep(PureStep):
    """A training step `(state, batch) -> (state, metrics)` made of three pure functions, each callable and replaceable alone.

    - `loss(params, buffers, batch, *, key=None) -> (loss, (buffers, metrics))`: the module as a function, differentiable in all tensors.
    - `gradients(state, batch) -> (grads, buffers, metrics)`: `grads` of the trained parameters by name, detached and never scaled, None
      where the loss does not reach; `buffers` after the forward, and the parameters that it wrote to.
    - `update(state, grads) -> (state, metrics)`: the optimizer: new `params` and `opt_state`, `step + 1`, and reports.

    The step is their composition: `g, b, m = step.gradients(state, batch)`, then `s, more = step.update(state.replace(buffers=b), g)`,
    which returns `(s, {**m, **more})`.

    - `combine=IN_TURN`: how the parts are combined, one after the other or as one graph.
    - `examples`: `batch -> int`, the number of examples, by which loops weight plain metrics.

    A transform is a function `step -> step`: `dataclasses.replace(step, gradients=f)` is this step with other gradients. `loss` is not
    replaced alone, since `gradients` differentiates its own (TypeError). A user's function in a part is keyed: torch's generators are
    seeded from the state's key around it. Its results are detached and checked.

    >>> from fnrun import TrainState, make_train_step, optim
    >>> model = torch.nn.Linear(3, 1)
    >>> step = make_train_step(model, lambda model, x: model(x).square().mean(), optim.sgd(0.1))
    >>> state, x = TrainState.create(model, optim.sgd(0.1)), torch.ones(4, 3)
    >>> def signs(state, batch):
    ...     grads, buffers, metrics = step.gradients(state, batch)
    ...     return {name: grad.sign() for name, grad in grads.items()}, buffers, metrics
    >>> moved = dataclasses.replace(step, gradients=signs)(state, x)[0].params["bias"] - state.params["bias"]
    >>> round(abs(moved.item()), 4)
    0.1
    """

    loss: Callable[..., Any]
    gradients: Callable[[Any, Any], tuple[Any, Any, Metrics]]
    update: Callable[[Any, Any], tuple[Any, Metrics]]
    name: str = "train_step"
    combine: Combine = IN_TURN
    examples: Callable[[Any], int | None] = example_count

    def __post_init__(self) -> None:
        if isinstance(self.gradients, Gradients) and self.gradients.loss is not self.loss:
            raise TypeError(
                f"{self.name}: its gradients are those of another loss, and would stay so. Make the step anew with another loss_fn, or "
                "replace its gradients too"
            )
        if not isinstance(self.gradients, (Gradients, Keyed)):
            self._set(gradients=KeyedGradients(self.gradients, self.name))
        if not isinstance(self.update, (Update, Keyed)):
            self._set(update=KeyedUpdate(self.update, self.name))
        self._set(__name__=self.name, __qualname__=self.name)

    def _set(self, **fields: Any) -> None:
        for field, value in fields.items():
            object.__setattr__(self, field, value)
            if isinstance(value, Keyed):
                object.__setattr__(self, "name", f"{value.title}({self.name})")

    def __call__(self, state: Any, batch: Any, /, *, owner: Owner | None = None) -> tuple[Any, Metrics]:
        return self.combine(self, state, [batch], owner)

    def several(self, state: Any, batches: list[Any], /, *, owner: Owner | None = None) -> tuple[Any, Metrics]:
        """An update for each batch, in one call; the metrics are merged, and folds even for one batch."""
        state, metrics = self.combine(self, state, batches, owner)
        return state, metrics if len(batches) > 1 else together([metrics], batches, [self.examples(batches[0])])

    @property
    def donates(self) -> bool:
        """Whether the update may write the new state over the old one: an optimizer's can."""
        return isinstance(self.update, Update) and self.update.optimizer.donatable and self.combine.donates

    @property
    def ignores_position(self) -> bool:
        return isinstance(self.gradients, Gradients) and isinstance(self.update, Update)

    @property
    def fuses(self) -> bool:
        return self.combine.fuses

    @property
    def optimizer_text(self) -> str:
        return repr(self.update.optimizer) if isinstance(self.update, Update) else ""

    @property
    def options_text(self) -> str:
        options = self.gradients.options() if isinstance(self.gradients, Gradients) else []
        return ", ".join(filter(None, [*options, self.combine.text]))

    def __repr__(self) -> str:
        return f"<{', '.join(filter(None, [self.name, self.options_text]))}>"


# --- composition --------------------------------------------------------------------------------------------------------


def each(
    call: Callable[[Any, Any], tuple[Any, Metrics]], state: Any, batches: list[Any], examples: Callable[[Any], int | None]
) -> tuple[Any, Metrics]:
    """`call(state, batch)` for each batch in order; the metrics of several are merged, weighted by `examples(batch)`."""
    if len(batches) == 1:
        return call(state, batches[0])
    seen: list[Metrics] = []
    for batch in batches:
        state, metrics = call(state, batch)
        seen.append(metrics)
    return state, together(seen, batches, list(map(examples, batches)))


def composed(step: TrainStep, state: Any, batch: Any, owner: Owner | None = None) -> tuple[Any, Metrics]:
    """The composition that a step is."""
    grads, buffers, metrics = step.gradients(state, batch)
    skipped = metrics.get("skipped")
    if isinstance(skipped, torch.Tensor) and not eager():
        return _unless(skipped, step, carried(state, buffers=buffers), grads, metrics)
    update = step.update
    if not isinstance(update, Update):
        state, more = update(carried(state, buffers=buffers), grads)
        return state, {**metrics, **more}
    if not isinstance(step.gradients, Gradients):
        update.check_grads(state, grads)
    if owner is not None:  # metrics and buffers must not lie in memory that is written over now
        metrics, buffers = owner.share(metrics), owner.share(buffers)
        if not isinstance(step.gradients, Gradients):
            grads = owner.share(grads)
    state, more = update.updated(state, grads, buffers, owner)
    return state, {**metrics, **more} if more else metrics


def _unless(skipped: torch.Tensor, step: TrainStep, state: Any, grads: Any, metrics: Metrics) -> tuple[Any, Metrics]:
    """The update, or none if `skipped` is not 0, without waiting for its value: both are computed, and selected leaf by leaf."""
    (new, more), (still, _) = step.update(state, grads), step.update(state, dict.fromkeys(grads))
    params, opt_state = choose(skipped != 0, lambda: (still.params, still.opt_state), lambda: (new.params, new.opt_state))
    more["skipped"] = torch.maximum(skipped, torch.as_tensor(more.get("skipped", 0), dtype=skipped.dtype))
    return carried(new, params=params, opt_state=opt_state), {**metrics, **more}


def together(metrics: list[Metrics], batches: list[Any], examples: list[int | None]) -> Metrics:
    """The merged metrics of several steps, all of them folds; `examples` are the batches' numbers of examples."""
    totals, shapes = dict[str, Any](), Shapes("fused steps")
    for values, batch, rows in zip(metrics, batches, examples, strict=True):
        n = weight(rows, batch, values)
        shapes.add(values, n)
        skipped = values.get("skipped")
        done = True if skipped is None else torch.as_tensor(skipped) == 0
        for name, value in values.items():
            if not hasattr(value, "merge"):  # an elementwise mean over examples; a skipped update has none
                plain = to_accumulator_dtype(torch.as_tensor(value))
                value = folds.Mean(plain * n, torch.full_like(plain, n))
                if done is not True and name != "skipped":
                    value = folds.Mean(torch.where(done, value.total, 0), torch.where(done, value.weight, 0))
            totals[name] = totals[name].merge(value) if name in totals else value
    shapes.check()
    return totals


class Keyed:
    """A user's function as a part of a step: torch's generators are seeded around it, its reports are metrics.

    The seed is derived from the state's key, the step, the function's name, and how many calls of that name are around it: two transforms
    draw different numbers.
    """

    part: str

    def __init__(self, fn: Callable[..., Any], name: str) -> None:
        self.fn, self.name = fn, name
        self.label: str = getattr(fn, "__qualname__", type(fn).__qualname__)
        self.title = self.label.partition(".<locals>")[0]
        self._within = Surroundings(f"{name}: its {self.part}")
        self._guard = Guard(f"the {self.part} of {name}, {kind(fn)},")

    def __call__(self, state: Any, data: Any) -> Any:
        check_state(f"{self.name}: its {self.part}", state, data, "batch")
        marks = self._guard.look(state)
        within = _parts_at_work.get()
        token = _parts_at_work.set((*within, self.label))
        try:
            with self._within(state.rng, self.part, self.label, within.count(self.label), state.step) as reports:
                result = self.fn(state, data)
        finally:
            _parts_at_work.reset(token)
        self._guard.check(marks)
        return self.checked(result, state, reports)

    def checked(self, result: Any, state: Any, reports: dict[str, Any]) -> Any:
        raise NotImplementedError


#: The labels of the parts that are being called, outermost first.
_parts_at_work: ContextVar[tuple[str, ...]] = ContextVar("parts_at_work", default=())


class KeyedGradients(Keyed):
    part = "gradients"

    def checked(self, result: Any, state: Any, reports: dict[str, Any]) -> Any:
        if not isinstance(result, tuple) or len(result) != 3 or not all(isinstance(each, Mapping) for each in result):
            raise TypeError(
                f"the gradients of {self.name} are a function of (state, batch) that returns (grads, buffers, metrics), three "
                f"dictionaries by name, and {kind(self.fn)} returned {kind(result)}"
            )
        grads, buffers, metrics = result
        if buffers.keys() - state.params.keys() != state.buffers.keys():
            missing = sorted(state.buffers.keys() - buffers.keys())
            extra = sorted(buffers.keys() - state.buffers.keys() - state.params.keys())
            raise ValueError(
                f"the gradients of {self.name}: {kind(self.fn)} returned other buffers than the state has: missing {missing}, unexpected "
                f"{extra}. They are what the forward made of state.buffers: return those of step.gradients, or state.buffers itself"
            )
        metrics = {name: detached_all(value) for name, value in reported(metrics, reports).items()}
        return {name: detached(grad) for name, grad in grads.items()}, tree.map(detached, buffers), metrics


class KeyedUpdate(Keyed):
    part = "update"

    def __call__(self, state: Any, data: Any) -> Any:
        if not state.buffers.keys().isdisjoint(state.params):
            params, buffers = with_written(state.params, state.buffers)
            state = carried(state, params=params, buffers=buffers)
        return super().__call__(state, data)

    def checked(self, result: Any, state: Any, reports: dict[str, Any]) -> Any:
        if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[1], Mapping) or not is_state(result[0]):
            raise TypeError(
                f"the update of {self.name} is a function of (state, grads) that returns (state, metrics), and {kind(self.fn)} returned "
                f"{kind(result)}"
            )
        new, metrics = result
        if isinstance(new.step, int) and new.step != state.step + 1:
            raise ValueError(f"the update of {self.name} leaves state.step at {new.step}, and it counts one more, {state.step + 1}")
        metrics = {name: detached_all(value) for name, value in reported(metrics, reports).items()}
        return tree.map(detached, new).replace(position=new.position), metrics
