"""`fnrun verify`: runs the program from each checkpoint to the next one, and compares every bit."""

from __future__ import annotations

import contextlib
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from fnrun.checkpoint import Entry
from fnrun.cli.commands import CommandError, Verify
from fnrun.cli.commands.output import document
from fnrun.cli.commands.places import run_at
from fnrun.core.tables import printable
from fnrun.runs.run import Run
from fnrun.runs.verify import Pair, verify

#: The number of leaves of a pair that are shown; `--json` has all.
SHOWN = 10


def run(flags: Verify) -> int:
    run = run_at(flags.run)
    ambiguous = {step for step, n in Counter(entry.step for entry in run.checkpoints.entries()).items() if n > 1}
    pairs: list[Pair] = []
    with contextlib.redirect_stdout(sys.stderr) if flags.json else contextlib.nullcontext():  # the experiment may print too
        for pair in verify(run, to=flags.to or None, from_start=flags.from_start):
            pairs.append(pair)
            print(printable("\n".join(_lines(pair, ambiguous))), flush=True)
    count = Counter(pair.outcome for pair in pairs)
    failed = count["different"] + count["damaged"]
    if flags.json:
        document({"run": str(run.path), "proven": count["equal"], "failed": failed, "pairs": [_jsonable(pair) for pair in pairs]})
    else:
        print(_summary(run, pairs, count["equal"], failed))
        if not failed and not flags.to and (first := pairs[0].begin) is not None:
            print(f"step {first.step} was taken as it is; --from-start proves it too")
    if failed:
        return 1
    if not count["equal"]:
        raise CommandError(f"{run.path}: nothing could be proven: {'; '.join(pair.reason for pair in pairs)}")
    return 0


def _summary(run: Run, pairs: Sequence[Pair], proven: int, failed: int) -> str:
    unproven = len(pairs) - proven - failed
    return (
        f"{run.path}: {proven} of {len(pairs)} proven"
        + (f", {failed} failed" if failed else "")
        + (f", {unproven} not proven" if unproven else "")
    )


def _lines(pair: Pair, ambiguous: set[int]) -> Iterator[str]:
    begin = "start" if pair.begin is None else f"step {_name(pair.begin, ambiguous)}"
    words = {"unproven": "not proven"}.get(pair.outcome, pair.outcome)
    took = f" ({pair.seconds:.1f} s)" if pair.seconds else ""
    yield f"{begin} -> {_name(pair.end, ambiguous)}: {words}{f': {pair.reason}' if pair.reason else ''}{took}"
    yield from (f"  {note}" for note in pair.notes)
    yield from (f"  {difference}" for difference in pair.differences[:SHOWN])
    if len(pair.differences) > SHOWN:
        yield f"  and {len(pair.differences) - SHOWN} leaves more"
    if pair.outcome == "different":
        yield from (
            f"  {name}: {_short(then)} when the checkpoint was made, {_short(now)} now" for name, (then, now) in pair.environment.items()
        )


def _short(value: str | None) -> str:
    return re.sub(r"(sha256:\w{12})\w+", r"\1", value or "none")


def _name(entry: Entry, ambiguous: set[int]) -> str:
    """The step, or of several checkpoints at one step the whole name."""
    return entry.name if entry.step in ambiguous else str(entry.step)


def _jsonable(pair: Pair) -> dict[str, Any]:
    return {
        "from": pair.begin and pair.begin.name,
        "to": pair.end.name,
        "step": pair.end.step,
        "outcome": pair.outcome,
        "reason": pair.reason,
        "leaves": [difference._asdict() for difference in pair.differences],
        "environment": dict(pair.environment),
        "notes": list(pair.notes),
        "seconds": round(pair.seconds, 3),
    }
