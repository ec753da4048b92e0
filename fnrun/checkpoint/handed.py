"""What was handed over to be saved, and whether it is still what it was.

A state is not copied to be saved, for nobody writes to it. Where somebody does, the disk is not to blame: it is told here.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch

from fnrun.checkpoint.manifest import Leaf
from fnrun.core.inplace import InPlaceError, version


class HandedOver:
    """The tensors of the last state that was handed over, and how often each had been written to."""

    def __init__(self) -> None:
        self._step: int | None = None
        self._held: dict[int, tuple[weakref.ref[torch.Tensor], int]] = {}

    def take(self, step: int, leaves: list[Leaf], sources: Mapping[int, Any]) -> InPlaceError | None:
        """Note these tensors; the error where one of them is in the last state too, and was written to since."""
        held, last, changed = self._held, self._step, None
        self._step, self._held = step, {}
        for number, source in sources.items():
            if not isinstance(source, torch.Tensor):
                continue
            known, count = held.get(id(source), (None, 0))
            if changed is None and known is not None and known() is source and version(source) != count:
                changed = changed_after_saving(leaves[number].path, f"the state of step {last}")
            self._held[id(source)] = weakref.ref(source), version(source)
        return changed

    def versions(self) -> dict[int, int]:
        """The counts of the tensors that were last noted, by their ids."""
        return {same: count for same, (_, count) in self._held.items()}


def check(leaves: list[Leaf], sources: Mapping[int, Any], versions: Mapping[int, int], step: int) -> None:
    """Raises InPlaceError, with the path, where a tensor was written to since it was noted."""
    for number, source in sources.items():
        if isinstance(source, torch.Tensor) and version(source) != versions.get(id(source), version(source)):
            raise changed_after_saving(leaves[number].path, f"the state of step {step}")


def changed_after_saving(path: str, state: str) -> InPlaceError:
    return InPlaceError(
        f"{path} was changed in place after {state} was handed over to be saved. A hook, an observer, a step or a transform writes to what it was "
        "given: program.dry_run(state, data) and fnrun.testing.assert_pure name it. (Who gives a state away by state.donate() waits for the save first)"
    )
