"""Which of several processes this one is."""

from __future__ import annotations

import os

import torch


def rank() -> int:
    """The rank of this process: torch.distributed's, or `RANK` as torchrun sets it, or 0."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    return int(os.environ.get("RANK", 0))
