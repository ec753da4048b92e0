"""Hooks: what transforms the state between ticks, `(state, metrics) -> state`. One concept a file.

What a hook remembers is in `state.memory`, under its name; the hook object itself is a frozen value.
"""

from fnrun.hooks.average import ema
from fnrun.hooks.monitor import early_stopping
from fnrun.hooks.when import compose, every

__all__ = ["compose", "early_stopping", "ema", "every"]
