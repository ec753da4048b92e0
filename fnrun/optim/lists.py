"""Arithmetic on lists of tensors, with two implementations of one set of operations: a rule is written once.

`foreach` calls torch's `_foreach` kernels. `leafwise` calls the plain operations leaf by leaf, out of place: it works under `torch.func`,
in a compiled step, where gradients flow through, and with numbers that are tensors.

An operation with a trailing underscore may write over its first list: `foreach` does, `leafwise` does not.
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

#: torch, with the kernels that its stubs do not declare.
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
    "mul": torch.mul,
    "div": torch.div,
    "sqrt": torch.sqrt,
    "abs": torch.abs,
    "sign": torch.sign,
    "maximum": torch.maximum,
    "rsqrt": torch.rsqrt,
    "clamp_min": torch.clamp_min,
}


def _norm(x: Tensor, order: float = 2) -> Tensor:
    """In float32 or wider: the norm of float16 gradients easily overflows."""
    return torch.linalg.vector_norm(x, order, dtype=torch.float32 if x.dtype in _LOW else None)


def _norms(tensors: Any, order: float = 2) -> list[Tensor]:
    if any(x.dtype in _LOW for x in tensors):
        return [_norm(x, order) for x in tensors]
    return list(kernels._foreach_norm(tensors, order))


_LOW = (torch.float16, torch.bfloat16)


Ops = SimpleNamespace
foreach = Ops(clone=kernels._foreach_clone, norm=_norms)
leafwise = Ops(clone=_leafwise(torch.clone), norm=_leafwise(_norm))
for _name, _fn in _OPERATIONS.items():
    setattr(foreach, _name, getattr(kernels, f"_foreach_{_name}"))
    setattr(foreach, f"{_name}_", _over(getattr(kernels, f"_foreach_{_name}_")))
    setattr(leafwise, _name, _leafwise(_fn))
    setattr(leafwise, f"{_name}_", _leafwise(_fn))


_capturing: ContextVar[bool] = ContextVar("capturing", default=False)


@contextlib.contextmanager
def capturing() -> Iterator[None]:
    """A context in which operations are recorded for a compiler, which fuses plain ones: no fused kernels, no number is read."""
    token = _capturing.set(True)
    try:
        yield
    finally:
        _capturing.reset(token)


def eager() -> bool:
    """Whether operations run as they are called, without a compiler or a `torch.func` transform."""
    return not _capturing.get() and kernels._C._functorch.peek_interpreter_stack() is None


#: The types of ordinary tensors: no DTensor, nor another subclass.
PLAIN = frozenset({Tensor, torch.nn.Parameter})
_LEAVES = PLAIN | {type(None)}
is_none = functools.partial(operator.is_, None)
_requires_grad = operator.attrgetter("requires_grad")


def kernels_apply(*lists: Any) -> bool:
    """Whether kernels that write in place may compute with these tensors: ordinary ones, through which no gradient flows."""
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
    """`fn` over the leaves, with None as a leaf."""
    return optree.tree_map(fn, tree, *rest, none_is_leaf=True)


class Names:
    """The structure of a dictionary whose values are the leaves, in the order of optree, by sorted key; five times as fast as optree."""

    def __init__(self, tree: dict[str, Any]) -> None:
        self.keys = sorted(tree)
        self._values = operator.itemgetter(*self.keys, self.keys[0])  # the first key twice: for a single key the getter returns no tuple
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
        """The dictionary of these leaves, with its keys in their first order of insertion."""
        return dict(zip(self._written, self._places(leaves), strict=True))


class Flat:
    """Flattens trees with None as a leaf, first by the structure of the last tree, which is faster."""

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
    """Whether `value` is a tensor whose elements can be read without waiting for a device or losing a gradient."""
    return type(value) is Tensor and value.is_cpu and eager() and not flows([value])


def host_value(value: Any) -> Any:
    """A scalar tensor on the CPU as a Python number, unless its gradient is needed; anything else unchanged."""
    return value.item() if _on_host(value) else value


def all_finite(leaves: Iterable[Any]) -> Any:
    """Whether all floats among the leaves are finite: a bool where the host knows it, else a tensor."""
    tensors = [torch.as_tensor(leaf) for leaf in leaves if isinstance(leaf, (Tensor, float, complex))]
    parts = [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in tensors if t.numel()]
    floats = [t for t in parts if t.is_floating_point()]
    if not floats:
        return True
    norms = ops_for(floats).norm(floats, math.inf)
    device = norms[0].device
    dtype = functools.reduce(torch.promote_types, {n.dtype for n in norms})  # no finite norm overflows in it
    return host_value(torch.isfinite(torch.stack([n.to(device, dtype) for n in norms])).all())


def host_values(values: Tensor, like: list[Tensor]) -> list[Any]:
    """The numbers of a vector, one for each tensor of `like`: Python numbers where the host knows them, else scalars on their devices."""
    return values.tolist() if _on_host(values) else [value.to(x.device) for value, x in zip(values.unbind(), like, strict=True)]


def report_as(name: str, value: Any, owner: object = None) -> None:
    """`report`; a second owner of a name in one step reports as `name_2`, and so on."""
    report(name if owner is None else name_of(name, owner), value)


def is_zero(value: Any) -> bool:
    """Whether `value` is the number 0; a tensor never is."""
    return not isinstance(value, Tensor) and value == 0
