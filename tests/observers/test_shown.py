"""What hooks, observers and sinks say of themselves, for the drawing of a program."""

from __future__ import annotations

from pathlib import Path

import pytest

from fnrun import hooks, observers
from fnrun.checkpoint import Checkpoints


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: hooks.ema(0.999), "ema 0.999"),
        (lambda: hooks.ema(0.9, every=2, start=10, name="slow"), "slow 0.9, every 2, from 10"),
        (lambda: hooks.annealed_ema(0.5), "annealed_ema 0.5"),
        (lambda: hooks.swa(100, every=10), "swa, every 10, from 100"),
        (lambda: hooks.early_stopping("val/loss", patience=3), "early_stopping on val/loss (min), patience 3"),
        (
            lambda: hooks.reduce_on_plateau("val/loss", patience=2, factor=0.5),
            "reduce_on_plateau on val/loss (min), patience 2, factor 0.5",
        ),
        (lambda: hooks.rollback("loss"), "rollback on loss"),
        (lambda: hooks.stop_after(steps=5), "stop_after 5 steps"),
        (lambda: hooks.stop_after(epochs=5), "stop_after 5 epochs"),
        (lambda: hooks.stop_after(tokens=5), "stop_after 5 tokens"),
        (lambda: observers.log(50), "log every 50 -> console"),
        (
            lambda: observers.log(5, to=[observers.jsonl("runs/a/m.jsonl"), observers.csv("m.csv")], name="all"),
            "all every 5 -> runs/a/m.jsonl, m.csv",
        ),
        (lambda: observers.log(5, to=[observers.wandb("runs/a", project="p")]), "log every 5 -> runs/a/wandb.jsonl"),
        (lambda: observers.log(5, to=[]), "log every 5 -> nowhere"),
        (lambda: observers.progress(), "progress"),
        (lambda: observers.checkpoint(Checkpoints("runs/a/checkpoints")), "checkpoint every 1 -> runs/a/checkpoints"),
        (
            lambda: observers.checkpoint(Checkpoints("c"), monitor="val/accuracy", mode="max", every=2),
            "checkpoint every 2 -> c, best by val/accuracy (max)",
        ),
        (lambda: observers.profile(range(10, 13), to="runs/p"), "profile steps 10 to 12 -> runs/p"),
        (lambda: observers.memory(10), "memory every 10"),
        (lambda: observers.watch(10, to=[]), "watch every 10"),
        (lambda: observers.predictions("p.jsonl"), "predictions -> p.jsonl"),
        (lambda: observers.predictions(Path("p")), "predictions -> p"),
    ],
)
def test_it_says_what_it_does(make, words):
    assert str(make()) == words
