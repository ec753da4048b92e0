from __future__ import annotations

import logging

import pytest
import torch

import fnrun
from fnrun import observers
from fnrun.testing import assert_observers_do_not_matter
from tests.observers.small import Kept, Small


def test_a_table_at_the_first_tick_and_records_afterwards(caplog):
    caplog.set_level(logging.INFO, "fnrun")
    small, sink = Small(), Kept()
    watching = observers.memory(2, to=[sink])
    state = small.state().replace(memory={})
    fnrun.epoch_loop(small.step, observers=[watching])(state, small.batches)
    (message,) = [record.getMessage() for record in caplog.records]
    lines = message.splitlines()
    params = sum(p.numel() for p in small.model.parameters())
    held = 4 * params  # the parameters alone
    assert "params" in lines[0]
    assert "opt_state" in lines[0]
    assert "[8, 4] float32" in lines[1]
    assert [record.step for record in sink.records] == [2, 4]
    for record in sink.records:
        assert 3 * held <= record.metrics["state_mib"] * 2**20 <= 3 * held + 64  # with Adam's two moments and a few numbers
        assert 1 < record.clock["resident_mib"] < 1e6
    assert not sink.is_open


def test_memory_that_two_leaves_share_counts_once():
    from fnrun.observers.memory import table

    one = torch.zeros(1024, 256)
    assert table({"a": one, "b": one, "c": one[:10]}).splitlines()[0] == "memory: the state takes 1.0 MiB: a 1.0"


def test_it_changes_no_bit():
    small = Small()
    loop = fnrun.epoch_loop(small.step, observers=[observers.memory(2, to=[Kept()])])
    assert_observers_do_not_matter(loop, small.state(), small.batches)


def test_every_is_at_least_one():
    with pytest.raises(ValueError, match="at least 1"):
        observers.memory(0)
