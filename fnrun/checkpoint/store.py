"""The files of one checkpoint: arrays through orbax, the manifest beside them, a digest for everything.

    manifest.json      structure, leaves, metrics, config, environment, the digest of each other file
    manifest.sha256    the digest of the manifest
    arrays/            orbax: numbered arrays; small leaves lie together in packs, uint8 arrays in which each has its offset
      state/00012/0.0  the bytes of array 12, in the order of C, as zarr (v2, uncompressed, one chunk) lays them down

orbax sees only numbers: names with dots, empty arrays, kinds of containers and odd dtypes, all of which it loses or mixes up, stand in
the manifest. It is imported where it is used, since it brings JAX.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import math
import os
import re
import shutil
import sys
import threading
import types
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from fnrun import files, tree
from fnrun.checkpoint.former import migrate
from fnrun.checkpoint.handed import told
from fnrun.checkpoint.manifest import FORMAT, TORCH_DTYPES, CheckpointError, DamagedError, File, Judgement, Leaf, Manifest, config
from fnrun.environment import environment

#: Smaller leaves are packed: an array costs orbax about a millisecond, whatever its size.
PACKED = 256 * 1024
#: The size of a pack; the memory that packing takes is one copy of the small leaves.
PACK = 64 * 1024 * 1024
#: torch's dtypes that are NumPy's too.
_NATIVE = {"bool", "float16", "float32", "float64", "complex64", "complex128"} | {
    f"{sign}int{8 * size}" for sign in ("", "u") for size in (1, 2, 4, 8)
}
#: So many threads restore.
READERS = min(8, os.cpu_count() or 1)
#: Where a leaf begins in its pack.
ALIGNMENT = 64

MANIFEST, DIGEST, ARRAYS = "manifest.json", "manifest.sha256", "arrays"
#: orbax and tensorstore keep what they know of a call for the process: one call at a time, whichever directories it is about.
_turn = threading.Lock()
_ARRAY_FILE = re.compile(rf"{ARRAYS}/state/(\d{{5}})/([^/]+)")


# --- orbax -------------------------------------------------------------------------------------------------------------


def orbax() -> Any:
    """`orbax.checkpoint.v1`, imported here because it brings JAX.

    JAX is kept to the CPU where nobody else has imported it: left alone it reserves most of a GPU's memory for itself. It warns at each
    fork, because a child that calls it may hang; a forked data worker never does. absl, through which orbax logs, calls `logging.basicConfig()`
    where a program has not: a program that does so later, while a save is under way, would find it done.
    """
    check_process()
    with _turn:
        return _imported()


def load() -> None:
    """Import orbax if nobody has, here and not in the thread that saves: NumPy's generator, which JAX draws from meanwhile, is put back."""
    if "orbax.checkpoint" not in sys.modules:
        orbax()


def check_process() -> None:
    """Raises CheckpointError in a process that was forked from one that had used orbax: its threads are gone, and it aborts the process."""
    if _forked_from is not None:
        raise CheckpointError(
            f"this process cannot save: it was forked from process {_forked_from} after that had saved, and orbax does not outlive a fork. Start "
            "it by spawn (multiprocessing.get_context('spawn')), or fork before the first save"
        )


def _imported() -> Any:
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


#: The process, once orbax has worked in it: until then a fork may use it too; and the one that this was forked from, if it had worked there.
_used_by: int | None = None
_forked_from: int | None = None


@contextlib.contextmanager
def _working() -> Iterator[None]:
    """Within it orbax is at work: for one call at a time."""
    global _used_by
    with _turn, _quiet():
        _used_by = os.getpid()
        yield


def _forked() -> None:
    global _forked_from, _turn
    _forked_from, _turn = _used_by, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what orbax says out of the program's log, and within it its errors too, which it raises as well."""
    logging.getLogger("absl").addFilter(_wanted)
    _calls.add(call := object())
    try:
        yield
    finally:
        _calls.discard(call)


#: Those of ours that orbax is at work on, in any thread: its own threads log.
_calls: set[object] = set()


def _wanted(record: logging.LogRecord) -> bool:
    """absl at times takes its own file for the caller's."""
    of_orbax = any(f"{os.sep}{name}{os.sep}" in record.pathname for name in ("orbax", "absl"))
    return not of_orbax or (record.levelno >= logging.ERROR and not _calls)


def _save_arrays(path: Path, arrays: list[np.ndarray]) -> None:
    """Write the arrays. Raises OSError where the disk does not take them, before anything is written if that can be known."""
    usage = shutil.disk_usage(path.parent)
    needed, free = sum(array.nbytes for array in arrays), usage.total - usage.used  # and not `usage.free`: root may have more
    if usage.total and needed > free:  # some network file systems do not know
        raise OSError(
            errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: it takes {needed / 1e6:.1f} MB, {free / 1e6:.1f} MB are free", str(path.parent)
        )
    ocp = orbax()
    context = ocp.Context()
    context.array.saving.use_compression = False
    context.array.saving.use_ocdbt = False  # a folder an array: damage in a file says which leaves are lost
    context.array.saving.use_zarr3 = False
    context.memory.deepcopy_host_arrays = False  # a state is immutable, and copying is what takes the time
    try:
        with _working(), context, contextlib.nullcontext() if files.syncs(path.parent) else _unsynced():
            ocp.save(path, {f"{number:05d}": array for number, array in enumerate(arrays)})
    except Exception as error:
        if (code := re.search(r"os_error_code='(\d+)'", str(error))) is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error


@contextlib.contextmanager
def _unsynced() -> Iterator[None]:
    """Within it tensorstore does not insist on making files durable, for a file system that cannot."""
    from orbax.checkpoint._src.serialization import tensorstore_utils

    contexts: list[dict[str, Any]] = [tensorstore_utils._BASE_TS_CONTEXT, tensorstore_utils._DEFAULT_OCDBT_TS_CONTEXT]  # pyright: ignore[reportPrivateUsage]
    for settings in contexts:
        settings["file_io_sync"] = False
    try:
        yield
    finally:
        for settings in contexts:
            settings.pop("file_io_sync")


def _load_arrays(path: Path, dtypes: dict[int, np.dtype], size: int) -> dict[int, np.ndarray]:
    """These arrays, by number, of `size` bytes of files. Of what is asked for orbax heeds the dtype, and casts to it; the shape is always the saved one.

    Raises ValueError where they would take more memory than the files: but for a few small values nothing in them is compressed.
    """
    ocp = orbax()
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    names = {f"{number:05d}": np.zeros((), dtype) for number, dtype in dtypes.items()}
    with _working(), context:
        saved = ocp.metadata(path).metadata
        needed = sum(
            math.prod(saved[name].shape) * max(like.itemsize, np.dtype(saved[name].dtype).itemsize) for name, like in names.items()
        )
        if needed > size + 4096 * len(names):
            raise ValueError(f"{needed} bytes of arrays in {size} bytes of files")
        loaded = ocp.load(path, names)
    return {number: loaded[f"{number:05d}"] for number in dtypes}


# --- writing -----------------------------------------------------------------------------------------------------------


def digest(manifest: Manifest, sources: dict[int, Any]) -> dict[int, np.ndarray]:
    """The bits of each leaf that is stored, after their digests have been entered in the manifest; waits for devices."""
    bits = {number: tree.array(source) if isinstance(source, torch.Tensor) else _flat(source) for number, source in sources.items()}
    digests = dict(zip(bits, _each(_sha256, bits.values()), strict=True))
    for number, leaf in enumerate(manifest.leaves):
        if leaf.stored:
            leaf.sha256 = digests[leaf.origin(number)]
    return bits


def _sha256(data: np.ndarray) -> str:
    return hashlib.sha256(data.data).hexdigest()


def _each(function: Callable[[Any], Any], items: Iterable[Any], threads: int = 2) -> list[Any]:
    """`function` of each item, on several threads: hashing and reading take as long as writing does, and hold no lock.

    Two by default, beside a training that wants the processor too.
    """
    items = list(items)
    results: list[Any] = [None] * len(items)
    left = deque(enumerate(items))

    def work(_: int) -> None:
        while True:
            try:
                number, item = left.popleft()
            except IndexError:
                return
            results[number] = function(item)

    with ThreadPoolExecutor(threads, "fnrun-checkpoint") as pool:
        list(pool.map(work, range(min(threads, len(items)))))
    return results


def _flat(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8) if array.nbytes else np.empty(0, np.uint8)


def write(directory: Path, manifest: Manifest, bits: dict[int, np.ndarray]) -> None:
    """All files of a checkpoint, on disk for good when this returns. `directory` must exist, empty."""
    arrays = _place(manifest.leaves, bits)
    if arrays:
        _save_arrays(directory / ARRAYS, arrays)
    manifest.environment = {**environment(), **manifest.environment}
    names = _names(directory)
    manifest.files = dict(zip(names, _each(lambda name: _file(directory / name, durably=True), names), strict=True))
    _check_written(manifest)
    encoded = msgspec.json.encode(manifest)
    files.write(directory / MANIFEST, encoded)
    files.write(directory / DIGEST, f"{hashlib.sha256(encoded).hexdigest()}  {MANIFEST}\n".encode())
    for folder, _, _ in os.walk(directory):
        files.sync(folder)


def _check_written(manifest: Manifest) -> None:
    """Raises InPlaceError where a leaf with a file of its own is not in it as it was hashed: others may write to it past any count, by `.data`."""
    written = {
        int(place[1]): file.sha256 for name, file in manifest.files.items() if (place := _ARRAY_FILE.match(name)) and place[2] != ".zarray"
    }
    for leaf in manifest.leaves:
        if leaf.array is not None and leaf.offset is None and written.get(leaf.array, leaf.sha256) != leaf.sha256:
            raise told(leaf.path, f"the state of step {manifest.step}")


def _place(leaves: list[Leaf], bits: dict[int, np.ndarray]) -> list[np.ndarray]:
    """Give each leaf its place: an array of its own, or an offset in a pack. Returns the arrays."""
    arrays: list[np.ndarray] = []
    pack: list[tuple[Leaf, np.ndarray]] = []

    def flush() -> None:
        if pack:
            packed = np.zeros(pack[-1][0].offset + pack[-1][1].size, np.uint8)  # pyright: ignore[reportOptionalOperand]
            for leaf, data in pack:
                leaf.array = len(arrays)
                packed[leaf.offset : leaf.offset + data.size] = data  # pyright: ignore[reportOptionalOperand]
                if _sha256(packed[leaf.offset : leaf.offset + data.size]) != leaf.sha256:  # pyright: ignore[reportOptionalOperand]
                    raise told(leaf.path, "the state")
            arrays.append(packed)
            pack.clear()

    end = 0
    for number, data in bits.items():
        leaf = leaves[number]
        if data.size >= PACKED:
            leaf.array = len(arrays)
            arrays.append(_natural(leaf, data))
    for number, data in bits.items():
        if 0 < data.size < PACKED:
            leaf = leaves[number]
            if end + data.size > PACK:
                flush()
                end = 0
            leaf.offset = -(-end // ALIGNMENT) * ALIGNMENT
            end = leaf.offset + data.size
            pack.append((leaf, data))
    flush()
    return arrays


def _natural(leaf: Leaf, data: np.ndarray) -> np.ndarray:
    """The bytes as an array that any reader of orbax understands."""
    dtype = _stored_dtype(leaf)
    return data.view(dtype).reshape(leaf.shape) if dtype.itemsize * math.prod(leaf.shape) == data.size else data


def _stored_dtype(leaf: Leaf) -> np.dtype:
    """The dtype of a leaf in orbax: its own where NumPy has it in the machine's order, elsewhere unsigned integers or bytes."""
    if leaf.offset is not None:
        return np.dtype(np.uint8)
    if leaf.kind == "tensor":
        return np.dtype(leaf.dtype if leaf.dtype in _NATIVE else f"uint{8 * TORCH_DTYPES[leaf.dtype].itemsize}")
    dtype = np.dtype(leaf.dtype)
    return dtype if dtype.kind in "biufc" and dtype.isnative and dtype.itemsize <= 16 else np.dtype(np.uint8)


def _names(directory: Path) -> list[str]:
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())


def _file(path: Path, *, durably: bool = False) -> File:
    with open(path, "rb") as file:
        found = File(size=os.fstat(file.fileno()).st_size, sha256=hashlib.file_digest(file, "sha256").hexdigest())
        if durably:
            files.sync(file.fileno())
    return found


# --- reading -----------------------------------------------------------------------------------------------------------


class _Version(msgspec.Struct):
    format: int


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a checkpoint, after its own digest has been checked. Raises CheckpointError."""
    encoded = _encoded(directory)
    try:
        version = msgspec.json.decode(encoded, type=_Version).format
        if not 1 <= version <= FORMAT:
            raise CheckpointError(
                f"{directory / MANIFEST} is written in format {version}; this version of fnrun reads 1 to {FORMAT}: update it"
            )
        if version < FORMAT:
            manifest = msgspec.convert(migrate(msgspec.json.decode(encoded)), Manifest)
        else:
            manifest = msgspec.json.decode(encoded, type=Manifest)
        manifest.check()
        manifest.config = config(manifest.config)
    except CheckpointError:
        raise
    except Exception as error:  # whatever a stranger may write
        raise DamagedError(f"{directory / MANIFEST} is not a manifest: {error}; {_elsewhere(directory)}") from error
    return manifest


def read_judgement(directory: Path) -> Judgement | Manifest:
    """By what a checkpoint is judged, after the digest of its manifest has been checked. Raises CheckpointError."""
    with contextlib.suppress(msgspec.MsgspecError, ValueError, RecursionError):
        found = msgspec.json.decode(_encoded(directory), type=Judgement)
        for value in found.metrics.values():
            float(value)
        if 2 <= found.format <= FORMAT:  # between these nothing that it says has changed
            return found
    return read_manifest(directory)  # of another format; or it says what is wrong


def _encoded(directory: Path) -> bytes:
    """The bytes of a manifest, which are as they were written. Raises DamagedError."""
    encoded, stated = _get(directory / MANIFEST), _get(directory / DIGEST)
    expected = f"{hashlib.sha256(encoded).hexdigest()}  {MANIFEST}\n".encode()
    if stated != expected:
        damaged = directory / MANIFEST if re.fullmatch(rb"[0-9a-f]{64}  manifest\.json\n", stated) else directory / DIGEST
        raise DamagedError(f"{damaged} is damaged: {MANIFEST} and {DIGEST} do not agree; {_elsewhere(directory)}")
    return encoded


def check_files(directory: Path, manifest: Manifest) -> None:
    """Compare every file with its digest, before anything opens one. Raises DamagedError, naming the first that differs and the leaves in it."""

    def check(name: str) -> None:
        expected = manifest.files[name]
        if name.startswith("/") or ".." in name.split("/"):
            raise DamagedError(f"{directory / MANIFEST} names the file {name!r}, outside of the checkpoint")
        path = directory / name
        try:
            found = _file(path) if path.is_file() else None
        except OSError as error:
            raise DamagedError(f"{path} cannot be read: {error}; {_elsewhere(directory)}") from error
        if found is None:
            wrong = "is missing"
        elif found.size != expected.size:
            wrong = f"has {found.size} bytes, {expected.size} were written"
        elif found.sha256 != expected.sha256:
            wrong = "is damaged: its sha256 is not the one that was written"
        else:
            return
        lost = _lost(path, name, manifest)
        raise DamagedError(f"{path} {wrong}{_named(lost)}; {_elsewhere(directory)}", lost)

    _each(check, manifest.files, READERS)


def read_checked(directory: Path) -> Manifest:
    """The manifest of a checkpoint, after every file was compared with its digest. Raises CheckpointError."""
    manifest = read_manifest(directory)
    check_files(directory, manifest)
    return manifest


def _lost(path: Path, name: str, manifest: Manifest) -> list[str]:
    """The leaves that a damaged file takes with it: those of its array, and of a pack that has its length those whose own bytes are not theirs."""
    place = _ARRAY_FILE.match(name)
    if place is None:
        return []
    inside = [leaf for leaf in manifest.leaves if leaf.array == int(place[1])]
    try:
        data = np.fromfile(path, np.uint8)
    except OSError:
        data = np.empty(0, np.uint8)
    if place[2] == ".zarray" or data.size != manifest.files[name].size:
        return [leaf.path for leaf in inside]
    slices = [data[leaf.offset or 0 :][: leaf.nbytes] for leaf in inside]
    return [leaf.path for leaf, part in zip(inside, slices, strict=True) if _sha256(part) != leaf.sha256]


def _named(leaves: list[str]) -> str:
    if not leaves:
        return ""
    more = f" and {len(leaves) - 3} more" if len(leaves) > 3 else ""
    return f". Lost: {', '.join(leaves[:3])}{more}"


def read_leaves(directory: Path, manifest: Manifest, numbers: set[int]) -> dict[int, Any]:
    """Those of these leaves that are stored, as tensors on the CPU and arrays, their digests checked."""
    leaves = manifest.leaves
    numbers = {number for number in numbers if leaves[number].stored}
    try:
        bits = _reader(directory, manifest, [leaves[number] for number in numbers if leaves[number].nbytes])
    except Exception as error:
        raise DamagedError(f"{directory / ARRAYS} cannot be read by orbax, though its files are as written: {error}") from error

    def read(number: int) -> Any:
        leaf = leaves[number]
        try:
            data = bits(leaf) if leaf.nbytes else np.empty(0, np.uint8)
        except (OSError, KeyError) as error:
            raise DamagedError(f"{directory}: leaf {leaf.path} cannot be read: {error}; {_elsewhere(directory)}", [leaf.path]) from error
        if data.size != leaf.nbytes or _sha256(data) != leaf.sha256:
            raise DamagedError(
                f"{directory}: leaf {leaf.path} is not what was saved: its sha256 differs; {_elsewhere(directory)}", [leaf.path]
            )
        return _tensor(leaf, data) if leaf.kind == "tensor" else _array(leaf, data)

    return dict(zip(numbers, _each(read, numbers, READERS), strict=True))


def _reader(directory: Path, manifest: Manifest, leaves: list[Leaf]) -> Callable[[Leaf], np.ndarray]:
    """What gives the bytes of one of these leaves, never more than its file has.

    They lie in the files as they are: who reads them needs no orbax and waits for nobody who saves. Format 1 alone has files of orbax's own.
    """
    plain = {int(place[1]): name for name in manifest.files if (place := _ARRAY_FILE.fullmatch(name)) and place[2] != ".zarray"}
    if leaves and not plain:
        size = sum(file.size for file in manifest.files.values())
        arrays = _load_arrays(directory / ARRAYS, {leaf.array: _stored_dtype(leaf) for leaf in leaves if leaf.array is not None}, size)
        return lambda leaf: _bytes(arrays[leaf.array or 0])[leaf.offset or 0 :][: leaf.nbytes]

    def read(leaf: Leaf) -> np.ndarray:
        name = plain[leaf.array or 0]
        return np.fromfile(directory / name, np.uint8, min(leaf.nbytes, manifest.files[name].size), offset=leaf.offset or 0)

    return read


def _bytes(array: Any) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _tensor(leaf: Leaf, data: np.ndarray) -> torch.Tensor:
    memory = torch.empty(data.size, dtype=torch.uint8)  # torch's own memory: kernels may round differently on other alignments
    memory.numpy()[:] = data
    tensor = memory.view(TORCH_DTYPES[leaf.dtype]).reshape(leaf.shape)
    if leaf.strides is None:
        return tensor
    return torch.empty_strided(leaf.shape, leaf.strides, dtype=tensor.dtype).copy_(tensor)


def _array(leaf: Leaf, data: np.ndarray) -> np.ndarray:
    return np.frombuffer(data.tobytes(), np.dtype(leaf.dtype)).reshape(leaf.shape).copy()


def _get(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise DamagedError(f"{path} is missing; {_elsewhere(path.parent)}") from error
    except OSError as error:
        raise DamagedError(f"{path} cannot be read: {error}") from error


def _elsewhere(directory: Path) -> str:
    return f"restore another checkpoint of {directory.parent}, or put the file back from a copy"


def remove(path: Path) -> None:
    """Delete a directory, or what else is there, as far as it can be; a link goes, what it points to stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()
