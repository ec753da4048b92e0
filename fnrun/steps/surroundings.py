"""What a step runs in: generators seeded from its key, and its reports collected."""

from __future__ import annotations

import random
import sys
import warnings
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fnrun.core import tree
from fnrun.core.inplace import FIRST
from fnrun.core.key import Key, Scope, ambient
from fnrun.core.reports import collect
from fnrun.core.undisturbed import undisturbed


class Surroundings:
    """torch's ambient generators seeded from a key and put back afterwards, reports collected.

    In the first calls it tells a step that it moves Python's or NumPy's generator, and puts them back. Later calls go unwatched: a look
    costs 100 us.
    """

    def __init__(self, name: str, host_random: bool = False) -> None:
        self.name, self.host, self.remaining = name, host_random, 0 if host_random else FIRST

    def __call__(self, key: Any, *data: int | str) -> Any:
        """What a call runs in that draws from `key` folded with `data`. The key of a call that becomes a graph makes its own."""
        return _Within(self, key.fold_path(*data)) if type(key) is Key else key.within(*data)

    def undrawn(self) -> Any:
        """Without a key: reports are collected, a random draw is an error."""
        return _Undrawn(self.name)

    def look(self) -> Any:
        self.remaining -= 1
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
                f"{self.name} draws from the global generator of {' and '.join(names)}, which is not keyed by the state: two calls differ "
                "and a resumed run is another run. Use torch's, or make the step with host_random=True",
                stacklevel=5,
            )


class _Within(Scope):
    """One call in its surroundings: `with` gives the reports, a dictionary that fills up."""

    __slots__ = ("_before", "_collect", "_surroundings")

    def __init__(self, surroundings: Surroundings, path: bytes) -> None:
        super().__init__(path, surroundings.host)
        self._surroundings = surroundings

    @undisturbed
    def __enter__(self) -> dict[str, Any]:
        super().__enter__()
        try:
            self._before = (
                self._surroundings.look() if self._surroundings.remaining else None
            )  # under the scope's lock, which keeps others out
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


class _Undrawn(TorchDispatchMode):
    """A call in which nothing is to be drawn from torch's generators."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name, self._reports = name, collect()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **(kwargs or {}))
        before = [(generator, generator.get_state()) for generator in ambient()]
        result = func(*args, **(kwargs or {}))
        if moved := [(generator, state) for generator, state in before if not torch.equal(generator.get_state(), state)]:
            for generator, state in moved:
                generator.set_state(state)
            raise ValueError(
                f"{self._name}: the loss draws random numbers ({func.__name__.partition('.')[0]}), and was given no key: "
                "step.loss(params, buffers, batch, key=key); a step's own is state.rng.fold_in('train', state.step)"
            )
        return result

    def __enter__(self) -> Any:
        super().__enter__()
        return self._reports.__enter__()

    def __exit__(self, *exc: Any) -> None:
        self._reports.__exit__()
        super().__exit__(*exc)
