"""A real training whose state follows from its step, bit for bit: every step takes exactly 1 from every parameter.

It runs in children of a warm process (a fork server that has imported torch, and has not used it), so that one starts in 20 ms.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fnrun
from fnrun import data, observers, optim
from fnrun.checkpoint import Checkpoints
from fnrun.core.position import Position

#: Parameters of several sizes.
SIZES = {"large": 70_000, "larger": 90_000, "middle": 5_000, "small": 7, "one": 1}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, size in SIZES.items():
            self.register_parameter(name, nn.Parameter(torch.arange(size, dtype=torch.float32)))


def parameters(step: int) -> dict[str, torch.Tensor]:
    """What the parameters are after that step, computed without fnrun; exact, since float32 holds integers up to 2**24."""
    return {name: torch.arange(size, dtype=torch.float32) - step for name, size in SIZES.items()}


def loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return sum((p.sum() for p in model.parameters()), torch.zeros(()))


OPTIMIZER = optim.sgd(1.0)
BATCHES = data.arrays({"x": torch.zeros(12, 1)}, 4, shuffle=True)


def fresh() -> fnrun.TrainState:
    return fnrun.TrainState.create(Net(), OPTIMIZER, seed=0)


def resumed(checkpoints: Checkpoints) -> fnrun.TrainState:
    return checkpoints.restore(like=fresh()) if checkpoints.latest() is not None else fresh()


# --- in a child --------------------------------------------------------------------------------------------------------


class Reported:
    """Waits for what was saved, now and then, and says that it is on disk."""

    def __init__(self, checkpoints: Checkpoints, pipe: Connection) -> None:
        self.checkpoints, self.pipe = checkpoints, pipe
        self.first = True

    def __call__(self, state: Any, metrics: Any) -> None:  # it comes before the observer that saves this state
        if not self.first and state.step % 3 == 0:
            self.checkpoints.wait()
            tell(self.pipe, state.step - 1)
        self.first = False


def tell(pipe: Connection, step: int) -> None:
    pipe.send_bytes(str(step).encode())


def train(directory: Path, pipe: Connection, last: int, *, donate: bool = False) -> None:
    """Save each state of a training in a loop, from the newest checkpoint on to the last step."""
    checkpoints = Checkpoints(directory)
    saving = observers.checkpoint(checkpoints, monitor="loss", mode="max", keep=2)
    step = fnrun.make_train_step(Net(), loss, OPTIMIZER)
    program = fnrun.step_loop(step, last, observers=[Reported(checkpoints, pipe), saving], donate=donate)
    state = resumed(checkpoints)
    tell(pipe, state.step)
    state, _ = program(state, BATCHES)
    tell(pipe, state.step)


def save(directory: Path, pipe: Connection, last: int) -> None:
    """Save one state after the other, without a loop."""
    checkpoints = Checkpoints(directory)
    state = resumed(checkpoints)
    tell(pipe, state.step)
    for step in range(state.step + 1, last + 1):
        state = state.replace(step=step, params=parameters(step), position=Position(ticks=step))
        checkpoints.save(state, {"loss": -step}, monitor="loss", mode="max")
        checkpoints.prune(2)
        if step % 3 == 0:
            checkpoints.wait()
            tell(pipe, step)
    checkpoints.wait()
    tell(pipe, last)


WAYS: dict[str, Callable[[Path, Connection, int], None]] = {
    "save": save,
    "train": train,
    "train, donating": functools.partial(train, donate=True),
}

OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.listdir", "os.scandir"}


def die_at(operation: int) -> None:
    """Kill this process right before an operation on files: 0 is the first directory that it makes, which is where a save begins."""
    count = 0

    def hook(event: str, arguments: Any) -> None:
        nonlocal count
        if event == "os.mkdir" or (event in OPERATIONS and count):
            count += 1
            if count > operation:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def child(way: str, directory: Path, pipe: Connection, last: int, operation: int | None) -> None:
    torch.set_num_threads(1)
    if operation is not None:
        die_at(operation)
    WAYS[way](directory, pipe, last)


# --- its parent --------------------------------------------------------------------------------------------------------

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.torture.warm", __name__])


class Process:
    """A child that saves into `directory` in one of the WAYS, up to a last step; it can die right before an operation on files."""

    def __init__(self, way: str, directory: Path, last: int = 10**6, operation: int | None = None) -> None:
        self.pipe, inside = SERVER.Pipe(duplex=False)
        self.process = SERVER.Process(target=child, args=(way, directory, inside, last, operation))
        self.process.start()
        inside.close()

    def begun(self) -> None:
        """Return when the child has restored and goes to save."""
        assert self.pipe.poll(60), "the child did not begin within a minute"

    def told(self) -> Iterator[int]:
        try:
            while True:
                yield int(self.pipe.recv_bytes())
        except EOFError:
            self.pipe.close()

    def end(self, kill: bool) -> tuple[int, int]:
        """The exit code of the child, killed or waited for, and the last step that it reported to be on disk (0: none)."""
        if kill:
            self.process.kill()
        reported = max(self.told(), default=0)
        self.process.join(60)
        code = self.process.exitcode
        assert code is not None, "the child did not end within a minute"
        self.process.close()
        return code, reported
