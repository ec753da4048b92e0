"""Steps: pure functions `(state, batch) -> (state, metrics)`, made of a module, a loss and an optimizer, or written by hand."""

from __future__ import annotations

import functools
import itertools
import random
import sys
import warnings
import weakref
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import optree
import torch
from torch import nn

from fnrun import metrics as folds, tree
from fnrun.compiled import Compiled, NoKey
from fnrun.counts import count
from fnrun.donation import Lease, own, unlisted
from fnrun.inplace import Guard
from fnrun.metrics.base import wide
from fnrun.reports import collect
from fnrun.rng import Key, Scope
from fnrun.shell import Shell
from fnrun.state import S, TrainState, check_apart, check_model, check_optimizer, is_state, no_state, weights_of
from fnrun.undisturbed import undisturbed
from fnrun.watch import described, leaves as leaves_of
from fnrun.words import a, bindable, kind, uncalled

if TYPE_CHECKING:
    from fnrun.optim import Optimizer

Metrics = dict[str, Any]


class Step(Protocol):
    """What loops turn: `(state, batch) -> (state, metrics)`, pure: the outputs are a function of the arguments alone, which stay as they are."""

    def __call__(self, state: Any, batch: Any, /) -> tuple[Any, Metrics]: ...


class EvalStep(Protocol):
    """`(state, batch) -> metrics`: it has no way to change the state."""

    def __call__(self, state: Any, batch: Any, /) -> Metrics: ...


class _Surroundings:
    """What a step runs in: torch's ambient generators seeded from its key and put back afterwards, its reports collected.

    In the first calls it tells a step that it moves Python's or NumPy's generator, and puts them back. Later calls go unwatched: a look
    costs 100 us.
    """

    WATCHED = 3

    def __init__(self, name: str, host_random: bool) -> None:
        self.name, self.host, self.left = name, host_random, 0 if host_random else self.WATCHED

    def __call__(self, key: Key, *data: int | str) -> _Within:
        return _Within(self, key.fold_path(*data))

    def look(self) -> Any:
        self.left -= 1
        return random.getstate(), np.random.get_state(legacy=False), len(sys.modules)

    def compare(self, before: Any) -> None:
        python, numpy, modules = before
        if len(sys.modules) != modules:
            return  # some draw as they are imported
        moved_python, moved_numpy = random.getstate() != python, not tree.equal(np.random.get_state(legacy=False), numpy)
        names = [name for name, moved in (("Python", moved_python), ("NumPy", moved_numpy)) if moved]
        if names:
            random.setstate(python)
            np.random.set_state(numpy)
            warnings.warn(
                f"{self.name} draws from the global generator of {' and '.join(names)}, which is not keyed by the state: two calls differ and "
                "a resumed run is another run. Use torch's, or make the step with host_random=True",
                stacklevel=4,
            )


class _Within(Scope):
    """One call in its surroundings: `with` gives the reports, a dictionary that fills up."""

    __slots__ = ("_before", "_collect", "_surroundings")

    def __init__(self, surroundings: _Surroundings, path: bytes) -> None:
        super().__init__(path, surroundings.host)
        self._surroundings = surroundings

    @undisturbed
    def __enter__(self) -> dict[str, Any]:
        super().__enter__()
        try:
            self._before = self._surroundings.look() if self._surroundings.left else None  # under the scope's lock, which keeps others out
            self._collect = collect()
            return self._collect.__enter__()
        except BaseException:
            self._put_back()
            raise

    @undisturbed
    def __exit__(self, *exc: object) -> None:
        try:
            self._collect.__exit__()
            if self._before is not None:
                self._surroundings.compare(self._before)
        finally:
            super().__exit__()


class Traits(NamedTuple):
    """What loops may make use of in a step."""

    #: It takes a `lease=`, with which it writes the new state over the old one.
    donates: bool = False
    #: Where in the program the state stands is no input of it, but for the count of steps.
    looks_at_step_only: bool = False
    #: The function `(state, batches, lease=lease)` that does several of these steps in one compiled call.
    fused: Callable[..., tuple[Any, Metrics]] | None = None
    #: In words, with its schedules; '' where a step has none that is known.
    optimizer: str = ""


#: Functions that are known to be steps, and to hold no loops that belong to the program around them. A registry and not an attribute, which
#: `functools.wraps` would give to a wrapper that may need the old state.
_steps: weakref.WeakKeyDictionary[Any, Traits] = weakref.WeakKeyDictionary()


def is_step(fn: Any) -> bool:
    """Whether `fn` was made by `fnrun.step` or one of the makers here."""
    try:
        return fn in _steps
    except TypeError:
        return False


def traits(fn: Any) -> Traits:
    """What is known of a step; nothing of any other function."""
    return _steps[fn] if is_step(fn) else Traits()


def step(fn: Callable[[S, Any], tuple[S, Metrics]] | None = None, *, host_random: bool = False) -> Any:
    """Make a hand-written `(state, batch) -> (state, metrics)` a lawful training step.

    Within, torch's ambient generators are seeded from `state.rng.fold_in("train", state.step)` (with `host_random` Python's and NumPy's too)
    and put back afterwards; what `fnrun.report` is given joins the metrics; tensors are detached; `state.step` goes up by one.

    >>> @step
    ... def add_noise(state, batch):
    ...     noisy = {name: p + torch.randn_like(p) for name, p in state.params.items()}
    ...     return state.replace(params=noisy), {"size": len(batch)}
    >>> state = TrainState.create(nn.Linear(2, 1))
    >>> once, twice = add_noise(state, [1, 2])[0], add_noise(state, [1, 2])[0]
    >>> tree.equal(once, twice), once.step
    (True, 1)
    """
    if fn is None:
        return lambda fn: step(fn, host_random=host_random)
    _check_function("step", fn, 2, "(state, batch)", "(state, metrics)")
    inner = fn

    name = getattr(fn, "__qualname__", repr(fn))
    within, guard = _Surroundings(name, host_random), Guard(f"the step {name}")

    @functools.wraps(fn)
    def lawful(state: Any, batch: Any) -> tuple[Any, Metrics]:
        marks = guard.look(state)
        try:
            count = state.step
            surroundings = within(state.rng, "train", count)
        except AttributeError:
            raise no_state(name, state, batch, "batch") from None
        with surroundings as reports:
            result: Any = inner(state, batch)
        guard.check(marks)
        if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[1], Mapping):
            raise TypeError(f"{name} returned {type(result).__name__}: a step returns (state, metrics), metrics a dict")
        new, metrics = result
        if not hasattr(new, "position") or isinstance(new, type):
            raise TypeError(
                f"{name} returned {kind(new)} in place of a state: a step returns (state, metrics), such as state.replace(...), {{}}"
            )
        metrics = {name: _detach_all(value) for name, value in _with(metrics, reports).items()}
        new = tree.map(_detach, new).replace(position=new.position)  # the same object: whether a loop ran is told by it
        return new.replace(step=count + 1), metrics

    _steps[lawful] = Traits()
    return lawful


def _with(metrics: Mapping[str, Any], reports: dict[str, Any]) -> Metrics:
    """The metrics, and the reports of other names behind them."""
    return {**metrics, **{name: value for name, value in reports.items() if name not in metrics}}


def _detach(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, torch.Tensor) and leaf.requires_grad else leaf


def _detach_all(value: Any) -> Any:
    return _detach(value) if isinstance(value, (torch.Tensor, float, int)) else tree.map(_detach, value)


# --- gradients ---------------------------------------------------------------------------------------------------------


def value_and_grad(fn: Callable[[Any], Any], *, has_aux: bool = False) -> Callable[[Any], tuple[Any, Any]]:
    """The function `params -> (fn(params), gradient of fn at params)`; with `has_aux`, `fn` returns `(value, aux)`.

    `params` is a pytree of tensors; the gradient has its structure, with None for a tensor that the value does not depend on. Values and
    gradients are detached. Raises ValueError where the value is no scalar or depends on none of the tensors.

    >>> value_and_grad(lambda p: (p["x"] ** 2).sum())({"x": torch.tensor([1.0, 3.0])})
    (tensor(10.), {'x': tensor([2., 6.])})
    """

    _check_function("value_and_grad", fn, 1, "fn(params)", "a scalar")

    def wrapped(params: Any) -> tuple[Any, Any]:
        leaves, spec = optree.tree_flatten(params)
        leaves = [p.detach().requires_grad_() for p in leaves]
        with torch.enable_grad():
            result = fn(optree.tree_unflatten(spec, leaves))
            value = result[0] if has_aux else result
            grads = _grad(value, leaves, value)
        value = value.detach()
        grads = optree.tree_unflatten(spec, grads)
        return ((value, tree.map(_detach, result[1])), grads) if has_aux else (value, grads)

    return wrapped


def _grad(loss: Any, leaves: list[torch.Tensor], scaled: Any, *, accumulate: bool = False) -> list[torch.Tensor | None]:
    """The gradients of `scaled`; with `accumulate` by way of the leaves' `grad`, where backwards within the backward put theirs too."""
    if isinstance(loss, torch.Tensor) and loss.is_complex():
        raise ValueError("a loss is a real number, this one is complex: take loss.abs().square(), or its real part")
    if not isinstance(loss, torch.Tensor) or loss.ndim:
        what = (
            f"a tensor of shape {tuple(loss.shape)}"
            if isinstance(loss, torch.Tensor)
            else a(type(loss).__name__)
            if loss is not None
            else "None"
        )
        hint = "take its mean or sum" if isinstance(loss, torch.Tensor) else "loss_fn returns it, or (loss, metrics), as it was computed"
        raise ValueError(f"a loss is a scalar tensor, this one is {what}: {hint}")
    if not loss.requires_grad:
        raise ValueError("the loss depends on no trained parameter: was it detached, or made under torch.no_grad() or inference_mode()?")
    if accumulate:
        _backward((scaled,), (_one(scaled),), False, False, (), True, accumulate_grad=True)
        return [leaf.grad for leaf in leaves]
    # What `torch.autograd.grad` calls in the end; half of its time goes into what one scalar does not need.
    return _backward((scaled,), (_one(scaled),), False, False, tuple(leaves), True, accumulate_grad=False)


def _one(like: torch.Tensor) -> torch.Tensor:
    """The gradient of a scalar with respect to itself: one tensor for all steps, as long as no backward hook has written to it."""
    kind = like.dtype, like.device
    one = _ones.get(kind)
    if one is None or one._version:
        one = _ones[kind] = torch.ones((), dtype=like.dtype, device=like.device)
    return one


_ones: dict[Any, torch.Tensor] = {}
_backward: Any = torch.autograd.Variable._execution_engine.run_backward  # pyright: ignore[reportAttributeAccessIssue]


def make_train_step(
    model: nn.Module,
    loss_fn: Callable[[nn.Module, Any], Any],
    optimizer: Optimizer,
    *,
    accumulate: int = 1,
    precision: str | None = None,
    compile: bool = False,
    host_random: bool = False,
) -> Step:
    """The training step of `model`: loss, gradient, update, as a pure function `(state, batch) -> (state, metrics)`.

    `loss_fn(model, batch)` returns a scalar loss, or `(loss, metrics)`; it calls `model` as usual, whose tensors are the state's for that
    time. The metrics are `loss`, those of `loss_fn` and what was reported (`fnrun.report`), tensors that nobody has waited for.

    - Submodules run in the train/eval modes that they have now. Buffers (batch statistics) come back in the new state.
    - A parameter with `requires_grad=False` is not trained; one that the loss does not reach is left alone, as in torch.
    - `accumulate=n` cuts the batch into n micro-batches (fewer if it has fewer examples) and takes the mean gradient, weighted by their
      examples: n times less memory for activations.
    - `precision="bf16"` or `"fp16"` runs `loss_fn` under autocast; parameters keep their dtype. fp16 wants `optim.dynamic_loss_scale`.
    - `compile` makes the whole step one graph (inductor), for each shape of the batch one, static: eager's numbers up to rounding, and the
      same bits from run to run. What depends on a tensor's value in Python cannot be captured: then it runs as without, with a warning.
    - `host_random` seeds Python's and NumPy's generators too (100 us a step), for a model that draws from them.

    Raises ValueError for a model without trained parameters, a loss that is no scalar, a state of another model.

    >>> from fnrun import optim
    >>> model = nn.Linear(3, 1)
    >>> train_step = make_train_step(model, lambda model, x: model(x).square().mean(), optim.sgd(0.1))
    >>> state = TrainState.create(model, optim.sgd(0.1))
    >>> state, metrics = train_step(state, torch.ones(4, 3))
    >>> state.step, sorted(metrics)
    (1, ['loss', 'lr'])
    """
    check_model("make_train_step", model)
    _check_function("make_train_step", loss_fn, 2, "loss_fn(model, batch)", "a scalar loss, or (loss, metrics)")
    check_optimizer("make_train_step", optimizer)
    if not isinstance(compile, bool):
        raise TypeError(f"make_train_step: compile= is True or False, and not {kind(compile)}")
    check_apart("make_train_step", model)
    name = f"train_step({type(model).__name__})"
    shell = Shell(model, name, watched=_Surroundings.WATCHED)
    if not shell.trained:
        raise ValueError(f"{shell.name} has no parameter to train: all have requires_grad=False, or there are none")
    accumulate = count("make_train_step: accumulate", accumulate)
    trained, places = shell.trained, {name: i for i, name in enumerate(shell.params)}
    indices, whole = [places[name] for name in trained], len(trained) == len(shell.params)
    autocast = _autocast(precision, shell.device_type)
    shell.check_hooks()
    _warn_of_eval_mode(model, name)
    within = _Surroundings(name, host_random)
    known: list[Any] = []  # structures of optimizer states that this step can go on with
    given = 0  # the id of the one that it made last, which needs no look
    guard, culprit = Guard(name), functools.partial(_culprit, optimizer, name)

    def gradients_of(memory: Any, params: Any, buffers: Any, batch: Any) -> tuple[Any, Any, dict[str, torch.Tensor], Metrics]:
        """The gradients, the parameters that they are to change (others than those given where the forward wrote to some), buffers, metrics."""
        tensors = shell.tensors("params", params)
        leaves = [tensors[i].detach().requires_grad_() for i in indices]
        if whole:
            tensors = leaves
        else:
            for i, leaf in zip(indices, leaves, strict=True):
                tensors[i] = leaf
        shell.hook(indices, leaves)

        def forward_and_backward() -> tuple[Any, Metrics]:  # both with the state's tensors: a checkpointed part runs again in the backward
            if autocast is None:
                result = loss_fn(model, batch)
            else:
                with autocast():
                    result = loss_fn(model, batch)
            loss, metrics = (result, {}) if isinstance(result, torch.Tensor) else _loss_and_metrics(result)
            if shell.first.watching and any(leaf.grad is not None for leaf in leaves):
                raise ValueError(
                    f"{name}: the loss calls backward() itself, and a step takes the gradient of what loss_fn returns: add that loss to it, or "
                    "take gradients within by torch.autograd.grad"
                )
            scaled = loss if optimizer.scale_loss is None else optimizer.scale_loss(memory, loss)
            if shell.first.watching and isinstance(loss, torch.Tensor):
                shell.first.check_graph(loss, leaves, batch)
            grads = _grad(loss, leaves, scaled, accumulate=shell.first.reentrant)
            if grads[0] is None and all(grad is None for grad in grads):
                raise ValueError(
                    f"{name}: the loss reaches no trained parameter of {shell.name}: does it call the model that it is given? "
                    f"It has a gradient to {', '.join(map(described, leaves_of(loss)))}"
                )
            if shell.first.watching:
                _check_dense(name, dict(zip(trained, grads, strict=True)))
            return grads, {"loss": loss, **metrics}

        (grads, metrics), buffers, written = shell.run(forward_and_backward, tensors, buffers, train=True)
        return grads, {**params, **written} if written else params, buffers, metrics

    def gradients(params: Any, memory: Any, batch: Any, buffers: Any) -> tuple[dict[str, Any], Any, dict[str, torch.Tensor], Metrics]:
        with _NOTHING if torch.is_grad_enabled() else torch.enable_grad():
            if accumulate == 1:
                grads, params, buffers, metrics = gradients_of(memory, params, buffers, batch)
            else:
                grads, params, buffers, metrics = _accumulated(functools.partial(gradients_of, memory), params, buffers, batch, accumulate)
        return dict(zip(trained, grads, strict=True)), params, buffers, metrics

    def eager(state: TrainState, batch: Any, lease: Lease | None) -> tuple[TrainState, Metrics]:
        count, memory = state.step, state.opt_state
        with within(state.rng, "train", count) as reports:
            grads, every, buffers, metrics = gradients(state.params, memory, batch, state.buffers)
            metrics = {name: _detach_all(value) for name, value in _with(metrics, reports).items()}
            params = every if whole else {name: every[name] for name in trained}
            key = state.rng.fold_in("optimizer", count) if optimizer.keyed else None
            if lease is None:
                marks = guard.look({"params": params, "opt_state": memory})
                params, memory = optimizer.update(grads, memory, params, key=key, step=count)
                guard.check(marks, culprit)
            else:
                if lease.grants(state):  # what was computed must not lie in what is written over now
                    metrics, buffers = ({name: lease.apart(value) for name, value in each.items()} for each in (metrics, buffers))
                by, state = f"step {count} ({name})", unlisted(state)
                params, memory = lease.update(by, optimizer.update, grads, memory, params, key=key, step=count)
        params = params if whole else {**every, **params}
        if lease is not None:
            lease.settle(params, memory, buffers)
        metrics = _with(metrics, {name: _detach_all(value) for name, value in reports.items()})  # and those of the optimizer
        return state.replace(params=params, buffers=buffers, opt_state=memory, step=count + 1), metrics

    def several(given: Any, kept: Any, batches: list[Any], count: Any) -> tuple[Any, Metrics]:
        """Steps one after the other, for the compiler: `given` are trained parameters and optimizer state, `kept` buffers and frozen ones."""
        (params, memory), (buffers, frozen), seen = given, kept, []
        for i, batch in enumerate(batches):
            with collect() as reports:
                grads, every, buffers, metrics = gradients({**params, **frozen}, memory, batch, buffers)
                params, frozen = ({name: every[name] for name in names} for names in (params, frozen))
                params, memory = optimizer.update(grads, memory, params, key=_UNKEYED, step=count + i)
            seen.append(_with(metrics, reports))
        return ((params, memory), (buffers, frozen)), seen[0] if len(seen) == 1 else _together(seen, batches)

    graphs = Compiled(several, name) if compile else None

    def compiled(state: TrainState, batches: list[Any], lease: Lease | None) -> tuple[TrainState, Metrics] | None:
        assert graphs is not None
        shell.check()
        count, params = state.step, {name: state.params[name] for name in trained}
        kept = state.buffers, {} if whole else {name: p for name, p in state.params.items() if name not in params}
        call = graphs((params, state.opt_state), kept, batches, count, inplace=lease is not None)
        if call is None:
            return None
        scope = state.rng.scope("train", count)
        if lease is None:
            marks = guard.look({"params": state.params, "opt_state": state.opt_state})
            with scope:
                ((params, memory), (buffers, frozen)), metrics = call()
            guard.check(marks, culprit)
        else:
            lease.grants(state)
            by, state = f"step {count + len(batches) - 1} ({name})", unlisted(state)
            with scope:
                ((params, memory), (buffers, frozen)), metrics = lease.update(by, lambda: call.owning(own)())
        params = params if whole else {**state.params, **frozen, **params}
        if lease is not None:
            lease.settle(params, memory, buffers)
        return state.replace(params=params, buffers=buffers, opt_state=memory, step=count + len(batches)), metrics

    def rehearse(state: TrainState, batch: Any) -> None:
        """The first calls without the compiler, for it sees only what a call computes; they are thrown away."""
        while shell.first.left:
            with within(state.rng, "train", state.step):
                gradients(state.params, state.opt_state, batch, state.buffers)

    def check(state: Any, batch: Any) -> None:
        """Raise where this is no state, or one whose optimizer state is another optimizer's."""
        if not is_state(state) or not hasattr(state, "opt_state"):
            raise no_state(name, state, batch, "batch")
        params, memory = state.params, state.opt_state
        structure = optree.tree_structure(memory)
        if structure not in known:
            _remembered(name, optimizer, {name: params[name] for name in trained if name in params}, memory)
            known.append(structure)

    def steps_over(state: TrainState, batches: list[Any], lease: Lease | None) -> tuple[TrainState, Metrics]:
        nonlocal given
        if id(getattr(state, "opt_state", None)) != given:
            check(state, batches[0])
        result = stepped(state, batches, lease)
        given = id(result[0].opt_state)
        return result

    def stepped(state: TrainState, batches: list[Any], lease: Lease | None) -> tuple[TrainState, Metrics]:
        if graphs is not None:
            rehearse(state, batches[0])
        if graphs is None or graphs.reason is not None:
            return eager(state, batches[0], lease)
        if (result := compiled(state, batches, lease)) is not None:
            return result
        result = eager(state, batches[0], lease)  # first, for what it raises is the step's own and no matter of the compiler
        warnings.warn(f"{name} is not compiled and goes on without: {graphs.reason}", stacklevel=3)
        return result

    def train_step(state: TrainState, batch: Any, *, lease: Lease | None = None) -> tuple[TrainState, Metrics]:
        return steps_over(state, [batch], lease)

    def fused_steps(state: TrainState, batches: list[Any], *, lease: Lease | None = None) -> tuple[TrainState, Metrics]:
        nonlocal given
        if len(batches) > 1 and graphs is not None and graphs.reason is None and _alike(batches):
            if id(getattr(state, "opt_state", None)) != given:
                check(state, batches[0])
            rehearse(state, batches[0])
            result = compiled(state, batches, lease)
            if result is not None:
                given = id(result[0].opt_state)
                return result
            warnings.warn(f"{name} is not compiled and goes on without: {graphs.reason}", stacklevel=3)
        seen: list[Metrics] = []
        for batch in batches:
            state, metrics = steps_over(state, [batch], lease)
            seen.append(metrics)
        return state, _together(seen, batches)

    train_step.__qualname__ = train_step.__name__ = name
    _steps[train_step] = Traits(
        optimizer.donatable, looks_at_step_only=True, fused=fused_steps if compile else None, optimizer=repr(optimizer)
    )
    return train_step


def _culprit(optimizer: Optimizer, name: str, path: str) -> str:
    """Which part of an optimizer writes to this leaf, as far as the leaf tells."""
    field, _, rest = path.partition("/")
    place, parts = rest.partition("/")[0], getattr(optimizer, "parts", ())
    if field == "opt_state" and place.isdecimal() and int(place) < len(parts):
        parts = (parts[int(place)],)
    named = [getattr(update, "__qualname__", repr(update)) for part in parts or (optimizer,) if (update := getattr(part, "update", None))]
    return f"{name}: the optimizer ({', '.join(named)})"


def _warn_of_eval_mode(model: nn.Module, name: str) -> None:
    """Warn of a model that was handed over in eval mode, as loaded ones often are, where that makes a difference in training."""
    if not model.training and (kinds := {type(m).__name__ for m in model.modules() if not m.training and _minds(m)}):
        warnings.warn(
            f"{name}: the model is in eval mode, and so it is trained: {', '.join(sorted(kinds))} work as in evaluation (no dropout, batch "
            "statistics as they are). Call model.train() before the step is made; to keep parts as they are, put those in eval mode after it",
            stacklevel=3,
        )


def _minds(module: nn.Module) -> bool:
    """Whether a module's forward looks at its mode, and has a rate of dropout other than 0 if it has one."""
    code = getattr(getattr(type(module), "forward", None), "__code__", None)
    if code is None or "training" not in code.co_names or type(module).__module__ == "torch.nn.modules.transformer":
        return False
    rate = getattr(module, "p", getattr(module, "dropout", None))
    return not isinstance(rate, (int, float)) or rate > 0


_NOTHING = nullcontext()
_UNKEYED: Any = NoKey()


def _together(metrics: list[Metrics], batches: list[Any]) -> Metrics:
    """The metrics of several steps as those of one: all of them folds."""
    totals: dict[str, Any] = {}
    for values, batch in zip(metrics, batches, strict=True):
        for name, value in values.items():
            if not hasattr(value, "merge"):  # a mean over examples, each element on its own
                plain, examples = wide(torch.as_tensor(value)), folds.examples(batch)
                value = folds.Mean(plain * examples, torch.full_like(plain, examples))
            totals[name] = totals[name].merge(value) if name in totals else value
    return totals


def _alike(batches: list[Any]) -> bool:
    """Whether the batches have the same structure and shapes."""
    return len({(spec, *(leaf.shape if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves)) for leaves, spec in map(optree.tree_flatten, batches)}) == 1  # fmt: skip


def _check_dense(who: str, grads: Mapping[str, Any]) -> None:
    """Raise ValueError for gradients that are sparse."""
    sparse = [name for name, grad in grads.items() if grad is not None and grad.layout != torch.strided]
    if sparse:
        raise ValueError(
            f"{who}: the gradient of {', '.join(sparse)} is sparse, and optimizers here take dense ones: make the layer with sparse=False "
            "(nn.Embedding, nn.EmbeddingBag, functional.embedding)"
        )


def _check_function(who: str, function: Any, arguments: int, call: str, returns: str) -> None:
    """Raise TypeError where this is no function of the user's that can be called so."""
    if isinstance(function, type):
        hint = ": a class is not called by it"
    elif uncalled(function) is not None:
        hint = ", which is of another kind"
    elif type(function).__module__ == "torch.nn.modules.loss" or getattr(function, "__module__", "") == "torch.nn.functional":
        hint = ", which takes outputs and targets: lambda model, batch: criterion(model(batch[0]), batch[1])"
    elif not callable(function):
        hint = ""
    elif not bindable(function, *range(arguments)):
        hint = ", which takes other arguments"
    else:
        return
    raise TypeError(f"{who} takes a function, {call} -> {returns}, and not {kind(function)}{hint}")


def _remembered(who: str, optimizer: Optimizer, params: dict[str, torch.Tensor], opt_state: Any) -> None:
    """Raise ValueError where the state does not hold what `optimizer` remembers of `params`."""
    fresh = optimizer.init(params)
    wanted, held = tree.paths({"opt_state": fresh}), tree.paths({"opt_state": opt_state})
    if wanted != held:
        missing, extra = [p for p in wanted if p not in held][:5], [p for p in held if p not in wanted][:5]
        raise ValueError(
            f"{who}: the state's opt_state is not that of this optimizer and these trained parameters: missing {missing}, unexpected {extra}. "
            f"{'It was created without an optimizer. ' if opt_state is None else ''}Create the state with the same optimizer, and freeze parameters before both; to go on with another optimizer, "
            "state.replace(opt_state=optimizer.init(state.params))"
        )


def _loss_and_metrics(result: Any) -> tuple[Any, Metrics]:
    if not isinstance(result, tuple):
        return result, {}
    if len(result) != 2 or not isinstance(result[1], Mapping):
        raise ValueError("loss_fn returns a loss, or (loss, metrics) with metrics a dict of names and values")
    if "loss" in result[1]:
        raise ValueError("loss_fn: 'loss' is the name of the loss itself; call the metric something else")
    loss, metrics = result
    return loss, dict(metrics)


def _autocast(precision: str | None, device_type: str) -> Callable[[], Any] | None:
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    if precision is None:
        return None
    if precision not in dtypes:
        raise ValueError(f"precision is None, 'bf16' or 'fp16', not {precision!r}")
    return lambda: torch.autocast(device_type, dtypes[precision])


def _accumulated(gradients: Callable[..., Any], params: Any, buffers: Any, batch: Any, pieces: int) -> tuple[list[Any], Any, Any, Metrics]:
    examples = folds.examples(batch)
    total: list[Any] = []
    totals: Any = None
    for micro in _micro_batches(batch, min(pieces, examples), examples):
        size = folds.examples(micro)
        with collect() as reports:
            grads, params, buffers, values = gradients(params, buffers, micro)
        values = _with(values, reports)
        weight = size / examples
        scaled = [None if g is None else g * weight for g in grads]
        total = scaled if not total else [a if b is None else b if a is None else a + b for a, b in zip(total, scaled, strict=True)]
        totals = folds.fold(totals, {name: _detach_all(value) for name, value in values.items()}, size)
    totals = folds.settled(totals)
    means = {name: value for name, value in folds.compute(totals).items() if name in totals.names and name not in totals.folds}
    return total, params, buffers, {**means, **totals.folds}


def _micro_batches(batch: Any, pieces: int, examples: int) -> list[Any]:
    """The batch cut along its examples: tensors and arrays of that length, and lists with an entry for each example."""
    edges = [examples * i // pieces for i in range(pieces + 1)]

    def entries(value: Any) -> bool:
        return isinstance(value, list) and len(value) == examples and not any(isinstance(v, (torch.Tensor, np.ndarray)) for v in value)

    def cut(leaf: Any, start: int, end: int) -> Any:
        whole = isinstance(leaf, (torch.Tensor, np.ndarray)) and leaf.ndim and len(leaf) == examples
        return leaf[start:end] if whole or entries(leaf) else leaf

    return [optree.tree_map(lambda leaf, a=a, b=b: cut(leaf, a, b), batch, is_leaf=entries) for a, b in itertools.pairwise(edges)]


# --- evaluation --------------------------------------------------------------------------------------------------------


def make_eval_step(
    model: nn.Module,
    metric_fn: Callable[[nn.Module, Any], Any],
    *,
    weights: str | Callable[[Any], Any] = "params",
    precision: str | None = None,
    host_random: bool = False,
) -> EvalStep:
    """The evaluation step `(state, batch) -> metrics`, in eval mode and without gradients.

    `metric_fn(model, batch)` returns a dict of metrics, or what a `loss_fn` returns. `weights` says whose: the state's own (`"params"`), those
    that a hook remembers (its name, as `"ema"`), or a function of the state that returns `params` or `(params, buffers)`.
    Randomness within is keyed by the training step and the batch's place in the pass; `host_random` as in `make_train_step`.
    """
    check_model("make_eval_step", model)
    _check_function("make_eval_step", metric_fn, 2, "metric_fn(model, batch)", "a dict of metrics, or a loss")
    run = _evaluation(model, metric_fn, weights, precision, host_random)

    def eval_step(state: Any, batch: Any) -> Metrics:
        result, reports = run(state, batch)
        if not isinstance(result, Mapping):
            loss, metrics = _loss_and_metrics(result)
            result = {"loss": loss, **metrics}
        return _with(result, reports)

    eval_step.__qualname__ = eval_step.__name__ = f"eval_step({type(model).__name__})"
    _steps[eval_step] = Traits()
    return eval_step


def make_predict_step(
    model: nn.Module,
    predict_fn: Callable[[nn.Module, Any], Any],
    *,
    weights: str | Callable[[Any], Any] = "params",
    precision: str | None = None,
    host_random: bool = False,
) -> Callable[[Any, Any], Any]:
    """The prediction step `(state, batch) -> outputs`: any pytree that `predict_fn(model, batch)` returns; else as `make_eval_step`."""
    check_model("make_predict_step", model)
    _check_function("make_predict_step", predict_fn, 2, "predict_fn(model, batch)", "outputs")
    run = _evaluation(model, predict_fn, weights, precision, host_random)

    def predict_step(state: Any, batch: Any) -> Any:
        return run(state, batch)[0]

    predict_step.__qualname__ = predict_step.__name__ = f"predict_step({type(model).__name__})"
    _steps[predict_step] = Traits()
    return predict_step


def _evaluation(
    model: nn.Module, fn: Callable[[nn.Module, Any], Any], weights: str | Callable[[Any], Any], precision: str | None, host: bool
) -> Callable[[Any, Any], tuple[Any, dict[str, Any]]]:
    if not isinstance(weights, str) and not callable(weights):
        named = getattr(weights, "name", None)
        hint = f": the name of the hook, weights={named!r}" if isinstance(named, str) else ""
        raise TypeError(f"weights= takes 'params', a hook's name or a function of the state, and not {kind(weights)}{hint}")
    name = f"the evaluation of {type(model).__name__}"
    shell = Shell(model, name, watched=_Surroundings.WATCHED)
    within = _Surroundings(name, host)
    autocast = _autocast(precision, shell.device_type) or nullcontext

    def run(state: Any, batch: Any) -> tuple[Any, dict[str, Any]]:
        try:
            frames, _ = state.position.frames, state.rng
        except AttributeError:
            raise no_state(name, state, batch, "batch") from None
        params, buffers = weights_of(state, weights)
        place = frames[-1].ticks if frames else 0
        with within(state.rng, "eval", state.step, place) as reports, torch.no_grad(), autocast():
            outputs, _, _ = shell.run(lambda: fn(model, batch), shell.tensors("params", params), buffers, train=False)
        return outputs, reports

    return run


# --- transformers ------------------------------------------------------------------------------------------------------


def skip_nonfinite(step: Step) -> Step:
    """`step`, but an update after which the loss or a parameter is not finite does not happen: all but `state.step` stays as it was.

    The step's metrics are then `{"skipped": 1.0}` alone, so that no NaN reaches a mean. It waits for the device at each step.
    It goes around a step and inside a loop; around a loop it is refused (TypeError), for what loops keep cannot be taken back.
    """

    _check_function("skip_nonfinite", step, 2, "step(state, batch)", "(state, metrics)")

    @functools.wraps(step)
    def wrapped(state: Any, batch: Any) -> tuple[Any, Metrics]:
        new, metrics = step(state, batch)
        if new.position is not state.position:
            raise TypeError("skip_nonfinite goes around a step, inside the loop: epoch_loop(skip_nonfinite(step))")
        tensors = [t for t in (metrics["loss"], *new.params.values()) if t.is_floating_point() or t.is_complex()]
        if all(bool(torch.isfinite(t).all()) for t in tensors):
            return new, {**metrics, "skipped": 0.0}
        return state.replace(step=new.step), {"skipped": 1.0}

    if is_step(step):
        _steps[wrapped] = Traits(optimizer=traits(step).optimizer)
    return wrapped
