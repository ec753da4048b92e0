"""Checkpoints: what is saved comes back, type and bit, or an error says what is wrong."""

from __future__ import annotations

import dataclasses
import functools
import gc
import hashlib
import json
import logging
import math
import os
import re
import shutil
import struct as binary
import subprocess
import sys
import textwrap
import threading
import warnings
import zlib
from collections import OrderedDict, defaultdict, deque
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from blake3 import blake3
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import nn

import fnrun
from fnrun import checkpoint, optim
from fnrun.checkpoint import CheckpointError, Checkpoints, DamagedError, codec, orbax, pieces, store, writing
from fnrun.checkpoint.manifest import FORMAT
from fnrun.cli import commands as command
from fnrun.core import tree
from fnrun.core.key import Key
from fnrun.core.position import Cursor, Frame, Position
from fnrun.core.state import TrainState

ROOT = Path(__file__).parents[2]


class Pair(NamedTuple):
    first: Any
    second: Any


@tree.struct
class Box:
    inside: Any
    label: Any = tree.static(default="")


class Net(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width))
        self.head = nn.Linear(width, 2, bias=False)


class Momentum:
    def init(self, params: Any) -> Any:
        return Pair({name: torch.zeros_like(p) for name, p in params.items()}, 0)


def fresh(width: int = 4, seed: int = 0) -> TrainState:
    torch.manual_seed(seed)
    return TrainState.create(Net(width), Momentum(), seed=seed)


def at(step: int, ticks: int | None = None, **memory: Any) -> TrainState:
    """A state that follows from its step alone, bit for bit; one leaf is too large for a pack."""
    generator = torch.Generator().manual_seed(step)
    params = {"w": torch.randn(300, 300, generator=generator), "b": torch.randn(5, generator=generator)}
    return TrainState(
        params=params,
        buffers={},
        opt_state=(),
        rng=Key(0),
        step=step,
        memory=memory,
        position=Position(ticks=step if ticks is None else ticks),
    )


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def python(code: str, *arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
        **options,
    )


# --- round trips -------------------------------------------------------------------------------------------------------

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128, torch.bool),
    *(torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu),
]


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Any dtype, any bits (NaN payloads too), 0-d, empty, non-contiguous, and at times too large for a pack."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.sampled_from([(), (0,), (1,), (3,), (2, 3), (2, 0, 3), (1, 2, 2, 2), (200_000,)]))
    size = math.prod(shape) * dtype.itemsize
    bits = np.random.default_rng(draw(st.integers(0, 2**32))).integers(0, 2 if dtype == torch.bool else 256, size, np.uint8)
    tensor = torch.from_numpy(bits).view(dtype).reshape(shape) if size else torch.empty(shape, dtype=dtype)
    form = draw(st.sampled_from(["plain", "transposed", "strided", "expanded", "conjugate"]))
    if form == "transposed":
        return tensor.permute(tuple(reversed(range(tensor.dim()))))
    if form == "strided" and tensor.dim() and tensor.shape[0] > 1:
        return tensor[::2]
    if form == "expanded":
        return tensor[..., None].expand(*shape, 2) if tensor.numel() < 100 else tensor
    return tensor.conj() if form == "conjugate" else tensor


ARRAYS = st.builds(
    lambda dtype, shape: np.arange(math.prod(shape)).reshape(shape).astype(dtype),
    st.sampled_from(["<f4", ">f8", "<i2", "?", "<c16", "<U3", "S2", "<M8[s]", "<f2", "<U0", "<f16"]),
    st.sampled_from([(), (0, 2), (3,), (2, 2)]),
)
FLOATS = st.one_of(
    st.floats(),
    st.sampled_from([-0.0, float("nan"), -float("nan"), float("inf"), binary.unpack(">d", bytes.fromhex("7ff8000000000123"))[0]]),
)
TEXT = st.one_of(st.text(max_size=5), st.sampled_from(["", ".", "a.b", "a/b", "~0", "é", "\ud800", "\n", "*", "00000"]))
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(2**62, 2**70),
    FLOATS,
    st.builds(complex, FLOATS, FLOATS),
    TEXT,
    st.binary(max_size=4),
)
KEYS = st.one_of(TEXT, st.integers(-3, 3), st.integers(2**70, 2**71), st.booleans(), st.none(), st.binary(max_size=2))
TREES = st.recursive(
    st.one_of(SCALARS, tensors(), ARRAYS),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(KEYS, inner, max_size=3),
        st.dictionaries(TEXT, inner, max_size=3).map(OrderedDict),
        st.dictionaries(TEXT, inner, max_size=2).map(lambda d: defaultdict(list, d)),
        st.lists(inner, max_size=3).map(lambda items: deque(items, 4)),
        st.builds(Pair, inner, inner),
        st.builds(Box, inner, st.one_of(SCALARS, st.tuples(SCALARS, st.tuples(SCALARS)))),
    ),
    max_leaves=12,
)


def order(value: Any) -> Any:
    """The keys of every dictionary within, in order, with their types, and the strides of tensors that have odd ones."""
    node = codec.container(value, ())
    if node is None:
        return codec._strides(value) if isinstance(value, torch.Tensor) else None
    return node.kind, [(type(key), key, order(child)) for key, child in node.items], repr(node.static)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(memory=st.dictionaries(TEXT, TREES, max_size=3))
def test_whatever_is_saved_comes_back_type_and_bit(memory: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    state = at(1).replace(memory=memory)
    with Checkpoints(tmp_path_factory.mktemp("round")) as checkpoints:
        checkpoints.save(state)
        for like in (None, at(2)):
            back = checkpoints.restore(like)
            assert tree.fingerprint(state) == tree.fingerprint(back)
            assert order(state) == order(back)


def test_a_fresh_state_takes_up_a_training(tmp_path: Path) -> None:
    frames = (
        Frame("repeat", ticks=2, totals={"loss": (torch.tensor(1.0), 3)}),
        Frame("epoch_loop", ticks=5, folds={"log": deque([1.0], 50)}),
    )
    position = Position(frames, {"train": Cursor(1, 5, "8 rows", {"worker": [b"\0"]})}, ticks=21)
    state = fresh(seed=1).replace(step=17, position=position, memory={"ema": {"head.weight": torch.ones(2)}}, stop="patience")
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
        assert tree.fingerprint(checkpoints.restore(like=fresh())) == tree.fingerprint(state)


def test_tensors_that_are_one_stay_one_and_are_written_once(tmp_path: Path) -> None:
    shared, array = torch.randn(500, 500), np.arange(4)
    state = at(1, a=shared, b=[shared.view(500, 500)], c=shared.t(), d=array, e=array)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
        back = checkpoints.restore().memory
    assert back["a"] is back["b"][0]
    assert back["c"] is not back["a"]
    assert back["d"] is back["e"]
    assert sum(path.stat().st_size for path in files(tmp_path)) < 2 * shared.nbytes + 1.5 * at(1).params["w"].nbytes


def test_memory_layout_is_kept(tmp_path: Path) -> None:
    image = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    one = torch.randn(4, 3, 1, 1).to(memory_format=torch.channels_last)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(at(1, image=image, one=one, wide=torch.randn(3, 1).expand(3, 4)))
        back = checkpoints.restore().memory
    assert back["image"].is_contiguous(memory_format=torch.channels_last)
    assert back["one"].stride() == one.stride()
    assert back["wide"].is_contiguous()
    assert all(leaf.data_ptr() % 64 == 0 for leaf in back.values())


def test_small_leaves_overflow_into_several_packs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "PACK", 1000)
    state = at(1, many=[torch.randn(50) for _ in range(40)])
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
        assert tree.equal(checkpoints.restore(), state)
        assert len({piece.file for leaf in checkpoints.manifest().leaves for piece in leaf.pieces}) > 5


def test_orbax_alone_reads_every_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large leaves as arrays of their own, with their shapes and dtypes; small ones in packs."""
    monkeypatch.setattr(writing, "PACKED", 2**16)
    ocp = orbax.imported()
    state = at(1, low=torch.randn(200_000).to(torch.bfloat16), flags=torch.rand(300, 300) > 0.5,
    z=torch.randn(99, 99, dtype=torch.complex64),
               swapped=np.arange(20_000.0).astype(">f8"), times=np.arange(20_000).astype("M8[s]"), text=np.array(["a", "bc"]),
               zero=torch.tensor(1.0))  # fmt: skip
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
        leaves = {leaf.path: leaf for leaf in checkpoints.manifest().leaves}
        directory = tmp_path / checkpoints.find().name / "arrays"
        sources = {path: leaf for path, leaf in checkpoints.read().items() if leaves[path].stored}
    arrays, described = ocp.load(directory), ocp.metadata(directory).metadata
    assert {name: (array.shape, array.dtype) for name, array in arrays.items()} == {
        name: (of.shape, of.dtype) for name, of in described.items()
    }
    files = {
        path.parent.name: path.relative_to(directory.parent).as_posix() for path in directory.glob("state/*/*") if path.name != ".zarray"
    }
    assert arrays.keys() == files.keys()
    content = {file: np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8) for name, file in files.items()}
    seen = dict.fromkeys(content, 0)
    for path, source in sources.items():
        for piece in leaves[path].pieces:
            bits = tree.array(source) if isinstance(source, torch.Tensor) else np.frombuffer(source.tobytes(), np.uint8)
            assert np.array_equal(content[piece.file][piece.offset :][: bits.size], bits)
            seen[piece.file] += bits.size
    assert seen == {file: data.size for file, data in content.items()}  # and nothing lies between
    own = {path: arrays[leaves[path].pieces[0].file.split("/")[2]] for path in ("params/w", "memory/low", "memory/flags", "memory/z")}
    assert np.array_equal(own["params/w"], state.params["w"].numpy())
    assert np.array_equal(own["memory/low"], state.memory["low"].view(torch.uint16).numpy())
    assert np.array_equal(own["memory/flags"], state.memory["flags"].numpy())
    assert np.array_equal(own["memory/z"], state.memory["z"].numpy())


def test_a_leaf_lies_in_several_pieces_where_several_processes_wrote_it(tmp_path: Path) -> None:
    """Written by hand: a matrix in four files, cut along both axes, and a vector in two cuts of one file, in the other order."""
    w, v = torch.arange(35.0).reshape(5, 7), torch.arange(9, dtype=torch.int16)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(at(1, w=w, v=v, turned=w.t()))
        checkpoints.wait()
        folder = tmp_path / checkpoints.find().name
        boxes = [((a, b), (c, d)) for a, c in ((0, 2), (2, 3)) for b, d in ((0, 6), (6, 1))]
        parts = {f"arrays/rank{number}": w[a : a + c, b : b + d].numpy().tobytes() for number, ((a, b), (c, d)) in enumerate(boxes)}
        parts["arrays/halves"] = v[4:].numpy().tobytes() + b"between" + v[:4].numpy().tobytes()
        for name, data in parts.items():
            (folder / name).write_bytes(data)

        def cut(manifest: Any) -> None:
            leaves = {leaf["path"]: leaf for leaf in manifest["leaves"]}
            leaves["memory/w"]["pieces"] = [
                {"file": f"arrays/rank{number}", "digest": blake3_of(parts[f"arrays/rank{number}"]), "start": start, "shape": shape}
                for number, (start, shape) in enumerate(boxes)
            ]
            halves = [((4,), (5,), 0, v[4:]), ((0,), (4,), 17, v[:4])]
            leaves["memory/v"]["pieces"] = [
                {"file": "arrays/halves", "digest": blake3_of(part.numpy().tobytes()), "offset": offset, "start": start, "shape": shape}
                for start, shape, offset, part in halves
            ]
            manifest["files"] |= {name: {"size": len(data)} for name, data in parts.items()}

        forge(tmp_path, cut)
        assert tree.equal(checkpoints.restore(), at(1, w=w, v=v, turned=w.t()))
        assert checkpoints.check().step == 1
        checkpoints.save(at(1, w=w, v=v, turned=w.t()))  # it is there already, in whatever pieces
        checkpoints.wait()
        assert names(tmp_path) == ["00000001-00000001"]
        for name, lost in (("arrays/rank3", "memory/w"), ("arrays/halves", "memory/v")):
            (folder / name).write_bytes(parts[name][:-1] + b"?")
            for read in (checkpoints.restore, checkpoints.check):
                with pytest.raises(DamagedError, match=rf"{folder / name} is damaged: its blake3 is not .*Lost: {lost};") as error:
                    read()
                assert error.value.leaves == [lost]
            assert checkpoints.read(select="params/**")["params/w"].equal(at(1).params["w"])  # which lies elsewhere
            (folder / name).write_bytes(parts[name])
        assert tree.equal(checkpoints.restore(), at(1, w=w, v=v, turned=w.t()))


@pytest.mark.parametrize(
    "boxes",
    [
        [((0, 0), (4, 5))],
        [((0, 0), (2, 6))],
        [((0, 0), (2, 6)), ((2, 0), (2, 5))],
        [((0, 0), (2, 6)), ((1, 0), (3, 6))],
        [((0, 0), (2, 6)), ((2, 0), (3, 6))],
        [((0, 0), (4, 6)), ((4, 0), (0, 6))],
        [((0, 0), (2, 3)), ((0, 3), (2, 3)), ((2, 0), (2, 3)), ((2, 0), (2, 3))],
        [((0, 0), (2, 3)), ((0, 3), (2, 3)), ((2, 0), (2, 3))],
        [((0,), (4,))],
        [((-2, 0), (2, 6)), ((0, 0), (4, 6))],
        [],
    ],
)
def test_pieces_that_do_not_make_up_their_leaf_are_refused(boxes: list[Any], tmp_path: Path) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(at(1, w=torch.zeros(4, 6)))
        checkpoints.wait()

        def cut(manifest: Any) -> None:
            leaf = next(leaf for leaf in manifest["leaves"] if leaf["path"] == "memory/w")
            (whole,) = leaf["pieces"]
            leaf["pieces"] = [whole | {"offset": 10_000 * n, "start": start, "shape": shape} for n, (start, shape) in enumerate(boxes)]

        forge(tmp_path, cut)
        with pytest.raises(DamagedError, match="memory/w is not what its pieces make up"):
            checkpoints.restore()


def blake3_of(data: bytes) -> str:
    return f"blake3:{blake3(data).hexdigest()}"


def test_every_byte_is_hashed_once_on_its_way_in_and_what_is_not_asked_for_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = at(1, large=torch.randn(2**20), many=[torch.randn(250) for _ in range(100)])
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
        checkpoints.wait()
    hashed = []

    class Counting:
        def __init__(self) -> None:
            self.inner = blake3()

        def update(self, data: Any) -> None:
            hashed.append(memoryview(data).nbytes)
            self.inner.update(data)

        def hexdigest(self) -> str:
            return self.inner.hexdigest()

    monkeypatch.setitem(pieces.ALGORITHMS, "blake3", Counting)
    size = sum(path.stat().st_size for path in files(tmp_path) if not path.name.startswith("manifest"))
    for ask, expected in (
        (checkpoints.restore, size),
        (lambda: checkpoints.restore(like=state), size),
        (checkpoints.check, size),
        (
            lambda: checkpoints.read(select="memory/large"),
            size - sum(leaf.nbytes for leaf in tree.leaves(state) if isinstance(leaf, torch.Tensor)) + 2**22,
        ),
    ):
        hashed.clear()
        ask()
        assert sum(hashed) == expected


def nested() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a prototype
        return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


def endless(container: Any) -> Any:
    """One that holds itself."""
    container.append(container) if isinstance(container, list) else container.update({0: container})
    return container


def deep(levels: int) -> Any:
    return functools.reduce(lambda inner, _: [inner], range(levels), 1)


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (len, r"memory/x is a builtins.builtin_function_or_method: a state holds"),
        ({1, 2}, r"memory/x is a builtins.set"),
        (np.float64(1), r"memory/x is a numpy.float64"),
        (np.array([None]), r"memory/x is an array of object"),
        (torch.eye(2).to_sparse(), r"memory/x: a torch.sparse_coo tensor cannot be saved"),
        (torch.empty(2, device="meta"), r"memory/x is a meta tensor"),
        (defaultdict(lambda: 0), r"memory/x: a defaultdict of <function"),
        (Box(1, label=[1]), r"memory/x: the static field label is a list, not a plain scalar"),
        ({torch.float32: 1}, r"memory/x: the key is a dtype, not a plain scalar"),
        (NamedTuple("Local", [("a", int)])(1), r"memory/x: Local cannot be found again by name: define it at the top level"),
        (torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged), r"memory/x: a NestedTensor cannot be saved"),
        (nested(), r"memory/x: a nested tensor cannot be saved"),
        (endless([]), r"memory/x/0/0/0/\.\.\. goes on for more than \d+ containers in one another: does one hold itself\?"),
        (endless({}), r"memory/x/0/0/0/\.\.\. goes on for more than"),
        (deep(900), r"memory/x/0/0/0/\.\.\. goes on for more than"),
        (deep(5000), r"memory/x/0/0/0/\.\.\. goes on for more than"),
        ({7**6000: len}, r"memory/x/0x[0-9a-f]+ is a builtins.builtin_function_or_method"),
    ],
)
def test_what_could_not_be_restored_is_refused_at_the_save(leaf: Any, message: str, tmp_path: Path) -> None:
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(CheckpointError, match=message):
        checkpoints.save(at(1, x=leaf))
    assert names(tmp_path) == []


def test_numbers_of_any_length_keys_that_are_no_number_and_deep_containers_come_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Python writes no integer of more than 4,300 digits in decimals."""
    big, nan = 7**6000, float("nan")
    state = at(1, x=[big, -big], keys={big: 1, nan: torch.ones(2), 1.0: 3}, box=Box(big, (big, "m")), deep=deep(300))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
        for like in (None, state, at(2), at(2, keys={nan: torch.zeros(2)})):
            assert tree.fingerprint(checkpoints.restore(like)) == tree.fingerprint(state)
        assert checkpoints.read()[f"memory/keys/{hex(big)}"] == 1
    (different,) = tree.diff(state.memory["box"], Box(big, (big, "km")))
    assert (different.what, hex(big)[:50] in different.detail) == ("static fields", True)
    for options in ([], ["--json"]):
        assert command.main(["show", str(tmp_path / "00000001-00000001"), *options]) == 0
        assert hex(big)[:50] in capsys.readouterr().out


def test_a_state_is_filed_by_its_step(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"named by state.step, an int: this dict has None"):
        Checkpoints(tmp_path).save({"a": 1})


# --- like and select ---------------------------------------------------------------------------------------------------


def test_a_mismatch_is_a_table(tmp_path: Path) -> None:
    like = fresh()
    params = dict(like.params)
    params["head.wieght"] = params.pop("head.weight")
    like = like.replace(params=params, buffers=like.buffers | {"body.1.running_mean": torch.zeros(4, dtype=torch.float64)})
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(fresh())
        with pytest.raises(CheckpointError) as error:
            checkpoints.restore(like)
        with pytest.raises(CheckpointError) as other:
            checkpoints.restore(fresh(5).replace(opt_state=[{}, 0]))
    assert str(error.value) == f"{tmp_path}/00000000-00000000 does not match the state that it is restored into:\n" + textwrap.dedent("""\
          leaf                         saved                  expected
          params/head.weight           tensor float32 (2, 4)  (unexpected)
          params/head.wieght           (missing)              tensor float32 (2, 4)  (saved under a near name: params/head.weight)
          buffers/body.1.running_mean  tensor float32 (4,)    tensor float64 (4,)""").replace("\n", "\n  ").replace("leaf  ", "  leaf  ", 1)
    rows = [line.split("  ") for line in str(other.value).splitlines()]
    rows = [[cell.strip() for cell in row if cell] for row in rows]
    assert ["params/body.0.weight", "tensor float32 (4, 3)", "tensor float32 (5, 3)"] in rows
    assert ["opt_state", f"namedtuple {__name__}:Pair of 2", "list of 2"] in rows


def test_of_a_long_table_some_of_each_sort_are_shown(tmp_path: Path) -> None:
    state = at(0).replace(params={f"layers.{n}.weight": torch.ones(2) for n in range(100)})
    like = state.replace(params={f"module.layers.{n}.weight": torch.ones(2) for n in range(100)} | {"layers.0.weight": torch.ones(3)})
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
        with pytest.raises(CheckpointError) as error:
            checkpoints.restore(like)
    text = str(error.value)
    assert (text.count("(unexpected)"), text.count("(missing)"), text.count("(2,)  tensor float32 (3,)")) == (10, 10, 1)
    assert "params/module.layers.1.weight  (missing)            tensor float32 (2,)  (saved under a near name: params/layers." in text
    assert text.endswith("... and 179 more")


@pytest.mark.parametrize(
    ("saved", "like"),
    [
        (torch.zeros(2), torch.zeros(3)),
        (torch.zeros(2), torch.zeros(2, dtype=torch.float64)),
        (torch.zeros(2), np.zeros(2, np.float32)),
        (torch.tensor(1), 1),
        (1, 1.0),
        (True, 1),
        (None, torch.zeros(2)),
        (torch.zeros(2), None),
        ((1, 2), [1, 2]),
        ((1, 2), Pair(1, 2)),
        ((1, 2), (1, 2, 3)),
        ({"a": {"b": 1}}, {"a.b": 1}),
        ({"a": {"b": 1}}, {"a/b": 1}),
        ({"a": 1}, OrderedDict(a=1)),
        ({1: 1}, {"1": 1}),
        ({1: 1}, {True: 1}),
        ({}, ()),
        ({"a": {}}, {}),
        ({}, {"a": {}}),
        ({"a": 1}, {}),
        (Box(1, "m"), Box(1, "km")),
    ],
)
def test_optimizer_state_of_another_make_is_refused(saved: Any, like: Any, tmp_path: Path) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(at(1).replace(opt_state=saved))
        assert tree.equal(checkpoints.restore(at(2).replace(opt_state=saved)).opt_state, saved)
        with pytest.raises(CheckpointError, match=r"does not match(.|\n)*opt_state"):
            checkpoints.restore(at(2).replace(opt_state=like))


@tree.struct
class WithBuffer(TrainState):
    replay: Any = ()
    second: Any = dataclasses.field(default_factory=lambda: {"w": torch.zeros(2)})


def test_what_is_empty_in_a_fresh_state_is_rebuilt_but_only_outside_of_parameters(tmp_path: Path) -> None:
    like = WithBuffer(**{field.name: getattr(at(1), field.name) for field in dataclasses.fields(TrainState)})
    state = like.replace(replay=[torch.ones(3), Pair(1, "a")], second={"w": torch.ones(2)}, stop="done")
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
        assert tree.equal(checkpoints.restore(like), state)
        with pytest.raises(CheckpointError, match=r"second/w .*tensor float32 \(2,\) +tensor float32 \(3,\)"):
            checkpoints.restore(like.replace(second={"w": torch.zeros(3)}))


def test_select_restores_only_what_it_names(tmp_path: Path) -> None:
    state, like = fresh(seed=1).replace(step=9, memory={"ema": {"a.b": torch.ones(2)}, "other": (1, None)}), fresh()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
        back = checkpoints.restore(like, select=["params/**", "buffers/body.1.*"])
        assert tree.equal((back.params, back.buffers, back.step), (state.params, state.buffers, 0))
        assert back.opt_state is like.opt_state
        assert back.memory is like.memory
        back = checkpoints.restore(select="params/head.weight")
        assert torch.equal(back.params.pop("head.weight"), state.params["head.weight"])
        assert {value for value in tree.leaves(back) if value is not None} == set()
        assert checkpoints.restore(like, select="memory/ema/**").memory == {
            "ema": {"a.b": tree_equal_to(torch.ones(2))},
            "other": None,
        }
        other = like.replace(params={"head.weight": like.params["head.weight"]}, opt_state=None)
        assert tree.equal(checkpoints.restore(other, select="params/head.*").params["head.weight"], state.params["head.weight"])
        with pytest.raises(CheckpointError, match=r"params/body.0.bias +tensor float32 \(4,\) +\(unexpected\)"):
            checkpoints.restore(other, select="params/**")
        with pytest.raises(CheckpointError, match=r"nothing that was saved matches 'parms/\*\*'; near: params"):
            checkpoints.restore(select="parms/**")


def test_damage_in_a_pack_is_told_by_its_leaf(tmp_path: Path) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(at(1).replace(params={str(i): torch.full((40,), float(i)) for i in range(1, 9)}))
        checkpoints.wait()
        (pack,) = [path for path in files(tmp_path) if path.name == "0"]
        data = bytearray(pack.read_bytes())
        data[data.find(torch.tensor([5.0]).numpy().tobytes())] ^= 1
        pack.write_bytes(data)
        with pytest.raises(DamagedError, match=r"Lost: params/5;"):
            checkpoints.restore()
        pack.unlink()
        with pytest.raises(DamagedError, match=r"state/00000/0 is missing\. Lost: params/1, params/2, params/3 and 5 more;"):
            checkpoints.restore()


def test_select_can_leave_out(tmp_path: Path) -> None:
    state, like = fresh(seed=1), fresh()
    like = like.replace(params=like.params | {"head.weight": torch.zeros(7, 4)})  # a head for other classes
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
        back = checkpoints.restore(like, select=["params/**", "!params/head.*"])
        assert back.params["head.weight"] is like.params["head.weight"]
        assert tree.equal(back.params["body.0.weight"], state.params["body.0.weight"])
        for select in ("params", "!buffers", "", ["params/**", "opt_state"]):
            with pytest.raises(CheckpointError, match=r"select: '[a-z_/*]*' is a container, not what is in it: that is '[a-z_/*]*\*\*'"):
                checkpoints.restore(like, select=select)
        with pytest.raises(CheckpointError, match="select: there is no pattern in it"):
            checkpoints.restore(like, select=[])
        with pytest.raises(CheckpointError, match=r"nothing that was saved matches 'params/tail\.\*'"):
            checkpoints.restore(like, select=["params/**", "!params/tail.*"])


def test_leaves_are_restored_under_other_names(tmp_path: Path) -> None:
    state = fresh(seed=1).replace(memory={"ema": {"params": {"body.0.bias": torch.ones(4)}}})
    like = fresh()
    params = {name.replace("body.", "encoder."): value for name, value in like.params.items()}
    buffers = {name.replace("body.", "encoder."): value for name, value in like.buffers.items()}
    like = like.replace(params=params, buffers=buffers, opt_state=Momentum().init(params))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
        for rename in ({r"/body\.": "/encoder."}, lambda path: path.replace("/body.", "/encoder.")):
            back = checkpoints.restore(like, rename=rename)
            assert list(back.params) == list(params)
            assert tree.equal(list(back.params.values()), list(state.params.values()))
            assert list(back.opt_state.first) == list(params)
            assert list(back.memory["ema"]["params"]) == ["encoder.0.bias"]
        back = checkpoints.restore(fresh(), rename={"^memory/ema/params/body.0.bias$": "params/extra"}, strict=False)
        assert (back.memory, "extra" in back.params) == ({"ema": {"params": {}}}, False)
        with pytest.raises(CheckpointError, match=r"params/body.0.weight and params/body.0.bias would both be params/x"):
            checkpoints.restore(like, rename={"^params/body.0.*": "params/x"})
        with pytest.raises(CheckpointError, match=r"rename: step cannot be params/step: it is not an entry of a dictionary"):
            checkpoints.restore(like, rename={"^step$": "params/step"})
        with pytest.raises(CheckpointError, match=r"rename: params/head.weight cannot be parms/x: no dictionary was saved at parms"):
            checkpoints.restore(like, rename={"^params/head.weight$": "parms/x"})
        with pytest.raises(CheckpointError, match=r"rename: it changes no path that was saved; saved: params/body.0.weight, "):
            checkpoints.restore(like, rename={"^module.": ""})


def test_not_strict_leaves_out_what_one_side_lacks_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = fresh(seed=1)
    like = fresh().replace(params={"new": torch.zeros(3)} | {k: v for k, v in fresh().params.items() if k != "head.weight"})
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
        with caplog.at_level(logging.WARNING, "fnrun"):
            back = checkpoints.restore(like, select="params/**", strict=False)
        assert back.params["new"] is like.params["new"]
        assert tree.equal(back.params["body.0.weight"], state.params["body.0.weight"])
        assert [record.getMessage().partition(": ")[2] for record in caplog.records] == [
            "not in the checkpoint, left as they are: params/new",
            "in the checkpoint and left out: params/head.weight",
        ]
        wider = like.replace(params=like.params | {"body.0.bias": torch.zeros(9)})
        with pytest.raises(CheckpointError, match=r"params/body.0.bias +tensor float32 \(4,\) +tensor float32 \(9,\)"):
            checkpoints.restore(wider, select="params/**", strict=False)


# --- a model that is not the same any more -----------------------------------------------------------------------------


def grown(frozen: bool, layers: int = 2) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(layers)))
    model[0].requires_grad_(not frozen)
    return model


def trained(model: nn.Module, optimizer: Any, state: TrainState, begin: int, end: int) -> TrainState:
    step = fnrun.make_train_step(model, lambda model, batch: (model(batch) - 1).square().mean(), optimizer)
    for seed in range(begin, end):
        state, _ = step(state, torch.randn(8, 3, generator=torch.Generator().manual_seed(seed)))
    return state


OPTIMIZERS: dict[str, tuple[Any, Any]] = {
    "adamw": (lambda: optim.adamw(1e-2), lambda groups: torch.optim.AdamW(groups, 1e-2)),
    "nadam": (lambda: optim.nadam(1e-2), lambda groups: torch.optim.NAdam(groups, 1e-2)),
    "sgd": (lambda: optim.sgd(1e-2), lambda groups: torch.optim.SGD(groups, 1e-2)),
    "momentum": (lambda: optim.sgd(1e-2, momentum=0.9), lambda groups: torch.optim.SGD(groups, 1e-2, momentum=0.9)),
    "groups": (
        lambda: optim.partition(lambda path, _: path.rpartition(".")[2], {"weight": optim.adam(1e-2), "bias": optim.sgd(1e-2)}),
        None,
    ),
    "accumulate": (lambda: optim.accumulate(2, optim.adam(1e-2)), None),
    "from_torch": (lambda: optim.from_torch(torch.optim.NAdam, lr=1e-2), lambda groups: torch.optim.NAdam(groups, 1e-2)),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("change", ["a layer is unfrozen", "a layer is added", "a layer is frozen"])
def test_a_layer_that_is_unfrozen_or_added_is_as_new_to_the_optimizer_as_in_torch(name: str, change: str, tmp_path: Path) -> None:
    make, of_torch = OPTIMIZERS[name]
    before = lambda: grown(frozen=change == "a layer is unfrozen")  # noqa: E731
    after = lambda: grown(frozen=change == "a layer is frozen", layers=3 if change == "a layer is added" else 2)  # noqa: E731
    state = trained(before(), make(), TrainState.create(before(), make(), seed=0), 0, 7)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
        like = TrainState.create(after(), make(), seed=0)
        with pytest.raises(CheckpointError, match="does not match"):
            checkpoints.restore(like)
        state = checkpoints.restore(like, strict=False)
    assert state.step == 7
    state = trained(after(), make(), state, 7, 12)
    if of_torch is None:
        return
    model, whole = before(), after()
    optimizer = of_torch([p for p in model.parameters() if p.requires_grad])
    for seed in range(12):
        if seed == 7:
            whole.load_state_dict(model.state_dict(), strict=False)
            known = dict(model.named_parameters())
            remembered = {name: optimizer.state.get(known[name]) if name in known else None for name, _ in whole.named_parameters()}
            model = whole
            optimizer = of_torch([p for p in model.parameters() if p.requires_grad])
            optimizer.state.update({p: remembered[name] for name, p in model.named_parameters() if p.requires_grad and remembered[name]})
        optimizer.zero_grad()
        batch = torch.randn(8, 3, generator=torch.Generator().manual_seed(seed))
        (model(batch) - 1).square().mean().backward()
        optimizer.step()
    for key, value in model.named_parameters():
        torch.testing.assert_close(state.params.get(key, state.buffers.get(key)), value.detach(), rtol=1e-5, atol=1e-6)


def test_what_an_optimizer_numbers_is_found_by_name_where_parameters_lie_in_one_another(tmp_path: Path) -> None:
    optimizer = optim.nadam(1e-2)

    def state(**params: Any) -> TrainState:
        return TrainState(params=params, buffers={}, opt_state=optimizer.init(params), rng=Key(0), step=1)

    before, one = state(a={"x": torch.ones(2)}, b={"y": torch.ones(2)}), torch.ones(2)
    params, opt_state = before.params, before.opt_state
    for x, y in ((None, one), (None, one), (one, one)):  # x misses two updates of three, y none
        params, opt_state = optimizer.update({"a": {"x": x}, "b": {"y": y}}, opt_state, params)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(before.replace(params=params, opt_state=opt_state))
        like = state(a={"v": one, "x": one}, b={"w": one, "y": one})
        back = checkpoints.restore(like, strict=False).opt_state
        assert back.misses.each.tolist() == [3, 2, 3, 0]  # those that are new have missed all
        x, y = opt_state.scalars["mu_product"]
        assert back.scalars["mu_product"].tolist() == [1.0, x, 1.0, y]


def test_the_shape_of_what_is_not_selected_is_nobodys_business(tmp_path: Path) -> None:
    state = trained(grown(True), optim.adam(1e-2), TrainState.create(grown(True), optim.adam(1e-2), seed=0), 0, 3)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
        like = TrainState.create(grown(False), optim.adam(1e-2), seed=0)
        back = checkpoints.restore(like, select=["params/**", "opt_state/slots/**"], strict=False)
    assert tree.equal(back.opt_state.misses, like.opt_state.misses)


@tree.struct
class Before(TrainState):
    """A state class that has another name by now."""


@tree.struct
class After(TrainState):
    """The same, under that name."""


@tree.struct
class Wider(TrainState):
    """And with a field more."""

    more: Any = dataclasses.field(default_factory=lambda: {"w": torch.zeros(2)})


def test_a_state_class_may_be_renamed_or_moved(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fields = {field.name: getattr(at(3), field.name) for field in dataclasses.fields(TrainState)}
    like = {field.name: getattr(at(0), field.name) for field in dataclasses.fields(TrainState)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(Before(**fields))
        checkpoints.wait()
        for select in (None, "params/**"):
            back = checkpoints.restore(After(**like), select=select)
            assert type(back) is After
            assert tree.equal(back.params, at(3).params)
        assert f"saved as a {__name__}:Before, restored as a {__name__}:After" in caplog.text
        assert tree.equal(checkpoints.restore(Wider(**like), select="params/**").params, at(3).params)
        with pytest.raises(CheckpointError, match=r"more/w +\(missing\)"):
            checkpoints.restore(Wider(**like))
        assert checkpoints.restore(Wider(**like), strict=False).step == 3
        forge(tmp_path, lambda manifest: manifest["structure"].update(kind="struct gone.away:State"))
        assert tree.equal(checkpoints.restore(After(**like)).params, at(3).params)
        assert checkpoints.read(select="params/w")["params/w"].equal(at(3).params["w"])
        with pytest.raises(
            CheckpointError, match=r"gone.away:State is not loaded: import the module .*Where it has another name now: restore\(like="
        ):
            checkpoints.restore()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_observers_of_quantization_take_their_shape_from_what_was_saved(tmp_path: Path) -> None:
    """A fresh one has no channels yet."""
    from torch.ao import quantization

    def make() -> nn.Module:
        model = grown(frozen=False)
        model.qconfig = quantization.get_default_qat_qconfig("fbgemm")
        return quantization.prepare_qat(model)

    make_state = lambda: TrainState.create(make(), optim.sgd(1e-2), seed=0)  # noqa: E731
    state = trained(make(), optim.sgd(1e-2), make_state(), 0, 3)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
        back = checkpoints.restore(make_state())
        loaded = checkpoint.load_from(tmp_path, make_state())
        with pytest.raises(CheckpointError, match=r"params/0.weight +tensor float32 \(3, 3\) +tensor float32 \(5, 3\)"):
            checkpoints.restore(make_state().replace(params=make_state().params | {"0.weight": torch.zeros(5, 3)}))
    assert tree.equal(back, state)
    assert tree.equal(loaded.buffers, state.buffers)
    assert tree.equal(trained(make(), optim.sgd(1e-2), back, 3, 5), trained(make(), optim.sgd(1e-2), state, 3, 5))


def test_another_dtype_only_when_asked(tmp_path: Path) -> None:
    state = fresh(seed=1)
    half = {name: value.bfloat16() for name, value in fresh().params.items()}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
        with pytest.raises(CheckpointError, match=r"head.weight +tensor float32 \(2, 4\) +tensor bfloat16 \(2, 4\)"):
            checkpoints.restore(fresh().replace(params=half), select="params/**")
        back = checkpoints.restore(fresh().replace(params=half), select=["params/**", "buffers/**"], dtype=torch.bfloat16)
        assert tree.equal(back.params, {name: value.bfloat16() for name, value in state.params.items()})
        assert tree.equal(back.buffers, state.buffers)  # float32 in `like`, int64 everywhere
        everything = checkpoints.restore(dtype=torch.float64, device="cpu")
        assert {value.dtype for value in tree.leaves((everything.params, everything.buffers))} == {torch.float64, torch.int64}
        with pytest.raises(CheckpointError, match=r"head.weight +tensor float32 \(2, 4\) +tensor bfloat16 \(2, 4\)"):
            checkpoints.restore(fresh().replace(params=half), select="params/**", dtype=torch.float16)


def test_a_dtype_is_floating_point_and_a_device_one_that_is_there(tmp_path: Path) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(fresh())
        for dtype in (torch.int32, torch.complex64, "float16"):
            with pytest.raises(CheckpointError, match=r"dtype is a floating-point one, such as torch\.bfloat16, not "):
                checkpoints.restore(dtype=dtype)  # pyright: ignore[reportArgumentType]
        with pytest.raises(CheckpointError, match=r"dtype=torch\.bfloat16 is for a `like` that has it"):
            checkpoints.restore(fresh(), dtype=torch.bfloat16)
        for device in ("nowhere", "cuda:99"):
            with pytest.raises(CheckpointError, match=f"^params/body.0.weight cannot be brought to {device}: "):
                checkpoints.restore(device=device)


def test_another_dtype_is_for_what_hooks_remember_too_and_not_for_the_totals_of_open_loops(tmp_path: Path) -> None:
    total = torch.tensor([1.1, 1 / 3], dtype=torch.float64)
    state = fresh().replace(memory={"ema": torch.ones(3)}, position=Position((Frame("epoch_loop", ticks=3, totals=total),), ticks=3))
    half = fresh().replace(params={name: value.bfloat16() for name, value in fresh().params.items()})
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
        for like, select in ((half, ["params/**", "memory/**", "position/**"]), (None, None)):
            back = checkpoints.restore(like, select=select, dtype=torch.bfloat16)
            assert {back.params["head.weight"].dtype, back.memory["ema"].dtype} == {torch.bfloat16}
            assert tree.equal(back.position, state.position)


def test_leaves_are_read_without_any_class(tmp_path: Path) -> None:
    tied = torch.ones(3)
    state = at(1).replace(opt_state=Pair(tied, Box([tied, 2**70], "m")))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
        leaves = checkpoints.read()
        assert leaves["params/w"].equal(state.params["w"])
        assert leaves["opt_state/second/inside/0"] is leaves["opt_state/first"]
        assert (leaves["opt_state/second/inside/1"], leaves["step"], leaves["stop"]) == (2**70, 1, None)
        assert list(checkpoints.read(select="params/*")) == ["params/w", "params/b"]
        (entry,) = checkpoints.entries()
        beside, same = Checkpoints.at(tmp_path / entry.name)
        assert (beside.directory, same) == (tmp_path, entry)
        assert tree.equal(beside.read(same), leaves)
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        Checkpoints.at(tmp_path)


def test_two_leaves_of_one_path_are_not_read_as_one(tmp_path: Path) -> None:
    state = at(1, a={1: torch.zeros(1), "1": torch.ones(1)})
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
        with pytest.raises(CheckpointError, match="there are two leaves memory/a/1, their keys of two types; `restore` tells them apart"):
            checkpoints.read()
        assert set(checkpoints.read(select="params/**")) == {"params/w", "params/b"}
        assert tree.equal(checkpoints.restore(), state)


def test_what_is_not_selected_needs_no_class_and_may_be_empty(tmp_path: Path) -> None:
    code = """
        import sys
        from fnrun.checkpoint import Checkpoints
        state = Checkpoints(sys.argv[1]).restore(select=["params/**", "buffers/**", "memory/**", "step"])
        print(sorted(state.params), state.buffers, state.opt_state, state.rng, state.step, state.memory, state.position)
    """
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(at(1).replace(opt_state=Pair(1, Box(torch.ones(2)))))
    ran = python(code, tmp_path)
    assert (ran.stdout, ran.stderr) == ("['b', 'w'] {} None None 1 {} None\n", "")


class tree_equal_to:
    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return tree.equal(self.value, other)

    __hash__ = None  # pyright: ignore[reportAssignmentType]


def test_classes_are_only_those_that_are_loaded_and_registered(tmp_path: Path) -> None:
    code = """
        import sys, fnrun.core.state
        from fnrun.checkpoint import Checkpoints, CheckpointError
        try:
            Checkpoints(sys.argv[1]).restore()
        except CheckpointError as error:
            print(error)
    """
    with Checkpoints(tmp_path / "a") as checkpoints:
        checkpoints.save(at(1, x=Pair(1, 2)))
    with Checkpoints(tmp_path / "b") as checkpoints:
        checkpoints.save(at(1, x=Box(1)))
    assert python(code, tmp_path / "a").stdout.startswith(f"memory/x: namedtuple {__name__}:Pair is not loaded: import the module")
    assert python(code, tmp_path / "b").stdout.startswith(f"memory/x: struct {__name__}:Box is not loaded: import the module")


def test_a_class_of_a_script_is_loaded(tmp_path: Path) -> None:
    code = """
        import typing, torch
        from fnrun.checkpoint import Checkpoints
        from fnrun.core.state import TrainState

        class Seen(typing.NamedTuple):
            loss: float

        state = TrainState.create(torch.nn.Linear(2, 1)).replace(memory={"mine": Seen(0.5)})
        with Checkpoints("checkpoints") as checkpoints:
            checkpoints.save(state)
        print(checkpoints.restore(state).memory)
    """
    (tmp_path / "script.py").write_text(textwrap.dedent(code))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ran = subprocess.run([sys.executable, "script.py"], capture_output=True, text=True, cwd=tmp_path, timeout=120, env=environment)
    assert (ran.stdout, ran.stderr) == ("{'mine': Seen(loss=0.5)}\n", "")


@pytest.mark.parametrize(
    "kind",
    [
        "namedtuple os:system",
        "struct os:system",
        "namedtuple builtins:tuple",
        "namedtuple torch:Tensor",
        "struct nowhere:X",
        "struct fnrun.__main__:X",
        "struct fnrun.nowhere:X",
        "object",
        "eval x:y",
        "",
    ],
)
def test_a_forged_manifest_names_nothing_else(kind: str, tmp_path: Path) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(at(1, x=Pair(1, 2)))
        checkpoints.wait()
        forge(tmp_path, lambda manifest: manifest["structure"]["children"][5]["children"][0].update(kind=kind))
        with pytest.raises(CheckpointError):
            checkpoints.restore()


PIECE = {"file": "arrays/state/00000/0", "digest": "blake3:" + "0" * 64}


@pytest.mark.parametrize(
    ("leaf", "change", "message"),
    [
        ("step", {"value": "abc"}, "step is said to be of kind int, and its value is none"),
        ("step", {"value": 1.0}, "of kind int"),
        ("step", {"value": True}, "of kind int"),
        ("step", {"kind": "str"}, "of kind str"),
        ("step", {"kind": "object"}, "of kind object"),
        ("stop", {"value": {"int": "0x10"}}, "of kind NoneType"),
        ("memory/b", {"pieces": [{**PIECE, "offset": 20}]}, "lies where another leaf lies"),
        ("memory/b", {"pieces": [{**PIECE, "offset": -1}]}, "memory/b is not what its pieces make up"),
        ("memory/b", {"pieces": [{**PIECE, "digest": "md5:" + "0" * 64}]}, "memory/b is not what its pieces make up"),
        ("step", {"pieces": [PIECE]}, "step is stored, and no tensor"),
        ("memory/a", {"path": "memory/b"}, "memory/b lies at memory/a"),
        ("memory/n", {"dtype": "|O"}, "memory/n is an array of |O"),
        ("memory/n", {"dtype": "<f4,<f4"}, "memory/n is an array of"),
    ],
)
def test_a_leaf_that_is_not_what_it_is_said_to_be_is_refused_where_the_manifest_is_read(
    leaf: str, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(at(1, a=torch.ones(20), b=torch.ones(20), n=np.ones(20, np.float32)))
        checkpoints.wait()
        forge(tmp_path, lambda manifest: next(found for found in manifest["leaves"] if found["path"] == leaf).update(change))
        with pytest.raises(DamagedError, match=rf"manifest.json is not a manifest: .*{re.escape(message)}"):
            checkpoints.manifest()


def test_nothing_that_is_read_is_unpacked(tmp_path: Path) -> None:
    """Compressed arrays could be of any size; zarr has them, fnrun writes none."""
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state := at(1, zeros=torch.zeros(2 * 10**6)))
        checkpoints.wait()
        (folder,) = [path.parent for path in files(tmp_path) if path.name == "0" and path.stat().st_size == 8 * 10**6]
        described = json.loads((folder / ".zarray").read_text())
        (folder / ".zarray").write_text(
            json.dumps(described | {"compressor": {"id": "zlib", "level": 9}, "shape": [10**12], "chunks": [10**12]})
        )
        forge(tmp_path, lambda manifest: None)
        assert tree.equal(checkpoints.restore(), state)
        (folder / "0").write_bytes(zlib.compress((folder / "0").read_bytes()))
        forge(tmp_path, lambda manifest: None)
        with pytest.raises(DamagedError, match="memory/zeros lies beyond the end of arrays/state/00000/0"):
            checkpoints.restore()


def forge(directory: Path, change: Any) -> None:
    """Change the only checkpoint's manifest, and make its digest agree."""
    (folder,) = [path for path in directory.iterdir() if path.name[0].isdigit()]
    manifest = json.loads((folder / store.MANIFEST).read_text())
    change(manifest)
    for name, file in manifest["files"].items() if isinstance(manifest.get("files"), dict) else ():
        if isinstance(file, dict) and (folder / name).is_file():
            file["size"] = (folder / name).stat().st_size
            if "digest" in file:
                file["digest"] = blake3_of((folder / name).read_bytes())
    data = json.dumps(manifest).encode()
    (folder / store.MANIFEST).write_bytes(data)
    (folder / store.DIGEST).write_text(f"{hashlib.sha256(data).hexdigest()}  {store.MANIFEST}\n")


# --- damage ------------------------------------------------------------------------------------------------------------


def test_a_damaged_leaf_is_named(tmp_path: Path) -> None:
    state = at(1)
    needle = state.params["w"].numpy().tobytes()[:64]
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
        checkpoints.wait()
        (path,) = [path for path in files(tmp_path) if needle in path.read_bytes()]
        path.write_bytes(path.read_bytes().replace(needle, needle[:-1] + bytes([needle[-1] ^ 1])))
        with pytest.raises(DamagedError, match=rf"{path} is damaged: [^.]*\. Lost: params/w;") as error:
            checkpoints.restore()
        assert error.value.leaves == ["params/w"]


def test_a_renamed_checkpoint_and_a_later_format_are_refused(tmp_path: Path) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(at(1))
        checkpoints.wait()
        (tmp_path / "00000001-00000001").rename(tmp_path / "00000002-00000002")
        with pytest.raises(DamagedError, match=r"holds step 1, ticks 1: the directory was renamed; its name is 00000001-00000001"):
            checkpoints.restore()
        (tmp_path / "00000002-00000002").rename(tmp_path / "00000001-00000001")
        for version in (0, FORMAT + 1):
            forge(tmp_path, lambda manifest, version=version: manifest.update(format=version))
            with pytest.raises(CheckpointError, match=rf"written in format {version}; this version of fnrun reads 1 to {FORMAT}"):
                checkpoints.restore()


# --- which is which ----------------------------------------------------------------------------------------------------


def test_an_empty_directory_holds_nothing_and_is_not_made(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "none")
    assert (checkpoints.steps(), checkpoints.latest(), checkpoints.best()) == ([], None, None)
    with pytest.raises(CheckpointError, match="there is no checkpoint here"):
        checkpoints.restore()
    assert not (tmp_path / "none").exists()


def test_what_else_lies_in_the_directory_is_left_alone(tmp_path: Path) -> None:
    """Two numbers and a dash are not yet the name of a checkpoint."""
    others = ["2024-11", "1-2", "00000001-\u0660\u0660\u0660\u0660\u0660\u0660\u0660\u0661", "00000001-00000001.0"]
    for name in others:
        (tmp_path / name).mkdir()
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(at(step))
            checkpoints.prune(1)
        assert checkpoints.steps() == [2]
    assert set(names(tmp_path)) == {*others, "00000002-00000002"}


def test_two_at_one_step_are_told_apart_by_their_ticks(tmp_path: Path) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        for ticks in (9, 10, 11):
            checkpoints.save(at(7, ticks, mark=ticks))
        checkpoints.save(at(8, 12))
        assert (checkpoints.steps(), checkpoints.latest()) == ([7, 8], 8)
        assert checkpoints.restore(step=7).memory == {"mark": 11}
        with pytest.raises(CheckpointError, match=r"no checkpoint of step 9; there are: 7, 7, 7, 8"):
            checkpoints.restore(step=9)
    assert names(tmp_path) == ["00000007-00000009", "00000007-00000010", "00000007-00000011", "00000008-00000012"]


def test_the_same_state_is_written_once_and_another_one_beside_it(tmp_path: Path) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(at(1, a=1), {"loss": 0.5}, monitor="loss")
        checkpoints.save(at(1, a=1))
        checkpoints.save(at(1, a=1), {"loss": 0.5}, monitor="loss")
        assert (checkpoints.steps(), names(tmp_path)) == ([1], ["00000001-00000001"])
        checkpoints.save(at(1, a=True), {"loss": 0.6}, monitor="loss")
        assert names_after(checkpoints) == ["00000001-00000001", "00000001-00000001.1"]
        assert checkpoints.restore().memory["a"] is True
        assert checkpoints.restore(step="best").memory["a"] == 1
        checkpoints.prune(1)
        assert names_after(checkpoints) == ["00000001-00000001", "00000001-00000001.1"]
        checkpoints.save(at(2))
        checkpoints.prune(1)
        assert names_after(checkpoints) == ["00000001-00000001", "00000002-00000002"]


def names_after(checkpoints: Checkpoints) -> list[str]:
    checkpoints.wait()
    return names(checkpoints.directory)


def test_a_damaged_checkpoint_is_saved_again_beside(tmp_path: Path) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(at(1))
        checkpoints.wait()
        next(path for path in files(tmp_path) if path.name == "_METADATA").write_text("{")
        checkpoints.save(at(1))
        assert tree.equal(checkpoints.restore(), at(1))


def test_a_run_that_goes_on_from_an_older_checkpoint_leaves_the_future_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        for step in (10, 20, 30, 40):
            checkpoints.save(at(step), {"loss": 1 / step}, monitor="loss")
        assert caplog.records == []
        state = checkpoints.restore(step=20)
        assert checkpoints.latest() == 40
        checkpoints.save(state.replace(step=25, position=Position(ticks=25)))
        assert (checkpoints.steps(), checkpoints.latest(), checkpoints.best()) == ([10, 20, 25], 25, 20)
        assert "goes on from step 25; moved aside as abandoned-*: 00000030-00000030, 00000040-00000040" in caplog.text
        with pytest.raises(CheckpointError, match=r"there are: 10, 20, 25; abandoned-00000040-00000040 was given up .* rename it"):
            checkpoints.restore(step=40)
        checkpoints.save(at(40))
        checkpoints.save(at(10))
        assert checkpoints.latest() == 10
        checkpoints.prune(1)
        assert [name for name in names_after(checkpoints) if "40" in name] == [
            "abandoned-00000040-00000040",
            "abandoned-00000040-00000040-2",
        ]


def test_best_is_by_the_monitored_metric_and_never_a_nan(tmp_path: Path) -> None:
    values = {1: float("nan"), 2: torch.tensor(0.5), 3: float("inf"), 4: 0.25, 5: np.float32(0.25), 6: 0.75, 7: None}
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(CheckpointError, match="there is no checkpoint here"):
            checkpoints.restore(step="best")
        for step, value in values.items():
            checkpoints.save(at(step), {} if value is None else {"loss": value, "matrix": torch.eye(2)}, monitor="loss")
        assert checkpoints.best() == 4
        assert checkpoints.manifest(2).metrics == {"loss": 0.5}
        assert math.isnan(float(checkpoints.manifest(1).metrics["loss"]))
        assert checkpoints.restore(step="best").step == 4
        checkpoints.save(at(8), {"acc": 0.5}, monitor="acc", mode="max")
        checkpoints.save(at(9), {"acc": 0.7}, monitor="acc", mode="max")
        checkpoints.save(at(10), {"acc": float("nan")}, monitor="acc", mode="max")
        checkpoints.save(at(11), {"acc": 0.9})
        assert checkpoints.best() == 9
        with pytest.raises(ValueError, match="mode is 'min' or 'max', not 'maximum'"):
            checkpoints.save(at(12), {"acc": 1}, monitor="acc", mode="maximum")  # pyright: ignore[reportArgumentType]


def test_without_a_monitored_metric_none_is_best(tmp_path: Path) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(at(1), {"loss": 0.5})
        checkpoints.save(at(2), {"loss": 0.5, "val/loss": float("nan")}, monitor="val/loss")
        assert checkpoints.best() is None
        with pytest.raises(CheckpointError, match="none is the best; metrics: loss"):
            checkpoints.restore(step="best")


@settings(max_examples=15, deadline=None)
@given(
    values=st.lists(st.sampled_from([0.0, 1.0, 2.0, float("nan"), None]), min_size=1, max_size=8),
    keep=st.integers(1, 4),
    each=st.booleans(),
)
def test_prune_never_deletes_the_newest_or_the_best(
    values: list[float | None], keep: int, each: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    numbers = {step: value for step, value in enumerate(values) if value is not None and not math.isnan(value)}
    with Checkpoints(tmp_path_factory.mktemp("prune")) as checkpoints:
        for step, value in enumerate(values):
            checkpoints.save(at(step), None if value is None else {"v": value}, monitor=None if value is None else "v", mode="max")
            if each:
                checkpoints.prune(keep)
        best = checkpoints.best()
        checkpoints.prune(keep)
        assert set(checkpoints.steps()) == {*range(len(values))[-keep:], *([] if best is None else [best])}
        assert best == max(numbers, key=lambda step: numbers[step], default=None)
        assert len(names(checkpoints.directory)) == len(checkpoints.steps())


def test_prune_leaves_what_it_cannot_judge(tmp_path: Path) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(at(step))
        checkpoints.wait()
        (tmp_path / "00000001-00000001" / store.MANIFEST).write_text("{}")
        checkpoints.prune(1)
        assert checkpoints.steps() == [1, 3]
        with pytest.raises(DamagedError, match="00000001-00000001"):
            checkpoints.best()
        with pytest.raises(ValueError, match="keep is at least 1, not 0"):
            checkpoints.prune(0)
        with pytest.raises(ValueError, match="keep_every is at least 1 step, not 0"):
            checkpoints.prune(1, 0)


def test_prune_keeps_one_of_each_so_many_steps(tmp_path: Path) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        for step in (5, 10, 15, 20, 33, 35, 45, 47, 48):
            checkpoints.save(at(step))
            checkpoints.prune(2, keep_every=10)
        assert checkpoints.steps() == [10, 20, 33, 45, 47, 48]
        assert [entry.step for entry in checkpoints.superfluous(1)] == [10, 20, 33, 45, 47]


def test_several_metrics_have_a_best_each(tmp_path: Path) -> None:
    monitor: Any = {"val/loss": "min", "val/accuracy": "max"}
    with Checkpoints(tmp_path) as checkpoints:
        for step, (loss, accuracy) in enumerate([(0.5, 0.7), (0.2, 0.8), (0.3, 0.9), (0.4, 0.6), (float("nan"), 0.5)]):
            checkpoints.save(at(step), {"val/loss": loss, "val/accuracy": accuracy}, monitor=monitor)
            checkpoints.prune(1)
        assert checkpoints.steps() == [1, 2, 4]
        assert (checkpoints.best(), checkpoints.best("val/loss"), checkpoints.best("val/accuracy")) == (1, 1, 2)
        assert [checkpoints.restore(step=which).step for which in ("best", "best:val/loss", "best:val/accuracy", None)] == [1, 1, 2, 4]
        with pytest.raises(
            CheckpointError, match=r"no checkpoint was saved with 'val/acuracy' monitored; monitored: val/loss, val/accuracy"
        ):
            checkpoints.restore(step="best:val/acuracy")
        with pytest.raises(CheckpointError, match="named by its step, 'best' or 'best:METRIC', not 'worst'"):
            checkpoints.restore(step="worst")


def test_what_is_not_finite_is_never_the_best_and_of_two_at_one_place_the_last_is(tmp_path: Path) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        for step, value in enumerate([float("inf"), 5.0, float("-inf")]):
            checkpoints.save(at(step), {"acc": value}, monitor="acc", mode="max")
        checkpoints.save(at(1, x=1), {"acc": 5.0}, monitor="acc", mode="max")
        assert checkpoints.find("best").name == "00000001-00000001.1"
        checkpoints.prune(1)
        assert [entry.name for entry in checkpoints.entries()] == ["00000001-00000001.1"]


def test_a_misspelt_monitored_metric_is_told(tmp_path: Path) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(ValueError, match="save: 'val/los' is monitored and not among the metrics: 'val/loss'"):
            checkpoints.save(at(1), {"val/loss": 1.0}, monitor="val/los")
        checkpoints.save(at(1))
        with pytest.raises(CheckpointError, match="named by its step, 'best' or 'best:METRIC', not 1"):
            checkpoints.restore(step=1.5)  # pyright: ignore[reportArgumentType]


def test_a_guard_keeps_a_process_out_that_may_not_write_any_more(tmp_path: Path) -> None:
    state, asked = at(1), []

    def guard() -> None:
        asked.append(len(names(tmp_path)))
        if len(asked) == 4:
            raise CheckpointError("the run was taken over")

    with Checkpoints(tmp_path, guard=guard) as checkpoints:
        checkpoints.save(state)
        checkpoints.save(at(2))
        with pytest.raises(CheckpointError, match="step 2 was not saved: the run was taken over"):
            checkpoints.wait()
        assert checkpoints.steps() == [1]
    assert names(tmp_path) == ["00000001-00000001"]


def test_the_manifest_tells_config_and_environment(tmp_path: Path) -> None:
    @dataclasses.dataclass(frozen=True)
    class Config:
        lr: float = 0.1
        clip: tuple[float, ...] = (float("inf"), -0.0)
        seed: int = 2**70

    with Checkpoints(tmp_path, config=Config()) as checkpoints:
        checkpoints.save(at(3, 4), {"loss": 2})
        manifest = checkpoints.manifest()
    assert (manifest.format, manifest.step, manifest.ticks, manifest.config, manifest.metrics) == (
        FORMAT,
        3,
        4,
        {"lr": 0.1, "clip": [math.inf, -0.0], "seed": 2**70},
        {"loss": 2.0},
    )
    assert {"python", "torch", "numpy", "orbax-checkpoint", "jax", "threads", "platform"} <= set(manifest.environment)
    assert set(manifest.files) == {path.relative_to(tmp_path / "00000003-00000004").as_posix() for path in files(tmp_path)} - {
        store.MANIFEST,
        store.DIGEST,
    }


def test_a_moved_directory_reads_the_same(tmp_path: Path) -> None:
    with Checkpoints(tmp_path / "a" / "b") as checkpoints:
        checkpoints.save(at(1))
    (tmp_path / "a").rename(tmp_path / "c")
    assert tree.equal(Checkpoints(tmp_path / "c" / "b").restore(), at(1))


# --- beside others -----------------------------------------------------------------------------------------------------


def test_several_directories_of_one_process_are_saved_and_read_at_once(tmp_path: Path) -> None:
    directories = [Checkpoints(tmp_path / name) for name in ("last", "best", "other")]
    with Checkpoints(tmp_path / "read") as read:
        read.save(at(0))
    for step in range(1, 16):
        for checkpoints in directories:
            checkpoints.save(at(step))
        assert tree.equal(read.restore(), at(0))
    for checkpoints in directories:
        checkpoints.wait()
        assert checkpoints.steps() == list(range(1, 16))
        assert tree.equal(checkpoints.restore(), at(15))


def test_who_reads_waits_for_nobody_who_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, begun = threading.Event(), threading.Event()
    with Checkpoints(tmp_path / "a") as read:
        read.save(at(1))
    write = writing.write

    def slow(*arguments: Any) -> None:
        begun.set()
        assert gate.wait(20)
        write(*arguments)

    monkeypatch.setattr(writing, "write", slow)
    with Checkpoints(tmp_path / "b") as checkpoints:
        checkpoints.save(at(2))
        assert begun.wait(20)
        assert tree.equal(read.restore(), at(1))
        gate.set()
    assert tree.equal(checkpoints.restore(), at(2))


def test_a_reader_beside_a_pruning_writer_reads_what_is_there_by_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer, reader = Checkpoints(tmp_path), Checkpoints(tmp_path)
    for step in (1, 2):
        writer.save(at(step), {"loss": 1 / step}, monitor="loss")
    writer.wait()
    read = store.read_manifest

    def overtaken(directory: Path) -> Any:
        monkeypatch.setattr(store, "read_manifest", read)
        manifest = read(directory)
        writer.save(at(manifest.step + 1), {"loss": 1 / manifest.step - 1}, monitor="loss")
        writer.wait()
        writer.prune(1)
        return manifest

    asked: list[Any] = [
        lambda: reader.restore().step,
        lambda: reader.restore(step="best").step,
        lambda: reader.read()["step"],
        lambda: reader.check().step,
        lambda: checkpoint.load_from(tmp_path, fresh_like(at(0))).params["w"].equal(at(writer.latest() or 0).params["w"]),
    ]
    for ask in asked:
        monkeypatch.setattr(store, "read_manifest", overtaken)
        assert ask() in (writer.latest(), True)
    monkeypatch.setattr(store, "read_manifest", overtaken)
    with pytest.raises(
        CheckpointError, match=r"was deleted, or moved away, while it was read, by the process that writes there: .*no checkpoint of"
    ) as error:
        reader.restore(step=reader.latest())
    assert not isinstance(error.value, DamagedError)


def fresh_like(state: TrainState) -> TrainState:
    return state.replace(params={name: torch.zeros_like(value) for name, value in state.params.items()})


def test_a_forked_process_reads_and_saves(tmp_path: Path) -> None:
    code = """
        import os, sys, warnings
        from fnrun.checkpoint import Checkpoints
        from tests.checkpoint.test_checkpoints import at
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 and later warn of the fork itself
        checkpoints = Checkpoints(sys.argv[1])
        checkpoints.save(at(1))
        checkpoints.wait()
        if (child := os.fork()) == 0:
            print(checkpoints.restore().step, flush=True)
            with Checkpoints(sys.argv[1] + "/other") as other:
                other.save(at(2))
            print(other.steps(), flush=True)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        checkpoints.save(at(3))
        print(checkpoints.steps())
    """
    ran = python(code, tmp_path)
    assert (ran.stdout, ran.stderr) == ("1\n[2]\n[1, 3]\n", "")


@pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no compiler")
def test_a_file_system_that_makes_nothing_durable_is_written_to(tmp_path: Path) -> None:
    (tmp_path / "none.c").write_text(
        "#include <errno.h>\nint fsync(int f) { errno = EINVAL; return -1; }\nint fdatasync(int f) { return fsync(f); }\n"
    )
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", tmp_path / "none.so", tmp_path / "none.c"], check=True)
    code = """
        import sys
        from fnrun.checkpoint import Checkpoints
        from tests.checkpoint.test_checkpoints import at
        with Checkpoints(sys.argv[1]) as checkpoints:
            checkpoints.save(at(1))
    """
    ran = python(code, tmp_path / "saved", env=os.environ | {"LD_PRELOAD": str(tmp_path / "none.so")})
    assert (ran.returncode, ran.stderr) == (0, "")
    assert tree.equal(Checkpoints(tmp_path / "saved").restore(), at(1))


# --- behind the training -----------------------------------------------------------------------------------------------


def test_save_returns_before_it_is_written_and_one_is_in_flight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, running, most = threading.Event(), [], []
    write = writing.write

    def slow(*arguments: Any) -> None:
        running.append(1)
        most.append(len(running))
        assert gate.wait(10)
        write(*arguments)
        running.pop()

    monkeypatch.setattr(writing, "write", slow)
    with Checkpoints(tmp_path) as checkpoints:
        metrics = {"loss": 0.5}
        checkpoints.save(at(1), metrics)
        metrics.clear()
        checkpoints.prune(1)
        checkpoints.poll()
        assert [name for name in names(tmp_path) if not name.startswith(".")] == []
        threading.Timer(0.1, gate.set).start()
        checkpoints.save(at(2))
        assert "00000001-00000001" in names(tmp_path)
        assert checkpoints.steps() == [1, 2]
        assert checkpoints.manifest(1).metrics == {"loss": 0.5}
    assert most == [1, 1]


def test_a_metric_is_what_it_was_when_it_was_handed_over(tmp_path: Path) -> None:
    """Whoever adds up in a tensor, or an array, goes on to do so while the save is under way."""
    with Checkpoints(tmp_path) as checkpoints:
        for step in range(5):
            metrics = {"loss": torch.tensor(0.5), "accuracy": np.array([0.25]), "confusion": torch.ones(3, 3)}
            checkpoints.save(at(step), metrics)
            metrics["loss"].zero_()
            metrics["accuracy"][:] = 0
        assert all(checkpoints.manifest(step).metrics == {"loss": 0.5, "accuracy": 0.25} for step in range(5))


def test_an_interrupt_before_a_save_has_begun_leaves_the_next_one_possible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(thread: threading.Thread) -> None:
        raise KeyboardInterrupt

    with Checkpoints(tmp_path) as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", interrupted)
            with pytest.raises(KeyboardInterrupt):
                checkpoints.save(at(1))
        checkpoints.save(at(2))
        assert checkpoints.steps() == [2]


def test_a_failure_behind_is_reported_once_and_the_next_save_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(at(1))
    checkpoints.wait()
    with monkeypatch.context() as patch:
        patch.setattr(writing, "_write", full)
        checkpoints.save(at(2))
        with pytest.raises(CheckpointError, match=rf"^{tmp_path}: step 2 was not saved: \[Errno 28\] No space left on device$"):
            checkpoints.wait()
        checkpoints.wait()
        checkpoints.save(at(3))
        assert checkpoints.steps() == [1]
        with pytest.raises(CheckpointError, match="step 3 was not saved"):
            checkpoints.poll()
        checkpoints.poll()
        checkpoints.save(at(4))
        checkpoints.steps()
    with pytest.raises(CheckpointError, match="step 4 was not saved"):
        checkpoints.save(at(5))
    assert (checkpoints.steps(), names(tmp_path)) == ([1, 5], ["00000001-00000001", "00000005-00000005"])
    assert tree.equal(checkpoints.restore(), at(5))


def test_leaving_the_context_waits_and_never_hides_the_error_within(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing, "_write", full)
    with pytest.raises(CheckpointError, match="step 1 was not saved"), Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(at(1))
    with pytest.raises(KeyError) as error, Checkpoints(tmp_path) as checkpoints:  # noqa: PT012
        checkpoints.save(at(1))
        raise KeyError("mine")
    assert "step 1 was not saved" in error.value.__notes__[0]


def test_a_file_where_the_directory_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    checkpoints = Checkpoints(tmp_path / "file" / "checkpoints")
    checkpoints.save(at(3))
    with pytest.raises(CheckpointError, match=r"file/checkpoints: step 3 was not saved: .*Not a directory"):
        checkpoints.wait()


def test_leftovers_of_a_killed_process_are_no_checkpoints_and_are_cleaned_up_by_the_next_save(tmp_path: Path) -> None:
    for name in (".tmp-00000009-00000009", ".tmp-delete-00000001-00000001"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text("")
    checkpoints = Checkpoints(tmp_path)
    assert (checkpoints.steps(), len(names(tmp_path))) == ([], 2)
    with checkpoints:
        checkpoints.save(at(1))
    assert names(tmp_path) == ["00000001-00000001"]


def test_nothing_stays_behind(tmp_path: Path) -> None:
    others = threading.enumerate()  # what a tracker of another test left in this process
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(at(1))
        checkpoints.restore()
    before = threading.enumerate()
    handlers = list(logging.getLogger().handlers)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(at(2))
        checkpoints.restore(like=at(2))
    gc.collect()
    assert threading.enumerate() == before == others
    assert logging.getLogger().handlers == handlers


# --- processes ---------------------------------------------------------------------------------------------------------


def test_a_failure_of_which_nobody_asks_is_told_at_the_end(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code = """
        import gc, sys
        from fnrun.checkpoint import Checkpoints
        from tests.checkpoint.test_checkpoints import at
        checkpoints = Checkpoints(sys.argv[1])
        checkpoints.save(at(7))
        checkpoints.steps()
        del checkpoints
        gc.collect()
        print("gone")
    """
    ran = python(code, tmp_path / "file" / "checkpoints")
    assert (ran.returncode, ran.stdout) == (0, "gone\n")
    assert "step 7 was not saved" in ran.stderr


def test_a_save_that_begins_when_the_interpreter_ends_is_said_to_be_lost(tmp_path: Path) -> None:
    code = """
        import atexit, sys
        from fnrun.checkpoint import Checkpoints
        from tests.checkpoint.test_checkpoints import at
        checkpoints = Checkpoints(sys.argv[1])
        checkpoints.save(at(1))
        checkpoints.wait()
        atexit.register(lambda: checkpoints.save(at(2)))
    """
    ran = python(code, tmp_path)
    assert "step 2 was not saved" in ran.stderr or "shutdown" in ran.stderr  # since Python 3.12 no thread can begin then
    assert Checkpoints(tmp_path).steps() == [1]


def test_only_the_program_configures_logging() -> None:
    """A handler that orbax's logging puts on the root logger would make the program's own `basicConfig` do nothing."""
    code = """
        import logging
        from fnrun.checkpoint import orbax
        orbax.imported()
        from absl import logging as absl
        absl.info("as orbax does all the time")
        print(logging.getLogger().handlers)
    """
    assert python(code).stdout == "[]\n"


def test_orbax_is_imported_where_it_is_used() -> None:
    code = """
        import sys, fnrun.checkpoint
        print([name for name in ("orbax", "jax", "tensorstore") if name in sys.modules])
        assert fnrun.checkpoint.Checkpoints("nowhere").steps() == []
        assert "jax" not in sys.modules
    """
    ran = python(code)
    assert (ran.returncode, ran.stdout) == (0, "[]\n"), ran.stderr


def test_another_process_resumes_and_one_that_does_not_wait_still_saves(tmp_path: Path) -> None:
    code = """
        import sys, torch, logging
        from fnrun.core import tree
        from fnrun.checkpoint import Checkpoints
        from tests.checkpoint.test_checkpoints import at, fresh
        checkpoints = Checkpoints(sys.argv[1])
        state = checkpoints.restore(like=at(0))
        assert tree.equal(state, at(4, x=(1, None)))
        print(tree.fingerprint(state), logging.getLogger().handlers)
        checkpoints.save(at(5))
    """
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(at(4, x=(1, None)))
    ran = python(code, tmp_path, env=os.environ | {"PYTHONHASHSEED": "7", "PYTHONWARNINGS": "error"})
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout == f"{tree.fingerprint(at(4, x=(1, None)))} []\n"
    assert tree.equal(Checkpoints(tmp_path).restore(step=5), at(5))


def test_data_workers_are_forked_beside_a_save(tmp_path: Path) -> None:
    code = """
        import sys, torch
        from torch.utils.data import DataLoader
        from fnrun.checkpoint import Checkpoints
        from tests.checkpoint.test_checkpoints import at
        with Checkpoints(sys.argv[1]) as checkpoints:
            for step in range(1, 5):
                checkpoints.save(at(step))
                total = sum(batch.sum() for batch in DataLoader(torch.arange(8.0), batch_size=2, num_workers=2))
                assert total == 28
            print(checkpoints.steps())
    """
    ran = python(code, tmp_path, env=os.environ | {"PYTHONWARNINGS": "error::RuntimeWarning"})
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "[1, 2, 3, 4]\n", "")


def test_the_public_names() -> None:
    names = {"Checkpoints", "CheckpointError", "DamagedError", "Entry", "Manifest", "Which", "params_from", "load_from", "export"}
    assert set(checkpoint.__all__) == names
    assert issubclass(DamagedError, CheckpointError)


class TestManyCheckpoints:
    """What a save, a prune and a best cost does not grow with the manifests that are there: each is read once."""

    def saved(self, checkpoints: Checkpoints, step: int) -> None:
        state = TrainState.create(nn.Linear(1, 1)).replace(step=step, position=Position(ticks=step))
        checkpoints.save(state, {"loss": 1 / step}, monitor="loss")
        checkpoints.wait()

    def test_a_manifest_is_read_once(self, tmp_path, monkeypatch):
        with Checkpoints(tmp_path) as checkpoints:
            for step in range(1, 6):
                self.saved(checkpoints, step)
            assert checkpoints.best() == 5
            read, through = [], store.read_judgement
            monkeypatch.setattr(store, "read_judgement", lambda directory: read.append(directory.name) or through(directory))
            assert checkpoints.best() == 5
            self.saved(checkpoints, 6)
            checkpoints.prune(keep=4)
            assert (checkpoints.steps(), checkpoints.best(), read) == ([3, 4, 5, 6], 6, ["00000006-00000006"])

    def test_one_that_is_another_now_is_read_again(self, tmp_path):
        reader, writer = Checkpoints(tmp_path), Checkpoints(tmp_path)
        self.saved(writer, 1)
        self.saved(writer, 2)
        assert reader.best() == 2
        writer.delete(["00000002-00000002"])
        state = TrainState.create(nn.Linear(1, 1)).replace(step=2, position=Position(ticks=2))
        writer.save(state, {"loss": 5.0}, monitor="loss")
        writer.wait()
        assert reader.best() == 1
        manifest = tmp_path / "00000001-00000001" / "manifest.json"
        manifest.write_bytes(manifest.read_bytes().replace(b"loss", b"boss"))
        with pytest.raises(DamagedError):
            reader.best()


# --- who else is at work ------------------------------------------------------------------------------------------------


def test_a_state_that_a_loop_in_another_thread_writes_over_is_not_saved(tmp_path: Path) -> None:
    model, rule = torch.nn.Linear(2, 1), optim.adamw(1e-2)
    step = fnrun.make_train_step(model, lambda model, x: model(x).square().mean(), rule)
    refused: list[Exception] = []

    def save(state: Any, checkpoints: Checkpoints) -> None:
        try:
            checkpoints.save(state)
        except fnrun.DonatedStateError as error:
            refused.append(error)

    with Checkpoints(tmp_path / "theirs") as theirs, Checkpoints(tmp_path / "ours") as ours:

        def observe(state: Any, metrics: Any) -> None:
            thread = threading.Thread(target=save, args=(state, theirs))
            thread.start()
            thread.join()
            save(state, ours)

        state = fnrun.TrainState.create(model, rule)
        end, _ = fnrun.epoch_loop(step, observers=[observe], donate=True)(state, [torch.ones(3, 2)] * 4)
        thread = threading.Thread(target=save, args=(end, theirs))  # nobody writes over it any more
        thread.start()
        thread.join()
    assert len(refused) == 4
    assert all("in another thread" in str(error) for error in refused)
    assert ours.steps() == [1, 2, 3, 4]
    assert tree.equal(theirs.restore().params, end.params)


def test_several_checkpoints_in_one_directory_write_one_after_the_other(tmp_path: Path) -> None:
    state = fnrun.TrainState.create(torch.nn.Linear(100, 100))
    failed: list[Exception] = []

    def write(begin: int) -> None:
        try:
            for step in range(begin, begin + 6):
                with Checkpoints(tmp_path) as checkpoints:
                    checkpoints.save(state.replace(step=step, position=fnrun.Position(ticks=step)))
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(1,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    for entry in Checkpoints(tmp_path).entries():
        Checkpoints(tmp_path).check(entry)


@pytest.mark.parametrize("size", [3, 500_000])
def test_an_array_that_is_written_to_after_it_was_handed_over_is_saved_as_it_was(size: int, tmp_path: Path) -> None:
    array = np.zeros(size)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(fnrun.TrainState.create(torch.nn.Linear(2, 1)).replace(memory={"counts": array}))
        array += 1
    assert not checkpoints.restore().memory["counts"].any()
