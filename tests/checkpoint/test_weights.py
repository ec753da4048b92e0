"""Weights go from files and checkpoints into fresh states, and out into files, bit for bit and under their own names."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import nn

import fnrun
from fnrun import data, hooks, optim
from fnrun.checkpoint import CheckpointError, Checkpoints, export, load_from, params_from
from fnrun.core import tree
from tests.checkpoint.test_checkpoints import tensors
from tests.checkpoint.test_foreign import MMENGINE, Net

ROWS = torch.linspace(-1, 1, 48).view(16, 3)
OPTIMIZER = optim.adamw(0.05)


def loss_fn(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return model(batch).square().mean()


def outputs(state: Any, model: nn.Module, weights: Any = "params") -> torch.Tensor:
    """What the evaluation step of fnrun computes."""
    return fnrun.make_predict_step(model, lambda model, batch: model(batch), weights=weights)(state, ROWS)


def trained(model: nn.Module | None = None, optimizer: Any = OPTIMIZER, buffers: Any = "average", epochs: int = 2) -> Any:
    model = Net() if model is None else model
    hook = hooks.ema(0.5, buffers=buffers)
    loop = fnrun.epoch_loop(fnrun.make_train_step(model, loss_fn, optimizer), hooks=[hook])
    state = fnrun.TrainState.create(model, optimizer, seed=0)
    for _ in range(epochs):
        state, _ = loop(state, data.arrays(ROWS, 4))
    return state


def fresh(model: nn.Module | None = None, optimizer: Any = OPTIMIZER, seed: int = 7) -> Any:
    torch.manual_seed(seed)
    return fnrun.TrainState.create(Net() if model is None else model, optimizer, seed=seed)


class Heads(nn.Module):
    """`Net` with a larger head under another name, and its body under another name."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.ModuleDict({"body": nn.Linear(3, 4), "norm": nn.BatchNorm1d(4)})
        self.head = nn.Linear(4, 9)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone["norm"](self.backbone["body"](x)))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(3, 3, bias=False)
        self.decode = nn.Linear(3, 3, bias=False)
        self.decode.weight = self.encode.weight
        self.register_buffer("scratch", torch.zeros(2), persistent=False)
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decode(self.encode(x)) * self.scale


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """A run with two checkpoints, and their states."""
    path = tmp_path_factory.mktemp("runs") / "try1"
    first, second = trained(epochs=1), trained(epochs=2)
    with Checkpoints(path / "checkpoints") as checkpoints:
        checkpoints.save(first, {"loss": 0.1}, monitor="loss")
        checkpoints.save(second, {"loss": 0.2}, monitor="loss")
    return path, first, second


# --- into a fresh state ------------------------------------------------------------------------------------------------


def test_fine_tuning_begins_with_the_weights_of_a_run_and_nothing_else_of_it(run) -> None:
    path, first, second = run
    like = fresh()
    entry = Checkpoints(path / "checkpoints").entries()[0]
    for source, options, expected in [
        (path, {}, second),
        (str(path), {"step": 4}, first),
        (path / "checkpoints", {"step": "best"}, first),
        (Checkpoints(path / "checkpoints"), {"step": entry}, first),
        (path / "checkpoints" / entry.name, {}, first),
    ]:
        state = load_from(source, like, **options)
        assert tree.equal((state.params, state.buffers), (expected.params, expected.buffers))
        assert tree.equal(state.replace(params=like.params, buffers=like.buffers), like)
    assert second.step == 8


@pytest.mark.parametrize("buffers", ["average", "copy"])
def test_averaged_weights_are_taken_with_their_own_buffers_where_they_have_some(tmp_path, buffers) -> None:
    state = trained(buffers=buffers)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
    loaded = load_from(tmp_path, fresh(), weights="ema")
    assert torch.equal(outputs(loaded, Net()), outputs(state, Net(), weights="ema"))
    assert not torch.equal(outputs(loaded, Net()), outputs(state, Net()))
    with pytest.raises(CheckpointError, match=r"weights='swa': no hook of this name remembers 'params'; there are \['ema'\]"):
        load_from(tmp_path, fresh(), weights="swa")


def test_a_state_dict_fills_parameters_and_buffers(tmp_path) -> None:
    for source in (MMENGINE, params_from(MMENGINE)):
        state = load_from(source, fresh())
        assert set(state.params) | set(state.buffers) == set(params_from(MMENGINE))
        model = Net().eval()
        model.load_state_dict(params_from(MMENGINE))
        assert torch.equal(outputs(state, Net()), model(ROWS))


def test_what_is_trained_later_does_not_write_into_the_source() -> None:
    model = Net()
    state = load_from(model.state_dict(), fresh())
    with torch.no_grad():
        model.body.weight.zero_()
    assert state.params["body.weight"].any()
    assert not any(value.requires_grad for value in state.params.values())


def test_what_does_not_fit_is_a_table_and_nothing_is_cast() -> None:
    state_dict = params_from(MMENGINE)
    state_dict["body.weight"] = state_dict["body.weight"].to(torch.float16)
    state_dict["head.bias"] = torch.ones(5)
    state_dict["hand.weight"] = state_dict.pop("head.weight")
    with pytest.raises(CheckpointError) as caught:
        load_from(state_dict, fresh())
    assert sorted(" ".join(line.split()) for line in str(caught.value).splitlines()[2:]) == [
        "params/body.weight tensor float16 (4, 3) tensor float32 (4, 3)",
        "params/hand.weight tensor float32 (2, 4) (unexpected)",
        "params/head.bias tensor float32 (5,) tensor float32 (2,)",
        "params/head.weight (missing) tensor float32 (2, 4) (saved under a near name: params/hand.weight)",
    ]


def test_a_head_of_another_size_is_left_alone(run, tmp_path) -> None:
    state_dict = run[2].params | run[2].buffers
    rename = {r"/(body|norm)\.": r"/backbone.\1."}
    for source in (run[0], state_dict):
        like = fresh(Heads())
        with pytest.raises(CheckpointError, match=r"params/head.weight +tensor float32 \(2, 4\) +tensor float32 \(9, 4\)"):
            load_from(source, like, rename=rename)
        state = load_from(source, like, rename=rename, select=["params/**", "buffers/**", "!params/head.*"])
        assert tree.equal(load_from(source, like, rename=rename, select="!params/head.*"), state)
        assert state.params["head.weight"] is like.params["head.weight"]
        assert tree.equal(state.params["backbone.body.weight"], run[2].params["body.weight"])
        assert tree.equal(state.buffers["backbone.norm.running_mean"], run[2].buffers["norm.running_mean"])


def test_a_head_that_the_source_does_not_have_is_left_alone(run) -> None:
    body = {name: value for name, value in params_from(MMENGINE).items() if not name.startswith("head")}
    like = fresh()
    state = load_from(body, like, select="!params/head.*")
    assert state.params["head.weight"] is like.params["head.weight"]
    assert tree.equal(state.params["body.weight"], body["body.weight"])
    with pytest.raises(CheckpointError, match=r"nothing that was saved matches 'params/neck\.\*'"):
        load_from(body, like, select="!params/neck.*")


@pytest.mark.parametrize(
    "rename",
    [
        {r"module\.": ""},
        {r"^(params|buffers)/module\.": r"\1/"},
        {r"^params/module\.": "params/", r"^buffers/module\.": "buffers/"},
        lambda path: path.replace("module.", ""),
    ],
    ids=["anywhere", "both", "each", "function"],
)
def test_a_state_dict_is_renamed_in_parameters_and_buffers(rename) -> None:
    state_dict = {f"module.{name}": value for name, value in params_from(MMENGINE).items()}
    with pytest.raises(CheckpointError, match=r"params/module.body.weight +tensor float32 \(4, 3\) +\(unexpected\)"):
        load_from(state_dict, fresh())
    assert tree.equal(load_from(state_dict, fresh(), rename=rename), load_from(MMENGINE, fresh()))


@pytest.mark.parametrize(
    ("rename", "words"),
    [
        ({"no such": "name"}, "it changes no path; there are params/body.weight"),
        ({r"body|head": "body"}, "params/body.weight and params/head.weight would both be params/body.weight"),
        (lambda path: path.partition("/")[2], "params/body.weight cannot be 'body.weight': a path is params/NAME or buffers/NAME"),
    ],
)
def test_names_that_lead_nowhere_are_refused(run, rename, words) -> None:
    for source in (MMENGINE, run[0]):
        with pytest.raises(CheckpointError, match=words):
            load_from(source, fresh(), rename=rename)


def test_without_strictness_what_is_missing_or_unexpected_is_left_out_and_said(caplog) -> None:
    state_dict = params_from(MMENGINE)
    state_dict["neck.weight"] = state_dict.pop("head.weight")
    like = fresh()
    with caplog.at_level(logging.WARNING, "fnrun"):
        state = load_from(state_dict, like, strict=False)
    assert state.params["head.weight"] is like.params["head.weight"]
    assert tree.equal(state.params["head.bias"], state_dict["head.bias"])
    assert [record.getMessage() for record in caplog.records if record.name == "fnrun"] == [
        "the state dict: not in the checkpoint, left as they are: params/head.weight",
        "the state dict: in the checkpoint and left out: params/neck.weight",
    ]
    with pytest.raises(CheckpointError, match=r"params/head.bias +tensor float32 \(5,\)"):
        load_from(state_dict | {"head.bias": torch.ones(5)}, like, strict=False)
    with pytest.raises(CheckpointError, match=r"params/head.bias +\(missing\) .* \(saved under a near name: params/module.head.bias\)"):
        load_from({f"module.{name}": value for name, value in state_dict.items()}, like, strict=False)  # nothing fits


def test_another_name_of_a_tied_weight_is_not_unexpected(tmp_path) -> None:
    model = Tied()
    torch.save(model.state_dict(), path := tmp_path / "tied.pt")
    for source in (path, model.state_dict()):
        assert set(source if isinstance(source, dict) else torch.load(source)) == {"encode.weight", "decode.weight", "scale"}
        state = load_from(source, fresh(Tied()), select="!buffers/scratch")
        assert tree.equal(state.params, {"encode.weight": model.encode.weight.detach()})
    apart = {**model.state_dict(), "decode.weight": model.decode.weight.detach().clone()}
    with pytest.raises(CheckpointError, match=r"params/decode.weight +tensor float32 \(3, 3\) +\(unexpected\)"):
        load_from(apart, fresh(Tied()), select="!buffers/scratch")


def test_buffers_that_are_in_no_state_dict_are_told() -> None:
    model = Tied()
    with pytest.raises(CheckpointError, match=r"buffers/scratch +\(missing\) (.*\n)*.*select='!buffers/NAME'"):
        load_from(model.state_dict(), fresh(Tied()))
    like = fresh(Tied())
    assert load_from(model.state_dict(), like, select="!buffers/scratch").buffers["scratch"] is like.buffers["scratch"]


def test_tensors_come_in_the_layout_of_the_fresh_state() -> None:
    model = nn.Conv2d(3, 4, 3)
    like = fresh(nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last))
    state = load_from(model.state_dict(), like)
    assert tree.equal(state.params, dict(model.state_dict()))
    assert state.params["weight"].is_contiguous(memory_format=torch.channels_last)


OPTIMIZERS = {
    "schedule-free": optim.schedule_free_adamw(0.05),
    "lookahead": optim.lookahead(optim.sgd(0.1)),
    "chain": optim.chain(optim.clip_by_global_norm(1.0), optim.lookahead(optim.schedule_free_adamw(0.05))),
    "partition": optim.partition(
        lambda path, p: "bias" if p.ndim < 2 else "weight", {name: optim.schedule_free_adamw(0.05) for name in ("weight", "bias")}
    ),
    "adamw": optim.adamw(0.1),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_an_optimizer_that_remembers_the_parameters_remembers_the_new_ones(optimizer) -> None:
    frozen, zero = Net(), Net()
    frozen.body.requires_grad_(False)
    for module in zero.children():
        nn.init.zeros_(module.bias)  # and so do all moments begin
        if isinstance(module, nn.BatchNorm1d):
            nn.init.zeros_(module.weight)
    for model, left_out in ((Net(), "-"), (frozen, "body"), (zero, "-")):
        state = load_from(MMENGINE, fresh(model, optimizer=optimizer))
        trained = {name: p for name, p in state.params.items() if not name.startswith(left_out)}
        assert tree.equal(state.opt_state, optimizer.init(trained))


def test_moments_stay_zero_where_all_parameters_were() -> None:
    model = nn.Linear(3, 2)
    for p in model.parameters():
        nn.init.zeros_(p)
    state = load_from(nn.Linear(3, 2).state_dict(), fresh(model))
    assert tree.equal(state.opt_state, OPTIMIZER.init(state.params))


def test_weights_and_step_are_for_checkpoints() -> None:
    for options in ({"weights": "ema"}, {"step": 3}):
        with pytest.raises(CheckpointError, match="a state dict has one set of weights and no step"):
            load_from(MMENGINE, fresh(), **options)


def test_one_checkpoint_has_one_step(run, tmp_path) -> None:
    one = next((run[0] / "checkpoints").iterdir())
    with pytest.raises(CheckpointError, match="is one checkpoint: step chooses among several"):
        load_from(one, fresh(), step=4)
    with pytest.raises(CheckpointError, match="there is no checkpoint here"):
        load_from(tmp_path, fresh())
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        load_from(tmp_path / "nowhere", fresh())


# --- out into a file ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["pt", "pth", "safetensors"])
@pytest.mark.parametrize("weights", ["params", "ema"])
def test_a_plain_module_computes_with_the_file_what_the_evaluation_step_does(run, tmp_path, suffix, weights) -> None:
    path, _, state = run
    for number, source in enumerate([state, path, path / "checkpoints", Checkpoints(path / "checkpoints")]):
        to = export(source, tmp_path / f"{number}.{suffix}", weights=weights, model=Net())
        loaded = safetensors.torch.load_file(to) if suffix == "safetensors" else torch.load(to, weights_only=True)
        model = Net().eval()
        model.load_state_dict(loaded, strict=True)
        assert torch.equal(model(ROWS), outputs(state, Net(), weights))
        assert tree.equal(params_from(to), dict(loaded))


def test_the_header_says_where_the_weights_are_from(run, tmp_path) -> None:
    to = export(run[0], tmp_path / "w.safetensors", weights="ema", step=4)
    with safetensors.safe_open(to, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "fnrun": fnrun.__version__, "step": "4", "weights": "ema"}
    assert tree.equal(params_from(to), run[1].memory["ema"]["params"] | run[1].memory["ema"]["buffers"])


def test_a_checkpoint_is_exported_where_nobody_knows_its_classes(tmp_path) -> None:
    code = """
import sys, torch, fnrun
from fnrun.checkpoint import Checkpoints
@fnrun.struct
class Mine(fnrun.TrainState):
    extra: object = None
with Checkpoints(sys.argv[1]) as checkpoints:
    checkpoints.save(Mine.create(torch.nn.Linear(2, 1), extra=torch.ones(1)))
"""
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True, timeout=120)
    to = export(tmp_path, tmp_path / "w.pt")
    nn.Linear(2, 1).load_state_dict(torch.load(to, weights_only=True))
    with pytest.raises(CheckpointError, match="is not loaded: import the module that defines it"):
        export(tmp_path, tmp_path / "v.pt", weights=lambda state: state.params)


def test_weights_that_are_a_function_of_the_state_are_exported_and_loaded(tmp_path) -> None:
    optimizer = optim.schedule_free_adamw(0.05)
    state = trained(optimizer=optimizer)

    def average(state: Any) -> Any:
        return optimizer.eval_params(state.opt_state, state.params)

    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
    for number, source in enumerate([state, tmp_path]):
        model = Net().eval()
        model.load_state_dict(torch.load(export(source, tmp_path / f"{number}.pt", weights=average, model=model), weights_only=True))
        assert torch.equal(model(ROWS), outputs(state, Net(), average))
    assert torch.equal(outputs(load_from(tmp_path, fresh(), weights=average), Net()), outputs(state, Net(), average))


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_tied_weights_have_all_names_of_the_module_and_buffers_that_are_not_persistent_have_none(tmp_path, suffix) -> None:
    state = trained(Tied(), buffers="copy")
    model = Tied()
    to = export(state, tmp_path / f"w.{suffix}", model=model)
    assert set(params_from(to)) == {"encode.weight", "decode.weight", "scale"}
    model.load_state_dict(safetensors.torch.load_file(to) if suffix == "safetensors" else torch.load(to), strict=True)
    assert torch.equal(model.eval()(ROWS), outputs(state, Tied()))
    assert tree.equal(load_from(to, fresh(Tied()), select="!buffers/scratch").params, state.params)
    assert set(params_from(export(state, tmp_path / f"plain.{suffix}"))) == {"encode.weight", "scratch", "scale"}


def test_floating_point_is_cast_when_asked_and_only_then(tmp_path) -> None:
    state = trained()
    plain = params_from(export(state, tmp_path / "a.safetensors"))
    assert {value.dtype for value in plain.values()} == {torch.float32, torch.int64}
    cast = params_from(export(state, tmp_path / "b.safetensors", dtype=torch.bfloat16))
    assert tree.equal(cast, {name: value.bfloat16() if value.is_floating_point() else value for name, value in plain.items()})
    tied = params_from(export(trained(Tied(), buffers="copy"), tmp_path / "c.pt", dtype=torch.float16, model=Tied()))
    assert tied["encode.weight"] is tied["decode.weight"]


def test_the_weights_of_another_model_are_not_given_its_names(tmp_path) -> None:
    with pytest.raises(CheckpointError, match=r"not the weights of the Heads: backbone.body.bias is missing, .*body.bias is unexpected"):
        export(trained(), tmp_path / "w.pt", model=Heads())
    with pytest.raises(CheckpointError, match=r"not the weights of the Linear: weight is \(1, 2\)"):
        export(fresh(nn.Linear(2, 1)), tmp_path / "w.pt", model=nn.Linear(3, 1))
    extra = nn.Linear(2, 1)
    type(extra).get_extra_state, before = lambda self: 1, type(extra).get_extra_state
    try:
        with pytest.raises(CheckpointError, match="entries that are none of its tensors: _extra_state"):
            export(fresh(nn.Linear(2, 1)), tmp_path / "w.pt", model=extra)
    finally:
        type(extra).get_extra_state = before
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_exported_is_said_before_anything_is_read(run, tmp_path) -> None:
    for name in ("w.onnx", "w"):
        with pytest.raises(CheckpointError, match=r"weights are written as \.safetensors, \.pt, \.pth"):
            export(tmp_path / "nowhere", tmp_path / name)
    (tmp_path / "w.pt").write_bytes(b"mine")
    with pytest.raises(CheckpointError, match="there is no directory"):
        export(run[0], tmp_path / "no" / "w.pt")
    with pytest.raises(CheckpointError, match=r"w\.pt is there already; overwrite=True"):
        export(run[0], tmp_path / "w.pt")
    assert (tmp_path / "w.pt").read_bytes() == b"mine"
    assert params_from(export(run[0], tmp_path / "w.pt", overwrite=True))
    with pytest.raises(CheckpointError, match=r"nowhere is no run and no checkpoint"):
        export(tmp_path / "nowhere", tmp_path / "v.pt")
    with pytest.raises(CheckpointError, match="this is one state"):
        export(run[1], tmp_path / "v.pt", step=3)
    with pytest.raises(CheckpointError, match="no hook of this name is remembered"):
        export(fresh(), tmp_path / "v.pt", weights="ema")


# --- there and back ----------------------------------------------------------------------------------------------------

NAMES = st.one_of(
    st.text(st.characters(codec="utf-8"), max_size=6), st.sampled_from(["a/b", "~0", "a.b", "state_dict", "model", "tied", "0"])
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.dictionaries(NAMES, tensors(), min_size=1, max_size=4), suffix=st.sampled_from(["pt", "safetensors"]), data=st.data())
def test_what_is_exported_loads_bit_for_bit(tmp_path, values, suffix, data) -> None:
    names = data.draw(st.sets(st.sampled_from(sorted(values))))
    state = fnrun.TrainState(
        params={name: value for name, value in values.items() if name not in names},
        buffers={name: value for name, value in values.items() if name in names},
        opt_state=None,
        rng=fnrun.Key(0),
    )
    like = state.replace(
        params={name: torch.zeros_like(value) for name, value in state.params.items()},
        buffers={name: torch.zeros_like(value) for name, value in state.buffers.items()},
    )
    if suffix == "safetensors" and any(value.dtype == torch.complex128 for value in values.values()):
        with pytest.raises(CheckpointError, match=r"safetensors has no torch\.complex128"):
            export(state, tmp_path / "w.safetensors", overwrite=True)
        return
    to = export(state, tmp_path / f"w.{suffix}", overwrite=True)
    assert tree.equal(load_from(to, like), state)


def test_a_state_is_a_source_too_and_what_is_none_is_told() -> None:
    trained = fnrun.TrainState.create(nn.Linear(3, 2), seed=1)
    fresh = fnrun.TrainState.create(nn.Linear(3, 2), seed=2)
    assert tree.equal(load_from(trained, fresh).params, trained.params)
    for source, like, message in (
        (nn.Linear(3, 2), fresh, "a Linear holds no weights that are known"),
        (trained, nn.Linear(3, 2), "`like` is a state with params and buffers, not a Linear"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_from(source, like)  # pyright: ignore[reportArgumentType]
    with pytest.raises(CheckpointError, match="weights='ema': no hook of this name"):
        load_from(trained, fresh, weights="ema")


def test_weights_come_in_another_dtype_and_to_a_device_when_asked(run, tmp_path) -> None:
    path, _, state = run
    half = fresh(Net().bfloat16())
    export(state, weights := tmp_path / "weights.pt")
    for source in (path, weights, state, params_from(weights)):
        with pytest.raises(CheckpointError, match=r"tensor float32 .*tensor bfloat16"):
            load_from(source, half)
        loaded = load_from(source, half, dtype=torch.bfloat16, device="cpu")
        assert tree.equal(loaded.params, {name: value.bfloat16() for name, value in state.params.items()})
        with pytest.raises(CheckpointError, match=r"load_from: dtype=torch.bfloat16 is for a `like` that has it"):
            load_from(source, fresh(), dtype=torch.bfloat16)
        with pytest.raises(CheckpointError, match="load_from: the state cannot be brought to nowhere"):
            load_from(source, fresh(), device="nowhere")
    tied = fnrun.TrainState.create(Tied(), OPTIMIZER, seed=0).replace(memory={"same": (same := torch.ones(2), same)})
    loaded = load_from(Tied().state_dict(), tied, device="cpu", strict=False)
    assert loaded.memory["same"][0] is loaded.memory["same"][1]
    with Checkpoints(path / "checkpoints") as checkpoints:
        assert {leaf.dtype for leaf in checkpoints.read(select="params/**", dtype=torch.float64).values()} == {torch.float64}


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_arrays_are_exported_as_tensors_and_what_no_file_holds_is_told(tmp_path, suffix) -> None:
    def stored(**buffers: Any) -> Any:
        return fresh().replace(buffers=buffers)

    packed = torch.arange(4, dtype=torch.uint8)
    found = params_from(export(stored(a=np.arange(3.0), b=np.arange(3, dtype=">i4")), tmp_path / f"a{suffix}"))
    assert (found["a"].dtype, found["a"].tolist(), found["b"].dtype, found["b"].tolist()) == (
        torch.float64,
        [0, 1, 2],
        torch.int32,
        [0, 1, 2],
    )
    path = export(stored(x=packed.view(torch.float4_e2m1fn_x2)), tmp_path / f"b{suffix}")
    assert params_from(path)["x"].view(torch.uint8).tolist() == [0, 1, 2, 3]
    for value, dtype, words in [
        (packed.view(torch.uint1), None, r"(torch.save does not write|safetensors has no) .*x.*tensor.view\(torch.uint8\)"),
        (packed.view(torch.float4_e2m1fn_x2), torch.bfloat16, r"x is torch.float4_e2m1fn_x2, which torch cannot cast"),
        (np.array(["a"]), None, "torch has no <U1, as x is, an array"),
        (None, None, "x is None, and a state dict holds tensors"),
    ]:
        with pytest.raises(CheckpointError, match=words):
            export(stored(x=value), tmp_path / f"c{suffix}", dtype=dtype)
    assert not (tmp_path / f"c{suffix}").exists()
