"""What a step costs besides its arithmetic, here and elsewhere: a tiny network, one thread.

64-64-10 with ReLU, batches of 32, float32, AdamW, cross entropy. A turn is 2,000 steps, of a whole
program 3 epochs of 2,000: 64,000 examples in each, about as many as MNIST has.

What counts. A bare loop, fnrun's step and loop, and every other framework go through a list of batches that were cut before; their start
and their end are not timed, only what is between the first batch and the last. A *program* also shuffles and gathers its batches, logs each
50th step to a file, validates on 4 batches and saves a checkpoint each epoch, and its whole call counts, with the wait for the last
checkpoint to be on disk. `by hand` is that written in plain PyTorch, with torch.save. Validation is 0.2% of the batches, in both.

    python -m benchmarks.overhead [--rounds 9] [--only bare fnrun ...]
"""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
from typing import Any

import torch

from benchmarks.measure import ROUNDS, Turns, compared, ratios, spread, table, take_turns
from benchmarks.problems import tiny

EPOCHS, VALIDATION, LOG_EVERY = 3, 4, 50
WHOLE = {"epochs": EPOCHS, "validation": VALIDATION, "log_every": LOG_EVERY}
FUSED = {"fused": True}

#: The name of a side: its file in `peers`, the function there, and its options.
SIDES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bare, default AdamW": ("torch_loop", "train", {}),
    "bare, foreach AdamW": ("torch_loop", "train", {"foreach": True}),
    "bare, fused AdamW": ("torch_loop", "train", FUSED),
    "by hand, default AdamW": ("torch_loop", "whole", WHOLE),
    "by hand, fused AdamW": ("torch_loop", "whole", {**WHOLE, **FUSED}),
    "fnrun step": ("fnrun_program", "step", {}),
    "fnrun loop": ("fnrun_program", "loop", {}),
    "fnrun loop, log": ("fnrun_program", "loop", {"log_every": LOG_EVERY}),
    "fnrun program, no checkpoint": ("fnrun_program", "program", {**WHOLE, "saves": False}),
    "fnrun program": ("fnrun_program", "program", WHOLE),
    "fnrun program, donated": ("fnrun_program", "program", {**WHOLE, "donate": True}),
    "fnrun program, compiled": ("fnrun_program", "program", {**WHOLE, "compile": True}),
    "fnrun program, compiled, donated": ("fnrun_program", "program", {**WHOLE, "compile": True, "donate": True}),
    "fnrun program, compiled, 10 steps fused": ("fnrun_program", "program", {**WHOLE, "compile": True, "fused_steps": 10}),
    "fnrun program, compiled, donated, 10 steps fused": (
        "fnrun_program",
        "program",
        {**WHOLE, "compile": True, "donate": True, "fused_steps": 10},
    ),
    "MMEngine Runner, default hooks": ("mmengine_runner", "train", {"hooks": True}),
    "MMEngine Runner, no hooks": ("mmengine_runner", "train", {"hooks": False}),
    "MMEngine Runner, no hooks, fused AdamW": ("mmengine_runner", "train", {"hooks": False, **FUSED}),
    "Lightning Trainer, barebones": ("lightning_trainer", "train", {"barebones": True}),
    "Lightning Trainer, barebones, fused AdamW": ("lightning_trainer", "train", {"barebones": True, **FUSED}),
    "Lightning Trainer": ("lightning_trainer", "train", {}),
    "Lightning Trainer, self.log": ("lightning_trainer", "train", {"logs": True}),
    "Lightning Fabric": ("lightning_fabric_loop", "train", {}),
    "Lightning Fabric, fused AdamW": ("lightning_fabric_loop", "train", FUSED),
    "Accelerate": ("accelerate_loop", "train", {}),
    "Accelerate, fused AdamW": ("accelerate_loop", "train", FUSED),
    "Ignite": ("ignite_engine", "train", {}),
    "Ignite, a look at each 50th loss": ("ignite_engine", "train", {"logs": True}),
    "Ignite, fused AdamW": ("ignite_engine", "train", FUSED),
    "TorchOpt": ("torchopt_functional", "train", {"inplace": True}),
    "TorchOpt, out of place": ("torchopt_functional", "train", {"inplace": False}),
}


def side(name: str) -> tuple[Any, Any]:
    torch.set_num_threads(1)
    module, function, options = SIDES[name]
    problem = tiny()
    train = getattr(importlib.import_module(f"benchmarks.peers.{module}"), function)
    return functools.partial(run, train, problem, options), problem.batches


def run(train: Any, problem: Any, options: dict[str, Any], turns: Turns) -> None:
    train(turns, problem, **options)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="PREFIX", help="sides whose names begin so; the bare ones are always there"
    )
    options = parser.parse_args()
    names = [name for name in SIDES if name.startswith(("bare, default", "bare, fused", *options.only))]
    times = take_turns("benchmarks.overhead", names, options.rounds)
    print(f"{options.rounds} rounds, one thread\n")
    print(compared(times, ["bare, default AdamW", "bare, fused AdamW"], "us a step", 1e6))
    around = ["fnrun step", "fnrun loop", "fnrun loop, log", "fnrun program, no checkpoint", "fnrun program"]
    if set(around) <= set(times):
        print("\nWhat is around a step of fnrun, each row over the one before it:\n")
        print(
            table(
                ["", "us a step", "ratio"],
                [
                    [
                        f"{b} over {a}",
                        spread([(y - x) * 1e6 for x, y in zip(times[a], times[b], strict=True)], 1),
                        spread(ratios(times[b], times[a])),
                    ]
                    for a, b in itertools.pairwise(around)
                ],
            )
        )


if __name__ == "__main__":
    main()
