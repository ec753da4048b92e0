"""State dicts of other frameworks are read and written as they are, and no code in a file is ever run."""

from __future__ import annotations

import argparse
import datetime
import io
import json
import pickle
import zipfile
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import nn

from fnrun.checkpoint import CheckpointError, DamagedError, foreign, params_from
from fnrun.core import tree

MMENGINE = Path(__file__).parent / "foreign" / "mmengine.pth"


class Net(nn.Module):
    """The network of which MMEngine wrote the checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.body(x)))


def tied() -> nn.Module:
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False))
    model[1].weight = model[0].weight
    return model


# --- what is read ------------------------------------------------------------------------------------------------------


def test_a_checkpoint_of_mmengine_is_read_without_mmengine() -> None:
    model = Net().eval()
    model.load_state_dict(params_from(MMENGINE))
    outputs = model(torch.tensor([[1.0, 2.0, 3.0], [0.0, -1.0, 0.5]]))
    torch.testing.assert_close(outputs, torch.tensor([[0.012656, 0.090942], [0.00701, -0.022078]]), atol=1e-5, rtol=0)


def test_the_state_dict_is_the_whole_file_or_under_state_dict_or_under_model(tmp_path) -> None:
    state_dict = Net().state_dict()
    for number, content in enumerate(
        [state_dict, {"state_dict": state_dict, "epoch": 3, "optimizer_states": [{"state": {}}]}, {"model": state_dict, "lr": 0.1}]
    ):
        torch.save(content, path := tmp_path / f"{number}.ckpt")
        for source in (path, str(path), content):
            assert list(params_from(source)) == list(state_dict)
            assert tree.equal(params_from(source), dict(state_dict))


def test_another_place_is_named_and_never_guessed(tmp_path) -> None:
    state_dict = Net().state_dict()
    torch.save({"module": state_dict, "epoch": 3}, path := tmp_path / "deepspeed.pt")
    with pytest.raises(
        CheckpointError, match=r"no state dict under state_dict or model; it has: module \(an OrderedDict of 9\), epoch \(an int\)"
    ):
        params_from(path)
    assert tree.equal(params_from(path, key="module"), dict(state_dict))
    with pytest.raises(CheckpointError, match="more than one state dict"):
        params_from({"model": state_dict, "state_dict": state_dict})
    with pytest.raises(CheckpointError, match="no state dict under epoch"):
        params_from(path, key="epoch")


def test_tied_weights_are_one_tensor(tmp_path) -> None:
    torch.save(tied().state_dict(), path := tmp_path / "tied.pt")
    params = params_from(path)
    assert params["0.weight"] is params["1.weight"]


def test_what_was_read_does_not_hang_on_the_file(tmp_path) -> None:
    state_dict = {"w": torch.arange(4.0)}
    torch.save(state_dict, torch_file := tmp_path / "a.pt")
    safetensors.torch.save_file(state_dict, tensors_file := tmp_path / "a.safetensors")
    for path in (torch_file, tensors_file):
        params = params_from(path)
        path.write_bytes(bytes(path.stat().st_size))
        assert params["w"].tolist() == [0, 1, 2, 3]


def test_a_legacy_file_of_torch_is_read(tmp_path) -> None:
    state_dict = Net().state_dict()
    torch.save(state_dict, path := tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert tree.equal(params_from(path), dict(state_dict))


def test_a_file_that_was_packed_again_is_read(tmp_path) -> None:
    state_dict = written("zip", tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as old, zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    assert tree.equal(params_from(tmp_path / "b.pt"), state_dict)


def test_a_file_is_told_by_its_content(tmp_path) -> None:
    state_dict = dict(Net().state_dict())
    safetensors.torch.save_file(state_dict, path := tmp_path / "named.pth")
    assert tree.equal(params_from(path), state_dict)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "it is empty"),
        (b"\n<!DOCTYPE html><html>Not found</html>", "an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "git lfs pull"),
        (pickle.dumps({"w": 1}), "a plain pickle"),
        (b"P6 10 10", "begins with b'P6"),
        (b"PK\x03\x04 and no more", "damaged or cut off"),
    ],
    ids=["empty", "html", "lfs", "pickle", "image", "zip"],
)
def test_other_files_are_refused_by_what_they_are(tmp_path, content, words) -> None:
    (path := tmp_path / "weights.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match=words) as caught:
        params_from(path)
    assert str(path) in str(caught.value)
    with pytest.raises(CheckpointError, match=r"nowhere\.pth cannot be read: No such file"):
        params_from(tmp_path / "nowhere.pth")
    with pytest.raises(CheckpointError, match="is a directory: load_from"):
        params_from(tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([torch.ones(1)], "holds a list, not a state dict"),
        (torch.ones(1), "holds a tensor"),
        ({}, "it has: nothing"),
        ({"state_dict": {}}, "is empty"),
        ({"w": torch.ones(1), "lr": 0.1}, "lr is a float"),
        ({"w": torch.ones(1), "w._extra_state": b"abc"}, "w._extra_state is a bytes"),
        ({"w": torch.ones(1), 3: torch.ones(1)}, "3 is a tensor"),
        ({"w": torch.ones(3).to_sparse()}, "torch.sparse_coo"),
        ({"w": torch.ones(1, device="meta")}, "on meta"),
    ],
    ids=["list", "tensor", "nothing", "empty", "float", "extra state", "key", "sparse", "meta"],
)
def test_what_is_no_state_dict_is_refused(tmp_path, content, words) -> None:
    torch.save(content, path := tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match=words):
        params_from(path)


def test_a_pickled_module_is_no_state_dict(tmp_path) -> None:
    torch.save({"model": Net(), "epoch": 3}, path := tmp_path / "yolo.pt")
    with pytest.raises(CheckpointError, match=r"it has: model \(a tests.checkpoint.test_foreign.Net\), epoch \(an int\)"):
        params_from(path)
    torch.save(Net(), path)
    with pytest.raises(CheckpointError, match=r"holds a tests.checkpoint.test_foreign.Net, not a state dict"):
        params_from(path)


# --- damage ------------------------------------------------------------------------------------------------------------


def written(kind: str, path: Path) -> dict[str, torch.Tensor]:
    state_dict = {"a": torch.arange(300.0), "b": torch.tensor(7), "c": torch.zeros(0, 3)}
    if kind == "safetensors":
        safetensors.torch.save_file(state_dict, path)
    else:
        torch.save(state_dict, path, _use_new_zipfile_serialization=kind == "zip")
    return state_dict


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_a_file_that_was_cut_off_anywhere_is_refused(tmp_path, kind) -> None:
    written(kind, path := tmp_path / "cut")
    whole = path.read_bytes()
    for length in [*range(0, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            params_from(path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_changed_byte_of_a_zip_file_is_loaded(tmp_path, data) -> None:
    expected = written("zip", path := tmp_path / "changed")
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    try:
        found = params_from(path)
    except CheckpointError:
        return
    assert tree.equal(found, expected)  # a byte that means nothing, as the date


def test_changed_weights_are_told_from_weights_without_checksums(tmp_path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"w": torch.arange(300.0)}, path := tmp_path / "w.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    with pytest.raises(DamagedError, match=r"set_crc32_options\(False\)"):
        params_from(path)
    assert params_from(torch.load(path))["w"].shape == (300,)


# --- code in files -----------------------------------------------------------------------------------------------------


class Reduced:
    """Pickles as a call, whatever it is of, and with a state to be set on what it returns."""

    def __init__(self, fn: str, *args: Any, state: Any = None) -> None:
        self.fn, self.args, self.state = fn, args, state


class Pickler(pickle._Pickler):  # the one in Python, which can be told to write any name
    def save(self, obj: Any, *args: Any, **options: Any) -> None:
        if not isinstance(obj, Reduced):
            return super().save(obj, *args, **options)
        module, _, name = obj.fn.rpartition(".")
        self.write(b"c" + f"{module}\n{name}\n".encode())
        self.save(obj.args)
        self.write(pickle.REDUCE)
        if obj.state is not None:
            self.save(obj.state)
            self.write(pickle.BUILD)
        return None


def pickled(value: Any) -> bytes:
    Pickler(buffer := io.BytesIO(), protocol=2).dump(value)
    return buffer.getvalue()


def zipped(path: Path, content: bytes, like: Path | None = None) -> Path:
    """A file of torch with this pickle in it, and the tensors of another file."""
    entries = {"x/data.pkl": content, "x/version": b"3\n", "x/byteorder": b"little"}
    if like is not None:
        with zipfile.ZipFile(like) as file:
            entries = {name: content if name.endswith("/data.pkl") else file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w") as file:
        for name, data in entries.items():
            file.writestr(name, data)
    return path


def hostile(canary: Path) -> dict[str, Any]:
    touch = f"touch {canary}"
    write = f"__import__('pathlib').Path({str(canary)!r}).touch()"
    imported = Reduced("builtins.__import__", "os")
    return {
        "os.system": Reduced("os.system", touch),
        "posix.system": Reduced("posix.system", touch),
        "sys": Reduced("sys.setrecursionlimit", 10),
        "eval": Reduced("builtins.eval", write),
        "eval of Python 2": Reduced("__builtin__.eval", write),
        "exec": Reduced("builtins.exec", write),
        "open": Reduced("builtins.open", str(canary), "w"),
        "Popen": Reduced("subprocess.Popen", touch),
        "getattr": Reduced("builtins.getattr", imported, "system"),
        "partial": Reduced("functools.partial", Reduced("builtins.eval", write)),
        "torch's own": Reduced("torch.utils.cpp_extension.load_inline", "x", touch),
        "torch.load": Reduced("torch.serialization.load", str(canary)),
        "a tensor's method": Reduced("torch.Tensor.tofile", str(canary)),
        "rebuilt by a call": Reduced(
            "torch._tensor._rebuild_from_type_v2", Reduced("builtins.eval", write), Reduced("builtins.type"), (), None
        ),
        "a state": Reduced("tests.checkpoint.test_foreign.Explosive", state={"path": str(canary)}),
        "a state in two": Reduced("tests.checkpoint.test_foreign.Explosive", state=(None, {"path": str(canary)})),
        "a dictionary that makes": Reduced("collections.defaultdict", Reduced("builtins.eval", write)),
        "in a key": {Reduced("builtins.eval", write): 1},
        "in an ordered dictionary": Reduced("collections.OrderedDict", [("a", Reduced("os.system", touch))]),
        "an encoding": Reduced("_codecs.encode", write, "unicode_escape"),
    }


class Shape(NamedTuple):
    height: int
    width: int


class Explosive:
    """What somebody else's class may do when it is unpickled."""

    def __getstate__(self) -> Any:
        return {"path": "/nowhere/canary"}

    def __setstate__(self, state: Any) -> None:
        Path((state if isinstance(state, dict) else state[1])["path"]).touch()


@pytest.mark.parametrize("name", hostile(Path()))
def test_no_code_in_a_file_is_run(tmp_path, name) -> None:
    canary = tmp_path / "canary"
    written("zip", tmp_path / "honest.pt")
    for content in (
        {"state_dict": {}, "payload": hostile(canary)[name]},
        {"state_dict": {"w": hostile(canary)[name]}},
        hostile(canary)[name],
    ):
        path = zipped(tmp_path / "hostile.pt", pickled(content), tmp_path / "honest.pt")
        with pytest.raises(CheckpointError):
            params_from(path)
        assert not canary.exists()


def test_the_canary_is_one(tmp_path) -> None:
    """Python's own unpickler does run what the test before holds back."""
    for name, payload in hostile(tmp_path / "canary").items():
        if name in ("os.system", "eval", "a state", "in a key"):
            (tmp_path / "canary").unlink(missing_ok=True)
            pickle.loads(pickled(payload))
            assert (tmp_path / "canary").exists(), name


def test_weights_beside_objects_of_other_classes_are_read(tmp_path) -> None:
    beside = {
        "args": argparse.Namespace(lr=0.1, out=Path("runs")),
        "seen": defaultdict(list, a=[1]),
        "best": np.float64(0.5),
        "rows": np.arange(3),
        "model_class": Net,
        "when": datetime.datetime(2026, 1, 2),
        "shape": Shape(2, 3),
        "payload": Explosive(),
    }
    torch.save({"state_dict": {"w": torch.arange(3.0)}, **beside}, path := tmp_path / "a.pt")
    assert params_from(path)["w"].tolist() == [0, 1, 2]


def test_a_method_that_a_file_puts_on_a_tensor_is_not_called(tmp_path) -> None:
    tensor = torch.ones(2)
    for name in ("detach", "clone", "to"):
        setattr(tensor, name, OrderedDict)
    torch.save({"w": tensor}, path := tmp_path / "a.pt")
    assert vars(torch.load(path)["w"])
    found = params_from(path)["w"]
    assert (type(found), vars(found), found.tolist()) == (torch.Tensor, {}, [1, 1])


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_pickle_is_a_state_dict_or_an_error(tmp_path, data) -> None:
    """What a pickle of bytes changed at random does is to fail, with our error."""
    with zipfile.ZipFile(MMENGINE) as file:
        content = bytearray(next(file.read(name) for name in file.namelist() if name.endswith("/data.pkl")))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(2, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = params_from(zipped(tmp_path / "fuzzed.pt", bytes(content), MMENGINE))
    except CheckpointError:
        return
    assert all(type(value) is torch.Tensor for value in found.values())


def test_what_is_allowed_for_one_file_is_not_allowed_afterwards() -> None:
    before = set(map(str, torch.serialization.get_safe_globals()))
    params_from(MMENGINE)
    assert set(map(str, torch.serialization.get_safe_globals())) == before


# --- what is written ---------------------------------------------------------------------------------------------------


def test_a_file_appears_whole_or_not_at_all(tmp_path) -> None:
    foreign.write(to := tmp_path / "w.pt", {"w": torch.ones(2)}, {})
    before = to.read_bytes()
    with pytest.raises(CheckpointError, match=r"safetensors has no torch.complex128, as z is"):
        foreign.write(tmp_path / "w.safetensors", {"z": torch.ones(2, dtype=torch.complex128)}, {})
    with pytest.raises(CheckpointError, match="cannot be written: No such file or directory"):
        foreign.write(tmp_path / "nowhere" / "w.pt", {"w": torch.ones(2)}, {})
    assert [path.name for path in tmp_path.iterdir()] == ["w.pt"]
    assert to.read_bytes() == before


def test_a_part_of_a_large_tensor_takes_no_more_room_than_it_is(tmp_path) -> None:
    large = torch.zeros(100_000)
    for suffix in ("pt", "safetensors"):
        foreign.write(to := tmp_path / f"w.{suffix}", {"a": large[:2], "b": large[2:4]}, {})
        assert to.stat().st_size < 10_000


def test_safetensors_holds_tied_weights_twice_and_says_so(tmp_path) -> None:
    tensors = dict(tied().state_dict())
    foreign.write(to := tmp_path / "w.safetensors", tensors, {"step": "3"})
    assert tree.equal(safetensors.torch.load_file(to), tensors)
    with safetensors.safe_open(to, framework="pt") as file:
        metadata = file.metadata()
    assert metadata == {"step": "3", "tied": json.dumps({"1.weight": "0.weight"})}
    params = params_from(to)
    assert params["0.weight"] is params["1.weight"]
    foreign.write(to := tmp_path / "w.pt", OrderedDict(tensors), {})
    loaded = torch.load(to, weights_only=True)
    assert loaded["0.weight"].data_ptr() == loaded["1.weight"].data_ptr()


# --- what a file asks for ----------------------------------------------------------------------------------------------


class Stored:
    """A tensor of a file: how many elements its storage has, as the pickle says, and how the tensor looks at it."""

    def __init__(self, length: int, shape: tuple[int, ...], strides: tuple[int, ...], offset: int = 0, key: str = "0") -> None:
        self.length, self.shape, self.strides, self.offset, self.key = length, shape, strides, offset, key


class TensorPickler(Pickler):
    """Writes tensors as torch does, but with any numbers."""

    legacy = False

    def persistent_id(self, obj: Any) -> Any:
        if type(obj) is not tuple or obj[:1] != ("a storage",):
            return None
        return ("storage", torch.FloatStorage, obj[2], "cpu", obj[1], *([None] if self.legacy else []))

    def save(self, obj: Any, *args: Any, **options: Any) -> None:
        if isinstance(obj, Stored):
            storage = ("a storage", obj.length, obj.key)
            obj = Reduced("torch._utils._rebuild_tensor_v2", storage, obj.offset, obj.shape, obj.strides, False, OrderedDict())
        super().save(obj, *args, **options)


def stored(path: Path, content: Any, records: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    """A file as torch writes it, of these tensors and records of storages."""
    TensorPickler(buffer := io.BytesIO(), protocol=2).dump(content)
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in {"data.pkl": buffer.getvalue(), "byteorder": b"little", **records, "version": b"3\n"}.items():
            file.writestr(f"x/{name}", data)
    return path


def legacy(path: Path, content: Any, storages: dict[str, bytes]) -> Path:
    """A file as torch wrote it before 1.6."""
    with path.open("wb") as file:
        for plain in (torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION, {"little_endian": True}):
            pickle.dump(plain, file, protocol=2)
        pickler = TensorPickler(file, protocol=2)
        pickler.legacy = True
        pickler.dump(content)
        pickle.dump(list(storages), file, protocol=2)
        for data in storages.values():
            file.write((len(data) // 4).to_bytes(8, "little") + data)
    return path


FLOATS = torch.arange(8.0).numpy().tobytes()


def test_what_is_written_by_hand_is_read_as_torch_reads_it(tmp_path) -> None:
    """So that what the next tests refuse is refused for what is wrong in it."""
    content = {"w": Stored(8, (2, 3), (3, 1), 1), "same": Stored(8, (8,), (1,))}
    for path in (stored(tmp_path / "a.pt", content, {"data/0": FLOATS}), legacy(tmp_path / "b.pt", content, {"0": FLOATS})):
        expected = torch.load(path, weights_only=True)
        assert expected["w"].tolist() == [[1, 2, 3], [4, 5, 6]]
        assert tree.equal(params_from(path), expected)


@pytest.mark.parametrize(
    ("content", "records"),
    [
        ({"w": Stored(8, (8,), (1,))}, {"data/0": FLOATS[:20], "data/1": b"what lies behind it"}),
        ({"w": Stored(2, (2,), (1,)), "v": Stored(8, (8,), (1,))}, {"data/0": FLOATS[:8]}),
        ({"w": Stored(10**12, (8,), (1,))}, {"data/0": FLOATS}),
        ({"w": Stored(8, (8,), (1,), 4)}, {"data/0": FLOATS}),
        ({"w": Stored(8, (8,), (1,), -1)}, {"data/0": FLOATS}),
        ({"w": Stored(8, (2,), (2**62,))}, {"data/0": FLOATS}),
        ({"w": Stored(8, (2, 2), (-1, 1), 4)}, {"data/0": FLOATS}),
        ({"w": Stored(8, (-2,), (1,))}, {"data/0": FLOATS}),
        ({"w": Stored(-8, (8,), (1,))}, {"data/0": FLOATS}),
        ({"w": Stored(8, (8,), (1,))}, {"data/0": FLOATS, "DATA/0": FLOATS}),
        ({"w": Stored(8, (8,), (1,), key="../data/0")}, {"data/0": FLOATS}),
        ({"w": Stored(8, (8,), (1,), key="7")}, {"data/0": FLOATS}),
    ],
    ids=["short", "two lengths", "terabytes", "beyond", "before", "overflow", "backwards", "negative", "less than none", "twice", "a path",
    "missing"],
)  # fmt: skip
def test_a_tensor_that_its_record_does_not_hold_is_refused(tmp_path, content, records) -> None:
    with pytest.raises(CheckpointError):
        params_from(stored(tmp_path / "a.pt", content, records))
    with pytest.raises(CheckpointError):
        params_from(stored(tmp_path / "b.pt", content, records, zipfile.ZIP_DEFLATED))
    if set(records) == {"data/0"}:
        with pytest.raises(CheckpointError):
            params_from(legacy(tmp_path / "c.pt", content, {"0": records["data/0"]}))


@pytest.mark.parametrize(
    "view",
    [(10**12,), (10**6, 10**6), (2**40, 1)],
    ids=["expanded", "in two dimensions", "along one"],
)
def test_views_that_stand_for_more_than_their_file_are_refused(tmp_path, view) -> None:
    for zipped in (True, False):
        torch.save({"w": torch.ones(1).expand(view)}, path := tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
        with pytest.raises(CheckpointError, match=r"far more than the file has.*save copies, tensor.contiguous\(\)"):
            params_from(path)
    memory = torch.ones(5000)
    torch.save({str(begin): memory[begin:] for begin in range(4000)}, path)
    with pytest.raises(CheckpointError, match="views of one another"):
        params_from(path)
    torch.save({"row": torch.arange(4.0).expand(3, 4), "window": torch.arange(9.0).as_strided((4, 3), (2, 1))}, path)
    assert tree.equal(params_from(path), torch.load(path))  # as much as anybody means to


def test_a_file_that_unpacks_to_far_more_than_it_has_is_refused(tmp_path) -> None:
    with zipfile.ZipFile(path := tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as file:
        for name in ("x/data.pkl", *(f"x/data/{number}" for number in range(4))):
            file.writestr(name, bytes(2**22))
    with pytest.raises(DamagedError, match="unpacks to far more than the file has"):
        params_from(path)


@pytest.mark.parametrize(
    ("header", "metadata"),
    [({}, [1]), ({}, "x"), ({}, {"a": 1}), ({}, {"tied": "[1]"}), ({}, {"tied": "{"}), ({}, {"tied": '{"w": ["w"]}'}),
    ({}, {"tied": "[" * 10_000}),
     ({"v": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4]}}, {}),
     ({"v": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, {}),
     ({"v": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [4, 4]}}, {}),
     ({"v": {"dtype": "X", "shape": [0], "data_offsets": [4, 4]}}, {})],
)  # fmt: skip
def test_a_header_of_safetensors_that_makes_no_sense_is_refused(tmp_path, header, metadata) -> None:
    text = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, **header, "__metadata__": metadata}).encode()
    (path := tmp_path / "a.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"\0\0\x80?")
    with pytest.raises(DamagedError, match="no safetensors file"):
        params_from(path)


def test_tensors_come_to_a_device_and_a_dtype(tmp_path) -> None:
    safetensors.torch.save_file(state_dict := {"w": torch.arange(3.0), "n": torch.arange(3)}, path := tmp_path / "a.safetensors")
    for source in (path, state_dict):
        found = params_from(source, device="cpu", dtype=torch.bfloat16)
        assert {name: tensor.dtype for name, tensor in found.items()} == {"w": torch.bfloat16, "n": torch.int64}
    with pytest.raises(CheckpointError, match=r"[wn] cannot be brought to nowhere"):
        params_from(path, device="nowhere")
    with pytest.raises(CheckpointError, match="params_from: dtype is a floating-point one"):
        params_from(path, dtype=torch.int8)
