"""Files from strangers: a manifest or a config runs no code, imports nothing, takes little memory, and the error is ours."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import json
import random
import re
import resource
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from fnrun.checkpoint import CheckpointError, Checkpoints, DamagedError, load_from, store
from fnrun.cli import commands as command
from fnrun.core import tree
from fnrun.core.position import Frame, Position
from fnrun.core.state import TrainState
from fnrun.runs.run import Run
from fnrun.runs.writer import RunError
from tests.torture.flips import sign, write

FUZZ = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}


# --- what must not happen ----------------------------------------------------------------------------------------------

FORBIDDEN = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "subprocess.",
    "socket.connect",
    "socket.bind",
    "socket.getaddrinfo",
    "shutil.",
    "os.remove",
    "os.rename",
    "os.rmdir",
)
watching: list[str] | None = None


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    if watching is None:
        return
    if event.startswith(FORBIDDEN):
        watching.append(f"{event}{arguments}")
    elif event == "open" and ("passwd" in str(arguments[0]) or (isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"))):
        watching.append(f"open{arguments}")


sys.addaudithook(watch)


class Watched:
    """Within it no code of a file's choice runs: nothing is started, connected, written or imported, but for modules of fnrun."""

    def __enter__(self) -> None:
        global watching
        watching, self.loaded = [], set(sys.modules)

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        global watching
        seen, watching = watching, None
        assert seen == [], error
        assert [name for name in set(sys.modules) - self.loaded if not name.startswith("fnrun.")] == []


@pytest.fixture(autouse=True)
def little_memory() -> Iterator[None]:
    """No more than 4 GB can be asked for: an error that says so shows what was asked for, whether or not it would have been touched."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    virtual = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (virtual + 4 * 2**30, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def answer(ask: Callable[[], Any], ours: type[Exception]) -> str | None:
    """The text of the error of ours with which a question ends, if it does. Any other error passes."""
    try:
        with Watched():
            ask()
    except ours as error:
        causes: list[BaseException] = [error]
        while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
            causes.append(cause)
        if any(isinstance(cause, MemoryError) or "alloc" in str(cause) for cause in causes):
            pytest.fail(f"memory was asked for: {causes}")
        return str(error)
    return None


# --- manifests ---------------------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    first: Any
    second: Any


@tree.struct
class Box:
    inside: Any
    label: Any = tree.static(default="")


def state() -> TrainState:
    shared = torch.arange(3.0)
    return TrainState.create(torch.nn.Module(), seed=1).replace(
        params={"0.weight": torch.ones(2, 3).t(), "0.bias": torch.zeros(2, dtype=torch.bfloat16), "large": torch.zeros(70_000)},
        memory={
            "pair": Pair(shared, [shared, np.arange(4), np.array("text")]),
            "box": Box({"a": b"b"}, (1, "m", 2.5)),
            "rest": (None, True, -0.0, float("nan"), 2**80, 1 + 2j, "\ud800", OrderedDict(a=1), defaultdict(list, b=[]), deque([1], 4)),
        },
        position=Position((Frame("repeat", ticks=1, totals={"loss": (torch.tensor(1.0), 3)}),), ticks=7),
        step=5,
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoints, Path]:
    checkpoints = Checkpoints(tmp_path_factory.mktemp("saved"), config={"lr": 0.1, "nan": float("nan")})
    checkpoints.save(state(), {"loss": 0.5, "nan": float("nan")}, monitor="loss")
    checkpoints.restore()
    commanded("show", checkpoints)  # what it needs is imported
    commanded("diff", checkpoints, str(checkpoints.directory / checkpoints.find().name))
    return checkpoints, checkpoints.directory / checkpoints.find().name


CLASSES = [
    "os:system",
    "subprocess:Popen",
    "builtins:eval",
    "builtins:tuple",
    "torch:Tensor",
    "antigravity:x",
    "fnrun.nowhere:x",
    "fnrun.__main__:x",
    ":",
    "a.b",
]
KINDS = [
    f"{family} {name}"
    for family in ("struct", "namedtuple")
    for name in (*CLASSES, f"{__name__}:Pair", f"{__name__}:Box", "fnrun.core.state:Frame", "fnrun.Frame")
]
NUMBERS = [-1, 0, 1, 2, 3, 10**6, 10**15, 2**31, 2**63 - 1, 2**63, -(2**63), 10**30, 1.5, -0.0, 1e308]
PATHS = [
    "../../etc/passwd",
    "/etc/passwd",
    "..",
    "",
    ".",
    "a/../../b",
    "\0",
    "é" * 300,
    "arrays",
    "manifest.json",
    "arrays/state/00000/0.0",
    "/dev/zero",
    "x\n",
]
ANYTHING = [
    *(None, True, "", "x", [], {}, [[]], [0], {"int": "z"}, {"int": "0x" + "f" * 10_000}, {"tuple": [{"tuple": []}]}, {"float": "00"},
    {"str": "ff"}),
    *NUMBERS,
    *PATHS,
    *( "@deep lists@", "@deep nodes@", "@deeper nodes@", "@deep constants@"),
]  # fmt: skip
SHAPES = [
    [],
    [0],
    [1],
    [6],
    [3, 2],
    [2, 3],
    [0, 10**15],
    [10**15],
    [10**15, 0],
    [2**62, 4],
    [-1],
    [-3, -2],
    [10**5, 10**5, 10**5],
    [0, 0],
    [1, 1],
    [1, 10**9],
    [10**9, 1],
    [10**12, 10**12],
]
#: What is worth trying in a place, by its key.
LIKELY: dict[Any, list[Any]] = {
    "kind": [*KINDS, "list", "tuple", "dict", "deque", "OrderedDict", "defaultdict", "tensor", "ndarray", "int", "float", "str", "object",
        ""],
    "shape": SHAPES,
    "strides": SHAPES,
    "dtype": ["float32", "float64", "bfloat16", "bool", "int64", "complex128", "uint8", "<f4", "|O", "<U1000000", "|V8", "M8[s]",
        "<f8,<i4", "bits8", "quint8", ""],
    "device": ["meta", "cuda:7", "xla", "nowhere", "cpu:3"],
    "digest": ["", "md5:" + "0" * 64, "blake3", "blake3:" + "0" * 64, "sha256:" + "0" * 63, ":"],
    "path": PATHS,
    "static": [[["label", 1]], [["__class__", "x"]], [["__dict__", {"tuple": []}]], [10**18], [-1], ["list"], ["eval"], [[]],
        [["inside", 1], ["label", 1]]],
    "keys": [["__class__", "second"], ["inside", "inside"], [], [None, {"tuple": []}], ["first", "second", "third"]],
    "format": [0, 1, 2, 3, -1, 10**9],
    "metrics": [{"loss": "abc"}, {"loss": "nan"}, {"loss": "-inf"}, {"loss": ""}, {}],
    "monitors": [{"loss": "max"}, {"x": "min"}, {"loss": "lowest"}],
}  # fmt: skip
DEEP = {
    "@deep lists@": "[" * 3000 + "]" * 3000,
    "@deep nodes@": '{"kind":"list","children":[' * 400 + "]}" * 400,
    "@deeper nodes@": '{"kind":"list","children":[' * 3000 + "]}" * 3000,
    "@deep constants@": '{"tuple":[' * 3000 + "1" + "]}" * 3000,
}


def places(value: Any, key: Any = None) -> Iterator[tuple[Any, Any, Any]]:
    """Every place in a document: its container, its key there, and the key that says what it is."""
    for inner in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        meaning = inner if isinstance(value, dict) else key
        yield value, inner, meaning
        yield from places(value[inner], meaning)


def mutate(manifest: Any, chance: random.Random) -> None:
    found = list(places(manifest))
    wanted = chance.choice(
        sorted({str(meaning) for _, _, meaning in found})
    )  # first what, then where: there are many leaves and one format
    container, key, meaning = chance.choice([place for place in found if str(place[2]) == wanted])
    match chance.choice(["likely", "likely", "likely", "anything", "delete", "another", "name", "again"]):
        case "likely":
            container[key] = copy.deepcopy(chance.choice(LIKELY.get(meaning, ANYTHING)))
        case "anything":
            container[key] = copy.deepcopy(chance.choice(ANYTHING))
        case "delete":
            del container[key]
        case "another":
            other, its, _ = chance.choice(found)
            container[key] = copy.deepcopy(other[its])
        case "name" if isinstance(container, dict):
            container[chance.choice(PATHS)] = container.pop(key)
        case "again" if isinstance(container, list):
            container.append(copy.deepcopy(container[key]))
        case _:
            pass


def test_a_forged_manifest_is_an_error_or_a_state(saved: tuple[Checkpoints, Path]) -> None:
    checkpoints, folder = saved
    original = {name: (folder / name).read_bytes() for name in (store.MANIFEST, store.DIGEST)}
    answers: Counter[bool] = Counter()

    @settings(max_examples=1200, **FUZZ)
    @given(chance=st.randoms(use_true_random=False))
    def forged(chance: random.Random) -> None:
        manifest = json.loads(original[store.MANIFEST])
        for _ in range(chance.choice([1, 1, 2, 3])):
            mutate(manifest, chance)
        text = json.dumps(manifest)
        for name, deep in DEEP.items():
            text = text.replace(json.dumps(name), deep)
        sign(folder, text.encode())
        for ask in chance.choice(ASKED):
            message = answer(lambda ask=ask: ask(checkpoints), CheckpointError)
            answers[message is None] += 1
            assert (
                message is None
                or str(folder) in message
                or re.match(r"(the state|[^:]*): .* (is not loaded|was saved with the fields)", message, re.DOTALL)
            ), message

    forged()
    write({folder / name: content for name, content in original.items()})
    assert tree.equal(checkpoints.restore(), state())
    assert min(answers[True], answers[False]) > 300


@pytest.mark.parametrize("digest", ["md5:" + "0" * 64, ""])
@pytest.mark.parametrize("of", ["piece", "file"])
def test_a_digest_of_an_algorithm_that_nobody_knows_is_damage(saved: tuple[Checkpoints, Path], of: str, digest: str) -> None:
    checkpoints, folder = saved
    original = {name: (folder / name).read_bytes() for name in (store.MANIFEST, store.DIGEST)}
    manifest = json.loads(original[store.MANIFEST])
    with_pieces = next(leaf for leaf in manifest["leaves"] if leaf.get("pieces"))["pieces"]
    with_digest = [file for file in manifest["files"].values() if file.get("digest")]
    (with_pieces if of == "piece" else with_digest)[0]["digest"] = digest
    sign(folder, json.dumps(manifest).encode())
    try:
        for ask in (checkpoints.restore, checkpoints.read, checkpoints.check, checkpoints.manifest):
            with pytest.raises(DamagedError, match=r"manifest\.json is not a manifest"):
                ask()
    finally:
        write({folder / name: content for name, content in original.items()})


@pytest.mark.parametrize("name", ["../elsewhere", "/etc/passwd", "arrays//state/00000/0", "arrays/\0"])
def test_a_file_that_is_none_of_the_checkpoint_is_damage(saved: tuple[Checkpoints, Path], name: str) -> None:
    checkpoints, folder = saved
    original = {file: (folder / file).read_bytes() for file in (store.MANIFEST, store.DIGEST)}
    manifest = json.loads(original[store.MANIFEST])
    old = next(leaf for leaf in manifest["leaves"] if leaf.get("pieces"))["pieces"][0]["file"]
    for piece in [piece for leaf in manifest["leaves"] for piece in leaf.get("pieces", [])]:
        piece["file"] = name if piece["file"] == old else piece["file"]
    manifest["files"][name] = manifest["files"].pop(old)
    sign(folder, json.dumps(manifest).encode())
    try:
        with pytest.raises(DamagedError, match="names no file of a checkpoint"):
            checkpoints.restore()
    finally:
        write({folder / file: content for file, content in original.items()})


@pytest.mark.parametrize("offset", [10**9, 10**30])
def test_a_piece_beyond_the_end_of_its_file_is_damage(saved: tuple[Checkpoints, Path], offset: int) -> None:
    checkpoints, folder = saved
    original = {file: (folder / file).read_bytes() for file in (store.MANIFEST, store.DIGEST)}
    manifest = json.loads(original[store.MANIFEST])
    next(leaf for leaf in manifest["leaves"] if leaf.get("pieces"))["pieces"][0]["offset"] = offset
    sign(folder, json.dumps(manifest).encode())
    try:
        for ask in (checkpoints.restore, checkpoints.check):
            with pytest.raises(DamagedError):
                ask()
    finally:
        write({folder / file: content for file, content in original.items()})


ASKED: list[list[Callable[[Checkpoints], Any]]] = [
    [lambda checkpoints: checkpoints.restore()],
    [lambda checkpoints: checkpoints.restore(like=state()), lambda checkpoints: checkpoints.best()],
    [lambda checkpoints: checkpoints.read(), lambda checkpoints: checkpoints.superfluous(1)],
    [lambda checkpoints: commanded("show", checkpoints), lambda checkpoints: commanded("show", checkpoints, "--json")],
    [lambda checkpoints: commanded("diff", checkpoints, str(checkpoints.directory / checkpoints.find().name))],
    [lambda checkpoints: load_from(checkpoints, state())],
]


def commanded(name: str, checkpoints: Checkpoints, *arguments: str) -> None:
    """What a command says; an error of ours is what it says of one."""
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        code = command.main([name, str(checkpoints.directory / checkpoints.find().name), *arguments])
    if code == 2:
        raise CheckpointError(errors.getvalue())


# --- configs -----------------------------------------------------------------------------------------------------------


class SGD(msgspec.Struct, frozen=True, tag=True):
    lr: float = 0.1


class Adam(msgspec.Struct, frozen=True, tag=True):
    lr: float = 0.1
    betas: tuple[float, float] = (0.9, 0.999)


@dataclasses.dataclass(frozen=True)
class Augmentation:
    crop: int | None = None
    names: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Config:
    epochs: int = 5
    schedule: Literal["cosine", "constant"] = "cosine"
    optimizer: SGD | Adam = dataclasses.field(default_factory=SGD)
    augmentation: Augmentation = Augmentation()
    tags: dict[str, Any] = dataclasses.field(default_factory=dict)


LINES = [
    "experiment: experiments.digits", "experiment: [1]", "config:", "config: {}", "config: {epochs: 3}", "config: {epochs: 1e400}",
    "  epochs: 3", "  epochs: '3'",
    "  epochs: 99999999999999999999999", "  epochs: " + "9" * 5000, "  schedule: linear", "  optimizer: {type: SGD, lr: 1}",
    "  optimizer: {type: Adam, betas: [1]}",
    "  optimizer: {type: [], lr: .nan}", "  augmentation: {crop: -1, names: [a]}", "  augmentation: {nowhere: 1}",
    "  tags: {a: !!binary AAAA}", "  tags: {2: 3}",
    "  tags: !!python/object/apply:os.system ['touch canary']", "  tags: !!python/name:os.system", "  tags: !!python/module:antigravity",
    "  tags: !!set {a, b}",
    "  tags: !!omap [a: 1]", "  tags: !!timestamp x", "  tags: {a: 2001-99-99}", "  tags: {a: 2001-01-01}", "  epochs: !!int ''",
    "  epochs: !!bool x", "  epochs: !!float x",
    "  tags: &a {x: *a}", "  tags: {<<: 1}", "  tags: {<<: [*a]}", "  tags: {? [a] : b}", "history: []",
    "history: [{changed: {epochs: [5, 8]}, step: 1, ticks: 2}]",
    "history: [{forked: 1}]", "history: {}", "\t", "---", "...", "%YAML 3.0", "# é", "&a", "*a", "!", "|", "? ", "\ud7ff", "\x85",
    "config: &b " + "[" * 400 + "]" * 400, "  tags: " + "{a: " * 400 + "1" + "}" * 400,
]  # fmt: skip
LAUGHS = "experiment: e\nconfig:\n  tags:\n    a0: &a0 [ha, ha, ha, ha, ha, ha, ha, ha, ha]\n" + "".join(
    f"    a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30)
)
TEXTS = st.one_of(
    st.lists(st.sampled_from(LINES), min_size=1, max_size=6).map("\n".join),
    st.lists(st.sampled_from(LINES), max_size=4).map(lambda lines: "\n".join(["experiment: e", "config:", *lines])),
    st.text(max_size=40),
    st.just(LAUGHS),
).map(lambda text: text.encode("utf-8", "surrogatepass"))
CONFIGS = st.one_of(TEXTS, TEXTS.map(lambda text: text.decode().encode("utf-16")), st.binary(max_size=40))


def test_a_config_from_a_stranger_is_an_error_or_a_config(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    answers: Counter[bool] = Counter()

    @settings(max_examples=800, **FUZZ)
    @given(content=CONFIGS, config_type=st.sampled_from([None, Config, Config]))
    def read(content: bytes, config_type: Any) -> None:
        file.write_bytes(content)
        message = answer(lambda: Run.open(tmp_path, config_type), RunError)
        answers[message is None] += 1
        assert message is None or (str(file) in message and "\n" not in message), message

    read()
    assert min(answers[True], answers[False]) > 20
