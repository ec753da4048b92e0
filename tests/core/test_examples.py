"""How many examples a batch has, and which of its parts microbatches cut."""

from __future__ import annotations

import dataclasses
import itertools
import pickle
from collections import OrderedDict, UserDict
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import optree
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils import _pytree as torch_pytree
from torch.utils.data import TensorDataset

import fnrun
from fnrun import data, metrics, optim
from fnrun.core import examples as rows, tree
from fnrun.core.key import Key
from fnrun.core.position import Cursor


def images(*values, height=5):
    return [torch.full((3, height, 5), float(value)) for value in values]


def first(stream, batch=0):
    return next(stream.iterate(Key(0), Cursor(batch=batch)))[0]


def made(loss, **options):
    model = nn.Linear(4, 1).double()
    with torch.no_grad():
        model.weight.copy_(torch.arange(4.0) / 10)
        model.bias.fill_(0.1)
    return fnrun.make_train_step(model, loss, optim.sgd(0.1), **options), fnrun.TrainState.create(model, optim.sgd(0.1))


def x_of(n, seed=0):
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(seed)).double()


def squares(model, batch):
    return model(batch["x"]).square().mean()


# --- counting -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "n"),
    [
        (images(1, 2), 2),
        (images(1), 1),
        (images(1) + images(2, height=7), 2),
        ({"images": images(1, 2), "targets": [{"boxes": torch.zeros(7, 4)}, {"boxes": torch.zeros(1, 4)}]}, 2),
        ({"images": images(1, 2), "y": torch.zeros(2)}, 2),
        ([torch.zeros(8, 4), torch.zeros(8, dtype=torch.int64)], 8),
        ([torch.zeros(8, 4), {"y": torch.zeros(8)}], 8),
        ({"views": [torch.zeros(8, 4), torch.zeros(8, 4)], "y": torch.zeros(8)}, 8),
        ({"views": [torch.zeros(8, 4), torch.zeros(8, 1)], "y": torch.zeros(8)}, 8),
        ((np.zeros((4, 2)), torch.zeros(4), "name", 3.0, None, torch.tensor(1)), 4),
        ({"x": torch.zeros(4, 2), "text": list("abcd"), "scale": [1.0, 2.0]}, 4),
        (["a", "b", "c"], 3),
        ([torch.zeros(5, 2), torch.zeros(3, 2)], 2),
        (UserDict(ids=torch.zeros(6, 9)), 6),
        ([[1, 2], [3, 4, 5]], 2),
        ({"x": torch.zeros(0, 4)}, 0),
        (3.5, 1),
        ({}, 1),
    ],
)
def test_what_a_batch_counts_as(batch, n):
    assert metrics.examples(batch) == n


@pytest.mark.parametrize(
    ("batch", "shapes"),
    [
        ({"x": torch.zeros(8, 4), "anchors": torch.zeros(2, 4)}, r"anchors \[2, 4\], x \[8, 4\]"),
        ((np.zeros((4, 2)), torch.zeros(3)), r"0 \[4, 2\], 1 \[3\]"),
        ([torch.zeros(8, 4), torch.zeros(8, 1)], r"the batch a list of 2 \(\[8, 4\], \[8, 1\]\)"),
        ({"images": images(1, 2), "y": torch.zeros(5)}, r"images a list of 2 \(\[3, 5, 5\], \[3, 5, 5\]\), y \[5\]"),
        ({"a": ["x"], "b": ["y", "z"]}, "a a list of 1, b a list of 2"),
    ],
)
def test_what_disagrees_is_refused_with_the_shapes(batch, shapes):
    with pytest.raises(ValueError, match=f"is not clear: {shapes}"):
        metrics.examples(batch)


# --- a loop's mean ------------------------------------------------------------------------------------------------------


def mean_image(model, batch):
    return {"mean": torch.stack([image.mean() for image in batch]).mean()}


def test_a_list_of_images_weighs_as_many_as_there_are():
    """Four images of 1 and one of 6: 2.0, and not 3.5."""
    batches = [images(1, 1, 1, 1), images(6)]
    model = nn.Linear(1, 1)
    evaluate = fnrun.eval_loop(fnrun.make_eval_step(model, mean_image))
    state = fnrun.TrainState.create(model)
    for stream in (batches, data.loader(images(1, 1, 1, 1, 6), 4, collate=list)):
        assert evaluate(state, stream)[1]["mean"].item() == 2.0
    train = fnrun.epoch_loop(fnrun.step(lambda state, batch: (state, mean_image(None, batch))))
    assert train(state, batches)[1]["mean"].item() == 2.0


MIXED = [{"x": x_of(n, n), "anchors": torch.ones(2, 4)} for n in (8, 2, 5)]


def test_lengths_that_disagree_are_refused_in_loops_of_both_kinds_and_said_in_one_word():
    step, state = made(squares)
    evaluate = fnrun.make_eval_step(nn.Linear(4, 1).double(), lambda model, batch: {"size": float(len(batch["x"]))})
    for loop in (fnrun.epoch_loop(step), fnrun.step_loop(step, 2), fnrun.eval_loop(evaluate)):
        with pytest.raises(ValueError, match=r"not clear: anchors \[2, 4\], x \[8, 4\].*examples='x'.*metrics\.mean\(value, weight=n\)"):
            loop(state, MIXED)
    evaluate = fnrun.make_eval_step(nn.Linear(4, 1).double(), lambda model, batch: {"size": float(len(batch["x"]))}, examples="x")
    assert fnrun.eval_loop(evaluate)(state, MIXED)[1]["size"] == pytest.approx((64 + 4 + 25) / 15)
    sized = made(lambda model, batch: (squares(model, batch), {"size": len(batch["x"])}), examples=lambda batch: len(batch["x"]))[0]
    for loop in (fnrun.epoch_loop(sized), fnrun.epoch_loop(fnrun.skip_nonfinite(sized))):
        assert loop(state, MIXED)[1]["size"] == pytest.approx((64 + 4 + 25) / 15)


def test_a_tick_of_folds_alone_needs_no_count():
    step, state = made(lambda model, batch: (metrics.mean(model(batch["x"]).square()), {"n": metrics.sum(torch.ones(len(batch["x"])))}))
    assert fnrun.epoch_loop(step)(state, MIXED)[1]["n"].item() == 15
    assert len(fnrun.predict_loop(fnrun.make_predict_step(nn.Linear(4, 1), lambda model, batch: 1))(state, MIXED)[1]) == 3


# --- which parts are cut ------------------------------------------------------------------------------------------------


def whole_gradient(loss, batch):
    step, state = made(loss)
    return step.gradients(state, batch)[0]


def test_only_what_is_per_example_is_cut():
    seen = []

    def loss(model, batch):
        seen.append((len(batch["x"]), len(batch["anchors"])))
        return (model(batch["x"]) * batch["anchors"].sum()).square().mean()

    batch = {"x": x_of(5), "anchors": torch.ones(2, 4)}
    for examples in ("x", 5, lambda batch: len(batch["x"]), ("x",), ["x"]):
        seen.clear()
        step, state = made(loss, microbatches=2, examples=examples)
        grads, _, _ = step.gradients(state, batch)
        assert seen == [(2, 2), (3, 2)]
        torch.testing.assert_close(grads, whole_gradient(loss, batch), rtol=1e-12, atol=1e-12)
        assert step.examples(batch) == 5
    with pytest.raises(ValueError, match=r"cannot tell how this batch is cut: anchors \[2, 4\], x \[5, 4\].*examples='x'.*split=f"):
        made(loss, microbatches=2)[0](state, batch)


@pytest.mark.parametrize("sizes", [(8, 10), (10, 8)])
def test_a_length_that_fits_by_accident_is_refused(sizes):
    """Class weights of length 10 in a batch of 10."""
    step, state = made(squares, microbatches=2, examples="x")
    one, other = ({"x": x_of(n), "weights": torch.ones(10)} for n in sizes)
    step(state, one)
    with pytest.raises(
        ValueError, match=r"weights has an entry for each .* by accident.*weights \[10\], x \[\d+, 4\].*examples=\('x', 'y'\)"
    ):
        step(state, other)
    lengths = []

    def loss(model, batch):
        lengths.append(len(batch["weights"]))
        return squares(model, batch)

    named, _ = made(loss, microbatches=2, examples=("x",))
    for batch in (one, other):
        named(state, batch)
    assert set(lengths) == {10}
    agreeing, _ = made(squares, microbatches=2)
    with pytest.raises(ValueError, match=r"by accident|cannot tell"):
        [agreeing(state, batch) for batch in (one, other)]


@pytest.mark.filterwarnings("ignore:.*is not compiled")
@pytest.mark.parametrize("options", [{}, {"compile": True}], ids=["eager", "compiled"])
def test_what_is_the_very_same_in_two_batches_is_no_examples(options):
    """Class weights of the batch's length: the batches never differ in length, but they bring the same tensor each."""
    weights, array = torch.ones(10), np.ones(10)
    for same in (lambda i: weights, lambda i: weights[:], lambda i: array[:]):
        if options and not isinstance(same(0), torch.Tensor):
            continue
        batches = [{"x": x_of(10, i), "weights": same(i)} for i in range(2)]
        step, state = made(squares, microbatches=2, **options)
        state, _ = step(state, batches[0])
        step(state, batches[0])
        for _ in range(2):
            with pytest.raises(ValueError, match=r"weights is the very same in this batch and the one before.*examples=\('x', 'y'\)"):
                step(state, batches[1])
    for batches, examples in (
        ([{"x": x_of(10, i), "weights": weights} for i in range(2)], ("x",)),
        ([{"x": x, "noise": x_of(10, i)} for x in [x_of(10)] for i in range(2)], "x"),
        ([{"x": each} for each in x_of(20).split(10)], None),
    ):
        step, state = made(squares, microbatches=2, examples=examples)
        for batch in batches:
            state, _ = step(state, batch)
    memory = {"x": x_of(10), "y": x_of(10)}
    step, state = made(squares, microbatches=2)
    for i in range(2):  # filled anew
        memory["x"].copy_(x_of(10, i))
        state, _ = step(state, {**memory, "y": x_of(10, i)})


def test_lists_are_cut_as_lists():
    seen = []

    def loss(model, batch):
        seen.append([len(image) for image in batch["images"]] + [len(target["boxes"]) for target in batch["targets"]])
        return model(torch.stack([image.mean((1, 2)).sum() * torch.ones(4) for image in batch["images"]]).double()).mean()

    batch = {"images": images(1, 2, 3), "targets": [{"boxes": torch.zeros(k, 4)} for k in (7, 8, 9)]}
    step, state = made(loss, microbatches=2)
    grads, _, _ = step.gradients(state, batch)
    assert seen == [[3, 7], [3, 3, 8, 9]]
    torch.testing.assert_close(grads, whole_gradient(loss, batch), rtol=1e-12, atol=1e-12)


def test_several_keys_are_all_that_is_cut_and_must_agree():
    batch = {"inputs": {"ids": x_of(4), "text": list("abcd")}, "y": torch.zeros(4), "table": torch.zeros(4)}
    seen = []

    def loss(model, batch):
        seen.append((batch["inputs"]["text"], len(batch["y"]), len(batch["table"])))
        return model(batch["inputs"]["ids"]).mean()

    step, state = made(loss, microbatches=2, examples=("inputs", "y"))
    step(state, batch)
    assert seen == [(["a", "b"], 2, 4), (["c", "d"], 2, 4)]
    with pytest.raises(ValueError, match=r"they differ: inputs has 4, y has 3; in inputs/ids \[4, 4\]"):
        step(state, {**batch, "y": torch.zeros(3)})
    assert made(loss, examples="inputs/ids")[0].examples({**batch, "y": torch.zeros(3)}) == 4
    assert made(loss, examples="0")[0].examples((torch.zeros(4), torch.zeros(3))) == 4


def packed(sizes):
    """Sequences one behind the other, and where each begins and ends."""
    tokens = x_of(sum(sizes))
    return {"tokens": tokens, "ends": torch.tensor([0, *np.cumsum(sizes)])}


def split_packed(batch, n):
    ends = batch["ends"].tolist()
    count = len(ends) - 1
    for i in range(n):
        start, end = count * i // n, count * (i + 1) // n
        if start == end:
            yield None
            continue
        part = torch.tensor(ends[start : end + 1])
        yield {"tokens": batch["tokens"][ends[start] : ends[end]], "ends": part - ends[start]}


def of_sequences(model, batch):
    """A mean over sequences of what depends on all tokens of each."""
    ends = batch["ends"].tolist()
    each = [model(batch["tokens"][a:b]).exp().sum().square() for a, b in itertools.pairwise(ends)]
    return torch.stack(each).mean()


def sequences(batch):
    return len(batch["ends"]) - 1


@pytest.mark.parametrize("n", [2, 3, 7])
@pytest.mark.parametrize("loss", [of_sequences, lambda model, batch: metrics.sum(of_sequences(model, batch) * sequences(batch))])
def test_packed_sequences_are_split_by_hand_with_the_gradient_of_the_whole(n, loss):
    step, state = made(loss, microbatches=n, split=split_packed, examples=sequences)
    for sizes in ((3, 1, 4, 1, 5), (2, 6)):
        grads, _, _ = step.gradients(state, packed(sizes))
        torch.testing.assert_close(grads, whole_gradient(loss, packed(sizes)), rtol=1e-12, atol=1e-12)
        assert step.examples(packed(sizes)) == len(sizes)


def test_wrong_pieces_are_refused():
    batch = packed((3, 1, 4, 1))
    for split, message in [
        (lambda batch, n: batch, r"split\(batch, 2\) returned a dict, and it returns a list of pieces"),
        (lambda batch, n: batch["tokens"], "returned a Tensor, and it returns a list"),
        (lambda batch, n: [batch] * 3, "returned 3 pieces: at most 2"),
        (lambda batch, n: [*split_packed(batch, n)][:1], "the pieces of split= have 2 examples together, and the batch has 4"),
        (lambda batch, n: [None, None], "have 0 examples together"),
    ]:
        step, state = made(of_sequences, microbatches=2, split=split, examples=sequences)
        with pytest.raises((TypeError, ValueError), match=message):
            step(state, batch)
    step, state = made(of_sequences, microbatches=2, split=split_packed)
    with pytest.raises(ValueError, match=r"a piece of split= has is not clear: ends \[3\], tokens \[4, 4\]"):
        step(state, batch)
    for options, message in [
        ({"split": split_packed}, "there is one: microbatches=n"),
        ({"split": split_packed, "microbatches": 2, "examples": 4}, "of a whole batch"),
        ({"split": "x", "microbatches": 2}, "split= takes a function"),
        ({"split": lambda batch: [], "microbatches": 2}, "takes other arguments"),
    ]:
        with pytest.raises((TypeError, ValueError), match=message):
            made(of_sequences, **options)


def test_pieces_that_lose_or_double_rows_are_refused_without_a_word():
    x = {"x": x_of(11)}
    for split, total in [
        (lambda b, n: [{"x": b["x"][i * (11 // n) : (i + 1) * (11 // n)]} for i in range(n)], 8),
        (lambda b, n: [b] * n, 44),
    ]:
        step, state = made(squares, microbatches=4, split=split)
        with pytest.raises(ValueError, match=rf"pieces of split= have {total} examples together, and the batch has 11: x \[11, 4\]"):
            step(state, x)
    step, state = made(lambda model, batch: model(batch.data).mean(), microbatches=2, split=lambda b, n: [b, None])
    opaque = type("Opaque", (), {"__slots__": (), "data": property(lambda self: x_of(3))})()
    step(state, opaque)


@pytest.mark.parametrize("n", [2, 3, 8])
def test_a_metric_of_one_value_an_example_is_no_mean(n):
    def loss(model, batch):
        return squares(model, batch), {"id": batch["id"], "classes": torch.arange(4.0)}

    batch = {"x": x_of(8), "id": torch.arange(8.0)}
    step, state = made(loss, microbatches=n)
    with pytest.raises(ValueError, match=r"the metric 'id' has shape \[\d\].*metrics\.collect"):
        step(state, batch)
    folds, _ = made(lambda m, b: (squares(m, b), {"id": metrics.collect(b["id"])}), microbatches=n)
    assert folds(state, batch)[1]["id"].compute().tolist() == list(range(8))
    with pytest.raises(ValueError, match=r"fused steps: the metric 'id' has shape \[8\] for 8 examples"):
        made(loss)[0].several(state, [batch, batch])
    with pytest.raises(ValueError, match=r"fused steps: the metric 'id' has shape \[3\], and had \[8\]"):
        made(loss)[0].several(state, [batch, {name: value[:3] for name, value in batch.items()}])
    classes = made(lambda m, b: (squares(m, b), {"c": torch.arange(3.0)}), microbatches=n)[0](state, batch)[1]["c"]
    assert classes.tolist() == [0, 1, 2], "a value for each class"


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_a_buffer_that_counts_examples_is_not_that_of_a_piece(n, dtype):
    class Buffer(nn.Linear):
        def __init__(self, change):
            super().__init__(4, 1)
            self.change = change
            self.register_buffer("kept", torch.zeros((), dtype=dtype))

        def forward(self, x):
            self.kept.copy_(self.change(self.kept, x, self.weight.detach()))
            return super().forward(x)

    def run(change):
        model = Buffer(change)
        step = fnrun.make_train_step(model, squares, optim.sgd(0.1), microbatches=n)
        return step(fnrun.TrainState.create(model, optim.sgd(0.1)), {"x": x_of(8).float()})[0].buffers["kept"].item()

    assert run(lambda kept, x, w: kept + 1) == 1
    assert run(lambda kept, x, w: kept + 0 * len(x)) == 0
    for change in (lambda kept, x, w: kept + len(x), lambda kept, x, w: kept + x.numel() / 4):
        if n == 1:
            assert run(change) == 8
            continue
        with pytest.raises(ValueError, match="the buffer 'kept' counts, and a microbatch of"):
            run(change)


def test_the_vectors_of_spectral_norm_are_those_of_the_whole_batch():
    model = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3))
    ends = []
    for n in (1, 4):
        step = fnrun.make_train_step(model, squares, optim.sgd(0.1), microbatches=n)
        ends.append(step(fnrun.TrainState.create(model, optim.sgd(0.1)), {"x": x_of(8).float()})[0].buffers)
    torch.testing.assert_close(dict(ends[0]), dict(ends[1]))


@pytest.mark.parametrize("option", [0, -1, True, 2.5, "", (), ("x", 1), dict, lambda: 3])
def test_what_says_no_number_of_examples_is_refused_when_made(option):
    with pytest.raises((TypeError, ValueError), match="examples"):
        made(squares, examples=option)
    with pytest.raises((TypeError, ValueError), match="make_eval_step: examples"):
        fnrun.make_eval_step(nn.Linear(1, 1), lambda model, batch: {}, examples=option)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("z", r"examples='z': the batch has no 'z'; it has n a list of 1, x \[5, 4\]"),
        ("x/0", "no 'x/0'"),
        ("scale", "'scale' is 2.0, which has no length"),
        (lambda batch: -1, "it returned -1"),
        (lambda batch: 2.0, "it returned 2.0"),
        (lambda batch: None, "it returned None"),
        (7, "no part of it has an entry for each of 7 examples"),
    ],
)
def test_what_turns_out_to_be_none_is_refused_with_the_batch(option, message):
    step, state = made(squares, examples=option, microbatches=2)
    with pytest.raises(ValueError, match=message):
        step(state, {"x": x_of(5), "scale": 2.0, "n": [1]})


def test_what_is_no_tree_is_not_taken_for_one_piece():
    class Graphs:
        x = x_of(6)

    step, state = made(lambda model, batch: model(batch.x).mean(), microbatches=2)
    with pytest.raises(ValueError, match="cannot tell how this batch is cut: a Graphs: no part of it"):
        step(state, Graphs())


@pytest.mark.filterwarnings("error")
def test_compiled_and_fused_steps_cut_and_weigh_as_plain_ones():
    batches = [{"x": x_of(6, i), "anchors": torch.ones(2, 4).double()} for i in range(2)]

    def loss(model, batch):
        return (model(batch["x"]) * batch["anchors"].sum()).square().mean(), {"size": float(len(batch["x"]))}

    def split(batch, n):
        return [{**batch, "x": x} for x in batch["x"].tensor_split(n)]

    for k, options in ((1, {"examples": "x"}), (2, {"examples": lambda batch: len(batch["x"]), "split": split})):
        plain, state = made(loss, microbatches=2, **options)
        expected, seen = fnrun.step_loop(plain, 2)(state, batches)
        end, now = fnrun.step_loop(made(loss, microbatches=2, compile=True, **options)[0], 2, fused_steps=k)(state, batches)
        torch.testing.assert_close(dict(end.params), dict(expected.params))
        torch.testing.assert_close(torch.as_tensor(now["loss"]), torch.as_tensor(seen["loss"]))


def test_a_buffer_that_a_graph_cannot_compare_says_so():
    class Calls(nn.Linear):
        def __init__(self):
            super().__init__(4, 1)
            self.register_buffer("calls", torch.zeros(3))

        def forward(self, x):
            self.calls.add_(1)
            return super().forward(x)

    model = Calls()
    step = fnrun.make_train_step(model, squares, optim.sgd(0.1), microbatches=2, compile=True)
    with pytest.warns(UserWarning, match="goes on without: the buffer 'calls' changes in each microbatch"):
        step(fnrun.TrainState.create(model, optim.sgd(0.1)), {"x": x_of(4).float()})


# --- what streams know --------------------------------------------------------------------------------------------------


ANCHORS = torch.ones(2, 4).double()


def with_anchors(batch, key=None):
    return {**batch, "anchors": ANCHORS}


def pack(examples):
    return {"tokens": torch.cat(examples), "ends": torch.tensor([0, *np.cumsum([len(each) for each in examples])])}


class Sequences:
    def __init__(self, *sizes):
        self.sizes = sizes

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, i):
        return x_of(self.sizes[i], i)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_streams_word_travels_in_the_batch(workers):
    arrays = data.arrays({"x": x_of(11)}, 4, transform=with_anchors)
    loader = data.loader(Sequences(3, 1, 2, 5, 1), 3, collate=pack, workers=workers)
    for stream, sizes in ((arrays, [4, 4, 3]), (loader, [3, 2]), (arrays.to("cpu"), [4, 4, 3])):
        batches = [first(stream, i) for i in range(len(sizes))]
        assert [metrics.examples(batch) for batch in batches] == sizes
        batch = batches[0]
        assert isinstance(batch, dict)
        assert repr(batch) == repr(dict(batch))
        assert {**batch} == dict(**batch)
        assert tree.equal(batch, dict(batch))
        assert tree.fingerprint(batch) == tree.fingerprint(dict(batch))
        assert list(batch) == list(dict(batch))
        again = pickle.loads(pickle.dumps(batch))
        mapped = [tree.map(lambda t: t * 2, batch), optree.tree_map(lambda t: t, batch), torch_pytree.tree_map(lambda t: t, batch), again]
        assert [metrics.examples(each) for each in mapped] == [sizes[0]] * 4
        assert torch.equal(mapped[0]["x" if "x" in batch else "tokens"], next(iter(batch.values())) * 2)


def test_a_step_by_hand_and_in_a_loop_take_a_streams_word():
    """Which is the mean over examples, with a ragged last batch, computed by hand."""
    step, state = made(lambda model, batch: (squares(model, batch), {"size": float(len(batch["x"]))}))
    stream = data.arrays({"x": x_of(11)}, 4, transform=with_anchors)
    assert fnrun.epoch_loop(lambda state, batch: step(state, batch))(state, stream)[1]["size"] == pytest.approx((16 + 16 + 9) / 11)
    step, by_hand = made(squares, microbatches=2, examples="x")
    for i in range(3):
        batch = next(stream.iterate(state.rng.fold_in("data", "data"), Cursor(batch=i)))[0]
        by_hand, _ = step(by_hand, batch)
    assert tree.equal(by_hand.params, fnrun.epoch_loop(step)(state, stream)[0].params)
    evaluate = fnrun.make_eval_step(nn.Linear(4, 1), lambda model, batch: {"size": float(len(batch["ends"]) - 1)})
    assert fnrun.eval_loop(evaluate)(state, data.loader(Sequences(3, 1, 2, 5, 1), 3, collate=pack))[1]["size"] == (9 + 4) / 5


@pytest.mark.parametrize(
    "stream",
    [data.arrays({"x": x_of(8)}, 4, transform=with_anchors), data.loader(Sequences(3, 1, 2, 5), 4, collate=pack)],
    ids=["anchors", "packed"],
)
def test_a_number_alone_does_not_say_what_is_cut(stream):
    """Of a stream: of packed sequences it would be the one column that happens to have an entry for each."""
    step, state = made(lambda model, batch: model(next(iter(batch.values()))).mean(), microbatches=2)
    with pytest.raises(ValueError, match=r"cannot tell how this batch is cut.*examples=\('x', 'y'\)"):
        step(state, first(stream))


def test_an_object_of_the_users_own_has_a_streams_word_too():
    class Packed:
        def __init__(self, examples):
            self.tokens = torch.cat(examples)

    batch = first(data.loader(Sequences(3, 1, 2), 2, collate=Packed))
    assert type(batch) is Packed
    assert metrics.examples(batch) == 2


@pytest.mark.parametrize("n", [2, 5])
def test_the_lists_of_torchs_collate_are_columns(n):
    """Pairs of alike tensors, which a list of two examples could be, also in a batch of two."""
    seen = []

    def loss(model, batch):
        x, y = batch
        seen.append((len(x), len(y)))
        return (model(x) - model(y)).square().mean()

    step, state = made(loss, microbatches=2)
    pairs = x_of(n), x_of(n, 1)
    for stream in (
        data.loader(TensorDataset(*pairs), n),
        data.arrays(list(pairs), n),
        data.arrays(list(pairs), n, transform=lambda batch, key: [batch[0] + 1, batch[1]]),
    ):
        batch = first(stream)
        assert isinstance(batch, list)
        assert metrics.examples(batch) == n
        seen.clear()
        grads, _, _ = step.gradients(state, batch)
        assert seen == [(n // 2, n // 2), (n - n // 2, n - n // 2)]
        torch.testing.assert_close(grads, whole_gradient(loss, tuple(batch)), rtol=1e-12, atol=1e-12)
    assert metrics.examples(first(data.loader(TensorDataset(pairs[0]), n))) == n
    assert metrics.examples(tree.map(torch.Tensor.float, first(data.loader(TensorDataset(*pairs), n)))) == n


class Pictures:
    """Images `[3, height, 5]` of several heights, a label, and `boxes` of several numbers."""

    def __init__(self, n, height=lambda i: 2 + i):
        self.n, self.height = n, height

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return torch.full((3, self.height(i), 5), float(i)), i % 2, {"boxes": torch.ones(i + 1, 4), "id": i}


def unzipped(examples):
    return tuple(zip(*examples, strict=True))


class Unzipped(NamedTuple):
    images: Any
    labels: Any
    targets: Any


@pytest.mark.parametrize("height", [lambda i: 2 + i, lambda i: 5], ids=["ragged", "alike"])
@pytest.mark.parametrize("n", [1, 2])
def test_tuples_of_as_many_things_as_were_asked_for_are_examples(n, height):
    """As torchvision's detection collates; 11 examples by 4, so that the last batch has as many as an image has channels."""
    seen = []

    def loss(model, batch):
        images, labels, targets = batch
        assert all(len(image) == 3 for image in images)
        assert len(images) == len(labels) == len(targets)
        seen.extend(target["id"] for target in targets)
        values = torch.stack([image.mean() for image in images])
        return model(values[:, None].expand(-1, 4).double()).square().mean(), {"mean": values.mean()}

    step, state = made(loss, microbatches=n)
    collates = [unzipped, lambda e: list(map(list, unzipped(e))), lambda e: Unzipped(*unzipped(e))]
    for collate in collates if height(0) != height(1) else collates[:1]:
        step = made(loss, microbatches=n)[0]
        stream = data.loader(Pictures(11, height), 4, collate=collate)
        for each in (stream, stream.to("cpu")):
            seen.clear()
            assert fnrun.epoch_loop(step)(state, each)[1]["mean"].item() == pytest.approx(5.0)
            assert sorted(set(seen)) == list(range(11))
    step = made(loss, microbatches=n)[0]
    assert fnrun.epoch_loop(step)(state, data.loader(Pictures(6, height), 3, collate=unzipped))[1]["mean"].item() == 2.5
    hand, _ = made(loss, microbatches=2, examples=lambda batch: len(batch[1]))
    batch = unzipped([Pictures(4, height)[i] for i in range(4)])
    torch.testing.assert_close(hand.gradients(state, batch)[0], whole_gradient(lambda m, b: loss(m, b)[0], batch), rtol=1e-12, atol=1e-12)


def test_a_tuple_of_tuples_that_nobody_counted_is_not_clear():
    batch = unzipped([Pictures(4)[i][:2] for i in range(4)])
    with pytest.raises(ValueError, match=r"is not clear: 0/0 \[3, 2, 5\]"):
        metrics.examples(batch)
    assert metrics.examples(((torch.zeros(8), torch.zeros(8)), (torch.zeros(8), torch.zeros(8)))) == 8


class InFirst(NamedTuple):
    tokens: Any


@pytest.mark.parametrize(
    "collate",
    [
        pad_sequence,
        lambda e: pad_sequence(e).numpy(),
        lambda e: {"x": pad_sequence(e)},
        lambda e: InFirst(pad_sequence(e)),
        lambda e: SimpleNamespace(x=pad_sequence(e)),
        lambda e: OrderedDict(x=pad_sequence(e)),
    ],
    ids=["tensor", "array", "dict", "named tuple", "object", "ordered"],
)
@pytest.mark.filterwarnings("ignore:.*is not compiled")
def test_time_first_batches_count_and_are_not_cut_along_time(collate):
    stream = data.loader(Sequences(3, 1, 2, 5, 1), 3, collate=collate)
    for each in (stream, stream.to("cpu")):
        assert [metrics.examples(first(each, i)) for i in range(2)] == [3, 2]
    for options in ({}, {"compile": True}):
        step, state = made(lambda model, batch: model(next(iter(tree.leaves(batch)))).mean(), microbatches=2, **options)
        with pytest.raises(ValueError, match=r"cannot tell how this batch is cut: .*\[5, 2, 4\].*examples='x'.*split=f"):
            step(state, first(stream, 1))


def test_a_step_that_is_told_cuts_time_first_batches():
    def loss(model, batch):
        return model(batch).exp().sum(0).square().mean()  # over time, then over examples

    batch = first(data.loader(Sequences(3, 1, 2, 5), 4, collate=pad_sequence))
    split = made(loss, microbatches=3, split=lambda b, n: b.tensor_split(n, dim=1), examples=lambda b: b.shape[1])[0]
    torch.testing.assert_close(split.gradients(made(loss)[1], batch)[0], whole_gradient(loss, batch), rtol=1e-12, atol=1e-12)


@dataclasses.dataclass(slots=True)
class Slotted:
    x: Any
    y: Any


class Plain:
    def __init__(self, x, y):
        self.x, self.y, self.owner = x, y, self  # fields may go round in circles


@pytest.mark.parametrize("kind", [Slotted, lambda x, y: SimpleNamespace(x=x, y=y), Plain, lambda x, y: UserDict(x=x, y=y)])
def test_batches_that_are_objects_count_by_their_fields_and_are_split_by_hand(kind):
    def get(batch):
        return (batch["x"], batch["y"]) if isinstance(batch, UserDict) else (batch.x, batch.y)

    def loss(model, batch):
        x, y = get(batch)
        return (model(x)[:, 0] - y).square().mean(), {"n": float(len(x))}

    batches = [kind(x_of(n, n), torch.ones(n)) for n in (8, 3)]
    step, state = made(loss)
    assert [metrics.examples(batch) for batch in batches] == [8, 3]
    assert fnrun.epoch_loop(step)(state, batches)[1]["n"] == pytest.approx((64 + 9) / 11)
    with pytest.raises(ValueError, match=r"not clear: x \[8, 4\], y \[3\]"):
        metrics.examples(kind(x_of(8), torch.zeros(3)))
    for batch in (batches[0], {"a": torch.zeros(8), "b": batches[0]}):
        with pytest.raises(ValueError, match=r"x, (b/)?y lies in an object.*split=f"):
            made(loss, microbatches=2)[0](state, batch)

    def split(batch, n):
        return [kind(*each) for each in zip(*(column.tensor_split(n) for column in get(batch)), strict=True)]

    got = made(loss, microbatches=3, split=split)[0].gradients(state, batches[0])[0]
    torch.testing.assert_close(got, whole_gradient(lambda m, b: loss(m, b)[0], batches[0]), rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:The PyTorch API of nested")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch.jagged, "nested"])
def test_sparse_and_nested_tensors_are_batches_and_are_cut(layout):
    parts = [x_of(k, k) for k in (2, 4, 2, 3, 1)]

    def make():
        if layout in (torch.sparse_coo, torch.sparse_csr):
            return x_of(5).relu().to_sparse(layout=layout)
        return torch.nested.nested_tensor(parts, layout=torch.strided if layout == "nested" else layout)

    def loss(model, batch):
        if not batch["x"].is_nested:
            return (batch["x"] @ model.weight.t() + model.bias).square().mean(), {}
        return torch.stack([model(each).square().mean() for each in batch["x"].unbind()]).mean(), {}

    step, state = made(loss, microbatches=2)
    assert metrics.examples({"x": make()}) == 5
    ends = [fnrun.epoch_loop(s)(state, [{"x": make()}, {"x": make()}])[0] for s in (step, made(loss)[0])]
    torch.testing.assert_close(dict(ends[0].params), dict(ends[1].params), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match=r"is a (sparse|nested) tensor, and rows are gathered from dense ones"):
        data.arrays(make(), 2)


def test_texts_of_torchs_collate_are_cut_with_the_rest():
    class Named:
        def __len__(self):
            return 4

        def __getitem__(self, i):
            return x_of(1, i)[0], f"name {i}"

    seen = []
    step, state = made(lambda model, batch: (seen.append(list(batch[1])), model(batch[0]).mean())[1], microbatches=2)
    step(state, first(data.loader(Named(), 4)))
    assert seen == [["name 0", "name 1"], ["name 2", "name 3"]]


def test_plain_batches_stay_as_they_are():
    assert type(first(data.arrays({"x": x_of(8)}, 4, transform=lambda batch, key: {"x": batch["x"] + 1}))) is dict
    assert type(first(data.loader(TensorDataset(x_of(8), torch.zeros(8)), 4))) is list


def test_a_collate_that_leaves_examples_out_says_so():
    """Nobody can tell two examples of three from two steps of time for three."""
    filtered = first(data.loader(Sequences(3, 3, 3), 3, collate=lambda examples: {"x": torch.stack(examples[1:])}))
    assert metrics.examples(filtered) == 3
    assert made(squares, examples="x")[0].examples(filtered) == 2
    with pytest.raises(ValueError, match=r"no part|x would not be cut, the rest in 3 examples"):
        made(squares, microbatches=2)[0](made(squares)[1], filtered)


def test_skipping_goes_around_hand_written_steps_too():
    step = fnrun.step(lambda state, batch: (state, {"loss": torch.tensor(float("nan"))}))
    assert fnrun.skip_nonfinite(step)(fnrun.TrainState.create(nn.Linear(1, 1)), 1)[1] == {"skipped": 1.0}


def test_unknown_kinds_are_looked_through():
    assert rows.shapes({"x": torch.zeros(8, 4), "o": object()}) == "x [8, 4]"
    assert rows.shapes(object()) == "an object"


def test_an_error_in_a_piece_says_which_and_its_shapes():
    def loss(model, batch):
        return nn.functional.cross_entropy(model(batch["x"]).expand(-1, 10), torch.zeros(len(batch["x"])).long(), batch["weights"])

    step, state = made(loss, microbatches=2)
    with pytest.raises(RuntimeError, match="weight tensor") as caught:
        step(state, {"x": x_of(10), "weights": torch.ones(10).double()})
    assert caught.value.__notes__ == ["raised in microbatch 0 of 2, which is weights [5], x [5, 4]"]
