"""What holds of every fold."""

from __future__ import annotations

import dataclasses
import inspect
import pickle

import pytest
import torch
import torchmetrics
from hypothesis import given, strategies as st
from torch import nn
from torch.func import vmap  # pyright: ignore[reportPrivateImportUsage]

import fnrun
from fnrun import data, metrics, optim, testing
from fnrun.core import tree
from fnrun.core.position import Frame, Position
from tests.metrics.folds import COLLECTING, EVERY, agree, cut, in_parts, scored, unhurried

each = pytest.mark.parametrize("name", EVERY)
each_and_collecting = pytest.mark.parametrize("name", [*EVERY, *COLLECTING])


def builder(name):
    return EVERY[name][0] if name in EVERY else COLLECTING[name]


@each
@unhurried
@given(seed=st.integers(0, 10**6), n=st.integers(1, 40))
def test_parts_in_any_order_and_tree_are_the_whole(name, seed, n):
    build, exactly = EVERY[name]
    rows = scored(seed, n)
    agree(in_parts(build, rows, seed), build(*rows).compute(), exactly)


@pytest.mark.parametrize("name", COLLECTING)
@unhurried
@given(seed=st.integers(0, 10**6), n=st.integers(1, 40), split=st.integers(1, 5))
def test_kept_rows_are_in_order_however_they_are_merged(name, seed, n, split):
    rows = scored(seed, n)
    folds = [COLLECTING[name](*part) for part in cut(rows, seed)]
    while len(folds) > 1:
        at = split % (len(folds) - 1)
        folds[at : at + 2] = [folds[at].merge(folds[at + 1])]
    agree(folds[0].compute(), COLLECTING[name](*rows).compute())


@each
def test_the_size_of_a_fold_is_fixed(name):
    def sizes(fold):
        return [leaf.nbytes if isinstance(leaf, torch.Tensor) else None for leaf in tree.leaves(fold)]

    build = builder(name)
    fold = first = build(*scored(0, 8))
    for seed in range(1, 20):
        fold = fold.merge(build(*scored(seed, 1 + seed % 8)))
        assert sizes(fold) == sizes(first)
        assert tree.paths(fold) == tree.paths(first)


@each_and_collecting
def test_a_fold_is_restored_from_a_frame_bit_for_bit(name):
    build = builder(name)
    totals = metrics.fold(None, {"it": build(*scored(0, 8))}, 8)
    totals = metrics.fold(totals, {"it": build(*scored(1, 5))}, 5)
    state = fnrun.TrainState.create(nn.Linear(1, 1))
    held = state.replace(position=Position(frames=(Frame("eval_loop", ticks=2, totals=totals),)))
    restored = testing.through_a_checkpoint(held, state).position.frames[0].totals
    assert tree.equal(restored, totals)
    more = {"it": build(*scored(2, 3))}
    assert tree.equal(metrics.compute(metrics.fold(restored, more, 3)), metrics.compute(metrics.fold(totals, more, 3)))


@each_and_collecting
def test_a_fold_goes_to_another_process(name):
    fold = builder(name)(*scored(0, 8))
    assert tree.equal(pickle.loads(pickle.dumps(fold)), fold)


@each
def test_vmapped_members_have_their_own_folds(name):
    build = builder(name)
    rows = [scored(seed, 12) for seed in range(3)]
    together = vmap(build)(torch.stack([s for s, _ in rows]), torch.stack([y for _, y in rows]))
    together = together.merge(together).compute()
    for i, row in enumerate(rows):
        one = build(*row)
        agree(tree.map(lambda value, i=i: value[i], together), one.merge(one).compute(), exactly=False)


@each_and_collecting
def test_making_merging_and_computing_change_nothing_given(name):
    build, rows = builder(name), scored(0, 8)
    fold, before = build(*rows), tree.snapshot(rows)
    kept = tree.snapshot(fold)
    fold.merge(build(*rows)).compute()
    fold.compute()
    assert tree.equal(rows, before)
    assert tree.equal(fold, kept)


@each_and_collecting
def test_nothing_waits_for_a_device(name):
    """Meta tensors have no values: whatever asked for one, or for a tensor elsewhere, would fail."""
    build = builder(name)
    rows = [tensor.to("meta") for tensor in scored(0, 8)]
    fold = build(*rows).merge(build(*rows))
    assert all(leaf.device.type == "meta" for leaf in tree.leaves(fold.compute()))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda s, y: metrics.top_k(s, y, (1, 2)), lambda s, y: metrics.top_k(s, y, (1, 3))),
        (lambda s, y: metrics.f1(s, y), lambda s, y: metrics.f1(s[:, :3], y)),
        (lambda s, y: metrics.confusion(y, y, 4), lambda s, y: metrics.confusion(y, y, 1)),
        (lambda s, y: metrics.f1(s, y), lambda s, y: metrics.precision(s, y)),
        (lambda s, y: metrics.f1(s, y), lambda s, y: metrics.f1(s, y, average="micro")),
        (metrics.auroc, lambda s, y: metrics.auroc(s[:, 0], y == 1)),
        (lambda s, y: metrics.auroc(s, y, exact=True), lambda s, y: metrics.auroc(s, y, average=None, exact=True)),
        (lambda s, y: metrics.quantiles(s, 0.5), lambda s, y: metrics.quantiles(s, 0.9)),
        (metrics.from_torchmetrics(torchmetrics.MeanSquaredError()), metrics.from_torchmetrics(torchmetrics.MeanAbsoluteError())),
    ],
)
def test_folds_of_other_settings_do_not_merge(one, other):
    rows = scored(0, 8)
    if hasattr(one, "metric"):
        rows = (rows[1].float(), rows[1].float())
    with pytest.raises(ValueError, match="does not merge with one with"):
        one(*rows).merge(other(*rows))


def test_every_fold_of_the_package_is_tried_here():
    """A fold is named by its class, and its class by the package: checkpoints name it so, whichever file it is in."""
    structs = {
        name: cls for name, cls in inspect.getmembers(metrics, inspect.isclass) if dataclasses.is_dataclass(cls) and hasattr(cls, "merge")
    }
    for name, cls in structs.items():
        assert tree.struct_name(cls) == f"fnrun.metrics.{name}"
    tried = {type(builder(name)(*scored(0, 4))).__name__ for name in [*EVERY, *COLLECTING]}
    elsewhere = {"Last", "Min", "Max", "Moments", "TorchmetricsState", "TorchmetricsInputs"}  # test_basic, within others, their own file
    assert set(structs) == tried | elsewhere


# --- in a program


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 4)

    def forward(self, x):
        return self.linear(x)


def everything(model, batch):
    logits = model(batch["x"])
    return {name: build(logits, batch["y"]) for name, (build, _) in EVERY.items()}


def rows(n):
    x = torch.randn(n, 3, generator=torch.Generator().manual_seed(0))
    return {"x": x, "y": scored(3, n)[1]}


def test_an_evaluation_in_ragged_batches_is_that_of_all_rows_at_once():
    model, whole = Tiny(), rows(23)
    state = fnrun.TrainState.create(model)
    evaluate = fnrun.eval_loop(fnrun.make_eval_step(model, everything))
    _, parts = evaluate(state, data.arrays(whole, 5))
    _, at_once = evaluate(state, data.arrays(whole, 23))
    assert parts.keys() == at_once.keys()
    for name in parts:
        torch.testing.assert_close(parts[name], at_once[name], equal_nan=True, rtol=1e-6, atol=1e-6)


def test_training_with_every_fold_resumes_anywhere():
    model, optimizer = Tiny(), optim.sgd(0.1)

    def loss_fn(model, batch):
        loss = nn.functional.cross_entropy(model(batch["x"]), batch["y"])
        return loss, everything(model, batch) | {"kept": metrics.collect(batch["y"])}

    for accumulate in (1, 2):
        fit = fnrun.epoch_loop(fnrun.make_train_step(model, loss_fn, optimizer, microbatches=accumulate))
        state = fnrun.TrainState.create(model, optimizer)
        testing.assert_resumable(fit, state, data.arrays(rows(11), 4))
        for found in testing.states_seen(fit, state, data.arrays(rows(11), 4))[0]:
            assert not any(leaf.requires_grad for leaf in tree.leaves(found) if isinstance(leaf, torch.Tensor))
