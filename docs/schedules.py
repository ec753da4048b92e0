"""Draws the curves of `docs/schedules.md`: python docs/schedules.py"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import torch

from fnrun import schedules

CURVES: dict[str, schedules.Schedule] = {
    "constant(0.5)": schedules.constant(0.5),
    "linear(1, 0.1, 80)": schedules.linear(1.0, 0.1, 80),
    "polynomial(1, 0, 80, power=2)": schedules.polynomial(1.0, 0.0, 80, 2.0),
    "exponential(1, 0.5, every=20)": schedules.exponential(1.0, 0.5, every=20),
    "step(1, every=20, gamma=0.5)": schedules.step(1.0, 20, 0.5),
    "multistep(1, [40, 70], 0.3)": schedules.multistep(1.0, [40, 70], 0.3),
    "inverse_sqrt(1, warmup=15)": schedules.inverse_sqrt(1.0, 15),
    "inverse_time(1, rate=1, every=20)": schedules.inverse_time(1.0, 1.0, every=20),
    "cosine(1, 80, floor=0.1)": schedules.cosine(1.0, 80, 0.1),
    "cosine_restarts(1, [20, 30, 40], [1, 0.7, 0.4])": schedules.cosine_restarts(1.0, [20, 30, 40], [1.0, 0.7, 0.4]),
    "flat_cosine(1, flat=50, total=90)": schedules.flat_cosine(1.0, 50, 90),
    "cyclic(0.1, 1, up=10, down=20)": schedules.cyclic(0.1, 1.0, 10, 20),
    "one_cycle(1, total=90)": schedules.one_cycle(1.0, 90),
    "trapezoid(1, warmup=15, total=90, decay=30)": schedules.trapezoid(1.0, 15, 90, 30),
    "warmup_cosine(1, warmup=15, total=90)": schedules.warmup_cosine(1.0, 15, 90),
    "join([linear(0, 1, 20), cosine(1, 40)], [20])": schedules.join([schedules.linear(0.0, 1.0, 20), schedules.cosine(1.0, 40)], [20]),
    "multiply(cosine(1, 90), step(1, 30, 0.5))": schedules.multiply(schedules.cosine(1.0, 90), schedules.step(1.0, 30, 0.5)),
    "warmup(step(1, 40, 0.5), 15, 'exponential')": schedules.warmup(schedules.step(1.0, 40, 0.5), 15, "exponential"),
    "piecewise([0.3, 1, 0.5], [20, 60])": schedules.piecewise([0.3, 1.0, 0.5], [20, 60]),
}


def main() -> None:
    columns = 4
    rows = -(-len(CURVES) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4 * columns, 2 * rows), sharex=True, sharey=True, layout="constrained")
    steps = torch.arange(101)
    for axis in axes.flat[len(CURVES) :]:
        axis.axis("off")
    for axis, (name, schedule) in zip(axes.flat, CURVES.items(), strict=False):
        axis.plot(steps, schedule(steps), linewidth=1.6, color="#1f5fa8")
        axis.set_title(name, fontsize=8)
        axis.set_ylim(-0.05, 1.1)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.25)
    figure.savefig(Path(__file__).with_name("schedules.png"), dpi=90)


if __name__ == "__main__":
    main()
