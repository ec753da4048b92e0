"""Weights of another training for a fresh state, and weights of a state for a file."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import optree
import torch
from torch import Tensor, nn

import fnrun
from fnrun.checkpoint import codec, foreign, match, store
from fnrun.checkpoint.directory import Checkpoints
from fnrun.checkpoint.manifest import CheckpointError, text
from fnrun.checkpoint.retention import Which
from fnrun.core import files, tree
from fnrun.core.checkpoint_name import Entry
from fnrun.core.placing import moved
from fnrun.core.state import buffers_of, weights_of
from fnrun.core.words import a, shortened

Weights = str | Callable[[Any], Any]
S = TypeVar("S")
FIELDS = ("params", "buffers")


# --- from a file or a checkpoint to a state ----------------------------------------------------------------------------


def load_from(
    source: str | Path | Checkpoints | Mapping[str, Any],
    like: S,
    *,
    weights: Weights = "params",
    select: str | Sequence[str] = ("params/**", "buffers/**"),
    rename: match.Rename | None = None,
    strict: bool = True,
    step: Which = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> S:
    """`like`, a fresh state, with the parameters and buffers of `source`; step, key, position and all else are `like`'s.

    Names, shapes and dtypes must be those of `like`. Tensors are copies, in the layout and on the device of `like`'s. Where the fresh
    optimizer state has a copy of the parameters (schedule-free, lookahead), the result has a copy of the new ones. It is recognized by its
    values, and so not where all parameters begin at zero.

    - `source`: a run, its checkpoints or one of them, a state, or what `params_from` takes.
    - `like`: the fresh state.
    - `weights="params"`: as in `make_eval_step`; of a run, a checkpoint or a state.
    - `select`, `rename`, `strict`: as in `Checkpoints.restore`, on paths such as `params/0.weight` and `buffers/1.running_mean`. A state
      dict does not tell parameters from buffers: `rename` is called with both paths, and a second name of a tensor is not unexpected.
    - `step=None`: as in `restore`, of a run.
    - `device=None`: where the whole state goes, `like`'s tensors too (`state.to`).
    - `dtype=None`: a floating-point dtype; tensors that have it in `like` are cast to it.

    Raises CheckpointError with a table of what differs, DamagedError for a file that is not as it was written.

    >>> model = nn.Linear(2, 1)
    >>> state = load_from(model.state_dict(), fnrun.TrainState.create(nn.Linear(2, 1)))
    >>> tree.equal(state.params, dict(model.state_dict()))
    True
    """
    match.check_cast("load_from", dtype)
    if not all(isinstance(getattr(like, field, None), Mapping) for field in FIELDS):
        raise CheckpointError(
            f"load_from: `like` is a state with params and buffers, not {a(type(like).__name__)}: TrainState.create(model, optimizer)"
        )
    found = None if isinstance(source, Mapping) else _found(source, weights, step)
    if found is None:
        entries, where = _of_state_dict(source, weights, step)
    else:
        where = found.where
        entries = [((text((field, name)),), tensor) for field in FIELDS for name, tensor in found.tensors[field].items()]
    fresh = {field: dict(getattr(like, field)) for field in FIELDS}
    patterns = [select] if isinstance(select, str) else list(select)
    described = codec.describe(_placed(entries, fresh, match.renaming(rename) if rename is not None else None))
    matcher = match.Matcher(described.structure, described.leaves, patterns, strict=strict, cast=dtype)
    try:
        plan = matcher.plan(fresh, where)
        if dtype is not None and not any(pick.dtype == dtype for pick in codec.picks(plan)):
            raise CheckpointError(f"load_from: dtype={dtype} is for a `like` that has it, and none of the leaves to be loaded is one there")
    except CheckpointError as error:
        if found is None and any(row.saved == "(missing)" and row.path.startswith("buffers/") for row in matcher.wrong):
            raise CheckpointError(
                f"{error}\nBuffers that are not persistent are in no state dict: select='!buffers/NAME' leaves them as they are"
            ) from None
        raise
    sources, leaves = described.sources, described.leaves
    built = codec.build(plan, lambda pick: sources[leaves[pick.number].origin(pick.number)])
    for line in matcher.left():
        logging.getLogger("fnrun").warning("%s: %s", where, line)
    new = {field: {name: _copied(built[field][name], value) for name, value in fresh[field].items()} for field in FIELDS}
    state: Any = like
    state = state.replace(**new, opt_state=_followed(state.opt_state, fresh["params"], new["params"]))
    if device is None:
        return state
    try:
        return moved(state, device)
    except Exception as error:  # a device that is not there, or full
        raise CheckpointError(f"load_from: the state cannot be brought to {device}: {error}") from error


Places = list[tuple[tuple[str, ...], Tensor]]  # each tensor, with the paths that it may have in a state


def _of_state_dict(source: Any, weights: Weights, step: Which) -> tuple[Places, str]:
    """The tensors of a state dict, and its name in errors."""
    if weights != "params" or step is not None:
        raise CheckpointError("weights and step choose among what a checkpoint holds; a state dict has one set of weights and no step")
    tensors = foreign.state_dict(source)
    where = "the state dict" if isinstance(source, Mapping) else str(source)
    return [(tuple(text((field, name)) for field in FIELDS), tensor) for name, tensor in tensors.items()], where


def _placed(entries: Places, fresh: Mapping[str, Any], rename: Callable[[str], str] | None) -> dict[str, dict[str, Tensor]]:
    """The tensors by field and name: the one that `fresh` has under the new name, else the first of their paths."""
    known = {text((field, name)): (field, name) for field in FIELDS for name in fresh[field]}
    placed: dict[str, Tensor] = {}
    before: dict[str, str] = {}
    spare: dict[str, Tensor] = {}
    for paths, tensor in entries:
        new = [rename(path) if rename else path for path in paths]
        old, path = next(((old, path) for old, path in zip(paths, new, strict=True) if path in known), (paths[0], new[0]))
        if path in before:
            raise CheckpointError(f"rename: {before[path]} and {old} would both be {path}")
        if path.partition("/")[0] not in FIELDS or path.count("/") != 1:
            raise CheckpointError(f"rename: {old} cannot be {path!r}: a path is params/NAME or buffers/NAME")
        before[path] = old
        (placed if path in known else spare)[path] = tensor
    if rename and all(path == old for path, old in before.items()):
        raise CheckpointError(f"rename: it changes no path; there are {shortened(list(before))}")
    taken = {codec.identity(tensor) for tensor in placed.values()}
    spare = {path: tensor for path, tensor in spare.items() if codec.identity(tensor) not in taken}
    found: dict[str, dict[str, Tensor]] = {field: {} for field in FIELDS}
    for path, tensor in {**placed, **spare}.items():
        field, name = tree.split(path)
        found[field][name] = tensor
    return found


def _copied(value: Tensor, like: Tensor) -> Tensor:
    if value is like:
        return like
    if not isinstance(like, Tensor):
        return tree.snapshot(value)
    device = "cpu" if like.is_meta else like.device
    if value.shape != like.shape:  # a buffer that takes its shape from the data
        return value.to(device, copy=True)
    return torch.empty_like(like, device=device, requires_grad=False).copy_(value)


def _followed(opt_state: Any, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> Any:
    """The fresh optimizer state, with copies of the new parameters where it holds copies of the old ones.

    Moments begin at zero, as parameters may: a copy of zeros counts only where another copy with the same last key is not zero.
    """

    def same(value: Any) -> bool:
        named = isinstance(value, dict) and bool(value) and all(name in before for name in value)
        return named and tree.equal(value, {name: before[name] for name in value})

    paths, values, spec = optree.tree_flatten_with_path(opt_state, is_leaf=same)
    found = [same(value) for value in values]
    places = {
        path[-1:] for path, value, is_same in zip(paths, values, found, strict=True) if is_same and any(v.any() for v in value.values())
    }
    followed = [
        {name: after[name].clone() for name in value} if is_same and path[-1:] in places else value
        for path, value, is_same in zip(paths, values, found, strict=True)
    ]
    return optree.tree_unflatten(spec, followed)


# --- from a state or a checkpoint to a file ----------------------------------------------------------------------------


def export(
    source: Any,
    to: str | Path,
    *,
    weights: Weights = "params",
    step: Which = None,
    dtype: torch.dtype | None = None,
    model: nn.Module | None = None,
    overwrite: bool = False,
) -> Path:
    """Parameters and buffers as a plain state dict of names to tensors, in a `.safetensors`, `.pt` or `.pth` file.

    The file appears whole or not at all. The header of a safetensors file says step, weights and version. Returns the path.

    - `source`: a state, a run, its checkpoints or one of them.
    - `to`: the path of the file.
    - `weights="params"`: as in `make_eval_step`: the parameters (`"params"`), those that a hook remembers (`"ema"`), or a function of the
      state. For such a function the classes of a checkpoint's state must be loaded.
    - `step=None`: as in `restore`, of a run.
    - `dtype=None`: a dtype that floating-point tensors are cast to.
    - `model=None`: the module whose `load_state_dict` is to take the file: names are those of `model.state_dict()`, tied ones too, without
      buffers that are not persistent. Without it each tensor has one name.
    - `overwrite=False`: whether a file that is there may be replaced.

    Raises CheckpointError for another suffix, a file that is there already, and weights that do not fit `model`.

    >>> import tempfile
    >>> from fnrun.checkpoint import params_from
    >>> state = fnrun.TrainState.create(nn.Linear(2, 1))
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     path = export(state, f"{directory}/linear.safetensors")
    ...     tree.equal(params_from(path), state.params)
    True
    """
    to = files.local_path(to)
    match.check_cast("export", dtype)
    foreign.check_target(to, overwrite=overwrite)
    if (found := _found(source, weights, step)) is None:
        raise CheckpointError(f"{source} is no run and no checkpoint")
    tensors = {name: _as_tensor(name, value) for field in FIELDS for name, value in found.tensors[field].items()}
    if model is not None:
        tensors = _as_named_by(model, tensors)
    if dtype is not None:
        casts = {id(tensor): _cast(name, tensor, dtype) for name, tensor in tensors.items() if tensor.is_floating_point()}
        tensors = {name: casts.get(id(tensor), tensor) for name, tensor in tensors.items()}
    name = weights if isinstance(weights, str) else getattr(weights, "__qualname__", type(weights).__name__)
    foreign.write(to, tensors, {"format": "pt", "fnrun": fnrun.__version__, "step": str(found.step), "weights": name})
    return to


def _as_tensor(name: str, value: Any) -> Tensor:
    """A parameter or buffer as what a state dict holds. Raises CheckpointError, with its name, for what is none."""
    if isinstance(value, np.ndarray):
        try:
            return torch.from_numpy(np.ascontiguousarray(value, value.dtype.newbyteorder("="))).reshape(value.shape)
        except TypeError:
            raise CheckpointError(f"export: torch has no {value.dtype}, as {name} is, an array") from None
    if not isinstance(value, Tensor):
        raise CheckpointError(f"export: {name} is {value!r:.60}, and a state dict holds tensors: leave it out of params and buffers")
    return value


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    try:
        return tensor.to(dtype)
    except NotImplementedError:
        raise CheckpointError(f"export: {name} is {tensor.dtype}, which torch cannot cast to {dtype}: export without dtype") from None


class _Found(NamedTuple):
    """Parameters and buffers by field and name, their step, and where they are from."""

    tensors: Mapping[str, Mapping[str, Tensor]]
    step: int
    where: str


def _found(source: Any, weights: Weights, step: Which) -> _Found | None:
    """The weights of a state, or of a checkpoint; None where `source` is neither."""
    if hasattr(source, "params"):
        if step is not None:
            raise CheckpointError("step chooses among the checkpoints of a run; this is one state")
        try:
            params, buffers = weights_of(source, weights)
        except ValueError as error:
            raise CheckpointError(str(error)) from None
        return _Found({"params": params, "buffers": buffers}, getattr(source, "step", 0), "the state")
    if (found := _checkpoints(source)) is None:
        return None
    checkpoints, entry = found
    if entry is not None and step is not None:
        raise CheckpointError(f"{checkpoints.directory / entry.name} is one checkpoint: step chooses among several")
    return checkpoints.reading(entry or step, lambda entry: _weights(checkpoints, entry, weights))


def _as_named_by(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under all names that they have in `model.state_dict()`. Raises CheckpointError where the two don't fit."""
    expected: dict[str, Tensor] = {**dict(model.named_parameters()), **buffers_of(model)}
    apart = [
        f"{name} is {what}"
        for names, what in ((expected.keys() - tensors, "missing"), (tensors.keys() - expected, "unexpected"))
        for name in sorted(names)
    ]
    apart += [
        f"{name} is {tuple(tensors[name].shape)}" for name, t in expected.items() if name in tensors and tensors[name].shape != t.shape
    ]
    if apart:
        raise CheckpointError(f"these are not the weights of the {type(model).__name__}: {shortened(apart)}")
    names = {id(tensor): name for name, tensor in expected.items()}
    found = {name: names.get(id(value)) for name, value in model.state_dict(keep_vars=True).items()}
    if strange := [name for name, known in found.items() if known is None]:
        raise CheckpointError(f"{type(model).__name__}.state_dict() has entries that are none of its tensors: {shortened(strange)}")
    return {name: tensors[known] for name, known in found.items() if known is not None}


# --- checkpoints -------------------------------------------------------------------------------------------------------


def _checkpoints(source: Any) -> tuple[Checkpoints, Entry | None] | None:
    """The checkpoints at `source`, and the entry where `source` is a single one; None for what is no directory."""
    source = getattr(source, "checkpoints", source)
    if isinstance(source, Checkpoints):
        return source, None
    if not isinstance(source, (str, os.PathLike)):
        raise CheckpointError(
            f"{a(type(source).__name__)} holds no weights that are known: give a state, a run, a checkpoint, a file or a state dict"
        )
    path = files.local_path(source)
    if not path.is_dir():
        return None
    if (path / store.MANIFEST).exists() or Entry.of(path.name):
        return Checkpoints.at(path)
    return Checkpoints(path / "checkpoints" if (path / "checkpoints").is_dir() else path), None


def _weights(checkpoints: Checkpoints, entry: Entry, weights: Weights) -> _Found:
    where = str(checkpoints.directory / entry.name)
    if callable(weights):
        params, buffers = weights_of(checkpoints.restore(step=entry), weights)
        return _Found({"params": params, "buffers": buffers}, entry.step, where)
    fields = dict(zip(FIELDS, FIELDS, strict=True))
    if weights != "params":
        remembered = text(("memory", weights))
        paths = [leaf.path for leaf in checkpoints.manifest(entry).leaves]
        if not any(path.startswith(f"{remembered}/params/") for path in paths):
            names = sorted({path.split("/")[1] for path in paths if path.startswith("memory/") and path.split("/")[2:3] == ["params"]})
            raise CheckpointError(f"{where}: weights={weights!r}: no hook of this name remembers 'params'; there are {names}")
        own = [field for field in FIELDS if any(path.startswith(f"{remembered}/{field}/") for path in paths)]
        fields |= {field: f"{remembered}/{field}" for field in own}
    leaves = checkpoints.read(entry, [f"{place}/**" for place in fields.values()])
    found: dict[str, dict[str, Tensor]] = {field: {} for field in FIELDS}
    for field, place in fields.items():
        for path, leaf in leaves.items():
            if path.startswith(f"{place}/"):
                found[field][tree.split(path)[-1]] = leaf
    return _Found(found, entry.step, where)
