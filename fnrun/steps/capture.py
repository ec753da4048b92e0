"""A whole step, forward, backward and update, as one compiled graph.

`make_fx` records the operations of one call on real tensors, so any Python may run in a step as long as it does not depend on a tensor's
value; inductor compiles what was recorded. The graph stands for arguments of the same structure, shapes, dtypes and constants, and for no
others: nothing in it is dynamic, so which calls came before never changes its bits. Numbers of the state that change from call to call
(counts of updates) are inputs of the graph, and Python numbers again afterwards. What Python reads from elsewhere is a constant; a later
call is recorded once more to see whether it still has its value.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import operator
import random
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optree
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from fnrun.core import tree
from fnrun.core.donation import storage
from fnrun.core.key import Key
from fnrun.core.words import a
from fnrun.optim.lists import capturing
from fnrun.steps.draws import Draws, Uncapturable

logger = logging.getLogger("fnrun")


_shape, _dtype, _device = operator.attrgetter("shape"), operator.attrgetter("dtype"), operator.attrgetter("device")


class Captured:
    """`fn(given, kept, x, count, draws) -> ((given, kept), metrics)`, of pytrees, as a graph for each signature of its arguments.

    `count` is an int that is a tensor within. `draws` are for the `TracedKey`s that `fn` draws from: what it draws is an input of the
    graph. Where `fn` cannot be captured there is no graph, and `reason` says why.
    """

    #: A batch of a new shape takes seconds to compile for: who has more than so many shapes is told.
    SHAPES = 8

    #: So many graphs may differ in nothing but constants of `x`; more, and there would be one for each batch.
    CONSTANTS = 4

    def __init__(self, fn: Callable[..., tuple[Any, Any]], name: str) -> None:
        self.fn, self.name = fn, name
        self.graphs: dict[Any, _Graph] = {}
        self.reason: str | None = None
        self._counters: frozenset[int] = frozenset()
        self._constants: Counter[Any] = Counter()

    def __call__(self, given: Any, kept: Any, x: Any, count: int, key: Key, check: Callable[[], None], *, inplace: bool) -> Call | None:
        """The call of the graph for these arguments, ready to be made; it is captured first where it is new. None where it cannot be.

        `check` raises for arguments of a structure that the caller refuses; it is called where a graph is captured.
        With `inplace` the graph writes what becomes of the tensors in `given` over them.
        """
        if self.reason is not None:
            return None
        arguments: Any = (given, kept, x)
        leaves, spec = optree.tree_flatten(arguments)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        constants = tuple(_constants(leaves, self._counters))
        shapes = tuple(map(_shape, tensors)), tuple(map(Tensor.stride, tensors)), tuple(map(_dtype, tensors)), tuple(map(_device, tensors))
        graph = self.graphs.get((spec, shapes, constants, inplace))
        if graph is None:
            check()
        try:
            if graph is None:
                n_own = len(optree.tree_leaves(given))
                graph = self._capture(leaves, n_own, inplace, spec, count, (spec, shapes, inplace))
                constants = tuple(_constants(leaves, self._counters))
                self.graphs[spec, shapes, constants, inplace] = graph
            graph.calls += 1
            if graph.calls in graph.LOOKS:
                graph.check(self.fn, leaves, spec, count)
        except Exception as error:  # of whatever kind: the same call without the compiler says whether it is the step's own
            self.reason = _reason(error)
            self.graphs.clear()
            return None
        return Call(graph, leaves, count, key)

    def _capture(self, leaves: list[Any], n_own: int, inplace: bool, spec: Any, count: int, kind: Any) -> _Graph:
        self._constants[kind] += 1
        if self._constants[kind] > self.CONSTANTS:
            raise Uncapturable("numbers or texts in its batches change from one to the next, and each would need a graph of its own")
        if len(self.graphs) == self.SHAPES:
            warnings.warn(
                f"{self.name} has been compiled for {self.SHAPES} shapes of its batches, and here is one more: each takes its time. Pad "
                "or crop batches to a few shapes, or go without compile=True",
                stacklevel=6,
            )
        logger.info("%s: compiling, for a shape of batch that is new", self.name)
        graph = _captured(self.fn, leaves, n_own, inplace, spec, count, self._counters)
        if graph.counters != self._counters:  # what was a constant of the graphs before is none
            self.graphs.clear()
            self._counters = graph.counters
        return graph


def _reason(error: Exception) -> str:
    if "aten._local_scalar_dense" in str(error):  # of make_fx, in words about make_fx
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if not any(part in frame.filename for part in _NOT_OWN)]
        where = f" ({Path(own[-1].filename).name}:{own[-1].lineno}: {own[-1].line})" if own else ""
        return (
            f"what it does depends on a value: Python reads a number of a tensor{where}, by float(), .item(), if or a format: "
            "keep it a tensor"
        )
    return (f"{type(error).__name__}: " * (not isinstance(error, Uncapturable)) + str(error).strip()).splitlines()[0]


_NOT_OWN = (f"{Path(torch.__file__).parent}", f"{Path(__file__).parents[1]}", "<")


def _constants(leaves: list[Any], counters: frozenset[int]) -> list[Any]:
    return [leaf for i, leaf in enumerate(leaves) if not isinstance(leaf, Tensor) and i not in counters]


class Call(NamedTuple):
    """A graph and the leaves that it will be given."""

    graph: _Graph
    leaves: list[Any]
    step: int
    key: Key

    def owning(self, writable: Callable[[list[Tensor]], list[Tensor]]) -> Call:
        """The call with other tensors in `given`: those to write over."""
        leaves, places = self.leaves, self.graph.own_places
        given = [leaves[i] for i in places]
        if (tensors := writable(given)) is not given:
            for i, tensor in zip(places, tensors, strict=True):
                leaves[i] = tensor
        return self

    def __call__(self) -> Any:
        return self.graph(self.leaves, self.step, self.key)


class _Graph:
    """A compiled call: how its inputs are taken from the arguments' leaves, and what its outputs become."""

    #: At these calls the graph is compared with what the step's Python does by then: early, and later ever more seldom.
    LOOKS = frozenset(3 * 10**i for i in range(9))

    def __init__(self, run: Any, recording: _Recording, recorded: GraphModule, n_own: int) -> None:
        self.counters, self._run, self._plan, self._spec = recording.counters, run, recording.plan, recording.spec
        self.own_places = [i for i in recording.inputs if i < n_own and i not in self.counters]  # the tensors of `given`
        self._tensors = [i for i in recording.inputs if i not in self.counters]
        self._numbers = [i for i in recording.inputs if i in self.counters]
        self._recorded, self._write, self._draws = recorded, recording.n_own, recording.draws
        self._draws.forget()
        self.calls = 0

    def check(self, fn: Any, leaves: list[Any], in_spec: Any, count: int) -> None:
        """Raise Uncapturable where `fn` computes something else by now than what was recorded: it reads more than its arguments."""
        with _computing_for_real(), contextlib.suppress(torch.OutOfMemoryError):
            now = _Recording(fn, leaves, self._write, in_spec, self.counters)
            graph = now.record(count)
            if self._spec != now.spec:
                raise Uncapturable(_MOVED.format("its metrics have other names"))
            if _alike(self._recorded, graph) and tree.equal(self._plan, now.plan) and self._draws == now.draws:
                return
            with torch.no_grad():
                old, new = now.outcome(self._recorded, self._plan, count, self._draws), now.outcome(graph, now.plan, count, now.draws)
            differ = _differences(self._spec, leaves, old, new)
            if not differ and self._draws != now.draws:
                differ = ["it draws other random numbers"]
            if differ:
                raise Uncapturable(_MOVED.format("; ".join(differ)))

    def __call__(self, leaves: list[Any], count: int, key: Key) -> Any:
        numbers = [_number(leaves[i]) for i in self._numbers]
        outputs = self._run(_number(count), *numbers, *[leaves[i] for i in self._tensors], *self._draws.again(key, count))
        return optree.tree_unflatten(self._spec, [_made(kind, what, leaves, outputs) for kind, what in self._plan])


_MOVED = (
    "its Python computes something else than when it was recorded ({}, for the same arguments), and the calls since then may have been "
    "made with the old values. A number that the loss reads from elsewhere (a global, an attribute, a dictionary) is a constant of a "
    "graph: give it a place in the batch, as a tensor"
)


def _differences(spec: Any, leaves: list[Any], old: list[Any], new: list[Any]) -> list[str]:
    """In words, where two results of the structure `spec` differ by more than rounding; `leaves` are the arguments', the state's first."""
    names = optree.treespec_paths(spec)
    state = len(old) - sum(path[0] == 1 for path in names)
    differ = [f"{tree.join(names[i][1:])} was {old[i]}, is {new[i]}" for i in range(state, len(old)) if not _close(old[i], new[i])]
    return differ or ["the update of the state is another one"] * _moved(leaves[:state], old, new)


def _alike(a: GraphModule, b: GraphModule) -> bool:
    """Whether two recordings are the same operations with the same constants."""
    if a.code != b.code:
        return False
    constants = [(getattr(a, node.target), getattr(b, node.target)) for node in a.graph.nodes if node.op == "get_attr"]
    return all(_alike(x, y) if isinstance(x, GraphModule) else tree.equal(x, y) for x, y in constants)


def _close(a: Any, b: Any) -> bool:
    """Whether two metrics are the same up to rounding."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return tree.equal(a, b)
    return a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=1e-3, atol=1e-6, equal_nan=True)


def _moved(start: list[Any], a: list[Any], b: list[Any]) -> bool:
    """Whether two updates of a state differ by more than rounding, which an optimizer that normalizes may magnify where a gradient is 0."""
    apart = size = 0.0
    for x, y, z in zip(start, a, b, strict=False):
        if isinstance(y, Tensor) and isinstance(z, Tensor) and y.is_floating_point():
            x, y, z = x.double(), y.double(), z.double()
            apart, size = apart + float((y - z).square().sum()), size + float((y - x).square().sum() + (z - x).square().sum())
    return apart > 0.01 * size


def _made(kind: str, what: Any, leaves: list[Any], outputs: Any) -> Any:
    if kind == "output":
        return outputs[what]
    if kind == "number":
        return outputs[what].item()
    return leaves[what] if kind == "input" else what


def _number(value: Any) -> Tensor:
    """A number of the state as an input of a graph."""
    if type(value) not in _NUMBERS:
        raise Uncapturable(f"{a(type(value).__name__)} in the state changes from step to step, and no tensor can stand for it")
    return torch.full((), value, dtype=_NUMBERS[type(value)])


_NUMBERS = {bool: torch.bool, int: torch.int64, float: torch.float64}


def _captured(fn: Any, leaves: list[Any], n_own: int, inplace: bool, spec: Any, count: int, counters: frozenset[int]) -> _Graph:
    """Record and compile. Raises whatever `fn` or the compiler raises, or the graph in its first call.

    `counters` are the leaves that are known to be numbers that change; more may be found. With `inplace` the tensors among the first
    `n_own` leaves are written over.
    """
    python, numpy = random.getstate(), np.random.get_state(legacy=False)["state"]["pos"]  # pyright: ignore[reportArgumentType,reportCallIssue]
    with _computing_for_real():
        while True:
            recording = _Recording(fn, leaves, n_own if inplace else 0, spec, counters)
            graph = recording.record(count)
            if not recording.changed:
                break
            counters |= recording.changed
        if random.getstate() != python or np.random.get_state(legacy=False)["state"]["pos"] != numpy:  # pyright: ignore[reportArgumentType,reportCallIssue]
            raise Uncapturable("it draws from Python's or NumPy's generator, and what is drawn would be the same at every step")
        with torch.no_grad():
            try:
                now = recording.outcome(graph, recording.plan, count, recording.draws)
            except Exception as error:  # some kernels are refused only now
                raise Uncapturable(f"its graph fails when it is called: {type(error).__name__}: {error}") from error
            recording.check(now)
            examples: list[Any] = recording.examples(count)
            run: Any = torch._inductor.compile(_without_alpha(GraphModule(graph, copy.deepcopy(graph.graph))), examples)
            try:
                run(*recording.examples(count))
            except Exception as error:  # some kernels are refused only now
                raise Uncapturable(f"its graph fails when it is called: {type(error).__name__}: {error}") from error
    return _Graph(run, recording, graph, n_own)


def _without_alpha(graph: GraphModule) -> GraphModule:
    """`add` and `sub` with their factor as a product of its own: torch 2.13's inductor loses it where it fuses a matrix product."""
    for node in list(graph.graph.nodes):
        if (alpha := node.kwargs.get("alpha", 1)) != 1 and node.target in _SUMS:
            with graph.graph.inserting_before(node):
                product = graph.graph.call_function(torch.ops.aten.mul.Tensor, (node.args[1], alpha))
            node.args, node.kwargs = (node.args[0], product), {}
    graph.recompile()
    return graph


_aten = torch.ops.aten
_SUMS = {_aten.add.Tensor, _aten.add_.Tensor, _aten.sub.Tensor, _aten.sub_.Tensor}


@contextlib.contextmanager
def _computing_for_real() -> Iterator[None]:
    """For what computes and draws only to be looked at."""
    with Key(0).scope(), capturing(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"torch\.")  # of torch by torch
        yield


class _Recording:
    """The function of tensors alone that is recorded, and what it found out about its outputs."""

    def __init__(self, fn: Any, leaves: list[Any], n_own: int, spec: Any, counters: frozenset[int]) -> None:
        self.fn, self.leaves, self.n_own, self.in_spec = fn, leaves, n_own, spec
        self.inputs = [*sorted(counters), *(i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor))]
        self.changed: frozenset[int] = frozenset()
        self.counters = counters
        self.plan: list[tuple[str, Any]] = []
        self.spec: Any = None
        self.seen: list[Any] = []  # the leaves of the result of the call that was not recorded
        self.draws, self._given = Draws(), None

    def record(self, count: int) -> GraphModule:
        """The operations of one call, after another one that shows what it draws."""
        self.draws, self._given = Draws(), None
        examples = self.examples(count)
        self.seen = self._result(self(*examples), self.plan, examples)
        self.draws.finish()
        self._given = self.draws.count
        return make_fx(self, tracing_mode="real", _allow_non_fake_inputs=True)(*self.examples(count))

    def examples(self, count: int, draws: Draws | None = None) -> list[Tensor]:
        """Inputs that may be written to."""
        values = [*(self.leaves[i] for i in self.inputs), *(draws or self.draws).values]
        return [_number(count), *(value.clone() if isinstance(value, Tensor) else _number(value) for value in values)]

    def outcome(self, graph: GraphModule, plan: list[tuple[str, Any]], count: int, draws: Draws) -> list[Any]:
        """The leaves of the result that a recorded graph computes from these arguments and draws."""
        examples = self.examples(count, draws)
        return self._result(graph(*examples), plan, examples)

    def _result(self, outputs: Any, plan: list[tuple[str, Any]], examples: list[Tensor]) -> list[Any]:
        leaves = list(self.leaves)
        for i, tensor in zip(self.inputs, examples[1:], strict=False):
            leaves[i] = tensor
        return [_made(kind, what, leaves, outputs) for kind, what in plan]

    def check(self, now: list[Any]) -> None:
        """Raise Uncapturable where the recorded operations are not all that the call does: `now` is what they compute."""
        if not tree.equal(now, self.seen) and (differ := _differences(self.spec, self.leaves, self.seen, now)):
            raise Uncapturable(
                f"it does what is no operation of torch's that could be recorded ({'; '.join(differ)}): writes to a tensor by .data or "
                ".numpy()? Write in place under torch.no_grad(): weight.copy_(...), buffer.mul_(...)"
            )

    def __call__(self, count: Tensor, *tensors: Tensor) -> list[Tensor]:
        """The call as a function of tensors alone: the arguments' in the order of `inputs`, then what it draws, if that is known."""
        leaves = list(self.leaves)
        if self._given is None:
            drawing = self.draws.found()
        else:
            at = len(tensors) - self._given
            drawing, tensors = self.draws.given(list(tensors[at:])), tensors[:at]
        for i, tensor in zip(self.inputs, tensors, strict=True):
            leaves[i] = tensor
        given, kept, x = optree.tree_unflatten(self.in_spec, leaves)
        with drawing:
            result: Any = self.fn(given, kept, x, count, self.draws)
        new, metrics = result
        state: Any = (given, kept)
        olds, old_spec = optree.tree_flatten(state)
        news, new_spec = optree.tree_flatten(new)
        if old_spec != new_spec:
            raise Uncapturable(f"the state does not keep its structure: {old_spec} becomes {new_spec}")
        self.spec = optree.tree_structure(result)
        return self._outputs(tensors, olds, news, optree.tree_leaves(metrics))

    def _outputs(self, tensors: tuple[Tensor, ...], olds: list[Any], news: list[Any], metrics: list[Any]) -> list[Tensor]:
        """The tensors that the graph puts out, and with them the plan of how they become the result; what is written over is no output."""
        places = {id(tensor): i for i, tensor in zip(self.inputs, tensors, strict=True)}
        memory = {storage(tensor): i for i, tensor in zip(self.inputs, tensors, strict=True)}
        outputs: list[Tensor] = []
        overwritten: list[tuple[Tensor, Tensor]] = []
        self.plan, changed = [], set()

        def output(kind: str, tensor: Tensor) -> None:
            self.plan.append((kind, len(outputs)))
            outputs.append(tensor.detach().clone() if storage(tensor) in memory else tensor.detach())

        for i, (old, value) in enumerate(zip(olds, news, strict=True)):  # the state's leaves come first among the arguments'
            if i in self.counters:
                output("number", value if isinstance(value, Tensor) else _number(value))
            elif not isinstance(old, Tensor):
                if isinstance(value, Tensor) or value != old:
                    changed.add(i)
                self.plan.append(("constant", value))
            elif id(value) in places or (memory.get(storage(value)) == i and value.shape == old.shape):
                self.plan.append(("input", places.get(id(value), i)))
            elif i < self.n_own and value.shape == old.shape and value.dtype == old.dtype:
                overwritten.append((old, value))
                self.plan.append(("input", i))
            else:
                output("output", value)
        for value in metrics:
            if isinstance(value, Tensor):
                output("output", value)
            else:
                self.plan.append(("constant", value))
        for old, value in overwritten:
            old.copy_(value)
        self.changed = frozenset(changed)
        return outputs
