"""The training state: everything that the next step depends on, as one immutable pytree."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, Self, TypeVar

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from fnrun.core.donation import Donatable, contents
from fnrun.core.entering import BARE, Entered, entering
from fnrun.core.key import Key, ambient_lock
from fnrun.core.placing import check_device, moved, write
from fnrun.core.position import Cursor as Cursor, Frame as Frame, Position  # who knew them here finds them here
from fnrun.core.tree import struct
from fnrun.core.words import kind, uncalled


class Optimizes(Protocol):
    """What a state needs to know of an optimizer: how its memory begins."""

    def init(self, params: Any, /) -> Any: ...


class Weights(NamedTuple):
    """What a model computes with, by name."""

    params: Mapping[str, torch.Tensor]
    buffers: Mapping[str, torch.Tensor]


M = TypeVar("M", bound=nn.Module)


@struct(name="fnrun.TrainState")
class TrainState(Donatable, metaclass=Entered):
    """A training, whole: given the program and the data, everything that follows is a function of it.

    Tensors are never written to once they are in a state. What enters one is detached, whoever made it, and of an `nn.Parameter` it is a
    copy; other tensors enter as they are, so give clones of what somebody writes to (a module's buffers). Subclass it under
    `@fnrun.struct` to add fields.
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
        check_model("TrainState.create", model)
        if optimizer is not None:
            check_optimizer("TrainState.create", optimizer, needs=("init",))
        with ambient_lock:  # not while another thread has the tensors of a step in the module
            return cls._of(model, optimizer, seed, fields)

    @classmethod
    def _of(cls, model: nn.Module, optimizer: Optimizes | None, seed: int, fields: dict[str, Any]) -> Self:
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
        """The state with these fields changed. Tensors that require grad are detached, and of an `nn.Parameter` a copy is taken."""
        for name in changes:
            if name not in BARE:
                changes[name] = entering(changes[name], getattr(self, name, None), name)
        return made(type(self), {**contents(self), **changes})

    def weights(self, weights: str | Callable[[Any], Any] = "params") -> Weights:
        """Parameters and buffers as evaluation with these `weights` uses them.

        - `"params"`: the state's own.
        - the name of a hook, such as `"ema"`: those in its memory. Raises ValueError where no hook has that name.
        - a function of the state that returns `params` or `(params, buffers)`.

        `fnrun.call(model, *state.weights("ema"), x)` computes with them.

        >>> state = TrainState.create(nn.Linear(2, 1))
        >>> params, buffers = state.weights()
        >>> list(params), state.weights().params is state.params
        (['weight', 'bias'], True)
        """
        return Weights(*weights_of(self, weights))

    def load_into(self, model: M, weights: str | Callable[[Any], Any] = "params") -> M:
        """`model`, with these weights written into its parameters and buffers: what training was for. `weights` as in `make_eval_step`.

        The model's tensors stay the same objects, on their devices; tied ones stay tied. Names, shapes and dtypes are those of the state:
        else ValueError says all that differs, and nothing is written.

        >>> model = nn.Linear(2, 1)
        >>> state = TrainState.create(nn.Linear(2, 1))
        >>> torch.equal(state.load_into(model).weight, state.params["weight"])
        True
        """
        check_model("state.load_into", model)
        chosen = self.weights(weights)
        params, buffers = chosen.params, chosen.buffers
        if both := sorted(params.keys() & buffers.keys()):
            raise ValueError(f"state.load_into: {both} are among the parameters and among the buffers")
        write(f"state.load_into({type(model).__name__})", {**dict(model.named_parameters()), **buffers_of(model)}, {**params, **buffers})
        return model

    def to(self, device: str | int | torch.device, *more: Any, **options: Any) -> Self:
        """The state with its tensors on a device, in all its fields; what an optimizer keeps in the host's memory on purpose stays there.

        Steps compute where the state is, so they are made of a model that is there too. Raises TypeError for a dtype.

        >>> TrainState.create(nn.Linear(2, 1)).to("meta").params["bias"].device
        device(type='meta')
        """
        check_device("state.to", device, (*more, *options))
        return made(type(self), moved(contents(self), device))

    def rewind(self) -> Self:
        """The state with its open frames given up and its stop cleared: a program called on it begins anew. Streams stay where they are."""
        return self.replace(position=dataclasses.replace(self.position, frames=()), stop=None)


def made(cls: Any, contents: dict[str, Any]) -> Any:
    """A state of what the library itself computed, which holds no graph: nothing is looked at."""
    return type.__call__(cls, **contents)


def carried(state: Any, **changes: Any) -> Any:
    """`state.replace(**changes)` with tensors that hold no graph: nothing is looked at."""
    return made(type(state), {**contents(state), **changes}) if isinstance(state, TrainState) else state.replace(**changes)


def check_apart(who: str, model: nn.Module) -> None:
    """Raise ValueError where a trained parameter shares its memory with another tensor of the model: a state holds each by itself.

    The same parameter in two places is one. Parts of one memory that do not overlap are apart.
    """
    ends: list[tuple[Any, int, int, str, bool]] = []
    for name, tensor in [*model.named_parameters(), *buffers_of(model).items()]:
        if is_lazy(tensor):
            raise ValueError(f"{who}: {name} has no shape yet: run the lazy module once on an example before")
        if tensor.layout == torch.strided and tensor.numel() and not tensor.is_meta and type(tensor) in (torch.Tensor, nn.Parameter):
            size = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
            begin = tensor.data_ptr()
            ends.append((tensor.device, begin, begin + size * tensor.element_size(), name, tensor.requires_grad))
    ends.sort(key=lambda each: (str(each[0]), each[1], each[2]))
    for (device, _, end, one, trains), (other, begin, _, two, trains_too) in itertools.pairwise(ends):
        if device == other and begin < end and (trains or trains_too):
            raise ValueError(
                f"{who}: {one!r} and {two!r} lie in the same memory, and in a state they would part: each is trained, or kept, by itself. "
                "To tie them let both be one parameter (decoder.weight = encoder.weight), or compute one from the other in the forward "
                "(encoder.weight.t()); to have two give one a copy (.clone())"
            )


def check_model(who: str, model: Any) -> None:
    """Raise TypeError where `model` is no module that a state can be put into."""
    if isinstance(model, (torch.jit.ScriptModule, torch.jit.ScriptFunction)) or (
        isinstance(model, nn.Module) and any(isinstance(module, torch.jit.ScriptModule) for module in model.modules())
    ):
        raise TypeError(
            f"{who}: {kind(model)} is, or holds, a TorchScript module, which cannot be called with the tensors of a state: give the module "
            "that it was made of (make_train_step(..., compile=True) compiles the step)"
        )
    if isinstance(model, nn.Module):
        return
    called = f": call it, {model.__name__}(...)" if isinstance(model, type) and issubclass(model, nn.Module) else ""
    hint = called or " (is the order of the arguments right? the model comes first)"
    raise TypeError(f"{who} takes a model, an nn.Module, and not {kind(model)}{hint}")


def check_optimizer(who: str, optimizer: Any, needs: tuple[str, ...] = ("init", "update")) -> None:
    """Raise TypeError, with what to write, where `optimizer` is no pair of `init` and `update` that makes parameters."""
    of_torch = isinstance(optimizer, type) and issubclass(optimizer, torch.optim.Optimizer)
    if isinstance(optimizer, torch.optim.lr_scheduler.LRScheduler):
        hint = "a learning rate that changes is a schedule, an argument of the optimizer: optim.adamw(fnrun.schedules.warmup_cosine(...))"
    elif of_torch or isinstance(optimizer, torch.optim.Optimizer):
        name = optimizer.__name__ if isinstance(optimizer, type) else type(optimizer).__name__
        ours = f"optim.{name.lower()}(...) or " if hasattr(sys.modules.get("fnrun.optim"), name.lower()) else ""
        hint = f"{ours}optim.from_torch(torch.optim.{name}, ...), for torch's own changes its parameters in place"
    elif (name := uncalled(optimizer)) is not None:
        hint = f"call it, {name}(...)"
    elif type(optimizer).__name__ == "Wrapper":
        hint = "it wraps an optimizer: optim.chain(it, optim.adamw(...))"
    elif type(optimizer).__name__ == "Transform":
        hint = "it changes gradients on their way to an optimizer: optim.chain(it, optim.adamw(...))"
    elif isinstance(optimizer, type) or not all(hasattr(optimizer, name) for name in needs):
        hint = "take one of fnrun.optim, such as optim.adamw(1e-3)"
    else:
        return
    raise TypeError(f"{who} takes an optimizer, a pair of pure functions (init and update), and not {kind(optimizer)}: {hint}")


def is_state(state: Any) -> bool:
    """Whether loops can work on it, as far as its fields tell."""
    return hasattr(state, "position") and not isinstance(state, type)


def check_state(who: str, state: Any, data: Any, what: str) -> None:
    """Raise TypeError, with what to write, where a step cannot work on it."""
    if not hasattr(state, "opt_state") or not hasattr(state, "position") or isinstance(state, type):
        raise no_state(who, state, data, what)


def no_state(who: str, state: Any, data: Any = None, what: str = "data") -> TypeError:
    """The error for what was given to `who` in place of a state."""
    if is_state(data):
        hint = f"state and {what} are swapped: the state comes first"
    elif isinstance(state, nn.Module):
        hint = "a module is no state, TrainState.create(model, optimizer) makes one of it"
    elif isinstance(state, type) and hasattr(state, "position"):
        hint = f"call it, {state.__name__}.create(model, optimizer)"
    elif isinstance(state, tuple) and state and is_state(state[0]):
        hint = "a loop and a step return (state, metrics): state, metrics = ..."
    elif inspect.isroutine(state):
        hint = "call it: what it returns may be the state"
    else:
        hint = "TrainState.create(model, optimizer) makes a state, and so does a struct of your own with step, memory, position and stop"
    return TypeError(f"{who} takes (state, {what}), and its state is {kind(state)}: {hint}")


def buffers_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """The buffers of `model` by name; one that is a parameter's tensor too is a parameter."""
    params = {id(p) for p in model.parameters()}
    return {name: b for name, b in model.named_buffers() if id(b) not in params}


def weights_of(state: Any, weights: str | Callable[[Any], Any]) -> tuple[Any, Any]:
    """Parameters and buffers of a state, as `TrainState.weights` says. Those of a hook have the dtypes of the state's own.

    Buffers that a function of the state does not return are the state's own. Raises ValueError for a name that no hook has.
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
    return _as_in(state.params, chosen["params"]), _as_in(state.buffers, chosen.get("buffers", state.buffers))


def _as_in(like: Any, tensors: Any) -> Any:
    """The tensors in the dtypes of those of the same names: an average has more digits than what it is one of."""
    if tensors is like or all(name in like and tensor.dtype == like[name].dtype for name, tensor in tensors.items()):
        return tensors
    return {name: tensor.to(like[name].dtype) if name in like else tensor for name, tensor in tensors.items()}


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
