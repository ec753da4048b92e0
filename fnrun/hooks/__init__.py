"""Hooks: what transforms the state between ticks, `(state, metrics) -> state`. One concept a file.

What a hook remembers is in `state.memory`, under its name; the hook object itself is a frozen value.
"""

from fnrun.hooks.average import annealed_ema, ema, swa
from fnrun.hooks.buffers import sync_buffers
from fnrun.hooks.plateau import reduce_on_plateau
from fnrun.hooks.recovery import rollback
from fnrun.hooks.stopping import early_stopping, stop_after
from fnrun.hooks.timing import at, between, compose, every, when

__all__ = [
    "annealed_ema", "at", "between", "compose", "early_stopping", "ema", "every", "reduce_on_plateau", "rollback", "stop_after", "swa",
    "sync_buffers", "when",
]  # fmt: skip
