"""The training step as a value: a loss, its gradient, an update, and how the three are combined."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any, Protocol

import torch

from fnrun import metrics as folds
from fnrun.core import examples as rows, tree
from fnrun.core.donation import Owner
from fnrun.core.inplace import Guard
from fnrun.core.state import carried, check_state, is_state
from fnrun.core.words import kind
from fnrun.metrics.base import to_accumulator_dtype
from fnrun.metrics.by_name import weight
from fnrun.optim.lists import eager
from fnrun.optim.wrappers import choose
from fnrun.steps.given import detached, detached_all, reported
from fnrun.steps.gradients import Gradients
from fnrun.steps.kinds import Metrics, PureStep
from fnrun.steps.pieces import Shapes
from fnrun.steps.surroundings import Surroundings
from fnrun.steps.update import Update, with_written


class Combine(Protocol):
    """How the parts of a step become a step: for several batches one after the other, whose metrics then are those of one."""

    #: The new state may be written over the old one, by the owner that it is given.
    donates: bool
    #: Several steps are one call.
    fuses: bool
    #: What it does besides, in words, for who prints the step.
    text: str

    def __call__(self, step: TrainStep, state: Any, batches: list[Any], owner: Owner | None, /) -> tuple[Any, Metrics]: ...


class InTurn:
    """The parts one after the other, for each batch."""

    donates, fuses, text = True, False, ""

    def __call__(self, step: TrainStep, state: Any, batches: list[Any], owner: Owner | None, /) -> tuple[Any, Metrics]:
        if len(batches) == 1:
            return composed(step, state, batches[0], owner)
        return each(lambda state, batch: composed(step, state, batch, owner), state, batches, step.examples)


IN_TURN = InTurn()


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class TrainStep(PureStep):
    """A training step `(state, batch) -> (state, metrics)` made of parts, each a pure function that can be called and replaced alone.

    - `loss(params, buffers, batch, *, key=None) -> (loss, (buffers, metrics))`: the module as a function, differentiable in anything.
    - `gradients(state, batch) -> (grads, buffers, metrics)`: of the trained parameters by name, detached, None where the loss does not
      reach, of the loss itself (never scaled); `buffers` as the forward left them, and with them the parameters that it wrote to.
    - `update(state, grads) -> (state, metrics)`: the optimizer alone: new `params` and `opt_state`, `step + 1`; what it reported.

    The step is their composition: `g, b, m = step.gradients(state, batch)`, then `s, more = step.update(state.replace(buffers=b), g)`,
    which gives `(s, {**m, **more})`. `combine` says how the parts become a step: one after the other, or as one graph. `examples` says how
    many examples a batch has, by which loops weigh plain metrics.

    A transform is a function `step -> step`: `dataclasses.replace(step, gradients=f)` is this step with other gradients. `gradients` come
    of a loss of their own, so one does not replace `loss` alone. A function that is put in is keyed (torch's generators are seeded from the
    state's key around it), and what it returns is detached and checked.

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
    examples: Callable[[Any], int | None] = rows.example_count

    def __post_init__(self) -> None:
        if isinstance(self.gradients, Gradients) and self.gradients.loss is not self.loss:
            raise TypeError(
                f"{self.name}: its gradients are those of another loss, and would stay so. Make the step anew with another loss_fn, or "
                "replace its gradients too"
            )
        changes, name = dict[str, Any](), self.name
        if not isinstance(self.gradients, (Gradients, Keyed)):
            changes["gradients"] = part = KeyedGradients("gradients", self.gradients, name)
            name = f"{part.title}({name})"
        if not isinstance(self.update, (Update, Keyed)):
            changes["update"] = part = KeyedUpdate("update", self.update, name)
            name = f"{part.title}({name})"
        for field, value in {**changes, "name": name, "__name__": name, "__qualname__": name}.items():
            object.__setattr__(self, field, value)

    def __call__(self, state: Any, batch: Any, /, *, owner: Owner | None = None) -> tuple[Any, Metrics]:
        return self.combine(self, state, [batch], owner)

    def several(self, state: Any, batches: list[Any], /, *, owner: Owner | None = None) -> tuple[Any, Metrics]:
        """A step on each of the batches, in one call; their metrics as those of one, folds also where it is one."""
        state, metrics = self.combine(self, state, batches, owner)
        return state, metrics if len(batches) > 1 else together([metrics], batches, [self.examples(batches[0])])

    @property
    def donates(self) -> bool:
        """Whether the update may write the new state over the old one: the optimizer's own can."""
        return isinstance(self.update, Update) and self.update.optimizer.donatable and self.combine.donates

    @property
    def looks_at_step_only(self) -> bool:
        return isinstance(self.gradients, Gradients) and isinstance(self.update, Update)

    @property
    def fuses(self) -> bool:
        return self.combine.fuses

    @property
    def optimizer_text(self) -> str:
        return repr(self.update.optimizer) if isinstance(self.update, Update) else ""

    @property
    def options_text(self) -> str:
        own = self.gradients.options() if isinstance(self.gradients, Gradients) else []
        return ", ".join([*own, *([self.combine.text] if self.combine.text else [])])

    def __repr__(self) -> str:
        return f"<{self.name}{', ' if self.options_text else ''}{self.options_text}>"


# --- put together -------------------------------------------------------------------------------------------------------


def each(
    call: Callable[[Any, Any], tuple[Any, Metrics]], state: Any, batches: list[Any], examples: Callable[[Any], int | None]
) -> tuple[Any, Metrics]:
    """`call(state, batch)` for one batch after the other; the metrics of several as those of one, weighed by `examples(batch)`."""
    if len(batches) == 1:
        return call(state, batches[0])
    seen: list[Metrics] = []
    for batch in batches:
        state, metrics = call(state, batch)
        seen.append(metrics)
    return state, together(seen, batches, list(map(examples, batches)))


def composed(step: TrainStep, state: Any, batch: Any, owner: Owner | None = None) -> tuple[Any, Metrics]:
    """What a step is."""
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
    if owner is not None:  # what was computed must not lie in what is written over now
        metrics, buffers = owner.share(metrics), owner.share(buffers)
        if not isinstance(step.gradients, Gradients):
            grads = owner.share(grads)
    state, more = update.updated(state, grads, buffers, owner)
    return state, {**metrics, **more} if more else metrics


def _unless(skipped: torch.Tensor, step: TrainStep, state: Any, grads: Any, metrics: Metrics) -> tuple[Any, Metrics]:
    """The update, or none where `skipped` is not 0, for who cannot wait for it: both, selected leaf by leaf."""
    (new, more), (still, _) = step.update(state, grads), step.update(state, dict.fromkeys(grads))
    params, opt_state = choose(skipped != 0, lambda: (still.params, still.opt_state), lambda: (new.params, new.opt_state))
    more["skipped"] = torch.maximum(skipped, torch.as_tensor(more.get("skipped", 0), dtype=skipped.dtype))
    return carried(new, params=params, opt_state=opt_state), {**metrics, **more}


def together(metrics: list[Metrics], batches: list[Any], examples: list[int | None]) -> Metrics:
    """The metrics of several steps, on these batches of so many examples, as those of one: all of them folds."""
    totals, shapes = dict[str, Any](), Shapes("fused steps")
    for values, batch, known in zip(metrics, batches, examples, strict=True):
        n = weight(known, batch, values)
        shapes.add(values, n)
        skipped = values.get("skipped")
        done = True if skipped is None else torch.as_tensor(skipped) == 0
        for name, value in values.items():
            if not hasattr(value, "merge"):  # a mean over examples, each element on its own; of an update that was not made there is none
                plain = to_accumulator_dtype(torch.as_tensor(value))
                value = folds.Mean(plain * n, torch.full_like(plain, n))
                if done is not True and name != "skipped":
                    value = folds.Mean(torch.where(done, value.total, 0), torch.where(done, value.weight, 0))
            totals[name] = totals[name].merge(value) if name in totals else value
    shapes.check()
    return totals


class Keyed:
    """A part that somebody put into a step: torch's generators are seeded around it, its reports are metrics.

    The seed is of the state's key, the step and the function's name, so that what two transforms draw is not the same; where one stands in
    itself, of how many are around it too.
    """

    def __init__(self, part: str, fn: Callable[..., Any], name: str) -> None:
        self.part, self.fn, self.name = part, fn, name
        self.label: str = getattr(fn, "__qualname__", type(fn).__qualname__)
        self.title = self.label.partition(".<locals>")[0]
        self._within = Surroundings(f"{name}: its {part}")
        self._guard = Guard(f"the {part} of {name}, {kind(fn)},")

    def __call__(self, state: Any, given: Any) -> Any:
        check_state(f"{self.name}: its {self.part}", state, given, "batch")
        marks = self._guard.look(state)
        within = _parts_at_work.get()
        token = _parts_at_work.set((*within, self.label))
        try:
            with self._within(state.rng, self.part, self.label, within.count(self.label), state.step) as reports:
                result = self.fn(state, given)
        finally:
            _parts_at_work.reset(token)
        self._guard.check(marks)
        return self.checked(result, state, reports)

    def checked(self, result: Any, state: Any, reports: dict[str, Any]) -> Any:
        raise NotImplementedError


#: The labels of the parts that are being called, outermost first.
_parts_at_work: ContextVar[tuple[str, ...]] = ContextVar("parts_at_work", default=())


class KeyedGradients(Keyed):
    def checked(self, result: Any, state: Any, reports: dict[str, Any]) -> Any:
        if not isinstance(result, tuple) or len(result) != 3 or not all(isinstance(each, Mapping) for each in result):
            raise TypeError(
                f"the gradients of {self.name} are a function of (state, batch) that returns (grads, buffers, metrics), three "
                f"dictionaries by name, and {kind(self.fn)} returned {kind(result)}"
            )
        grads, buffers, metrics = result
        if buffers.keys() - state.params.keys() != state.buffers.keys():
            missing, extra = (
                sorted(state.buffers.keys() - buffers.keys()),
                sorted(buffers.keys() - state.buffers.keys() - state.params.keys()),
            )
            raise ValueError(
                f"the gradients of {self.name}: {kind(self.fn)} returned other buffers than the state has: missing {missing}, unexpected "
                f"{extra}. They are what the forward made of state.buffers: return those of step.gradients, or state.buffers itself"
            )
        metrics = {name: detached_all(value) for name, value in reported(metrics, reports).items()}
        return {name: detached(grad) for name, grad in grads.items()}, tree.map(detached, buffers), metrics


class KeyedUpdate(Keyed):
    def __call__(self, state: Any, given: Any) -> Any:
        if not state.buffers.keys().isdisjoint(state.params):
            params, buffers = with_written(state.params, state.buffers)
            state = carried(state, params=params, buffers=buffers)
        return super().__call__(state, given)

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
