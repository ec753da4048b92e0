"""`sync_buffers` over two real processes."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import torch
from torch import nn

import fnrun
from fnrun import hooks

RANKS = """
    import torch, torch.distributed as dist
    import fnrun
    from fnrun import hooks

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    buffers = {
        "mean": torch.tensor([1.0, 2.0]) * (rank + 1), "wide": torch.full((2, 2), float(rank), dtype=torch.float64),
        "var": torch.tensor(4.0) + rank, "count": torch.tensor(5 + rank), "mask": torch.tensor([rank == 0, True]),
    }
    state = fnrun.TrainState(params={"x": torch.tensor(float(rank))}, buffers=buffers, opt_state=None, rng=fnrun.Key(0))
    before = fnrun.tree.snapshot(state)
    step = fnrun.step(lambda state, batch: (state, {}))
    end, _ = fnrun.epoch_loop(step, hooks=[hooks.every(2, hooks.sync_buffers)])(state, [0, 0])
    expected = {
        "mean": torch.tensor([1.5, 3.0]), "wide": torch.full((2, 2), 0.5, dtype=torch.float64),
        "var": torch.tensor(4.5), "count": torch.tensor(5), "mask": torch.tensor([True, True]),
    }
    assert fnrun.tree.equal(end.buffers, expected), fnrun.tree.diff(end.buffers, expected)
    assert end.params["x"].item() == rank
    assert fnrun.tree.equal(state, before)
    dist.destroy_process_group()
    print("in step")
"""


def test_two_ranks_agree(tmp_path):
    """Batch statistics are the mean; counts and masks are those of rank 0; parameters are left alone, and so is the old state."""
    script = tmp_path / "ranks.py"
    script.write_text(textwrap.dedent(RANKS))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("in step") == 2


def test_without_other_ranks_it_does_nothing():
    state = fnrun.TrainState.create(nn.BatchNorm1d(2))
    assert hooks.sync_buffers(state, {}) is state
    assert torch.distributed.is_available()
