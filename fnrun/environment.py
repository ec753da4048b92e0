"""What the bits of a computation may depend on besides program, state and data: versions, machine, settings."""

from __future__ import annotations

import functools
import platform
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


@functools.cache
def _versions() -> dict[str, str]:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return versions
