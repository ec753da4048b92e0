"""Optimizers, transforms and wrappers: pure functions `init` and `update`, and `chain`, which composes them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

from fnrun.core.key import Key
from fnrun.core.words import a, brief, called


class _Made:
    """Prints as the call that made it: `adamw(lr=0.001)`."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", called("fnrun.optim"))

    def __repr__(self) -> str:
        function = getattr(self, "update", None) or getattr(self, "wrap", None)
        return self.text or f"{type(self).__name__}({brief(function)})"  # pyright: ignore[reportAttributeAccessIssue]


class Init(Protocol):
    """`params -> state`: the state before the first update, whose structure never changes."""

    def __call__(self, params: Any, /) -> Any: ...


class Update(Protocol):
    """`(grads, state, params) -> (grads or params, state)`; the arguments are not written to.

    - `grads`: with the structure of `params`; None for a parameter that the loss does not reach, which keeps its value.
    - `key=None`: the source of randomness.
    - `step=None`: the training step, an int.
    """

    def __call__(self, grads: Any, state: Any, params: Any, /, *, key: Key | None = None, step: int | None = None) -> tuple[Any, Any]: ...


@dataclasses.dataclass(frozen=True, repr=False)
class Transform(_Made):
    """Changes gradients before an optimizer: `update(grads, state, params, *, key, step) -> (grads, state)`.

    - `parts=()`: the members of a chain.
    - `keyed=False`: it draws random numbers; a chain derives a key for it.
    - `donatable=False`: its results share no memory with its arguments; see `Optimizer`.
    """

    init: Init
    update: Update
    parts: tuple[Any, ...] = ()
    keyed: bool = False
    donatable: bool = False
    text: str = dataclasses.field(init=False, default="", compare=False)


@dataclasses.dataclass(frozen=True, repr=False)
class Optimizer(_Made):
    """`init(params) -> opt_state`, `update(grads, opt_state, params, *, key=None, step=None) -> (params, opt_state)`: pure functions.

    - `loss_scale=None`: `opt_state -> scale`, a scalar tensor. A step multiplies the loss by it, and divides the gradients.
    - `eval_params=None`: `(opt_state, params) -> params`, the weights to evaluate with (schedule-free).
    - `parts=()`: the members of a chain.
    - `donatable=False`: `update` neither reads its arguments after the kernels have run nor keeps them, so that a loop with `donate=True`
      may write over them. All optimizers here are donatable.
    - `keyed=True`: `update` uses its key.
    """

    init: Init
    update: Update
    loss_scale: Callable[[Any], Any] | None = None
    eval_params: Callable[[Any, Any], Any] | None = None
    parts: tuple[Any, ...] = ()
    donatable: bool = False
    keyed: bool = True
    text: str = dataclasses.field(init=False, default="", compare=False)


@dataclasses.dataclass(frozen=True, repr=False)
class Wrapper(_Made):
    """A function from optimizer to optimizer; in a chain it wraps all members after it."""

    wrap: Callable[[Optimizer], Optimizer]
    parts: tuple[Any, ...] = ()
    scales_loss: bool = False
    text: str = dataclasses.field(init=False, default="", compare=False)

    def __call__(self, optimizer: Optimizer) -> Optimizer:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"expected an Optimizer to wrap, not {a(type(optimizer).__name__)}: put transforms into a chain with it")
        return self.wrap(optimizer)


def chain(*parts: Any) -> Any:
    """Transforms from left to right, and at the end an optimizer; without an optimizer the chain is a transform.

    The state is the tuple of the members' states. Chaining is associative: a chain within a chain has the state and the bits of its
    members. `accumulate`, `apply_if_finite`, `lookahead`, `freeze_until` and `dynamic_loss_scale` wrap all members after them.

    Raises TypeError for an optimizer before the end, and for anything that is neither transform, optimizer nor wrapper. Raises ValueError
    for a transform before `dynamic_loss_scale`.

    >>> import torch
    >>> from fnrun import optim
    >>> optimizer = optim.chain(optim.clip_by_global_norm(1.0), optim.sgd(0.5))
    >>> params = {"x": torch.tensor([1.0, 1.0])}
    >>> state = optimizer.init(params)
    >>> params, state = optimizer.update({"x": torch.tensor([3.0, 4.0])}, state, params)
    >>> params["x"]
    tensor([0.7000, 0.6000])
    """
    flat = tuple(member for part in parts for member in (getattr(part, "parts", ()) or (part,)))
    for i, member in enumerate(flat):
        if not isinstance(member, (Transform, Optimizer, Wrapper)):
            raise TypeError(
                f"chain takes transforms and at the end an optimizer; argument {i + 1} is {a(type(member).__name__)}: {member!r}"
            )
        if isinstance(member, Optimizer) and i + 1 < len(flat):
            raise TypeError(
                f"the optimizer of a chain is its last member; member {i + 1} of {len(flat)} is one: it returns parameters, not gradients"
            )
    if len(flat) == 1:
        return flat[0]
    scaling = next((i for i, member in enumerate(flat) if getattr(member, "loss_scale", None) or getattr(member, "scales_loss", False)), 0)
    if any(isinstance(member, Transform) for member in flat[:scaling]):
        raise ValueError("dynamic_loss_scale comes first in a chain: a transform before it would see the gradients of the scaled loss")
    first = next((i for i, member in enumerate(flat) if isinstance(member, Wrapper)), None)
    if first is not None:
        if not isinstance(flat[-1], Optimizer):
            return Wrapper(lambda optimizer: chain(*flat, optimizer), flat)
        return dataclasses.replace(chain(*flat[:first], flat[first](chain(*flat[first + 1 :]))), parts=flat)
    if flat and isinstance(flat[-1], Optimizer):
        return _ending(flat)
    init, update = _sequence(flat)
    return Transform(init, update, flat, any(m.keyed for m in flat), all(m.donatable for m in flat))


def _sequence(transforms: tuple[Transform, ...]) -> tuple[Init, Update]:
    updates = [(transform.update, i if transform.keyed else None) for i, transform in enumerate(transforms)]

    def init(params: Any, /) -> tuple[Any, ...]:
        return tuple(transform.init(params) for transform in transforms)

    def update(grads: Any, state: Any, params: Any, /, *, key: Key | None = None, step: int | None = None) -> tuple[Any, tuple[Any, ...]]:
        states = []
        for (update, place), old in zip(updates, state, strict=False):  # a chain that ends in an optimizer keeps its state last
            member_key = key if place is None or key is None else key.fold_in("chain", place)
            grads, new = update(grads, old, params, key=member_key, step=step)
            states.append(new)
        return grads, tuple(states)

    return init, update


def _ending(members: tuple[Any, ...]) -> Optimizer:
    optimizer: Optimizer = members[-1]
    init_transforms, transform = _sequence(members[:-1])

    def init(params: Any, /) -> tuple[Any, ...]:
        return (*init_transforms(params), optimizer.init(params))

    def update(grads: Any, state: Any, params: Any, /, *, key: Key | None = None, step: int | None = None) -> tuple[Any, tuple[Any, ...]]:
        grads, states = transform(grads, state, params, key=key, step=step)
        params, last = optimizer.update(grads, state[-1], params, key=key, step=step)
        return params, (*states, last)

    return Optimizer(
        init,
        update,
        of_inner(optimizer.loss_scale, lambda state: state[-1]),
        of_inner(optimizer.eval_params, lambda state: state[-1]),
        members,
        all(member.donatable for member in members),
        any(member.keyed for member in members),
    )


def of_inner(fn: Callable[..., Any] | None, inner: Callable[[Any], Any]) -> Callable[..., Any] | None:
    """`fn(state, ...)` for a state that holds that of `fn` as `inner(state)`."""
    return None if fn is None else lambda state, *args: fn(inner(state), *args)
