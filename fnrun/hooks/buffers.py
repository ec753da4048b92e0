"""The same buffers on every rank."""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed

from fnrun.core.state import TrainState


def sync_buffers(state: TrainState, metrics: dict[str, Any]) -> TrainState:
    """The state with the mean of each buffer over all ranks of the default process group; integers and booleans are those of rank 0.

    Batch statistics differ between ranks that saw other batches: evaluate after this. Without an initialized `torch.distributed` it does
    nothing. Every rank must call it in the same tick, with buffers of the same names and shapes.

    Source: MMEngine's SyncBuffersHook, which acts after each training epoch.
    """
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return state
    return state.replace(buffers={**state.buffers, **_synced(state.buffers)})


def _synced(buffers: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    kinds: dict[tuple[torch.dtype, torch.device], list[str]] = {}
    for name, buffer in buffers.items():
        kinds.setdefault((buffer.dtype, buffer.device), []).append(name)
    synced: dict[str, torch.Tensor] = {}
    for names in kinds.values():  # one message for each dtype, however many buffers there are
        flat = torch.cat([buffers[name].reshape(-1) for name in names])
        if flat.is_floating_point() or flat.is_complex():
            distributed.all_reduce(flat)
            flat /= distributed.get_world_size()
        else:
            distributed.broadcast(flat, src=0)
        parts = flat.split([buffers[name].numel() for name in names])
        synced.update({name: part.view_as(buffers[name]).clone() for name, part in zip(names, parts, strict=True)})
    return synced
