import itertools

import pytest
import torch
from hypothesis import given, strategies as st

from fnrun import data
from fnrun.state import Cursor
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
