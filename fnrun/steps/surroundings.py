"""What surrounds a call of a step: generators seeded from its key, and collected reports."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import torch

from fnrun.core.inplace import FIRST
from fnrun.core.key import Key, Scope, ambient
from fnrun.core.reports import collect
from fnrun.core.undisturbed import undisturbed
from fnrun.data.ambient import restore_hosts, save_hosts
from fnrun.steps.draws import RandomOperations


class Surroundings:
    """torch's ambient generators seeded from a key and restored afterwards, reports collected.

    The first calls warn of draws from Python's or NumPy's generator, and restore it. Later calls are not watched: that costs 100 us.
    """

    def __init__(self, name: str, host_random: bool = False) -> None:
        self.name, self.host, self.remaining = name, host_random, 0 if host_random else FIRST

    def __call__(self, key: Any, *data: int | str) -> Any:
        """The context manager of a call that draws from `key` folded with `data`. The key of a recorded call makes its own."""
        return _Within(self, key.fold_path(*data)) if type(key) is Key else key.within(*data)

    def undrawn(self) -> Any:
        """The context manager of a call without a key: reports are collected, a random draw is an error."""
        return _Undrawn(self.name)

    def save(self) -> Any:
        self.remaining -= 1
        return len(sys.modules), save_hosts()

    def compare(self, saved: Any) -> None:
        modules, states = saved
        if len(sys.modules) != modules:
            return  # some modules draw as they are imported
        if moved := restore_hosts(states):
            warnings.warn(
                f"{self.name} draws from {' and '.join(moved)}, which is not keyed by the state: two "
                "calls differ and a resumed run is another run. Use torch's, or make the step with host_random=True",
                stacklevel=5,
            )


class _Within(Scope):
    """One call in its surroundings: `with` returns the reports, a dictionary that fills up."""

    __slots__ = ("_before", "_collect", "_surroundings")

    def __init__(self, surroundings: Surroundings, path: bytes) -> None:
        super().__init__(path, surroundings.host)
        self._surroundings = surroundings

    @undisturbed
    def __enter__(self) -> dict[str, Any]:
        super().__enter__()
        try:
            # Under the scope's lock: no other thread draws meanwhile.
            self._before = self._surroundings.save() if self._surroundings.remaining else None
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


class _Undrawn(RandomOperations):
    """A call that must not draw from torch's generators."""

    def __init__(self, name: str) -> None:
        super().__init__(self._refuse)
        self._name, self._reports = name, collect()

    def _refuse(self, func: Any, args: Any, kwargs: Any) -> Any:
        before = [(generator, generator.get_state()) for generator in ambient()]
        result = func(*args, **kwargs)
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
