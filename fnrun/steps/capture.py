"""A whole step, forward, backward and update, as one compiled graph.

`make_fx` records the operations of one call on real tensors, and inductor compiles them. Any Python may run in a step, as long as it does
not depend on a tensor's value.

A graph is for arguments of one structure, of the same shapes, dtypes and constants. Nothing in it is dynamic, so its bits do not depend on
earlier calls. Numbers of the state that change from call to call (counts of updates) are inputs of the graph, and Python numbers again
afterwards. Other values that Python reads are constants; later calls are recorded again to check them.
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
from typing import Any

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
    """`fn(given, kept, x, count, draws) -> ((given, kept), metrics)` over pytrees, as a graph for each signature of its arguments.

    `count` is an int, which `fn` gets as a tensor. `draws` makes the numbers that `fn` draws from `TracedKey`s inputs of the graph. If `fn`
    cannot be captured, `reason` says why.
    """

    #: A warning comes with the next graph: compiling for a new shape takes seconds.
    SHAPES = 8

    #: At most so many graphs may differ only in constants of `x`: otherwise each batch would have its own.
    CONSTANTS = 4

    def __init__(self, fn: Callable[..., tuple[Any, Any]], name: str) -> None:
        self.fn, self.name = fn, name
        self.graphs: dict[Any, _Graph] = {}
        self.reason: str | None = None
        self._counters: frozenset[int] = frozenset()
        self._constants: Counter[Any] = Counter()

    def __call__(
        self, given: Any, kept: Any, x: Any, count: int, check: Callable[[], None], *, inplace: bool
    ) -> tuple[_Graph, list[Any]] | None:
        """The graph for these arguments, captured if it is new, and the arguments' leaves; None if `fn` cannot be captured.

        - `check`: is called before a capture, and raises for arguments that the caller refuses.
        - `inplace`: the graph writes the new values of the tensors in `given` over them.
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
        except Exception as error:  # of any kind: an eager call then shows whether it is the step's
            self.reason = _reason(error)
            self.graphs.clear()
            return None
        return graph, leaves

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
        if graph.counters != self._counters:  # earlier graphs have one of them as a constant
            self.graphs.clear()
            self._counters = graph.counters
        return graph


def _reason(error: Exception) -> str:
    if "aten._local_scalar_dense" in str(error):  # make_fx names the operation alone
        frames = traceback.extract_tb(error.__traceback__)
        user = [frame for frame in frames if not any(part in frame.filename for part in _NOT_OWN)]
        where = f" ({Path(user[-1].filename).name}:{user[-1].lineno}: {user[-1].line})" if user else ""
        return (
            f"what it does depends on a value: Python reads a number of a tensor{where}, by float(), .item(), if or a format: "
            "keep it a tensor"
        )
    return (f"{type(error).__name__}: " * (not isinstance(error, Uncapturable)) + str(error).strip()).splitlines()[0]


_NOT_OWN = (f"{Path(torch.__file__).parent}", f"{Path(__file__).parents[1]}", "<")


def _constants(leaves: list[Any], counters: frozenset[int]) -> list[Any]:
    return [leaf for i, leaf in enumerate(leaves) if not isinstance(leaf, Tensor) and i not in counters]


class _Graph:
    """A compiled call: the places of its inputs among the arguments' leaves, and of its outputs in the result."""

    #: The numbers of the calls in which `fn` is recorded again, to check the graph.
    LOOKS = frozenset(3 * 10**i for i in range(9))

    def __init__(self, run: Any, recording: _Recording, recorded: GraphModule, n_own: int) -> None:
        self.counters, self._run, self._plan, self._spec = recording.counters, run, recording.plan, recording.spec
        self._given = [i for i in recording.inputs if i < n_own and i not in self.counters]  # the tensors of `given`
        self._tensors = [i for i in recording.inputs if i not in self.counters]
        self._numbers = [i for i in recording.inputs if i in self.counters]
        self._recorded, self._write, self._draws = recorded, recording.n_own, recording.draws
        self._draws.forget()
        self.calls = 0

    def check(self, fn: Any, leaves: list[Any], in_spec: Any, count: int) -> None:
        """Raise Uncapturable where `fn` now computes something else than the recording: it reads more than its arguments."""
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

    def writing_to(self, leaves: list[Any], writable: Callable[[list[Tensor]], list[Tensor]]) -> list[Any]:
        """The leaves with `writable` tensors in place of those in `given`."""
        old = [leaves[i] for i in self._given]
        if (tensors := writable(old)) is not old:
            for i, tensor in zip(self._given, tensors, strict=True):
                leaves[i] = tensor
        return leaves

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
    """Where two results of the structure `spec` differ by more than rounding; `leaves` are the arguments', the state's first."""
    names = optree.treespec_paths(spec)
    state = len(old) - sum(path[0] == 1 for path in names)
    differ = [f"{tree.join(names[i][1:])} was {old[i]}, is {new[i]}" for i in range(state, len(old)) if not _close(old[i], new[i])]
    return differ or ["the update of the state is another one"] * _moved(leaves[:state], old, new)


def _alike(a: GraphModule, b: GraphModule) -> bool:
    """Whether two recordings have the same operations and constants."""
    if a.code != b.code:
        return False
    constants = [(getattr(a, node.target), getattr(b, node.target)) for node in a.graph.nodes if node.op == "get_attr"]
    return all(_alike(x, y) if isinstance(x, GraphModule) else tree.equal(x, y) for x, y in constants)


def _close(a: Any, b: Any) -> bool:
    """Whether two metrics are equal up to rounding."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return tree.equal(a, b)
    return a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=1e-3, atol=1e-6, equal_nan=True)


def _moved(start: list[Any], a: list[Any], b: list[Any]) -> bool:
    """Whether two updates of a state differ by more than rounding, which a normalizing optimizer may magnify where a gradient is 0."""
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
    """Record and compile. Raises what `fn`, the compiler, or the graph's first call raises.

    - `n_own`: the number of leaves of `given`, which come first; with `inplace` their tensors are written over.
    - `counters`: the leaves that are known to be numbers that change; more may be found.
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
            recording.check(_called(recording.outcome, graph, recording.plan, count, recording.draws))
            examples: list[Any] = recording.examples(count)
            run: Any = torch._inductor.compile(_without_alpha(GraphModule(graph, copy.deepcopy(graph.graph))), examples)
            _called(run, *recording.examples(count))
    return _Graph(run, recording, graph, n_own)


def _called(graph: Callable[..., Any], *args: Any) -> Any:
    try:
        return graph(*args)
    except Exception as error:  # some kernels are refused only when they are called
        raise Uncapturable(f"its graph fails when it is called: {type(error).__name__}: {error}") from error


def _without_alpha(graph: GraphModule) -> GraphModule:
    """`add` and `sub` with their factor as a separate product: inductor of torch 2.13 loses it when it fuses a matrix product."""
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
    """The context of calls whose results are only inspected: a fixed key, no deprecation warnings of torch's."""
    with Key(0).scope(), capturing(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"torch\.")  # torch calls its own
        yield


class _Recording:
    """The function of tensors that is recorded, and the plan of its outputs."""

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
        """The operations of a call, after a first one that finds its draws."""
        self.draws, self._given = Draws(), None
        examples = self.examples(count)
        self.seen = self._result(self(*examples), self.plan, examples)
        self.draws.finish()
        self._given = self.draws.count
        return make_fx(self, tracing_mode="real", _allow_non_fake_inputs=True)(*self.examples(count))

    def examples(self, count: int, draws: Draws | None = None) -> list[Tensor]:
        """Copies of the inputs."""
        values = [*(self.leaves[i] for i in self.inputs), *(draws or self.draws).values]
        return [_number(count), *(value.clone() if isinstance(value, Tensor) else _number(value) for value in values)]

    def outcome(self, graph: GraphModule, plan: list[tuple[str, Any]], count: int, draws: Draws) -> list[Any]:
        """The leaves of a recorded graph's result."""
        examples = self.examples(count, draws)
        return self._result(graph(*examples), plan, examples)

    def _result(self, outputs: Any, plan: list[tuple[str, Any]], examples: list[Tensor]) -> list[Any]:
        leaves = list(self.leaves)
        for i, tensor in zip(self.inputs, examples[1:], strict=False):
            leaves[i] = tensor
        return [_made(kind, what, leaves, outputs) for kind, what in plan]

    def check(self, now: list[Any]) -> None:
        """Raise Uncapturable where the call does more than the recorded operations, whose result is `now`."""
        if not tree.equal(now, self.seen) and (differ := _differences(self.spec, self.leaves, self.seen, now)):
            raise Uncapturable(
                f"it does what is no operation of torch's that could be recorded ({'; '.join(differ)}): writes to a tensor by .data or "
                ".numpy()? Write in place under torch.no_grad(): weight.copy_(...), buffer.mul_(...)"
            )

    def __call__(self, count: Tensor, *tensors: Tensor) -> list[Tensor]:
        """The call as a function of tensors: the arguments' in the order of `inputs`, then the draws, once they are known."""
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
        """The outputs of the graph; sets the plan of how they become the result. Tensors that are written over are no outputs."""
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
