"""Runs that an earlier version left in the middle: today's code goes on with them to the end that it would have come to, and proves them.

`tests/earlier_runs/digits-N` is an interrupted run of `experiments.digits` with checkpoints of format N, `digits-N.json` says how the run
ended that the same version made without an interruption. Both were written once and are never written again.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fnrun
from experiments.digits import build, network, split
from fnrun.checkpoint import Checkpoints
from fnrun.cli.commands import main as command
from fnrun.core import tree

RUNS = Path(__file__).parent / "earlier_runs"

#: Kernels that compute the same on as many processors as can be.
ALIKE = {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "ONEDNN_MAX_CPU_ISA": "SSE41", "OMP_NUM_THREADS": "1"}


def canary() -> str:
    """Some bits of torch alone, from the kernels that the run calls: where they are others than then, so are those of any run."""
    torch.set_num_threads(1)
    images, labels = (part[:128] for part in split(True))
    model = network(0.0)
    with torch.no_grad():
        for n, p in enumerate(model.parameters()):
            p.copy_(torch.sin(torch.arange(p.numel(), dtype=torch.float64) * 0.7 + n).mul(0.1).float().view_as(p))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, fused=True)
    for at in (0, 64, 0, 64):
        optimizer.zero_grad()
        F.cross_entropy(model(images[at : at + 64]), labels[at : at + 64]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()


def trained(state: Any) -> dict[str, Any]:
    """All that was trained, in containers that no version names otherwise."""
    momentum = [leaf for leaf in tree.leaves(state.opt_state) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and leaf.ndim]
    return {"params": state.params, "buffers": state.buffers, "ema": state.memory["ema"], "momentum": momentum, "step": state.step}


def ending(run: Path) -> dict[str, Any]:
    """How a run ended: the digest of what was trained, the norms of the weights, and the last line of its log without the clock."""
    state = Checkpoints(run / "checkpoints").restore()
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        "trained": tree.fingerprint(trained(state)),
        "norms": {name: p.double().norm().item() for name, p in state.params.items()},
        "logged": [{name: value for name, value in line.items() if name != "clock"} for line in logged],
    }


@pytest.mark.parametrize("begun", sorted(path for path in RUNS.iterdir() if path.is_dir()), ids=lambda path: path.name)
def test_a_run_that_an_earlier_version_began_is_resumed_to_the_end_that_it_would_have_come_to_and_is_proven(begun: Path, tmp_path) -> None:
    then = json.loads(begun.with_suffix(".json").read_text())
    run = shutil.copytree(begun, tmp_path / begun.name)
    (name,) = (path.name for path in (run / "checkpoints").iterdir())
    command = [sys.executable, "-m", "tests.test_earlier_runs", "resume", str(run), then["canary"]]
    done = subprocess.run(command, env={**os.environ, **ALIKE}, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    now = json.loads((run / "ending.json").read_text())
    manifests = [(place / "checkpoints" / name / "manifest.json").read_bytes() for place in (begun, run)]
    assert manifests[0] == manifests[1]
    if now["canary"] == then["canary"]:
        assert now["ending"] == then["ending"]
        assert now["proven"] == [[56, "equal"], [69, "equal"]]
    else:  # another processor: what is left to see is that it is the same training, and that it can be repeated here
        assert now["ending"]["norms"] == pytest.approx(then["ending"]["norms"], rel=2e-2)
        for line, expected in zip(now["ending"]["logged"], then["ending"]["logged"], strict=True):
            assert line.pop("at") == expected.pop("at")
            assert line == pytest.approx(expected, rel=0.2, abs=0.02)
        assert now["proven"] == [[69, "equal"]]


def resume(run: Path, expected: str) -> None:
    """Go on with a run and prove it, as a shell would, and note how it ended; from its beginning where this processor computes as then."""
    found = canary()
    with pytest.raises(SystemExit) as end:
        fnrun.main(build, ["resume", str(run)])
    assert end.value.code == 0
    beginning = ["--from-start"] if found == expected else ["--to", "69"]
    with contextlib.redirect_stdout(io.StringIO()) as told:
        assert command(["verify", str(run), "--json", *beginning]) == 0
    proven = [[pair["step"], pair["outcome"]] for pair in json.loads(told.getvalue())["pairs"]]
    (run / "ending.json").write_text(json.dumps({"canary": found, "ending": ending(run), "proven": proven}))


if __name__ == "__main__":
    if sys.argv[1] == "resume":
        resume(Path(sys.argv[2]), sys.argv[3])
    else:  # python -m tests.test_earlier_runs WHOLE_RUN > tests/earlier_runs/digits-N.json, by the version that made both
        print(json.dumps({"canary": canary(), "ending": ending(Path(sys.argv[1]))}, indent=1))
