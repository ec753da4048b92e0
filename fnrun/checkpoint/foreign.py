"""State dicts in files: those that torch, MMEngine, Lightning and safetensors write, read without running any code in them, and written.

A pickle is read by torch's restricted unpickler alone (`torch.load(weights_only=True)`). Where a file holds objects of other classes too,
as MMEngine's do, each of these classes and functions is replaced by one of ours that takes any arguments and does nothing.
"""

from __future__ import annotations

import io
import json
import tarfile
import threading
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import (
    Tensor,
    _weights_only_unpickler,  # pyright: ignore[reportPrivateUsage]
)

from fnrun.checkpoint import codec
from fnrun.checkpoint.manifest import CheckpointError, DamagedError
from fnrun.checkpoint.match import check_cast
from fnrun.core import files, tree
from fnrun.core.words import a, shortened

#: The keys of a state dict in a larger file: MMEngine's and Lightning's, and that of many others.
KEYS = ("state_dict", "model")
#: The suffixes of files that can be written.
SUFFIXES = (".safetensors", ".pt", ".pth")
#: The content of a file may take so many times its size, and a megabyte more. A few bytes can unpack or expand to terabytes.
ROOM = 8
#: The entry of a safetensors header that says which names are one tensor: JSON, other name to first name.
TIED = "tied"


# --- reading -----------------------------------------------------------------------------------------------------------


def params_from(
    source: str | Path | Mapping[str, Any],
    key: str | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """The tensors of a state dict by name. Names that are one tensor (tied weights) are one tensor here too. No code in a file is run.

    - `source`: a state dict, a file that `torch.save` or safetensors wrote (recognized by its content), or what such a file holds.
    - `key=None`: where the state dict is in `source`. By default it is all of it if its values are tensors, else `state_dict` or `model`.
    - `device=None`: where the tensors go; by default those of a file go to the CPU.
    - `dtype=None`: a dtype that floating-point tensors are cast to.

    Raises DamagedError for a file that is cut off or changed, as far as its format can tell: zip files (torch's since 1.6) have a checksum.
    Raises CheckpointError for other files, for pickles that cannot be read without running code, where there is no state dict or more than
    one, and for entries that are no plain tensors.

    >>> model = torch.nn.Linear(2, 1)
    >>> list(params_from({"epoch": 3, "state_dict": model.state_dict()}))
    ['weight', 'bias']
    """
    check_cast("params_from", dtype)
    mapped = not isinstance(source, Mapping)  # a file that is mapped into memory may be changed later

    def moved(name: str, tensor: Tensor) -> Tensor:
        try:
            return tensor.to(device, dtype if tensor.is_floating_point() else None, copy=mapped)
        except Exception as error:  # a device that is not there, or full
            raise CheckpointError(f"{name} cannot be brought to {device}: {error}") from error

    return _each_once(state_dict(source, key), moved)


def _each_once(tensors: Mapping[str, Tensor], function: Callable[[str, Tensor], Tensor]) -> dict[str, Tensor]:
    """`function(name, tensor)` of each tensor; names that are one tensor are one in the result."""
    results: dict[Any, Tensor] = {}
    for name, tensor in tensors.items():
        if (identity := codec.identity(tensor)) not in results:
            results[identity] = function(name, tensor)
    return {name: results[codec.identity(tensor)] for name, tensor in tensors.items()}


def state_dict(source: str | Path | Mapping[str, Any], key: str | None = None) -> dict[str, Tensor]:
    """The state dict of `params_from`; tensors of a file may be mapped from it, and must be copied."""
    if isinstance(source, Mapping):
        return _chosen(source, key, "the mapping")
    path = files.local_path(source)
    if path.is_dir():
        raise CheckpointError(f"{path} is a directory: load_from(path, like) takes runs and checkpoints, this takes a file")
    try:
        content = _content(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    found = _chosen(content, key, str(path))
    views = {codec.identity(tensor): tensor.nbytes for tensor in found.values()}
    if (needed := sum(views.values())) > _room(path):
        largest = max(found, key=lambda name: found[name].nbytes)
        raise CheckpointError(
            f"{path}: its tensors take {needed} bytes, far more than the file has: they repeat what they look at (expanded, or views of "
            f"one another), as {largest} of shape {tuple(found[largest].shape)} and strides {found[largest].stride()}: save copies, "
            "tensor.contiguous()"
        )
    return found


def _room(path: Path) -> int:
    """The bytes that the content of a file may take."""
    return ROOM * path.stat().st_size + 2**20


def _content(path: Path) -> Any:
    with path.open("rb") as file:
        head = file.read(64)
    if head.startswith(b"PK\x03\x04"):
        return _torch_file(path, zipped=True)
    if head.startswith(_LEGACY):
        return _torch_file(path, zipped=False)
    if head[8:9] == b"{":
        return _safetensors_file(path)
    what = next((what for start, what in _OTHERS.items() if head.lstrip().startswith(start)), f"it begins with {head[:24]!r}")
    raise CheckpointError(f"{path} is no file of torch or safetensors: {what if head else 'it is empty'}")


#: How torch's files began before 1.6: a pickle of this number.
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_OTHERS = {
    b"<": "it is an HTML page, which is what a failed download often is",
    b"version https://git-lfs": "it is a pointer to a file in Git LFS: `git lfs pull` fetches that",
    b"\x80": "it is a plain pickle, which cannot be read without running code",
}


def _check_zip(path: Path) -> bool:
    """Compare the content with the checksums, which torch writes and does not check. Returns whether it is stored without compression.

    Raises DamagedError, also for content that unpacks to far more than the file, and for two records of one name.
    """
    try:
        with zipfile.ZipFile(path) as file:
            entries = file.infolist()
            if len({entry.filename.lower() for entry in entries}) < len(entries):
                raise DamagedError(f"{path} holds two records of one name; fetch it again")
            if sum(entry.file_size for entry in entries) > _room(path) or sum(e.compress_size for e in entries) > path.stat().st_size:
                raise DamagedError(f"{path} says that it unpacks to far more than the file has, as no file of torch's does; fetch it again")
            changed = file.testzip()
    except DamagedError:
        raise
    except Exception as error:
        raise DamagedError(f"{path} is damaged or cut off: {error}; fetch it again") from error
    if changed:
        raise DamagedError(
            f"{path} is damaged: the checksum of {changed} in it is wrong; fetch it again. (If it was saved under "
            "torch.serialization.set_crc32_options(False) it has none: pass what torch.load makes of it.)"
        )
    return all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)


def _torch_file(path: Path, *, zipped: bool) -> Any:
    mapped = zipped and _check_zip(path)
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path) if zipped else []
        with _unpickling, torch.serialization.safe_globals([(_stand_in(name), name) for name in names]):
            (_check_records if zipped else _check_legacy)(path)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except DamagedError:
        raise
    except Exception as error:  # whatever a pickle may say
        if not zipped and (isinstance(error, EOFError) or "unexpected EOF" in str(error)):
            raise DamagedError(f"{path} is cut off: {_reason(error)}; fetch it again") from error
        raise CheckpointError(
            f"{path} cannot be read as tensors and plain values, running no code: {_reason(error)}. Read it where it was written and save "
            "the tensors alone: torch.save(model.state_dict(), ...)"
        ) from error


def _check_records(path: Path) -> None:
    """Raises DamagedError where a storage is longer than its record: torch would take what lies behind it for numbers."""
    reader = torch._C.PyTorchFileReader(str(path))
    sizes: dict[Any, int] = {}
    _unpickled(io.BytesIO(reader.get_record("data.pkl")), _measured(sizes))
    for key, size in sizes.items():
        if (there := reader.get_record_size(f"data/{key}")) < size:
            raise DamagedError(f"{path} is damaged: record data/{key} has {there} bytes, and the tensors in it take {size}; fetch it again")


def _check_legacy(path: Path) -> None:
    """Raises DamagedError where the storages of a file from before torch 1.6 take more than the file, or are not in it.

    torch would ask for their memory first.
    """
    if tarfile.is_tarfile(path):
        raise DamagedError(f"{path} is a tar file and a pickle at once")
    sizes: dict[Any, int] = {}
    with path.open("rb") as file:
        for _ in range(3):  # a number that tells the format, its version, the machine
            _unpickled(file)
        _unpickled(file, _measured(sizes))
        written = _unpickled(file)
    if sum(sizes.values()) > path.stat().st_size or not set(sizes) <= set(written):
        raise DamagedError(f"{path} is damaged or cut off: its tensors take {sum(sizes.values())} bytes; fetch it again")


def _unpickled(file: IO[bytes], persistent_load: Callable[[Any], Any] | None = None) -> Any:
    """Read a file by torch's restricted unpickler, with `persistent_load` in place of its own."""
    unpickler: Any = _weights_only_unpickler.Unpickler(file, encoding="utf-8")
    unpickler.persistent_load = persistent_load
    return unpickler.load()


def _measured(sizes: dict[Any, int]) -> Callable[[Any], Any]:
    """A `persistent_load` that notes the size of each storage, in bytes, and returns one on the meta device."""

    def storage(pid: Any) -> Any:
        if pid[0] not in ("storage", b"storage"):
            return pid[1]  # a class with its source, in old files
        _, kind, key, _, length, *_ = pid
        dtype = torch.uint8 if kind is torch.UntypedStorage else kind.dtype
        size = length * dtype.itemsize
        if size < 0:
            raise ValueError(f"storage {key} has {length} elements")
        sizes[key] = max(size, sizes.get(key, 0))
        return torch.storage.TypedStorage(wrap_storage=torch.UntypedStorage(size, device="meta"), dtype=dtype, _internal=True)

    return storage


#: torch's list of what may be unpickled is one for the process.
_unpickling = threading.Lock()


class Inert:
    """An object in place of one of a class that is not torch's."""

    def __new__(cls, *args: Any, **options: Any) -> Any:
        return object.__new__(cls)

    def __init__(self, *args: Any, **options: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _empty_dict(*args: Any) -> dict[Any, Any]:
    return {}


def _stand_in(name: str) -> Any:
    """The class or function that replaces this one: for a defaultdict a dict, else a class that does nothing."""
    return _empty_dict if name == "collections.defaultdict" else type(name, (Inert,), {})


def _reason(error: Exception) -> str:
    """The message of the unpickler, without torch's advice to trust the file."""
    inner = error.__context__ if type(error.__context__) is type(error) else error
    return (str(inner).strip().partition(" Please use")[0].splitlines() or [""])[0].rstrip(".") or type(error).__name__


def _safetensors_file(path: Path) -> dict[str, Tensor]:
    import safetensors

    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no dict)
            tied = json.loads((file.metadata() or {}).get(TIED, "{}"))
        if not (isinstance(tied, dict) and all(isinstance(first, str) for first in tied.values())):
            raise TypeError(f"the header says of tied tensors {repr(tied)[:60]}")
    except (safetensors.SafetensorError, ValueError, TypeError, RecursionError) as error:  # pyright: ignore[reportAttributeAccessIssue]
        raise DamagedError(f"{path} is damaged, cut off or no safetensors file: {error}; fetch it again") from error
    for other, first in tied.items():
        if other in tensors and first in tensors and tree.equal(tensors[other], tensors[first]):
            tensors[other] = tensors[first]
    return tensors


def _chosen(content: Any, key: str | None, where: str) -> dict[str, Tensor]:
    """The state dict in what was read. Raises CheckpointError, saying what there is."""
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{where} holds {_words(content)}, not a state dict; save model.state_dict() where its class is")
    keys = [key] if key is not None else [] if any(isinstance(v, Tensor) for v in content.values()) else list(KEYS)
    chosen = [content[name] for name in keys if isinstance(content.get(name), Mapping)] if keys else [content]
    if len(chosen) != 1:
        found = ", ".join(f"{name} ({_words(value)})" for name, value in list(content.items())[:30])
        what = f"{'more than one' if chosen else 'no'} state dict under {' or '.join(keys)}"
        raise CheckpointError(f"{where} holds {what}; it has: {found or 'nothing'}. Name one of these: params_from(..., key=...)")
    others = [f"{name} is {_words(value)}" for name, value in chosen[0].items() if not (isinstance(name, str) and _is_dense(value))]
    if others:
        raise CheckpointError(
            f"{where}: a state dict has plain, dense tensors by name, and here {shortened(others)}. Leave out what is none: read the "
            'file with torch.load(..., weights_only=True) and pass the rest, or name the state dict in it: params_from(..., key="model")'
        )
    if not chosen[0]:
        raise CheckpointError(f"{where}: the state dict is empty")
    return {name: Tensor.detach(value) for name, value in chosen[0].items()}  # not value.detach(), which a file can set


def _is_dense(value: Any) -> bool:
    plain = type(value) in (Tensor, torch.nn.Parameter, torch.nn.Buffer)
    return plain and value.layout == torch.strided and not value.is_quantized and value.device.type != "meta"


def _words(value: Any) -> str:
    if isinstance(value, Tensor):
        return "a tensor" if _is_dense(value) else f"{a(type(value).__name__)} of {value.layout}, {value.dtype}, on {value.device}"
    return a(type(value).__name__) + (f" of {len(value)}" if isinstance(value, Mapping) else "")


# --- writing -----------------------------------------------------------------------------------------------------------


def check_target(to: Path, *, overwrite: bool) -> None:
    """Raises CheckpointError where `write` would not write."""
    if to.suffix not in SUFFIXES:
        raise CheckpointError(f"{to}: weights are written as {', '.join(SUFFIXES)}, not as {to.suffix or 'a file without a suffix'}")
    if not to.parent.is_dir():
        raise CheckpointError(f"{to} cannot be written: there is no directory {to.parent}")
    if to.exists() and not overwrite:
        raise CheckpointError(f"{to} is there already; overwrite=True writes over it")


def write(to: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A state dict in a file that appears whole or not at all; `metadata` goes into the header of a safetensors file.

    Tensors that are one object are one in a torch file too; safetensors has no such thing, they are written twice, and the header says so.
    """
    tensors = _independent(tensors)
    try:
        with files.replacing(to) as file:
            if to.suffix == ".safetensors":
                _write_safetensors(Path(file.name), tensors, metadata)
            else:
                _write_torch(file, tensors)
    except OSError as error:
        raise CheckpointError(f"{to} cannot be written: {error.strerror or error}") from error


def _write_torch(file: IO[bytes], tensors: Mapping[str, Tensor]) -> None:
    try:
        torch.save(tensors, file)
    except KeyError as error:  # a dtype
        names = [f"{name} ({tensor.dtype})" for name, tensor in tensors.items() if str(tensor.dtype) in str(error)]
        raise CheckpointError(f"torch.save does not write {shortened(names)}: export tensor.view(torch.uint8)") from error


def _independent(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, each in a storage of its size; two names that are one tensor still are."""

    def copied(name: str, tensor: Tensor) -> Tensor:
        copy = tensor.detach().cpu().resolve_conj().resolve_neg()
        return copy.clone() if copy.untyped_storage().nbytes() != copy.nbytes else copy

    return _each_once(tensors, copied)


def _write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    import safetensors.torch

    first: dict[int, str] = {}
    tied = {name: first[id(tensor)] for name, tensor in tensors.items() if first.setdefault(id(tensor), name) != name}
    header = {**metadata, **({TIED: json.dumps(tied)} if tied else {})}
    copies = {
        name: tensor.clone(memory_format=torch.contiguous_format) if name in tied else tensor.contiguous()
        for name, tensor in tensors.items()
    }
    permissions = path.stat().st_mode
    try:
        safetensors.torch.save_file(copies, path, header)  # it replaces this file by another one
        path.chmod(permissions)
        files.sync(path)
    except KeyError as error:  # a dtype
        names = shortened([name for name, tensor in copies.items() if tensor.dtype == error.args[0]])
        raise CheckpointError(
            f"safetensors has no {error.args[0]}, as {names} is: write a .pt file, or export tensor.view(torch.uint8)"
        ) from error
    except safetensors.SafetensorError as error:  # pyright: ignore[reportAttributeAccessIssue]
        raise OSError(str(error)) from error
