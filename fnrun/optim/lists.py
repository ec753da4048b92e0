"""Arithmetic on lists of tensors, in two ways with one vocabulary: a rule is written once and runs either way.

`foreach` calls torch's `_foreach` kernels. `each` calls the plain operations leaf by leaf, out of place: it works under `torch.func`,
in a compiled step, where gradients flow through, and with numbers that are tensors.
A trailing underscore says that the first list is the rule's own and not needed any more: `foreach` writes over it, `each` does not.
"""

from __future__ import annotations

import contextlib
import functools
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from types import MappingProxyType, SimpleNamespace
from typing import Any

import optree
import torch
from torch import Tensor

from fnrun.core.reports import name_of, report

#: Where torch keeps the kernels that it does not export by name.
kernels: Any = torch


def _over(kernel: Callable[..., Any]) -> Callable[..., Any]:
    def operation(xs: Any, *args: Any, **options: Any) -> Any:
        kernel(xs, *args, **options)
        return xs

    return operation


def _leafwise(fn: Callable[..., Tensor]) -> Callable[..., list[Tensor]]:
    def operation(xs: Any, *args: Any, **options: Any) -> list[Tensor]:
        rows = [a if isinstance(a, (list, tuple)) else [a] * len(xs) for a in args]
        return [fn(*row, **options) for row in zip(xs, *rows, strict=True)]

    return operation


def _add(x: Tensor, y: Any, alpha: Any = 1) -> Tensor:
    return x + y * alpha if isinstance(alpha, Tensor) else torch.add(x, y, alpha=alpha)


def _addcmul(x: Tensor, a: Tensor, b: Tensor, value: Any = 1) -> Tensor:
    return x + value * a * b if isinstance(value, Tensor) else torch.addcmul(x, a, b, value=value)


def _addcdiv(x: Tensor, a: Tensor, b: Tensor, value: Any = 1) -> Tensor:
    return x + value * a / b if isinstance(value, Tensor) else torch.addcdiv(x, a, b, value=value)


def _lerp(x: Tensor, y: Tensor, weight: Any) -> Tensor:
    return x + weight * (y - x) if isinstance(weight, Tensor) else torch.lerp(x, y, weight)


_OPERATIONS = {
    "add": _add,
    "addcmul": _addcmul,
    "addcdiv": _addcdiv,
    "lerp": _lerp,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "sqrt": torch.sqrt,
    "abs": torch.abs,
    "neg": torch.neg,
    "sign": torch.sign,
    "maximum": torch.maximum,
    "rsqrt": torch.rsqrt,
    "clamp_min": torch.clamp_min,
}


def _norm(x: Tensor, order: float = 2) -> Tensor:
    """In float32 at least: the norm of float16 gradients is easily more than float16 can hold."""
    return torch.linalg.vector_norm(x, order, dtype=torch.float32 if x.dtype in _LOW else None)


def _norms(tensors: Any, order: float = 2) -> list[Tensor]:
    if any(x.dtype in _LOW for x in tensors):
        return [_norm(x, order) for x in tensors]
    return list(kernels._foreach_norm(tensors, order))


_LOW = (torch.float16, torch.bfloat16)


def _foreach() -> SimpleNamespace:
    fresh = {name: getattr(kernels, f"_foreach_{name}") for name in _OPERATIONS}
    over = {f"{name}_": _over(getattr(kernels, f"_foreach_{name}_")) for name in _OPERATIONS}
    return SimpleNamespace(**fresh, **over, clone=kernels._foreach_clone, norm=_norms)


def _leafwise_ops() -> SimpleNamespace:
    fresh = {name: _leafwise(fn) for name, fn in _OPERATIONS.items()}
    over = {f"{name}_": operation for name, operation in fresh.items()}
    return SimpleNamespace(**fresh, **over, clone=_leafwise(torch.clone), norm=_leafwise(_norm))


Ops = SimpleNamespace
foreach: Ops = _foreach()
leafwise: Ops = _leafwise_ops()


_capturing: ContextVar[bool] = ContextVar("capturing", default=False)


@contextlib.contextmanager
def capturing() -> Iterator[None]:
    """Within, operations are recorded for a compiler, which fuses plain ones itself: no fused kernels, and no number is read."""
    token = _capturing.set(True)
    try:
        yield
    finally:
        _capturing.reset(token)


def eager() -> bool:
    """Whether operations run as they are called: no compiler and no `torch.func` transform looks on."""
    return not _capturing.get() and kernels._C._functorch.peek_interpreter_stack() is None


#: What an ordinary tensor is: no DTensor, and no other class that computes in its own way.
PLAIN = frozenset({Tensor, torch.nn.Parameter})
_LEAVES = PLAIN | {type(None)}
is_none = functools.partial(operator.is_, None)
_requires_grad = operator.attrgetter("requires_grad")


def kernels_apply(*lists: Any) -> bool:
    """Whether kernels that write in place may compute on copies of these tensors: ordinary ones, and no gradient flows through."""
    if not eager():
        return False
    for tensors in lists:
        if not PLAIN.issuperset(map(type, tensors)):
            return False
    return not flows(*lists)


def flows(*lists: Any) -> bool:
    """Whether a gradient flows through one of these tensors."""
    return torch.is_grad_enabled() and any(True in map(_requires_grad, tensors) for tensors in lists)


def tree_map(fn: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """`fn` over the leaves, None among them."""
    return optree.tree_map(fn, tree, *rest, none_is_leaf=True)


class Names:
    """The structure of a dictionary whose values are the leaves, in the order of optree: by sorted key. What most parameters are, at a
    fifth of what optree takes for it.
    """

    def __init__(self, tree: dict[str, Any]) -> None:
        self.keys = sorted(tree)
        self._values = operator.itemgetter(*self.keys, self.keys[0])  # the first once more: of one key alone it returns no tuple
        self._written = tuple(tree)
        self._places = operator.itemgetter(*map(self.keys.index, tree)) if self._written != tuple(self.keys) else tuple

    def flatten_up_to(self, tree: Any) -> list[Any]:
        if type(tree) is not dict or len(tree) != len(self.keys):
            raise ValueError(f"expected a dictionary with the keys {self.keys}, not {tree!r}")
        try:
            values = list(self._values(tree))
        except KeyError as error:
            raise ValueError(f"expected a dictionary with the keys {self.keys}, this one has no {error}") from None
        del values[-1]
        return values

    def unflatten(self, leaves: Any) -> dict[str, Any]:
        """The dictionary of these leaves, its keys in the order in which they were first written."""
        return dict(zip(self._written, self._places(leaves), strict=True))


class Flat:
    """Flattens trees with None as a leaf. It remembers the last structure: to check a tree against one is cheaper than to find it out."""

    def __init__(self) -> None:
        self.spec: Any = None

    def __call__(self, tree: Any) -> tuple[list[Any], Any]:
        """The leaves of `tree` and its structure."""
        spec = self.spec
        if spec is None:
            return self._anew(tree)
        try:
            leaves = spec.flatten_up_to(tree)
        except (ValueError, TypeError):
            return self._anew(tree)
        return (leaves, spec) if _LEAVES.issuperset(map(type, leaves)) else self._anew(tree)

    def _anew(self, tree: Any) -> tuple[list[Any], Any]:
        leaves, spec = optree.tree_flatten(tree, none_is_leaf=True)
        if type(tree) is dict and tree and set(map(type, tree)) == {str} and _LEAVES.issuperset(map(type, tree.values())):
            spec = Names(tree)
        self.spec = spec
        return leaves, spec


def ops_for(*lists: Any, values: Mapping[str, Any] = MappingProxyType({})) -> Ops:
    """`foreach` where the tensors are plain and the `values` numbers, else `leafwise`."""
    return foreach if kernels_apply(*lists) and not any(isinstance(value, Tensor) for value in values.values()) else leafwise


def _on_host(value: Any) -> bool:
    """Whether it is a tensor whose elements the host may read: reading others would wait for a device, or lose a gradient."""
    return type(value) is Tensor and value.is_cpu and eager() and not flows([value])


def host_value(value: Any) -> Any:
    """A number that is a tensor on the host, as a Python number; anything else as it is."""
    return value.item() if _on_host(value) else value


def all_finite(leaves: Iterable[Any]) -> Any:
    """Whether every number is finite: a bool where the host knows it, else a tensor. What is no number, or an integer, is passed over."""
    tensors = [torch.as_tensor(leaf) for leaf in leaves if isinstance(leaf, (Tensor, float, complex))]
    parts = [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in tensors if t.numel()]
    there = [t for t in parts if t.is_floating_point()]
    if not there:
        return True
    norms = ops_for(there).norm(there, math.inf)
    device = norms[0].device
    dtype = functools.reduce(torch.promote_types, {n.dtype for n in norms})  # what one of them can hold is finite
    return host_value(torch.isfinite(torch.stack([n.to(device, dtype) for n in norms])).all())


def host_values(values: Tensor, like: list[Tensor]) -> list[Any]:
    """The numbers of a vector, one for each tensor of `like`: Python numbers where the host knows them, else scalars on its device."""
    return values.tolist() if _on_host(values) else [value.to(x.device) for value, x in zip(values.unbind(), like, strict=True)]


def report_as(name: str, value: Any, owner: object = None) -> None:
    """`report`; where several owners report under one name in one step, each has a name of its own."""
    report(name if owner is None else name_of(name, owner), value)


def is_zero(value: Any) -> bool:
    """Whether it is the number 0, so that a term can be left out; a tensor never is."""
    return not isinstance(value, Tensor) and value == 0
