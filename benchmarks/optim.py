"""What one update costs beside torch.optim: 4, 60 and 600 leaves, default, foreach and fused, side by side in one process.

One thread, leaves of 32x32 float32. In each round every way runs for about 20 ms.
`pure` writes into nothing that came in; `donated` may overwrite what it was given, as torch does.

    python -m benchmarks.optim                     every optimizer
    python -m benchmarks.optim adamw nadam --rounds 11
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.measure import ROUNDS, Times, alternate, ratios, seconds, spread, table
from fnrun import Key, TrainState, optim
from fnrun.core.donation import Owner

#: Name, ours, torch's class and its arguments.
CASES: dict[str, tuple[Callable[[], optim.Optimizer], Any, dict[str, Any]]] = {
    "sgd": (lambda: optim.sgd(1e-3, momentum=0.9), torch.optim.SGD, {"lr": 1e-3, "momentum": 0.9}),
    "adam": (lambda: optim.adam(1e-3), torch.optim.Adam, {"lr": 1e-3}),
    "adamw": (lambda: optim.adamw(1e-3), torch.optim.AdamW, {"lr": 1e-3}),
    "adagrad": (lambda: optim.adagrad(1e-3), torch.optim.Adagrad, {"lr": 1e-3}),
    "nadam": (lambda: optim.nadam(1e-3), torch.optim.NAdam, {"lr": 1e-3}),
    "radam": (lambda: optim.radam(1e-3), torch.optim.RAdam, {"lr": 1e-3}),
    "adamax": (lambda: optim.adamax(1e-3), torch.optim.Adamax, {"lr": 1e-3}),
    "adadelta": (lambda: optim.adadelta(1e-3), torch.optim.Adadelta, {"lr": 1e-3}),
    "rmsprop": (lambda: optim.rmsprop(1e-3), torch.optim.RMSprop, {"lr": 1e-3}),
    "rprop": (lambda: optim.rprop(1e-3), torch.optim.Rprop, {"lr": 1e-3}),
    "adafactor": (lambda: optim.adafactor(1e-3), torch.optim.Adafactor, {"lr": 1e-3}),
    "muon": (lambda: optim.muon(1e-3), torch.optim.Muon, {"lr": 1e-3}),
}
FUSED = ("sgd", "adam", "adamw", "adagrad")


def leaves(n: int, side: int) -> dict[str, torch.Tensor]:
    return {f"layers.{i}.weight": torch.randn(side, side) for i in range(n)}


def ours(make: Callable[[], optim.Optimizer], n: int, side: int, donated: bool) -> Callable[[], None]:
    optimizer, params, grads = make(), leaves(n, side), leaves(n, side)
    state = optimizer.init(params)
    owner = Owner()

    def update() -> None:
        nonlocal params, state
        params, state = optimizer.update(grads, state, params)

    def overwriting() -> None:
        nonlocal params, state
        before = TrainState(params, {}, state, Key(0))
        params, state = owner.update((0, "an update"), before, lambda: optimizer.update(grads, state, params))
        owner.accept(TrainState(params, {}, state, Key(0)))

    return overwriting if donated else update


def theirs(cls: Any, arguments: dict[str, Any], n: int, side: int) -> Callable[[], None]:
    params = [torch.nn.Parameter(p) for p in leaves(n, side).values()]
    for p in params:
        p.grad = torch.randn_like(p)
    return cls(params, **arguments).step


def ways(name: str, n: int, side: int) -> dict[str, Callable[[], None]]:
    make, cls, arguments = CASES[name]
    modes: dict[str, dict[str, Any]] = {"default": {}}
    if name != "muon":
        modes["foreach"] = {"foreach": True}
    if name in FUSED:
        modes["fused"] = {"fused": True}
    peers = {mode: theirs(cls, {**arguments, **options}, n, side) for mode, options in modes.items()}
    own = {"pure": ours(make, n, side, donated=False)}
    if name in FUSED:
        own["donated"] = ours(make, n, side, donated=True)
    return {**peers, **own}


def measure(calls: dict[str, Callable[[], None]], rounds: int, budget: float) -> Times:
    """Microseconds an update, round by round."""
    sides: dict[str, Callable[[], float]] = {}
    for way, call in calls.items():
        call()
        repeats = max(1, round(budget / seconds(call)))
        sides[way] = lambda call=call, repeats=repeats: seconds(lambda: [call() for _ in range(repeats)]) / repeats * 1e6
    return alternate(sides, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description="The cost of an update beside torch.optim.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(CASES))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--leaves", type=int, nargs="+", default=[4, 60, 600])
    parser.add_argument("--side", type=int, default=32, help="leaves are matrices of this many rows and columns")
    parser.add_argument("--budget", type=float, default=0.02, help="seconds for a way in a round")
    options = parser.parse_args()
    torch.set_num_threads(1)
    ways_, pairs = ("default", "foreach", "fused", "pure", "donated"), [("pure", "foreach"), ("pure", "fused"), ("donated", "fused")]
    rows = []
    for name in options.names or CASES:
        for n in options.leaves:
            times = measure(ways(name, n, options.side), options.rounds, options.budget)
            micros = [f"{statistics.median(times[way]):.0f}" if way in times else "" for way in ways_]
            shares = [spread(ratios(times[own], times[peer])) if {own, peer} <= set(times) else "" for own, peer in pairs]
            rows.append([name, str(n), *micros, *shares])
    print(f"{options.rounds} rounds, one thread, microseconds an update\n")
    print(table(["optimizer", "leaves", *ways_, *(f"{own} / {peer}" for own, peer in pairs)], rows))


if __name__ == "__main__":
    main()
