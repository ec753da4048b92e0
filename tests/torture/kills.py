"""SIGKILL at any moment of a process that saves as fast as it can: nothing that was saved is gone, and nothing is wrong.

    python -m tests.torture.kills [300]

Kills at random moments, each of which goes on from what the one before has left; and one kill right before each operation on files that
three saves, with what they delete, consist of. Both for plain saves, for a training loop and for one that donates.
"""

from __future__ import annotations

import itertools
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from fnrun.checkpoint import CheckpointError, Checkpoints
from fnrun.core import tree
from tests.torture.training import WAYS, Process, parameters

#: Seconds from the first save to the kill, at most: that of several saves.
SPREAD = 0.4


class Kills:
    """Kills, what they found on disk, and what was lost or wrong there."""

    def __init__(self) -> None:
        self.kills = 0
        self.found: Counter[str] = Counter()
        self.lost: list[str] = []
        self.wrong: list[str] = []

    def at_moments(self, way: str, folder: Path, moments: Iterable[float]) -> None:
        """A kill so many seconds after a child's first save has begun, and another child that goes on from there."""
        saved = 0
        for seconds in moments:
            process = Process(way, folder)
            process.begun()
            time.sleep(seconds)
            code, reported = process.end(kill=True)
            assert code == -signal.SIGKILL, f"the child ended by itself: {code}"
            saved = max(saved, reported)
            self._look(folder, saved)

    def at_operations(self, way: str, folder: Path, operations: Iterable[int]) -> None:
        """A kill right before these operations on files, each in a copy of the same three checkpoints; the last child ends by itself."""
        code, saved = Process(way, folder / "begun", last=3).end(kill=False)
        assert (code, saved) == (0, 3)
        for operation in operations:
            copy = shutil.copytree(folder / "begun", folder / str(operation))
            code, reported = Process(way, copy, last=6, operation=operation).end(kill=False)
            assert code in (0, -signal.SIGKILL), f"the child failed: {code}"
            if code == 0:
                break
            self._look(copy, max(saved, reported))
            shutil.rmtree(copy)

    def _look(self, folder: Path, saved: int) -> None:
        self.kills += 1
        self.found[_phase(folder)] += 1
        checkpoints = Checkpoints(folder)
        steps = checkpoints.steps()
        if max(steps, default=0) < saved or (saved and checkpoints.best() != 1):
            self.lost.append(f"kill {self.kills}: step {saved} and the best, 1, were reported as saved; on disk are {steps}")
        if aside := sorted(path.name for path in folder.glob("abandoned-*")):
            self.lost.append(f"kill {self.kills}: moved aside: {aside}")
        for step in steps:
            try:
                state = checkpoints.restore(step=step)
            except CheckpointError as error:
                self.wrong.append(f"kill {self.kills}: {error}")
                continue
            if (state.step, state.position.ticks) != (step, step) or not tree.equal(dict(state.params), parameters(step)):
                self.wrong.append(f"kill {self.kills}: step {step} is not what was saved")

    def __str__(self) -> str:
        phases = ", ".join(f"{count} {phase}" for phase, count in self.found.most_common())
        return "\n".join([f"{self.kills} kills: {len(self.lost)} lost, {len(self.wrong)} wrong. Killed {phases}", *self.lost, *self.wrong])


def _phase(directory: Path) -> str:
    """What the process was doing when it was killed, as far as its files tell."""
    temporary = list(directory.glob(".tmp-*"))
    if any(path.name.startswith(".tmp-delete-") for path in temporary):
        return "while deleting"
    if any((path / "manifest.sha256").exists() for path in temporary):
        return "between the last file and the rename"
    if any((path / "manifest.json").exists() for path in temporary):
        return "while the manifest was written"
    if temporary:
        return "while arrays were written" if any(any(path.iterdir()) for path in temporary) else "before the first file"
    return "between saves" if list(directory.glob("*-*")) else "before the first save"


def main(kills: int) -> int:
    chance, bad = random.Random(kills), 0
    with tempfile.TemporaryDirectory() as name:
        for way in WAYS:
            at_random, each = Kills(), Kills()
            at_random.at_moments(way, Path(name) / way, (chance.uniform(0, SPREAD) for _ in range(kills // len(WAYS))))
            print(f"{way}, at random moments: {at_random}", flush=True)
            each.at_operations(way, Path(name) / f"{way}, operations", itertools.count())
            print(f"{way}, at each operation: {each}", flush=True)
            bad += sum(len(found) for done in (at_random, each) for found in (done.lost, done.wrong))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 300))
