"""Parameter groups: labels, ready rules, messages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st

import fnrun
from fnrun import optim, schedules
from fnrun.core import tree
from fnrun.core.reports import collect

from . import cases
from .cases import OPTIMIZERS

P = cases.params()
PLAIN = sorted(set(OPTIMIZERS) - {"loss_scale"})


@pytest.mark.parametrize("name", PLAIN)
def test_everything_under_one_label_is_that_optimizer(name: str) -> None:
    params = cases.params(name)
    grouped = optim.partition(lambda path, p: "all", {"all": OPTIMIZERS[name]()})
    alone = OPTIMIZERS[name]()
    a, b, one, two = params, params, grouped.init(params), alone.init(params)
    for step in range(4):
        key, grads = cases.Key(step), cases.grads(params, step)
        a, one = grouped.update(grads, one, a, key=key, step=step)
        b, two = alone.update(grads, two, b, key=key.fold_in("partition", "all"), step=step)
    assert tree.equal(a, b)
    assert tree.equal(one, {"all": two})


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(P)), st.sampled_from(["x", "y", "z"]), min_size=len(P)))
def test_each_group_trains_as_if_alone(labels: dict[str, str]) -> None:
    optimizers = {"x": optim.chain(optim.clip_by_global_norm(0.1), optim.adamw(1e-2)), "y": optim.sgd(0.1), "z": optim.freeze()}
    for given_labels in (labels, lambda path, p: labels[path]):
        together = cases.last(optim.partition(given_labels, optimizers), P, 3)
        for label, optimizer in optimizers.items():
            mine = {n: p for n, p in P.items() if labels[n] == label}
            fn: Any = lambda like, step: {n: cases.grads(P, step)[n] for n in like}  # noqa: E731
            assert tree.equal({n: together[n] for n in mine}, cases.last(optimizer, mine, 3, fn) if mine else {})


def test_groups_agree_with_torchs_param_groups() -> None:
    optimizer = optim.partition(
        optim.decay_labels, {"decay": optim.adamw(1e-2, weight_decay=0.1), "no_decay": optim.adamw(1e-2, weight_decay=0.0)}
    )
    leaves = {n: torch.nn.Parameter(p.clone()) for n, p in P.items()}
    wide = [n for n in P if P[n].ndim > 1]
    groups = [{"params": [leaves[n] for n in P if (n in wide) == many], "weight_decay": 0.1 if many else 0.0} for many in (True, False)]
    reference = torch.optim.AdamW(groups, lr=1e-2, fused=True)
    now, state = P, optimizer.init(P)
    for step in range(30):
        grads = cases.grads(P, step)
        now, state = optimizer.update(grads, state, now)
        for n, p in leaves.items():
            p.grad = torch.empty_like(p).copy_(grads[n])
        reference.step()
    assert all(torch.equal(now[n], leaves[n].detach()) for n in P)


def test_reports_carry_the_label() -> None:
    optimizer = optim.partition(optim.decay_labels, {"decay": optim.adamw(0.2), "no_decay": optim.sgd(0.1)})
    with collect() as reports:
        optimizer.update(cases.grads(P, 0), optimizer.init(P), P)
    assert reports == {"decay/lr": 0.2, "no_decay/lr": 0.1}


def test_evaluation_weights_come_from_the_groups_that_have_them() -> None:
    optimizer = optim.partition(optim.decay_labels, {"decay": optim.schedule_free_adamw(0.1), "no_decay": optim.sgd(0.1)})
    assert optimizer.eval_params is not None
    now, state = optimizer.update(cases.grads(P, 0), optimizer.init(P), P)
    evaluated = optimizer.eval_params(state, now)
    assert torch.equal(evaluated["b.bias"], now["b.bias"])
    assert evaluated["b.weight"] is not now["b.weight"]


TRANSFORMER = {n: torch.zeros(2, 2) for n in ("embed.weight", "blocks.0.attn.weight", "blocks.1.attn.weight", "blocks.2.mlp.fc.weight", "norm.weight", "head.weight")}  # fmt: skip
RESNET = {n: torch.zeros(2, 2) for n in ("conv1.weight", "layer1.0.conv1.weight", "layer1.1.conv1.weight", "layer2.0.conv1.weight", "fc.weight")}  # fmt: skip


def test_layer_decay_counts_blocks_from_the_head() -> None:
    assert optim.layer_decay(0.5)(TRANSFORMER) == {
        "embed.weight": 0.5**4, "blocks.0.attn.weight": 0.5**3, "blocks.1.attn.weight": 0.5**2, "blocks.2.mlp.fc.weight": 0.5,
        "norm.weight": 1.0, "head.weight": 1.0,
    }  # fmt: skip
    assert optim.layer_decay(0.5)(RESNET) == {
        "conv1.weight": 0.5**3, "layer1.0.conv1.weight": 0.5**2, "layer1.1.conv1.weight": 0.5**2, "layer2.0.conv1.weight": 0.5, "fc.weight": 1.0,
    }  # fmt: skip


def test_the_longest_matching_name_wins() -> None:
    rule = optim.name_multipliers({"blocks": 0.1, "blocks.1": 0.5, "attn.weight": 0.2})
    assert rule(TRANSFORMER) == {
        "embed.weight": 1.0, "blocks.0.attn.weight": 0.2, "blocks.1.attn.weight": 0.2, "blocks.2.mlp.fc.weight": 0.1,
        "norm.weight": 1.0, "head.weight": 1.0,
    }  # fmt: skip


def test_scaled_rates_are_those_of_the_group() -> None:
    curve = schedules.linear(1.0, 0.0, 10)
    optimizer = optim.scaled_lr(lambda lr: optim.sgd(lr), curve, optim.name_multipliers({"a.": 0.5}))
    now = cases.last(optimizer, P, 3)
    for name, factor in (("a.weight", 0.5), ("b.weight", 1.0)):
        expected = cases.last(
            optim.sgd(schedules.multiply(curve, factor)), {name: P[name]}, 3, lambda like, step: {n: cases.grads(P, step)[n] for n in like}
        )
        assert torch.allclose(now[name], expected[name])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: optim.partition(lambda path, p: "w", {"x": optim.sgd(0.1)}).init(P), "no optimizer for label 'w'; there are: 'x'"),
        (lambda: optim.name_multipliers({"blockz": 0.1})(TRANSFORMER), "pattern 'blockz' matches no parameter; near names: blocks"),
        (lambda: optim.layer_decay(0.5)({"dense.weight": P["c"]}), "matches no parameter; near names: dense"),
        (lambda: optim.partition({}, {"x": optim.dynamic_loss_scale(optim.sgd(0.1))}), "put dynamic_loss_scale around the partition"),
    ],
)
def test_mistakes_are_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_scaled_lr_offers_what_its_optimizer_offers() -> None:
    multipliers = optim.name_multipliers({"a": 0.1})
    optimizer = optim.scaled_lr(lambda lr: optim.schedule_free_adamw(lr), 1e-2, multipliers)
    params = {"a": torch.ones(2), "b": torch.ones(2)}
    state = optimizer.init(params)
    for _ in range(3):
        params, state = optimizer.update({"a": torch.ones(2), "b": torch.ones(2)}, state, params)
    assert optimizer.eval_params is not None
    assert not torch.equal(optimizer.eval_params(state, params)["a"], params["a"])
    with pytest.raises(ValueError, match="goes around scaled_lr"):
        optim.scaled_lr(lambda lr: optim.dynamic_loss_scale(optim.sgd(lr)), 1.0, multipliers)


def test_labels_by_dtype_are_those_of_the_parameters_at_hand() -> None:
    def label(path: str, p: torch.Tensor) -> str:
        return "single" if p.dtype == torch.float32 else "double"

    optimizer = optim.partition(label, {"single": optim.sgd(1.0), "double": optim.sgd(0.1)})
    for dtype, moved in ((torch.float32, -1.0), (torch.float64, -0.1)):
        params = {"a": torch.zeros(1, dtype=dtype)}
        assert optimizer.update({"a": torch.ones(1, dtype=dtype)}, optimizer.init(params), params)[0]["a"].item() == moved


#: Names as the models have them, in their order, and how many blocks' rates each is from the head.
NAMES: dict[str, dict[str, int]] = {
    "timm ViT": {"cls_token": 4, "reg_token": 4, "pos_embed": 4, "patch_embed.proj.weight": 4, "norm_pre.weight": 4, "blocks.0.norm1.weight": 3,
        "blocks.1.attn.proj.weight": 2, "blocks.2.mlp.fc1.weight": 1, "norm.weight": 0, "attn_pool.latent": 0, "fc_norm.weight": 0, "head.weight": 0},
    "more than nine blocks": {"embed.weight": 13, **{f"blocks.{i}.weight": 12 - i for i in range(12)}, "norm.weight": 0},
    "timm CaiT": {"patch_embed.proj.weight": 3, "blocks.0.w": 2, "blocks.1.w": 1, "blocks_token_only.0.w": 0, "norm.weight": 0, "head.weight": 0},
    "timm EfficientNet": {"conv_stem.weight": 3, "bn1.weight": 3, "blocks.0.0.conv_dw.weight": 2, "blocks.0.0.bn1.weight": 2, "blocks.1.0.se.conv_reduce.weight": 1,
        "blocks.1.1.bn1.weight": 1, "conv_head.weight": 0, "bn2.weight": 0, "classifier.weight": 0},
    "timm ConvNeXt": {"stem.0.weight": 3, "stem.1.weight": 3, "stages.0.blocks.0.gamma": 2, "stages.0.blocks.1.gamma": 2, "stages.1.downsample.0.weight": 1,
        "stages.1.blocks.0.norm.weight": 1, "norm_pre.weight": 0, "head.norm.weight": 0, "head.fc.weight": 0},
    "timm Swin": {"patch_embed.proj.weight": 3, "patch_embed.norm.weight": 3, "layers.0.blocks.0.norm1.weight": 2, "layers.0.downsample.norm.weight": 2,
        "layers.1.blocks.0.attn.relative_position_bias_table": 1, "norm.weight": 0, "head.fc.weight": 0},
    "timm ResNet": {"conv1.weight": 5, "bn1.weight": 5, "layer1.0.conv1.weight": 4, "layer2.0.downsample.0.weight": 3, "layer3.0.bn1.weight": 2,
        "layer4.0.conv1.weight": 1, "fc.weight": 0},
    "timm HRNet": {"conv1.weight": 4, "layer1.0.conv1.weight": 3, "transition1.0.0.weight": 3, "stage2.0.w": 2, "transition2.0.w": 2, "stage3.0.w": 1,
        "incre_modules.0.w": 0, "final_layer.0.weight": 0, "classifier.weight": 0},
    "ConvNeXt": {"downsample_layers.0.0.weight": 3, "stages.0.0.gamma": 2, "stages.1.0.gamma": 1, "norm.weight": 0, "head.weight": 0},
    "ViT of torchvision": {"class_token": 3, "conv_proj.weight": 3, "encoder.pos_embedding": 3, "encoder.layers.encoder_layer_0.ln_1.weight": 2,
        "encoder.layers.encoder_layer_1.mlp.0.weight": 1, "encoder.ln.weight": 0, "heads.head.weight": 0},
    "two towers": {"text_projection": 0, "logit_scale": 0, "visual.proj": 0, "visual.class_embedding": 3, "visual.conv1.weight": 3,
        "visual.transformer.resblocks.0.w": 2, "visual.transformer.resblocks.1.w": 1, "visual.ln_post.weight": 0,
        "transformer.resblocks.0.w": 3, "transformer.resblocks.1.w": 2, "transformer.resblocks.2.w": 1, "token_embedding.weight": 4, "ln_final.weight": 0},
    "encoder and decoder": {"shared.weight": 3, "encoder.block.0.w": 1, "encoder.final_layer_norm.weight": 0, "decoder.block.0.w": 2, "decoder.block.1.w": 1,
        "decoder.final_layer_norm.weight": 0, "lm_head.weight": 0},
    "a backbone": {"backbone.stem.w": 3, "backbone.layers.0.w": 2, "backbone.layers.1.w": 1, "neck.convs.0.w": 0, "bbox_head.layers.0.w": 0,
        "bbox_head.layers.1.w": 0, "class_embed.0.weight": 0},
    "convolutions before": {"feature_extractor.conv_layers.0.conv.weight": 3, "feature_projection.weight": 3, "masked_spec_embed": 3,
        "encoder.pos_conv_embed.conv.bias": 3, "encoder.layer_norm.weight": 3, "encoder.layers.0.w": 2, "encoder.layers.1.w": 1, "lm_head.weight": 0},
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_what_stands_behind_the_last_block_has_the_rate_of_the_head(name: str) -> None:
    leaves = dict.fromkeys(NAMES[name], torch.zeros(1))
    assert optim.layer_decay(0.5)(leaves) == {path: 0.5**below for path, below in NAMES[name].items()}


def test_the_order_is_that_of_the_model_in_groups_of_groups_too() -> None:
    """Not that of the names, by which trees are sorted: there the first norm of an EfficientNet comes after its blocks."""
    names = NAMES["timm EfficientNet"]
    leaves = {path: torch.zeros(2, 2) if "conv" in path or "classifier" in path else torch.zeros(2) for path in names}
    grouped = optim.scaled_lr(optim.sgd, 1.0, optim.layer_decay(0.5))
    for optimizer in (grouped, optim.partition(optim.decay_labels, {"decay": grouped, "no_decay": optim.scaled_lr(optim.sgd, 1.0, optim.layer_decay(0.5))})):  # fmt: skip
        now, _ = optimizer.update({path: torch.ones_like(p) for path, p in leaves.items()}, optimizer.init(leaves), leaves)
        rates = {path: -p.flatten()[0].item() for path, p in now.items()}
        assert {path: rates[path] for path in ("conv_stem.weight", "bn1.weight")} == dict.fromkeys(
            ("conv_stem.weight", "bn1.weight"), 0.125
        )
        assert {rates[path] for path in ("conv_head.weight", "bn2.weight", "classifier.weight")} == {1.0}


SMALL = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
IMAGES = {"image_size": 32, "patch_size": 8, **{name: value for name, value in SMALL.items() if name != "vocab_size"}}


@pytest.mark.parametrize(
    ("cls", "config", "options", "head"),
    [
        ("BertForSequenceClassification", "BertConfig", SMALL, ["pooler", "classifier"]),
        ("ViTForImageClassification", "ViTConfig", IMAGES, ["layernorm.weight", "classifier"]),
        ("GPT2ForSequenceClassification", "GPT2Config", {"vocab_size": 50, "n_embd": 16, "n_layer": 3, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}, ["ln_f", "score"]),
        ("LlamaForCausalLM", "LlamaConfig", {**SMALL, "num_key_value_heads": 2}, ["model.norm", "lm_head"]),
        ("DebertaV2ForSequenceClassification", "DebertaV2Config", {**SMALL, "relative_attention": True, "pos_att_type": ["p2c"]}, ["pooler", "classifier"]),
        ("SwinForImageClassification", "SwinConfig", {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [1, 1, 2], "num_heads": [1, 2, 2], "window_size": 2}, ["swin.layernorm", "classifier"]),
        ("ConvNextForImageClassification", "ConvNextConfig", {"hidden_sizes": [4, 8, 8], "depths": [1, 2, 1], "num_stages": 3}, ["convnext.layernorm", "classifier"]),
        ("CLIPModel", "CLIPConfig", {"text_config": {**SMALL, "bos_token_id": 0, "eos_token_id": 0}, "vision_config": IMAGES, "projection_dim": 8}, ["final_layer_norm", "post_layernorm", "projection.weight", "logit_scale"]),
    ],
)  # fmt: skip
def test_the_models_of_transformers(cls: str, config: str, options: dict[str, Any], head: list[str]) -> None:
    transformers = pytest.importorskip("transformers")
    model = getattr(transformers, cls)(getattr(transformers, config)(**options))
    rates = optim.layer_decay(0.5)(dict(model.named_parameters()))
    assert set(rates.values()) == {1.0, 0.5, 0.25, 0.125, 0.0625}
    for part in head:
        of_head = {rate for path, rate in rates.items() if part in path}
        assert of_head == {1.0}, part
    assert {rate for path, rate in rates.items() if "embed" in path or ".wte." in path} == {0.0625}


def test_weights_to_evaluate_with_beside_frozen_ones() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
    model[0].requires_grad_(False)
    optimizer = optim.schedule_free_adamw(0.1)
    step = fnrun.make_train_step(model, lambda model, x: model(x).mean(), optimizer)
    state = fnrun.TrainState.create(model, optimizer)
    for _ in range(2):
        state, _ = step(state, torch.ones(3, 2))
    weights = optimizer.eval_params(state.opt_state, state.params)
    assert torch.equal(weights["0.weight"], state.params["0.weight"])
    assert not torch.equal(weights["1.weight"], state.params["1.weight"])
