"""Activation checkpointing: parts of a model whose activations are not kept for the backward, but computed once more in it.

The parts' `forward` is another one for the length of a forward, so any model works unchanged. Inputs are kept, and what the part's modules hold
as it begins; the second computation is given all of it again, and leaves nothing behind: buffers, attributes, reports and generators are
afterwards as the first one left them. So the gradient is that of the step without checkpointing, bit for bit.
"""

from __future__ import annotations

import difflib
import fnmatch
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import optree
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fnrun.reports import collect
from fnrun.steps.shell import Shell
from fnrun.steps.watch import Contents, versions
from fnrun.undisturbed import undisturbed
from fnrun.words import kind

#: They have no forward.
_LISTS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def chosen(who: str, model: nn.Module, which: Any) -> list[tuple[str, nn.Module]]:
    """The parts of `model` that `which` names, with their paths: "blocks", or a sequence of patterns. None lies within another one."""
    paths = {path: module for path, module in model.named_modules() if path}
    if isinstance(which, str) and which == "blocks":
        found = list(_blocks(model, paths)) or list(_layers(model, paths))
        if not found:
            raise ValueError(
                f"{who}: checkpoint_activations='blocks' finds no blocks in {type(model).__name__}: entries of an nn.ModuleList or nn.Sequential "
                f"that are of one class. Name the parts by patterns of their paths; there are: {_listed(paths)}"
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
    """What a pattern matches: paths in which it occurs, or, where it has a `*`, `?` or `[`, that it is a glob of; of a list its entries."""

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
            f"{who}: checkpoint_activations: pattern {pattern!r} matches no module; {'near' if near else 'there are'}: {_listed(near or paths)}"
        )
    yield from found


def _blocks(model: nn.Module, paths: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """What stands several times in a list: entries of one class that have parts of their own. Of an nn.Sequential in a list its own blocks, if it has any."""
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
    """In a model of which no block has parts: the entries of lists that hold one class alone, as recurrent layers."""
    for path, holder in {"": model, **paths}.items():
        kinds = {type(child) for child in holder.children()} if isinstance(holder, (nn.ModuleList, nn.Sequential)) else ()
        if len(kinds) == 1 and len(list(holder.children())) > 1 and next(holder.parameters(), None) is not None:
            yield from ((f"{path}.{name}".lstrip("."), child) for name, child in holder.named_children())


def _listed(paths: Any) -> str:
    names = list(paths)
    return ", ".join(map(repr, names[:10])) + ", ..." * (len(names) > 10) if names else "none"


class Recomputed:
    """The parts of a shell's model that are computed once more in the backward."""

    def __init__(self, name: str, shell: Shell, which: Any, host: bool) -> None:
        self.parts = [_Part(name, path, module, shell, host) for path, module in chosen(name, shell.model, which)]

    def run(self, fn: Callable[[Any], Any], batch: Any, buffers: Mapping[str, Tensor]) -> Any:
        """`fn(batch)`, a forward within `shell.run` that began with these buffers."""
        own = [part.module.__dict__.get("forward") for part in self.parts]
        try:
            for part in self.parts:
                part.enter(buffers)
            return fn(batch)
        finally:
            self._leave(own)

    @undisturbed
    def _leave(self, own: list[Any]) -> None:
        for part, forward in zip(self.parts, own, strict=True):
            part.module.__dict__.pop("forward", None)
            if forward is not None:
                part.module.__dict__["forward"] = forward


class _Part:
    """A module whose forward is checkpointed while it is entered."""

    def __init__(self, name: str, path: str, module: nn.Module, shell: Shell, host: bool) -> None:
        self.name, self.path, self.module, self.shell, self.host = name, path, module, shell, host
        self.modules = list(module.modules())
        self.slots, self.elsewhere = shell.slots_of(self.modules)

    def others(self) -> list[Tensor]:
        """What the shell holds besides the part's buffers."""
        return [container[key] for container, key, _ in self.elsewhere]

    def enter(self, buffers: Mapping[str, Tensor]) -> None:
        forward = self.module.forward
        self.module.__dict__["forward"] = lambda *args, **kwargs: self._checkpointed(forward, args, kwargs, buffers)

    def _checkpointed(self, forward: Callable[..., Any], args: Any, kwargs: Any, buffers: Mapping[str, Tensor]) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        inputs: Any = (args, kwargs)
        leaves, spec = optree.tree_flatten(inputs)  # torch looks after the tensors that it is given, and not after those in lists
        del inputs
        before, values = Contents(self.modules), self._values(buffers)
        host = _host() if self.host else None

        def compute(*leaves: Any) -> Any:
            nonlocal args
            if args is not None:
                given, args = args, None
                return forward(*given, **kwargs)
            given, named = optree.tree_unflatten(spec, leaves)
            with _Again(self, before, values, host):
                return forward(*given, **named)

        return checkpoint(compute, *leaves, use_reentrant=False)

    def _values(self, buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of the part's buffers as it begins: those of the state, unless something has written to them in this forward."""
        held = {name: container[key] for container, key, name in self.slots}
        first = self.shell.first.watching  # which looks at what is read
        return {
            name: t.clone() if first or t._version or name not in buffers else buffers[name] for name, t in held.items() if t is not None
        }


class _Again:
    """The second computation of a part: it finds what the first one found, and leaves nothing behind."""

    def __init__(self, part: _Part, before: Contents, values: Mapping[str, Tensor], host: Any) -> None:
        self.part, self.before, self.values, self.host = part, before, values, host

    @undisturbed
    def __enter__(self) -> None:
        part = self.part
        self._reports, self._now = collect(), Contents(part.modules)
        self._counts = versions(part.others()) if part.shell.first.watching else None
        self._host = None if self.host is None else _set_host(self.host)
        self._reports.__enter__()
        self.before.put_back()
        fresh = {name: value.clone() for name, value in self.values.items()}
        for container, key, name in part.slots:
            if name in fresh:
                container[key] = fresh[name]

    @undisturbed
    def __exit__(self, *exc: object) -> None:
        self._now.put_back()
        self._reports.__exit__()
        if self._host is not None:
            _set_host(self._host)
        if self._counts is not None and self._counts != (now := versions(self.part.others())):
            pairs = zip(self.part.elsewhere, self._counts, now or (), strict=True)
            names = sorted({name for (_, _, name), a, b in pairs if a != b})
            raise ValueError(
                f"{self.part.name}: the forward of {self.part.path!r} writes to {', '.join(map(repr, names))}, and where its activations are "
                "checkpointed it would do so twice: leave it out of checkpoint_activations="
            )


def _host() -> Any:
    return random.getstate(), np.random.get_state()


def _set_host(states: Any) -> Any:
    """The states of before."""
    before = _host()
    random.setstate(states[0])
    np.random.set_state(states[1])
    return before
