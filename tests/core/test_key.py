"""Keys: golden values, and generators that are left as they were."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from fnrun.core.key import Key


def state():
    numpy = np.random.get_state()
    return torch.get_rng_state().tolist(), random.getstate(), (numpy[1].tolist(), *numpy[2:])


def test_golden_values():
    """They never change: saved runs depend on them."""
    assert Key(0).path.hex() == "340a8e5bf2249223641ce9b5da08a204"
    assert Key(-1).path.hex() == "0fdfed61196fa03e16b6807da981a902"
    assert Key(2**70).fold_in("train", 17).path.hex() == "68e3c0e9495e12fe26179a5acf37fe89"
    assert Key(3).fold_in("data", "é", -5).bits == 10403573549614491274
    assert [k.bits for k in Key(0).split(2)] == [6755218473310840828, 13620711129899059240]
    assert torch.rand(3, generator=Key(0).generator()).tolist() == pytest.approx(
        [0.9740806818008423, 0.6609678864479065, 0.48585057258605957]
    )


@given(st.integers(), st.lists(st.one_of(st.integers(), st.text()), min_size=1, max_size=4), st.integers(0, 4))
def test_folding_step_by_step_is_folding_at_once(seed, data, cut):
    assert Key(seed).fold_in(*data) == Key(seed).fold_in(*data[:cut]).fold_in(*data[cut:])
    assert Key(seed).fold_in(*data) != Key(seed)


@given(st.lists(st.one_of(st.integers(-300, 300), st.text(max_size=2)), min_size=1, max_size=3), st.lists(st.one_of(st.integers(-300, 300), st.text(max_size=2)), min_size=1, max_size=3))  # fmt: skip
def test_different_data_give_different_keys(a, b):
    assert (Key(0).fold_in(*a) == Key(0).fold_in(*b)) == (a == b)


def test_numpy_integers_count_as_ints_and_nothing_else_does():
    assert Key(0).fold_in(np.int64(3)) == Key(0).fold_in(3)
    for wrong in (True, 1.0, None, b"x", torch.tensor([1, 2])):
        with pytest.raises(TypeError):
            Key(0).fold_in(wrong)


@pytest.mark.parametrize("host", [False, True])
def test_a_scope_leaves_the_generators_as_they_were(host):
    before = state()
    with Key(1).scope(host=host):
        first = torch.rand(2).tolist(), *([random.random(), np.random.rand()] if host else [])
    assert state() == before

    def fails():
        with Key(1).scope(host=host):
            raise ZeroDivisionError(torch.rand(2))

    with pytest.raises(ZeroDivisionError):
        fails()
    assert state() == before
    _ = torch.rand(5), random.random(), np.random.rand()
    with Key(1).scope(host=host):
        assert (torch.rand(2).tolist(), *([random.random(), np.random.rand()] if host else [])) == first


def test_scopes_nest():
    with Key(1).scope():
        a = torch.rand(1)
        with Key(2).scope():
            torch.rand(10)
        b = torch.rand(1)
    with Key(1).scope():
        assert torch.equal(torch.rand(1), a)
        assert torch.equal(torch.rand(1), b)
