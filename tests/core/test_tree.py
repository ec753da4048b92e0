"""Pytrees by their bits."""

from __future__ import annotations

import math
import struct as binary
import subprocess
import sys
from collections import OrderedDict, namedtuple
from typing import Any

import numpy as np
import optree
import pytest
import torch
from hypothesis import given, strategies as st
from torch.utils import _pytree as torch_pytree

from fnrun.core import tree


@tree.struct(name="tests.test_tree:Point")
class Point:
    x: Any
    y: Any = 0.0
    unit: str = tree.static(default="m")


@tree.struct(name="tests.test_tree:Named")
class Named(Point):
    name: Any = "p"


Pair = namedtuple("Pair", ["a", "b"], module="tests.test_tree")

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn]
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.complex_numbers(), st.text(max_size=3), st.binary(max_size=3))
tensors = st.builds(
    lambda dtype, shape, seed: torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed)).to(dtype),
    st.sampled_from(DTYPES), st.sampled_from([(), (0,), (2,), (2, 0), (2, 3)]), st.integers(0, 3),
)  # fmt: skip
trees = st.recursive(
    st.one_of(scalars, tensors),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=3), inner, max_size=3),
        st.builds(Point, inner, inner),
        st.builds(Pair, inner, inner),
    ),
    max_leaves=8,
)


@given(trees, trees)
def test_equal_is_an_empty_diff_and_the_same_fingerprint(a, b):
    assert tree.equal(a, a)
    assert tree.equal(a, tree.snapshot(a))
    assert tree.fingerprint(a) == tree.fingerprint(tree.snapshot(a))
    assert tree.equal(a, b) == (tree.fingerprint(a) == tree.fingerprint(b)) == (not tree.diff(a, b))


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (0.0, -0.0), (1, True), (1, 1.0), (None, 0), ((), []), ({}, ()), ([1], (1,)), (Pair(1, 2), (1, 2)), ({"a": 1}, OrderedDict(a=1)),
        ({1: 0}, {True: 0}), ({1: 0}, {"1": 0}), (b"a", "a"), (Point(1, 2), Named(1, 2)), (Point(1, unit="m"), Point(1, unit="km")),
        (torch.zeros(2), torch.zeros(2, dtype=torch.float64)), (torch.zeros(2), torch.zeros(1, 2)), (torch.zeros(1), -torch.zeros(1)),
        (torch.zeros(0), torch.zeros(0, 3)), (torch.zeros(1), np.zeros(1, np.float32)), ({None: 1}, {None: 2}), ({(1, 2): 1}, {(1, 2): 2}),
    ],
)  # fmt: skip
def test_what_is_not_the_same(a, b):
    assert not tree.equal(a, b)
    assert not tree.equal({"deep": [a]}, {"deep": [b]})
    assert tree.fingerprint(a) != tree.fingerprint(b)
    assert tree.diff(a, b)


def test_nan_payloads_count():
    quiet, other = (torch.frombuffer(bytearray(binary.pack("<I", bits)), dtype=torch.float32) for bits in (0x7FC00000, 0x7FC00001))
    assert quiet.isnan().all()
    assert other.isnan().all()
    assert tree.equal(quiet, quiet.clone())
    assert not tree.equal(quiet, other)
    assert tree.equal(math.nan, math.nan)


def test_dictionaries_are_equal_whatever_their_order():
    assert tree.equal({"a": 1, "b": 2}, {"b": 2, "a": 1})
    assert tree.fingerprint({"a": 1, "b": 2}) == tree.fingerprint({"b": 2, "a": 1})


def test_strides_and_views_do_not_matter():
    t = torch.arange(6.0).view(2, 3)
    assert tree.equal(t, t.t().contiguous().t())
    assert tree.fingerprint(t) == tree.fingerprint(t.t().contiguous().t())
    z = torch.complex(t, -t)
    assert tree.equal(z.conj(), z.conj().resolve_conj())


def test_fingerprints_are_for_ever_and_for_every_process():
    value = {"w": torch.arange(3.0), "n": (1, None, "x", 2.5), "p": Point(torch.tensor(True))}
    code = (
        "import torch; from tests.core.test_tree import Point; from fnrun import tree;"
        "print(tree.fingerprint({'w': torch.arange(3.0), 'n': (1, None, 'x', 2.5), 'p': Point(torch.tensor(True))}))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "7", "PYTHONPATH": "."}
    )
    assert out.stdout.strip() == tree.fingerprint(value) == "640c1dc3fbfbb6824d6b284e47739b69bed3b263e03b3fa0000d83e17ac3724e"


def test_diff_says_where_what_and_by_how_much():
    a = {"params": {"0.weight": torch.tensor([1.0, 2.0]), "gone": 1}, "n": 1, "dtype": torch.zeros(1)}
    b = {"params": {"0.weight": torch.tensor([1.0, 2.5]), "new": 1}, "n": True, "dtype": torch.zeros(1, dtype=torch.float64)}
    found = {d.path: (d.what, d.detail) for d in tree.diff(a, b)}
    assert found == {
        "params/0.weight": ("value", "1 of 2 elements differ, by at most 0.5"),
        "params/gone": ("missing", "1"),
        "params/new": ("unexpected", "1"),
        "n": ("type", "1 and True"),
        "dtype": ("dtype", "torch.float32 and torch.float64"),
    }


def test_a_leaf_that_is_no_data_is_refused_with_its_path():
    with pytest.raises(TypeError, match=r"leaf memory/f~1g is a function"):
        tree.fingerprint({"memory": {"f/g": lambda: 0}})


def test_a_struct_is_a_node_for_optree_and_for_torch():
    point = Point(torch.ones(2), {"a": torch.zeros(1)}, unit="km")
    assert len(optree.tree_leaves(point)) == len(torch_pytree.tree_leaves(point)) == 2
    doubled = torch.func.vmap(lambda p: Point(p.x * 2, p.y, p.unit))(Point(torch.ones(3), torch.ones(3), "km"))
    assert isinstance(doubled, Point)
    assert doubled.x.tolist() == [2.0, 2.0, 2.0]
    assert doubled.unit == "km"
    assert tree.paths(point) == ["x", "y/a"]
    with pytest.raises(AttributeError):
        point.x = 1
    with pytest.raises((AttributeError, TypeError)):
        point.z = 1


def test_a_snapshot_shares_nothing():
    value = {"t": torch.zeros(2), "a": np.zeros(2)}
    copy = tree.snapshot(value)
    value["t"].add_(1)
    value["a"] += 1
    assert copy["t"].sum() == 0
    assert copy["a"].sum() == 0
