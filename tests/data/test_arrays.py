import itertools
import os
import random
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from fnrun import data
from fnrun.core.key import Key
from fnrun.core.position import Cursor
from fnrun.data import content
from tests.data.streams import KEY, same, take, unhurried, untouched


def tree_of(rows):
    return {"x": torch.arange(rows * 2.0).view(rows, 2), "more": (np.arange(rows),)}


def jitter(batch, key):
    torch.rand(3)
    return {**batch, "noise": torch.rand(2), "keyed": torch.rand(2, generator=key.generator())}


@unhurried
@given(st.integers(1, 12), st.integers(1, 5), st.booleans(), st.booleans(), st.integers(0, 10))
def test_from_any_cursor_comes_the_tail(rows, batch_size, shuffle, drop_last, at):
    drop_last = drop_last and rows >= batch_size
    stream = data.arrays(tree_of(rows), batch_size, shuffle=shuffle, drop_last=drop_last, transform=jitter)
    everything = take(stream, 16)
    assert same(take(stream, 16 - at - 1, everything[at][1]), everything[at + 1 :])


@unhurried
@given(st.integers(1, 12), st.integers(1, 5), st.booleans())
def test_a_pass_has_every_row_once(rows, batch_size, shuffle):
    stream = data.arrays(tree_of(rows), batch_size, shuffle=shuffle)
    for epoch in range(2):
        batches = [batch for batch, _ in take(stream, len(stream), Cursor(epoch=epoch))]
        seen = torch.cat([batch["more"][0] for batch in batches]).tolist()
        assert sorted(seen) == list(range(rows))
        assert shuffle or seen == list(range(rows))
        assert all(torch.equal(batch["x"][:, 0], batch["more"][0] * 2.0) for batch in batches)
        assert {len(batch["x"]) for batch in batches[:-1]} <= {batch_size}


def test_passes_and_keys_differ_in_order():
    stream = data.arrays(torch.arange(50), 50, shuffle=True)
    orders = [take(stream, 1, Cursor(epoch=e), key)[0][0].tolist() for e in range(3) for key in (Key(0), Key(1))]
    assert len({tuple(order) for order in orders}) == 6


def test_blocks_of_the_order_are_seamless(monkeypatch):
    whole = take(data.arrays(torch.arange(100), 7, shuffle=True), 32)
    monkeypatch.setattr(sys.modules["fnrun.data.arrays"], "BLOCK", 21)
    assert same(take(data.arrays(torch.arange(100), 7, shuffle=True), 32), whole)


def test_every_batch_draws_its_own():
    drawn = [batch for batch, _ in take(data.arrays(torch.zeros(4), 2, transform=lambda batch, key: float(torch.rand(()))), 4)]
    assert len(set(drawn)) == 4


def test_replay_gives_the_same_pass():
    stream = data.arrays(torch.arange(10), 4, shuffle=True, transform=lambda batch, key: batch + torch.rand(()))
    found = take(stream, 6, Cursor(epoch=2), replay=True)
    assert same(found[:3], found[3:])
    assert same(found[:3], take(stream, 3, Cursor(epoch=2)))


def test_seeking_costs_nothing_however_many_rows():
    stream = data.arrays(torch.zeros(1).expand(10**9), 10, shuffle=True)
    assert len(stream) == 10**8
    assert take(stream, 1, Cursor(epoch=5, batch=10**8 - 1))[0][1].epoch == 6


def test_global_generators_are_never_moved():
    with untouched():
        take(data.arrays(tree_of(9), 2, shuffle=True, transform=jitter), 12)


def test_a_transform_that_draws_elsewhere_is_told():
    for draw in (random.random, np.random.rand):
        with untouched(), pytest.raises(RuntimeError, match=r"key\.bits"):
            take(data.arrays(tree_of(4), 2, transform=lambda batch, key, draw=draw: (batch, draw())), 1)


def test_a_batch_owns_its_memory():
    for shuffle in (False, True):
        x = torch.arange(4.0)
        stream = data.arrays(x, 2, shuffle=shuffle, transform=lambda batch, key: batch.mul_(0))
        take(stream, 2)
        assert x.tolist() == [0, 1, 2, 3]


def test_read_only_arrays_are_fine():
    x = np.arange(4)
    x.flags.writeable = False
    assert take(data.arrays(x, 4), 1)[0][0].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("tensors", "options", "message"),
    [
        ({"image": torch.zeros(3), "label": torch.zeros(4)}, {}, "image has 3, label has 4"),
        (torch.zeros(0, 2), {}, "empty"),
        ({}, {}, "no array"),
        (torch.zeros(3), {"batch_size": 0}, "batch_size is at least 1, not 0"),
        (torch.zeros(3), {"batch_size": 4, "drop_last": True}, "3 rows are fewer than batch_size=4"),
        ({"x": torch.zeros(())}, {}, "x is a single number"),
        ({"x": [1, 2]}, {}, "x/0 is an int"),
        ({"x": np.array(["a"])}, {}, "x: can't convert"),
        ({"x": np.ma.array([1, 2], mask=[True, False])}, {}, "x is a masked array"),
    ],
)
def test_what_gives_no_batches_is_refused(tensors, options, message):
    with pytest.raises(ValueError, match=message):
        data.arrays(tensors, **{"batch_size": 2, **options})


def test_a_batch_larger_than_the_data_is_one_short_batch():
    stream = data.arrays(torch.arange(3), 100)
    assert len(stream) == 1
    assert take(stream, 2)[1][0].tolist() == [0, 1, 2]


def test_the_source_says_what_the_batches_are_made_of():
    x = torch.arange(10.0)
    source = data.arrays(x, 2).source
    assert source == data.arrays(x.clone(), 2).source
    assert source.startswith("arrays of 10 rows, 2 a batch, in order, content ")
    for other in (
        data.arrays(x, 3),
        data.arrays(x, 2, shuffle=True),
        data.arrays(x, 2, drop_last=True),
        data.arrays(x + 1, 2),
        data.arrays({"x": x}, 2),
    ):
        assert other.source != source


def test_the_digest_of_large_content_reads_blocks_of_it(monkeypatch):
    monkeypatch.setattr(content, "LIMIT", 4096)
    x = torch.arange(100_000)
    digest = content.digest(x)
    assert digest == content.digest(x.clone())
    assert sum(part.nbytes for part in content._parts(x, 4096 / x.nbytes)) < 4 * 4096
    for at in (0, -1):
        other = x.clone()
        other[at] += 1
        assert content.digest(other) != digest
    assert content.digest(x[:-1]) != digest


def test_nothing_is_kept_between_iterations():
    stream = data.arrays(torch.arange(8), 2, shuffle=True)
    a, b = stream.iterate(KEY, Cursor()), stream.iterate(KEY, Cursor())
    assert all(same(next(a), next(b)) for _ in range(9))


@pytest.mark.parametrize("dtype", ["uint16", "int32", "float32"])
def test_a_mapped_file_stays_on_disk(tmp_path, dtype):
    """A file of tokens that may only be read: its rows come as they are, its memory is the file's, and a batch can be written to."""
    path = tmp_path / "tokens.bin"
    np.arange(64, dtype=dtype).tofile(path)
    mapped = np.memmap(path, dtype=dtype, mode="r").reshape(16, 4)
    stream = data.arrays({"tokens": mapped}, 5, shuffle=True)
    assert stream.tensors["tokens"].data_ptr() == mapped.ctypes.data
    batches = [batch["tokens"] for batch, _ in itertools.islice(stream.iterate(Key(0), Cursor()), 4)]
    assert sorted(torch.cat([batch.long() for batch in batches])[:, 0].tolist()) == list(range(0, 64, 4))
    batches[0].zero_()
    assert np.fromfile(path, dtype).tolist() == list(range(64))


def anonymous():
    """The bytes of this process that lie in no file."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) * 1024


@pytest.mark.parametrize("mode", ["r", "r+", "c"])
def test_a_mapped_file_takes_no_memory(tmp_path, mode):
    (tmp_path / "sparse").touch()
    os.truncate(tmp_path / "sparse", 2**28)
    before = anonymous()
    stream = data.arrays(np.memmap(tmp_path / "sparse", np.uint16, mode).reshape(-1, 1024)[:-1], 8, shuffle=True)
    assert len(stream.source) > 0
    assert take(stream, 2)[1][0].shape == (8, 1024)
    assert anonymous() - before < 2**27


def test_a_file_mapped_by_torch_is_read_as_it_is(tmp_path):
    np.arange(32, dtype=np.int32).tofile(tmp_path / "numbers")
    mapped = torch.from_file(str(tmp_path / "numbers"), size=32, dtype=torch.int32)
    assert take(data.arrays(mapped.unfold(0, 5, 4), 7), 1)[0][0][:, -1].tolist() == list(range(4, 32, 4))


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "uint64", "bool", "float16", "complex64"])
def test_rows_of_every_dtype_are_gathered(dtype):
    x = np.arange(6).astype(dtype)
    for rows in (x, x.reshape(6, 1)):
        batch = take(data.arrays(rows, 6, shuffle=True), 1)[0][0]
        assert batch.dtype == torch.from_numpy(x).dtype
        order = take(data.arrays(torch.arange(6), 6, shuffle=True), 1)[0][0]
        assert np.array_equal(batch.numpy(), rows[order.numpy()])


def unreadable(x):
    """The numbers of `x` as torch cannot read them where they lie."""
    records = np.zeros(len(x), [("odd", "i1"), ("x", x.dtype)])
    records["x"] = x
    return {"swapped": x.astype(x.dtype.newbyteorder(">")), "reversed": x[::-1].copy()[::-1], "field": records["x"]}


@pytest.mark.parametrize("how", ["swapped", "reversed", "field"])
def test_what_torch_cannot_read_where_it_lies_is_copied_from_memory_and_refused_from_a_file(tmp_path, how):
    x = np.arange(6, dtype=np.int32)
    assert take(data.arrays(unreadable(x)[how], 6), 1)[0][0].tolist() == x.tolist()
    assert data.arrays(unreadable(x)[how], 6).source == data.arrays(x, 6).source
    odd = unreadable(x)[how]
    owner = odd if odd.base is None else odd.base
    mapped = np.memmap(tmp_path / "file", owner.dtype, "w+", shape=owner.shape)
    view = {"swapped": mapped, "reversed": mapped[::-1], "field": mapped["x"] if how == "field" else mapped}[how]
    with pytest.raises(ValueError, match="tokens is mapped from a file, of dtype"):
        data.arrays({"tokens": np.asarray(view)}, 2)
