"""The training state: everything that the next step depends on, as one immutable pytree."""

from __future__ import annotations

import dataclasses
import functools
import operator
import sys
from collections.abc import Callable, Mapping
from typing import Any, Protocol, Self, TypeVar

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from fnrun.donation import Donatable, fields
from fnrun.rng import Key
from fnrun.tree import struct


@struct
class Cursor:
    """Where a data stream stands: the next batch is `batch` of pass `epoch`.

    `(epoch, n)` with n the last batch's successor is written `(epoch + 1, 0)`. `source` says what the stream is made of, in words
    (rows, batch size, a digest of the content): in other data the same position would mean other rows.
    `memo` is what a stream that cannot compute its batches from a position says of itself (`data.stateful`).
    """

    epoch: int = 0
    batch: int = 0
    source: str = ""
    memo: Any = None


@struct
class Frame:
    """An open loop: its kind and path, its finished ticks, the totals of its metrics, what its observers fold, and a sequence's member at work."""

    loop: str
    ticks: int = 0
    totals: Any = None
    folds: dict[str, Any] = dataclasses.field(default_factory=dict)
    member: str | None = None


@struct
class Position:
    """Where the program stands: the frames of the open loops, outermost first, and each stream's cursor.

    `ticks` counts the finished ticks of all loops over data, evaluation included.
    """

    frames: tuple[Frame, ...] = ()
    streams: dict[str, Cursor] = dataclasses.field(default_factory=dict)
    ticks: int = 0

    @property
    def order(self) -> tuple[int, ...]:
        """What checkpoints and log lines are ordered by: the ticks, then each open loop's own. Of two states of a run, the later has the higher.

        A program that has come to its end, or has not done anything yet, is later than all that was before it at the same ticks.
        """
        own = [frame.ticks for frame in self.frames]
        while own and not own[-1]:
            own.pop()  # a loop that has begun and done nothing yet
        return (self.ticks, *own) if own else (self.ticks, sys.maxsize)

    def forget(self, *streams: str) -> Position:
        """The position with these streams at their beginning again, whatever they are made of."""
        return dataclasses.replace(self, streams={k: v for k, v in self.streams.items() if k not in streams})


class Optimizes(Protocol):
    """What a state needs to know of an optimizer: how its memory begins."""

    def init(self, params: Any, /) -> Any: ...


@struct
class TrainState(Donatable):
    """A training, whole: given the program and the data, everything that follows is a function of it.

    Tensors are detached and never written to once they are in a state. Subclass it under `@fnrun.struct` to add fields.
    """

    params: dict[str, torch.Tensor]
    buffers: dict[str, torch.Tensor]
    opt_state: Any
    rng: Key
    _: dataclasses.KW_ONLY
    step: int = 0
    memory: dict[str, Any] = dataclasses.field(default_factory=dict)
    position: Position = dataclasses.field(default_factory=Position)
    stop: str | None = None

    @classmethod
    def create(cls, model: nn.Module, optimizer: Optimizes | None = None, seed: int = 0, **fields: Any) -> Self:
        """The fresh state of `model`: copies of its parameters and buffers, and what `optimizer` remembers of those that it trains.

        `fields` are those that a subclass adds. Raises ValueError for a model with lazy parameters that have no shape yet.

        >>> state = TrainState.create(nn.Linear(2, 1), seed=0)
        >>> list(state.params), state.step
        (['weight', 'bias'], 0)
        """
        named = dict(model.named_parameters())
        for name, tensor in [*named.items(), *model.named_buffers()]:
            if is_lazy(tensor):
                raise ValueError(f"{name} has no shape yet: run the lazy module once on an example before you create the state")
        params = {name: p.detach().clone() for name, p in named.items()}
        trained = {name: params[name] for name, p in named.items() if p.requires_grad}
        return cls(
            params=params,
            buffers={name: b.detach().clone() for name, b in buffers_of(model).items()},
            opt_state=optimizer.init(trained) if optimizer is not None else None,
            rng=Key(seed),
            **fields,
        )

    def replace(self, **changes: Any) -> Self:
        """The state with these fields changed."""
        cls = type(self)
        return cls(**{**dict(zip(fields(cls), _values(cls)(self), strict=True)), **changes})

    def rewind(self) -> Self:
        """The state with its open frames given up and its stop cleared: a program called on it begins anew. Streams stay where they are."""
        return self.replace(position=dataclasses.replace(self.position, frames=()), stop=None)


@functools.cache
def _values(cls: Any) -> Any:
    """What gets all fields of a state at once."""
    return operator.attrgetter(*fields(cls))


def buffers_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """The buffers of `model` by name; one that is a parameter's tensor too is a parameter."""
    params = {id(p) for p in model.parameters()}
    return {name: b for name, b in model.named_buffers() if id(b) not in params}


def weights_of(state: Any, weights: str | Callable[[Any], Any]) -> tuple[Any, Any]:
    """Parameters and buffers of a state: its own ("params"), those that the hook of this name remembers, or what a function of the state returns.

    The function returns `params` or `(params, buffers)`; buffers that are not told are the state's own. Raises ValueError for another name.
    """
    if weights == "params":
        return state.params, state.buffers
    if callable(weights):
        chosen = weights(state)
        return chosen if isinstance(chosen, tuple) else (chosen, state.buffers)
    if weights not in state.memory:
        raise ValueError(f"weights={weights!r}: no hook of this name is remembered in the state; there are {sorted(state.memory)}")
    chosen = state.memory[weights]
    if not isinstance(chosen, Mapping) or "params" not in chosen:
        raise ValueError(f"weights={weights!r}: this hook remembers no 'params'")
    return chosen["params"], chosen.get("buffers", state.buffers)


class LoopState(Protocol):
    """What loops need of a state, whatever else it holds. One without a `rng` draws the order of its data from `Key(0)`."""

    @property
    def step(self) -> int: ...
    @property
    def memory(self) -> dict[str, Any]: ...
    @property
    def position(self) -> Position: ...
    @property
    def stop(self) -> str | None: ...
    def replace(self, **changes: Any) -> Self: ...


S = TypeVar("S", bound=LoopState)


def in_training(state: Any) -> bool:
    """Whether the loop at work takes training steps; elsewhere its ticks are rounds. Outside every loop a call is like a training step."""
    frames = state.position.frames
    return not frames or frames[-1].loop.startswith(("epoch_loop", "step_loop"))


def counted(state: Any) -> int:
    """The number of the tick that has just ended: `state.step` in a loop of training steps, finished rounds elsewhere."""
    return state.step if in_training(state) else state.position.frames[-1].ticks


def due(state: LoopState, every: int) -> bool:
    """Whether a hook or an observer with `every=n` acts now: counted in `state.step` in a loop of training steps, in rounds elsewhere."""
    return counted(state) % every == 0
