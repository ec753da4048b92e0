"""Whether the tensors of a state are written to while it is saved.

A state is not copied to be saved, for nobody writes to it. Where somebody does, the error says so and does not blame the disk.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import torch

from fnrun.checkpoint.manifest import Leaf
from fnrun.core.inplace import InPlaceError, version


class HandedOver(NamedTuple):
    """The tensors of a state that was handed over to be saved, by id, and how often each had been written to."""

    step: int
    versions: dict[int, tuple[weakref.ref[torch.Tensor], int]]

    @classmethod
    def of(cls, step: int, sources: Mapping[int, Any]) -> Self:
        return cls(step, {id(t): (weakref.ref(t), version(t)) for t in sources.values() if isinstance(t, torch.Tensor)})

    def check(self, leaves: list[Leaf], sources: Mapping[int, Any]) -> None:
        """Raises InPlaceError, with the path, where one of `sources` is among these tensors and was written to since."""
        for number, source in sources.items():
            known, count = self.versions.get(id(source), (None, 0))
            if known is not None and known() is source and version(source) != count:
                raise changed_after_saving(leaves[number].path, self.step)


def changed_after_saving(path: str, step: int) -> InPlaceError:
    return InPlaceError(
        f"{path} was changed in place after the state of step {step} was handed over to be saved. A hook, an observer, a step or a "
        "transform writes to its argument: program.dry_run(state, data) and fnrun.testing.assert_pure name it. (Who gives a state away by "
        "state.donate() waits for the save first)"
    )
