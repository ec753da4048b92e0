"""Which of several processes this one is."""

from __future__ import annotations

from fnrun.core.environment import ranks


def rank() -> int:
    """The rank of this process, 0 where it is alone."""
    return ranks()[0]
