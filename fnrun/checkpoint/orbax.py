"""The files that make `arrays/` a checkpoint of orbax, and format 1, whose arrays orbax alone reads.

fnrun writes and reads orbax's plain arrays itself (zarr v2, not compressed, each one chunk): to orbax they are a dictionary of numbered
arrays. Names with dots, empty arrays, kinds of containers and odd dtypes, which orbax loses or mixes up, are in the manifest alone.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import sys
import threading
import time
import types
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ARRAYS = "arrays"
_HANDLER = "orbax.checkpoint.experimental.v1._src.handlers.pytree_handler.PyTreeHandler"


class Array(NamedTuple):
    """Shape and dtype of an array of orbax."""

    shape: tuple[int, ...]
    dtype: np.dtype


def chunk(number: int, array: Array) -> str:
    """The file with the bytes of an array."""
    return f"{ARRAYS}/state/{number:05d}/{'.'.join('0' * len(array.shape))}"


def described(arrays: Sequence[Array]) -> dict[str, bytes]:
    """The files beside those of the arrays, by name."""
    now = time.time_ns()
    about = {
        "item_handlers": {"state": _HANDLER},
        "metrics": {},
        "performance_metrics": {},
        "init_timestamp_nsecs": now,
        "commit_timestamp_nsecs": now,
        "custom_metadata": {},
    }
    tree = {
        f"('{number:05d}',)": {
            "key_metadata": [{"key": f"{number:05d}", "key_type": 2}],
            "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
        }
        for number in range(len(arrays))
    }
    options = {"use_ocdbt": False, "use_zarr3": False, "store_array_data_equal_to_fill_value": True, "custom_metadata": None}
    return {
        f"{ARRAYS}/orbax.checkpoint": b"",
        f"{ARRAYS}/_CHECKPOINT_METADATA": json.dumps(about).encode(),
        f"{ARRAYS}/commit_success.txt": b"Checkpoint commit was successful",  # asked for where renaming is not atomic: in a bucket
        f"{ARRAYS}/state/_METADATA": json.dumps({"tree_metadata": tree, **options}).encode(),
        **{f"{ARRAYS}/state/{number:05d}/.zarray": json.dumps(_zarray(array)).encode() for number, array in enumerate(arrays)},
    }


def _zarray(array: Array) -> dict[str, Any]:
    return {
        "zarr_format": 2,
        "shape": array.shape,
        "chunks": array.shape,
        "dtype": array.dtype.str,
        "order": "C",
        "dimension_separator": ".",
        "compressor": None,
        "filters": None,
        "fill_value": None,
    }


# --- format 1 ----------------------------------------------------------------------------------------------------------

#: orbax and tensorstore keep what they know of a call for the process: one call at a time, whichever directories it is about.
_turn = threading.Lock()


def load(path: Path, numbers: Iterable[int], size: int) -> dict[int, np.ndarray]:
    """The arrays of these numbers, of `size` bytes of files.

    Raises ValueError where they would take more memory than the files: but for a few small values nothing in them is compressed.
    """
    with _turn, _quiet():
        ocp = imported()
        context = ocp.Context()
        context.pytree.loading.partial_load = True
        with context:
            saved = ocp.metadata(path).metadata
            names = {f"{number:05d}": np.zeros((), saved[f"{number:05d}"].dtype) for number in numbers}  # it casts to what is asked for
            needed = sum(math.prod(saved[name].shape) * like.itemsize for name, like in names.items())
            if needed > size + 4096 * len(names):
                raise ValueError(f"{needed} bytes of arrays in {size} bytes of files")
            loaded = ocp.load(path, names)
    return {int(name): array for name, array in loaded.items()}


def imported() -> Any:
    """`orbax.checkpoint.v1`, imported where it is used because it brings JAX.

    JAX stays on the CPU where nobody else has imported it: by default it reserves most of a GPU's memory. It warns at each fork, because a
    child that calls it may hang; a forked data worker never calls it. absl, through which orbax logs, calls `logging.basicConfig()` where a
    program has not. JAX draws from NumPy's generator meanwhile, which is put back.
    """
    from absl import logging as absl

    absl.logging = types.SimpleNamespace(**{**vars(logging), "basicConfig": lambda: None})  # pyright: ignore[reportAttributeAccessIssue]
    drawn = np.random.get_state()
    try:
        if "jax" not in sys.modules and "JAX_PLATFORMS" not in os.environ:
            import jax

            jax.config.update("jax_platforms", "cpu")
        with _quiet():
            from orbax.checkpoint import v1 as ocp
    finally:
        np.random.set_state(drawn)
    warnings.filterwarnings("ignore", r"os\.fork\(\) was called", RuntimeWarning)
    return ocp


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what orbax says out of the program's log, within it also its errors, which it raises as well."""
    log = logging.getLogger("absl")
    log.addFilter(_of_others)
    try:
        yield
    finally:
        log.removeFilter(_of_others)


def _of_others(record: logging.LogRecord) -> bool:
    return not any(f"{os.sep}{name}{os.sep}" in record.pathname for name in ("orbax", "absl"))
