"""What the bits of a computation may depend on besides program, state and data: versions, machine, settings."""

from __future__ import annotations

import functools
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("fnrun", "torch", "numpy", "optree", "msgspec", "orbax-checkpoint", "jax")


def environment() -> dict[str, str]:
    """Versions, machine, devices, threads and the choice of algorithms, as they are now, in words by name."""
    import torch

    found = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": platform.machine(),
        **_versions(),
        "threads": str(torch.get_num_threads()),
        "deterministic": str(torch.are_deterministic_algorithms_enabled()),
    }
    if torch.cuda.is_available():
        found["cuda"] = str(torch.version.cuda)
        found["devices"] = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return found


def ranks() -> tuple[int, int]:
    """Which of how many processes this one is: torch.distributed's word, or `RANK` and `WORLD_SIZE` as torchrun sets them, or 0 of 1.

    Raises ValueError for variables that are no numbers; an empty one is not set.
    """
    distributed = getattr(sys.modules.get("torch"), "distributed", None)
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    rank = _whole("RANK", 0)
    return rank, _whole("WORLD_SIZE", rank + 1)


def rank() -> int:
    """The rank of this process, 0 where it is alone."""
    return ranks()[0]


def _whole(variable: str, otherwise: int) -> int:
    value = os.environ.get(variable, "").strip()
    if value and not value.isdecimal():
        raise ValueError(f"the variable {variable}, by which a launcher numbers its processes, is {value!r} and no number: unset it")
    return int(value) if value else otherwise


@functools.cache
def _versions() -> dict[str, str]:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return versions
