"""Activation checkpointing: parts of a model whose activations are recomputed in the backward.

During a forward each part's `forward` is replaced, so any model works unchanged. The inputs of a part are saved, and the contents of its
modules, of the modules around it, and of the objects among its arguments. The second computation starts from these, and restores buffers,
attributes, reports and generators afterwards. So the gradient is that of the step without checkpointing, bit for bit.

A part may read something else that has changed meanwhile. In the first forwards the tensors that the two computations save for the backward
are compared, and a difference is an error.
"""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import itertools
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError, checkpoint

from fnrun.core.reports import collect
from fnrun.core.undisturbed import undisturbed
from fnrun.core.words import kind
from fnrun.data.ambient import restore_hosts, save_hosts
from fnrun.steps.functional import FunctionalModule
from fnrun.steps.watch import Contents, versions

#: Containers without a forward.
_LISTS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def chosen(who: str, model: nn.Module, which: Any) -> list[tuple[str, nn.Module]]:
    """The modules of `model` that `which` selects ("blocks", or patterns), with their paths; the outer one of nested modules."""
    paths = {path: module for path, module in model.named_modules() if path}
    if isinstance(which, str) and which == "blocks":
        found = list(_blocks(model, paths)) or list(_layers(model, paths))
        if not found:
            raise ValueError(
                f"{who}: checkpoint_activations='blocks' finds no blocks in {type(model).__name__}: entries of an nn.ModuleList or "
                f"nn.Sequential that are of one class. Name the parts by patterns of their paths; there are: {_listed(paths)}"
            )
    elif isinstance(which, (list, tuple)) and all(isinstance(pattern, str) for pattern in which):
        if not which:
            raise ValueError(f"{who}: checkpoint_activations= has no pattern: leave it out, or give 'blocks'")
        found = [part for pattern in which for part in _matching(who, pattern, paths)]
    else:
        what = repr(which) if isinstance(which, (str, bool)) else kind(which)
        raise TypeError(f"{who}: checkpoint_activations= is None, 'blocks' or a list of patterns of paths (['encoder.layer']), not {what}")
    inner = {id(part) for _, module in found for part in module.modules() if part is not module}
    return [(path, module) for module, path in {module: path for path, module in found}.items() if id(module) not in inner]


def _matching(who: str, pattern: str, paths: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """The modules whose path contains the pattern, or matches it as a glob (with `*`, `?` or `[`); for a list its entries."""

    def entered(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        if not isinstance(module, _LISTS):
            yield path, module
            return
        for name, child in module.named_children():
            yield from entered(f"{path}.{name}", child)

    glob = any(sign in pattern for sign in "*?[")
    matched = [path for path in paths if pattern and (fnmatch.fnmatchcase(path, pattern) if glob else pattern in path)]
    found = [part for path in matched for part in entered(path, paths[path])]
    if not found:
        near = difflib.get_close_matches(pattern, paths, n=5, cutoff=0.4)
        raise ValueError(
            f"{who}: checkpoint_activations: pattern {pattern!r} matches no module; {'near' if near else 'there are'}: "
            f"{_listed(near or paths)}"
        )
    yield from found


def _blocks(model: nn.Module, paths: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """The entries of lists that share a class and have submodules; for an entry that is an nn.Sequential of blocks, those blocks."""
    for path, holder in {"": model, **paths}.items():
        if not isinstance(holder, (nn.ModuleList, nn.Sequential)):
            continue
        entries = [
            (f"{path}.{name}".lstrip("."), child)
            for name, child in holder._modules.items()
            if child is not None and next(child.children(), None)
        ]
        alike = Counter(type(child) for _, child in entries)
        only = isinstance(holder, nn.ModuleList) and len(holder) == 1
        for where, child in entries:
            stage = isinstance(child, nn.Sequential) and any(_blocks(child, {}))
            if (alike[type(child)] > 1 or only) and not isinstance(child, _LISTS) and not stage:
                yield where, child


def _layers(model: nn.Module, paths: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """For a model without blocks: the entries of lists of one class, as of recurrent layers."""
    for path, holder in {"": model, **paths}.items():
        kinds = {type(child) for child in holder.children()} if isinstance(holder, (nn.ModuleList, nn.Sequential)) else ()
        if len(kinds) == 1 and len(list(holder.children())) > 1 and next(holder.parameters(), None) is not None:
            yield from ((f"{path}.{name}".lstrip("."), child) for name, child in holder.named_children())


def _listed(paths: Any) -> str:
    names = list(paths)
    return ", ".join(map(repr, names[:10])) + ", ..." * (len(names) > 10) if names else "none"


class Recomputed:
    """The parts of a functional module that are recomputed in the backward."""

    def __init__(self, functional: FunctionalModule, which: Any, host: bool) -> None:
        self.parts = [_Part(path, module, functional, host) for path, module in chosen(functional.whose, functional.model, which)]
        self._calls: list[_Call] = []
        self._copies: dict[int, tuple[Any, Any, Tensor]] = {}

    def run(self, fn: Callable[[Any], Any], batch: Any, buffers: Mapping[str, Tensor]) -> Any:
        """`fn(batch)`, a forward within `functional.run` that started with these buffers."""
        forwards = [part.module.__dict__.get(part.entry) for part in self.parts]
        try:
            for part in self.parts:
                part.enter(buffers, self._calls, self._copies)
            return fn(batch)
        finally:
            self._leave(forwards)

    def over(self, fn: Callable[[], Any]) -> Any:
        """`fn()`, a forward and its backward. Errors of torch about the second computation are replaced by ones that name the part."""
        try:
            return fn()
        except CheckpointError as error:
            latest = next((call for call in self._calls if call.latest), None)
            if latest is None:  # a checkpoint within the model
                raise
            raise ValueError(latest.part.differs()) from error
        except RuntimeError as error:
            moved = next((call for call in self._calls if call.moved() - call.copied), None)
            if moved is None:
                raise
            raise ValueError(moved.part.writes()) from error
        finally:
            self._forget()

    @undisturbed
    def _forget(self) -> None:
        for call in self._calls:  # an argument may hold the graph that holds the call
            call.clear()
        self._calls.clear()
        self._copies.clear()

    @undisturbed
    def _leave(self, forwards: list[Any]) -> None:
        for part, forward in zip(self.parts, forwards, strict=True):
            part.module.__dict__.pop(part.entry, None)
            if forward is not None:
                part.module.__dict__[part.entry] = forward


class _Part:
    """A module whose forward is checkpointed."""

    #: The number of forwards with the part in which the two computations are compared.
    LOOKS = 3

    def __init__(self, path: str, module: nn.Module, functional: FunctionalModule, host: bool) -> None:
        self.name, self.path, self.module, self.functional, self.host = functional.whose, path, module, functional, host
        #: The attribute that a call of the module calls: a compiled module stays compiled.
        self.entry = "forward" if module._compiled_call_impl is None else "_compiled_call_impl"
        modules = dict(functional.model.named_modules())
        parents = ["", *itertools.accumulate(path.split(".")[:-1], lambda a, b: f"{a}.{b}")]
        within = list(module.modules())
        self.modules = [*within, *(modules[parent] for parent in parents)]  # and the modules around it, which it may read
        self.slots, self.elsewhere = functional.slots_of(within)
        #: The inputs that are written to, by the part or later: it computes with copies of them.
        self.written: set[int] = set()
        self.looks, self._used = self.LOOKS, False

    def others(self) -> list[Tensor]:
        """The tensors of the functional module besides the part's buffers."""
        return [container[key] for container, key, _ in self.elsewhere]

    def enter(self, buffers: Mapping[str, Tensor], calls: list[_Call], copies: dict[Any, Any]) -> None:
        if self._used and self.looks:
            self.looks -= 1
        self._used = False
        forward = getattr(self.module, self.entry)
        self.module.__dict__[self.entry] = lambda *args, **kwargs: self._checkpointed(forward, args, kwargs, buffers, calls, copies)

    def _checkpointed(self, forward: Any, args: Any, kwargs: Any, buffers: Mapping[str, Tensor], calls: list[_Call], copies: Any) -> Any:
        if not torch.is_grad_enabled() or torch.compiler.is_dynamo_compiling():
            return forward(*args, **kwargs)
        self._used = True
        call = _Call(self, args, kwargs, buffers, copies)
        calls.append(call)

        def compute(*given: Tensor) -> Any:
            nonlocal args, kwargs
            if args is not None:
                first, named, args, kwargs = args, kwargs, None, None
                with _looking(call.seen) if self.looks else contextlib.nullcontext():
                    return forward(*first, **named)
            for each in calls:
                each.latest = each is call
            with _Again(call, given) as (again, named):
                return forward(*again, **named)

        given, call.given = call.given, []
        result = checkpoint(compute, *given, use_reentrant=False)
        moved = call.moved()
        self.written |= moved
        if moved - call.copied:
            raise ValueError(self.writes())
        return result

    def values(self, buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The part's buffers before its call: those of the state, unless they were written to in this forward."""
        now = {name: container[key] for container, key, name in self.slots}
        watched = self.functional.first.watching  # a read of the state's own tensor would be an error
        return {
            name: t.clone() if watched or t._version or name not in buffers else buffers[name] for name, t in now.items() if t is not None
        }

    def differs(self) -> str:
        return (
            f"{self.name}: the second computation of {self.path!r} does not find what the first one found, so its gradient would be "
            "another one: something that its forward reads has changed meanwhile, and is neither an argument nor held by its modules or "
            "those around it (a global or a closure's variable, a tensor that is written to in place, a generator). Pass it as an "
            "argument, as a new tensor each time, or leave the part out of checkpoint_activations="
        )

    def writes(self) -> str:
        return (
            f"{self.name}: an input of {self.path!r} was written to in place, by its forward or later in the loss, which the first calls "
            "did not do, so its activations cannot be computed again: write in every call, or leave it out of checkpoint_activations="
        )


class _Call:
    """One call of a part: its inputs and the contents of its modules. torch's checkpoint keeps the input tensors, and frees them."""

    def __init__(
        self, part: _Part, args: Any, kwargs: Any, buffers: Mapping[str, Tensor], copies: dict[int, tuple[Any, Any, Tensor]]
    ) -> None:
        tensors: list[Tensor] = []
        self.part, self.latest = part, False
        self.seen: list[_Values] = []
        self.inputs: Contents | None = Contents((args, tuple(kwargs.items())), tensors)
        self.before: Contents | None = Contents(part.modules)
        self.values, self.host = part.values(buffers), save_hosts() if part.host else []
        self._counts = [_Count(t) for t in tensors]
        places = range(len(tensors)) if part.looks == part.LOOKS else part.written
        # Not those whose entries share memory (`expand`): operations refuse to write to them.
        self.copied = {i for i in places if i < len(tensors) and not (tensors[i].layout is torch.strided and 0 in tensors[i].stride())}
        self.given = [_copy(t, copies) if i in self.copied else t for i, t in enumerate(tensors)]

    def moved(self) -> set[int]:
        """The inputs that were written to since."""
        return {i for i, count in enumerate(self._counts) if count.moved()}

    def clear(self) -> None:
        self.inputs = self.before = None
        self.values = {}


class _Count:
    """A tensor's count of writes, without its memory."""

    def __init__(self, tensor: Tensor) -> None:
        self._alias = tensor.detach()  # shares the count,
        self._before = versions([self._alias])
        if self._before and type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided:
            self._alias.data = tensor.new_empty(0)  # also with other memory

    def moved(self) -> bool:
        return versions([self._alias]) != self._before


def _copy(tensor: Tensor, copies: dict[int, tuple[Any, Any, Tensor]]) -> Tensor:
    """A copy, shared by all parts that get this tensor with this value."""
    ref, count, copy = copies.get(id(tensor), (lambda: None, None, tensor))
    if ref() is not tensor or count != versions([tensor]):
        copy = tensor.detach().clone().requires_grad_(tensor.requires_grad)
        copies[id(tensor)] = weakref.ref(tensor), versions([tensor]), copy
    return copy


class _Again:
    """The second computation of a part: it starts from the inputs and contents of the first one, and restores everything afterwards."""

    def __init__(self, call: _Call, given: Sequence[Tensor]) -> None:
        self.call, self.given = call, given

    @undisturbed
    def __enter__(self) -> tuple[Any, dict[str, Any]]:
        call, part = self.call, self.call.part
        if call.inputs is None or call.before is None:
            raise RuntimeError(
                f"{part.name}: a backward through {part.path!r} after the step is over, when its module has its own tensors back"
            )
        part.written |= call.moved()
        given = [t.clone() if i in call.copied & part.written else t for i, t in enumerate(self.given)]
        self._seen: list[_Values] = []
        self._looking = _looking(self._seen) if call.seen else contextlib.nullcontext()
        self._reports, self._now = collect(), (call.before.now(), call.inputs.now())
        self._counts = versions(part.others()) if part.functional.first.watching else None
        self._host = save_hosts() if call.host else []
        restore_hosts(call.host)
        self._reports.__enter__()
        call.before.put_back()
        args, named = call.inputs.put_back(given)
        fresh = {name: value.clone() for name, value in call.values.items()}
        for container, key, name in part.slots:
            if name in fresh:
                container[key] = fresh[name]
        self._looking.__enter__()
        return args, dict(named)

    @undisturbed
    def __exit__(self, *exc: object) -> None:
        part = self.call.part
        self._looking.__exit__(*exc)
        for contents in self._now:
            contents.put_back()
        self._reports.__exit__()
        restore_hosts(self._host)
        if self._counts is not None and self._counts != (now := versions(part.others())):
            pairs = zip(part.elsewhere, self._counts, now or (), strict=True)
            names = sorted({name for (_, _, name), a, b in pairs if a != b})
            raise ValueError(
                f"{part.name}: the forward of {part.path!r} writes to {', '.join(map(repr, names))}, and where its activations are "
                "checkpointed it would do so twice: leave it out of checkpoint_activations="
            )
        # The second computation may stop early, when all that the backward needs is there.
        if any(map(_Values.differ, self.call.seen, self._seen)):
            raise ValueError(part.differs())


class _Values:
    """Two sums over a tensor that is saved for the backward, to compare two computations without keeping the first one's tensors."""

    def __init__(self, tensor: Tensor) -> None:
        plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
        self.sums = _sums(tensor) if plain and tensor.dtype is not torch.uint8 else None  # bytes are workspaces of kernels
        exact = tensor.device.type == "cpu"  # kernels of other devices may add in any order
        self.tolerance = 1e-9 if exact else 0.05 if tensor.is_floating_point() and tensor.dtype.itemsize < 4 else 1e-3

    def differ(self, other: _Values) -> bool:
        if self.sums is None or other.sums is None:
            return False
        (a, size), (b, _) = self.sums.tolist(), other.sums.tolist()
        return not abs(a - b) <= self.tolerance * size**0.5


def _sums(tensor: Tensor) -> Tensor:
    """A sum weighted by position, and the sum of squares."""
    flat = (torch.view_as_real(tensor) if tensor.is_complex() else tensor).detach().reshape(-1)
    dtype = torch.float32 if flat.device.type == "mps" else torch.float64
    weights = (torch.arange(min(len(flat), 1 << 20), dtype=dtype, device=flat.device) * 0.7391 + 1).sin()
    sums = flat.new_zeros(2, dtype=dtype)
    for piece in flat.split(1 << 20):
        values = piece.to(dtype).nan_to_num(1.25, 3.5, -2.5)
        sums += torch.stack([values @ weights[: len(values)], values @ values])
    return sums


def _looking(seen: list[_Values]) -> Any:
    """Append the values of tensors that are saved for the backward to `seen`; hooks around it still apply."""
    pack, unpack = torch._C._autograd._top_saved_tensors_default_hooks(False)  # pyright: ignore[reportAttributeAccessIssue]

    def looked(tensor: Tensor) -> Any:
        seen.append(_Values(tensor))
        return pack(tensor)

    return torch.autograd.graph.saved_tensors_hooks(torch.compiler.disable(looked), unpack)  # pyright: ignore[reportArgumentType]
