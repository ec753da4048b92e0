import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from torch.utils.data import TensorDataset

import fnrun
from fnrun import Key, data
from fnrun.core import tree
from fnrun.core.position import Cursor
from fnrun.data.order import permutation
from tests.data.streams import KEY, same, take, unhurried


def listed(n):
    return data.batches([torch.tensor([float(i)]) for i in range(n)])


@unhurried
@given(st.integers(1, 4), st.integers(0, 9), st.booleans(), st.booleans())
def test_from_any_cursor_comes_the_tail(n, at, ahead, replay):
    stream = listed(n).to("cpu") if ahead else listed(n)
    everything = take(stream, 14, replay=replay)
    cursor = everything[at][1]
    if replay and cursor.batch == 0:
        cursor = cursor.__class__(0, 0, cursor.source)
    assert same(take(stream, 14 - at - 1, cursor, replay=replay), everything[at + 1 :])


def test_passes_follow_each_other():
    found = [(int(batch), after.epoch, after.batch) for batch, after in take(listed(2), 5)]
    assert found == [(0, 0, 1), (1, 1, 0), (0, 1, 1), (1, 2, 0), (0, 2, 1)]


def test_replay_says_where_the_pass_ends_and_gives_it_again():
    found = [(int(batch), after.epoch, after.batch) for batch, after in take(listed(2), 5, Cursor(epoch=3), replay=True)]
    assert found == [(0, 3, 1), (1, 4, 0), (0, 3, 1), (1, 4, 0), (0, 3, 1)]


def test_a_position_beyond_the_pass_is_refused():
    with pytest.raises(ValueError, match=r"batch 2 of epoch 1, and a pass has 2 batches"):
        take(listed(2), 1, Cursor(epoch=1, batch=2))


def test_the_source_tells_contents_apart():
    assert listed(2).source == listed(2).source != listed(3).source
    assert data.batches([torch.zeros(1)]).source != data.batches([torch.ones(1)]).source
    assert data.batches([{"a": 1}]).source != data.batches([{"b": 1}]).source
    assert take(listed(2), 1)[0][1].source == listed(2).source


def test_what_is_no_stream_is_told_what_to_use():
    stream = listed(1)
    assert data.as_batches(stream) is stream
    assert len(data.as_batches([1, 2])) == len(data.as_batches((1, 2))) == 2
    loader = torch.utils.data.DataLoader([1, 2])
    for value, remedy in ((loader, "data.loader"), (iter([]), "data.stateful"), (None, "NoneType is not"), ({"train": [1]}, "dict is not")):
        with pytest.raises(TypeError, match=remedy):
            data.as_batches(value)
    with pytest.raises(TypeError, match="has examples, not batches"):
        data.as_batches(torch.utils.data.TensorDataset(torch.zeros(2)))
    with pytest.raises(ValueError, match="empty"):
        data.as_batches([])


def test_to_is_the_same_stream_elsewhere():
    stream = data.arrays({"x": torch.arange(6.0)}, 2, shuffle=True, name="train")
    moved = stream.to("cpu")
    assert (moved.name, moved.source, len(moved)) == ("train", stream.source, 3)
    assert same(take(moved, 7), take(stream, 7))
    assert take(stream.to("meta"), 1)[0][0]["x"].device.type == "meta"


class Broken:
    """A stream whose third batch cannot be had."""

    name, source = None, "broken"

    def __init__(self):
        self.asked, self.closed = 0, False

    def iterate(self, key, cursor, *, replay=False):
        try:
            for i in itertools.count():
                self.asked += 1
                if i == 2:
                    raise OSError("unreadable")
                yield torch.tensor(i), Cursor(0, i + 1)
        finally:
            self.closed = True


def test_to_looks_one_batch_ahead_and_raises_in_its_place():
    inner = Broken()
    iterator = data.OnDevice(inner, torch.device("cpu")).iterate(KEY, Cursor())
    assert int(next(iterator)[0]) == 0
    assert inner.asked == 2
    assert int(next(iterator)[0]) == 1
    with pytest.raises(OSError, match="unreadable"):
        next(iterator)
    assert inner.closed


def test_closing_closes_what_is_inside():
    inner = Broken()
    iterator = data.OnDevice(inner, torch.device("cpu")).iterate(KEY, Cursor())
    next(iterator)
    iterator.close()
    assert inner.closed


SEEDED = {
    "arrays": lambda seed, **options: data.arrays(torch.arange(10), 3, seed=seed, **options),
    "loader": lambda seed, **options: data.loader(TensorDataset(torch.arange(10)), 3, seed=seed, **options),
}


def order(stream, key, batches=8):
    return [leaf.tolist() for batch, _ in itertools.islice(stream.iterate(key, Cursor()), batches) for leaf in tree.leaves(batch)]


@pytest.mark.parametrize("kind", SEEDED)
def test_with_a_seed_the_order_is_that_of_its_key_whatever_the_state_s(kind):
    stream = SEEDED[kind](7, shuffle=True)
    rows = [permutation(Key(7).fold_in(epoch, "order"), 10, np.arange(10)).tolist() for epoch in range(2)]
    expected = [each[at : at + 3] for each in rows for at in range(0, 10, 3)]
    assert order(stream, Key(0)) == order(stream, Key(1).fold_in("data", "train")) == expected
    assert order(SEEDED[kind](8, shuffle=True), Key(0)) != expected
    unseeded = SEEDED[kind](None, shuffle=True)
    assert order(unseeded, Key(0)) != order(unseeded, Key(1))
    batch, after = next(stream.iterate(Key(3), Cursor(epoch=1, batch=2)))
    assert [leaf.tolist() for leaf in tree.leaves(batch)] == expected[6:7]
    assert (after.epoch, after.batch) == (1, 3)


@pytest.mark.parametrize("kind", SEEDED)
def test_the_source_tells_the_seed_and_a_seed_has_something_to_do(kind):
    make = SEEDED[kind]
    assert "3 a batch, shuffled by seed 7" in make(7, shuffle=True).source
    assert make(7, shuffle=True).source != make(8, shuffle=True).source
    assert "seed" not in make(None, shuffle=True).source
    with pytest.raises(ValueError, match=rf"data\.{kind}: seed=7 is for the order"):
        make(7)
    with pytest.raises(TypeError, match="seed is an int, and not True"):
        make(True, shuffle=True)


def test_what_a_transform_draws_follows_the_state_s_key_all_the_same():
    stream = data.arrays(torch.zeros(4, 2), 4, shuffle=True, seed=7, transform=lambda batch, key: batch + torch.rand(4, 2))
    one, two = (next(stream.iterate(key, Cursor()))[0] for key in (Key(0), Key(1)))
    assert not torch.equal(one, two)


def test_who_iterates_a_stream_is_told_how_one_looks_at_a_batch():
    rows = TensorDataset(torch.arange(4))
    for stream in (listed(2), data.arrays(torch.arange(4), 2), data.loader(rows, 2), data.arrays(torch.arange(4), 2).to("cpu")):
        with pytest.raises(TypeError, match=r"is iterated by a loop, .*To look at one batch: (.*)$") as error:
            list(stream)  # pyright: ignore[reportArgumentType]
        batch = eval(str(error.value).partition("one batch: ")[2], {"fnrun": fnrun, "stream": stream, "next": next})
        assert tree.equal(batch, take(stream, 1)[0][0])
