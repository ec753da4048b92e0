"""The curves of a run, from its `metrics.jsonl`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

#: Fields of a line that are not metrics.
PLACE = ("ticks", "at", "step", "epoch", "clock")


def records(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`; one that was cut short by a kill is left out."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


def curves(lines: list[dict[str, Any]]) -> dict[str, tuple[list[int], list[float]]]:
    """Of each metric its steps and values; NaN and infinities included."""
    found: dict[str, tuple[list[int], list[float]]] = {}
    for line in lines:
        for name, value in line.items():
            if name not in PLACE and isinstance(value, (int, float, str)):
                steps, values = found.setdefault(name, ([], []))
                steps.append(line["step"])
                values.append(float(value))
    return found


def plot(metrics: Path, to: Path, title: str) -> Path | None:
    """Draw loss and accuracy over steps, training beside validation, to the PNG `to`; None where nothing was logged yet."""
    found = curves(records(metrics)) if metrics.exists() else {}
    groups = {kind: [name for name in found if name.rpartition("/")[2] == kind] for kind in ("loss", "accuracy")}
    panels = [(kind, names) for kind, names in groups.items() if names]
    if not panels:
        return None
    from matplotlib.figure import Figure  # without pyplot: no global state, no display

    figure = Figure(figsize=(5 * len(panels), 3.4), layout="constrained", dpi=150)
    figure.suptitle(title, fontsize=11)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (kind, names) in zip(axes, panels, strict=True):
        for name in sorted(names):
            steps, values = found[name]
            validation = not name.startswith("train")
            axis.plot(steps, values, marker="o" if validation else None, markersize=3, linewidth=1.5, label=name)
        axis.set(xlabel="step", ylabel=kind)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
    figure.savefig(to)
    return to
