"""Every comparison, one after the other: `make bench`. Writes `benchmarks/results.md`.

`python -m benchmarks NAME ...` measures some, and writes only their sections anew.

Each runs in a process of its own, prints Markdown, and says in its docstring what it compares and what counts. Nothing else should run on
the machine meanwhile.
"""

from __future__ import annotations

import argparse
import ast
import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path

#: What runs, with the options that keep the whole under about 20 minutes.
BENCHMARKS: dict[str, list[str]] = {
    "overhead": ["--rounds", "9"],
    "models": ["--rounds", "7"],
    "growth": ["--rounds", "9"],
    "input": ["--rounds", "7"],
    "optim": ["sgd", "adamw", "nadam", "muon", "--rounds", "9"],
    "checkpoint": ["--rounds", "7"],
}
VERSIONS = (
    "fnrun", "torch", "numpy", "optree", "orbax-checkpoint", "mmengine-lite", "pytorch-lightning", "lightning-fabric", "accelerate",
    "pytorch-ignite", "torchopt",
)  # fmt: skip
FOLDER = Path(__file__).parent


def machine() -> str:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next((line.partition(": ")[2] for line in info.read_text().splitlines() if line.startswith("model name")), cpu)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    installed = {distribution.name: distribution.version for distribution in importlib.metadata.distributions()}
    versions = ", ".join(f"{name} {installed[name]}" for name in VERSIONS if name in installed)
    return (
        f"{datetime.date.today():%Y-%m-%d}, {cpu}, {os.cpu_count()} cores, {memory:.0f} GiB, {platform.system()} {platform.release()}, "
        f"Python {platform.python_version()}; {versions}. Load before: {os.getloadavg()[0]:.1f}."
    )


def section(name: str, rounds: int | None, again: str = "") -> str:
    """The benchmark's docstring and what it prints, as it prints it. `again` says when, if not with all others."""
    doc = ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text())) or ""
    text = f"## {name}\n\n{doc}\n\n{again}"
    print(text, end="", flush=True)
    command = [sys.executable, "-m", f"benchmarks.{name}", *BENCHMARKS[name], *(["--rounds", str(rounds)] if rounds else [])]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=FOLDER.parent)
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        text += line
    if process.wait():
        raise SystemExit(f"benchmarks.{name} failed")
    print()
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--rounds", type=int, help="of each, to see that all of it works; 2 at least")
    parser.add_argument("--out", type=Path, default=FOLDER / "results.md")
    options = parser.parse_args()
    head = f"""# Measured side by side

Written by `make bench`; not edited. {machine()}

Figures are medians over the rounds. A ratio is taken within a round, in which every side has one turn, in an order that is drawn anew; it
is shown as median (quartiles). Below 1 is faster, or smaller, than what stands behind the slash.
"""
    if not options.names or not options.out.exists():
        sections = [section(name, options.rounds) for name in options.names or BENCHMARKS]
    else:
        head, *before = options.out.read_text().split("\n## ")
        sections = ["## " + text for text in before]
        for name in options.names:
            measured = section(name, options.rounds, f"Measured again: {machine()}\n\n")
            sections = [measured.rstrip("\n") if text.startswith(f"## {name}\n") else text for text in sections]
    options.out.write_text("\n".join([head.rstrip("\n") + "\n", *sections]).rstrip("\n") + "\n")


if __name__ == "__main__":
    main()
