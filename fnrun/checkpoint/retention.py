"""Which checkpoint is the best, and which may go. Pure functions of names and manifests."""

from __future__ import annotations

from collections.abc import Mapping

from fnrun.checkpoint.manifest import CheckpointError, Judgement, Manifest, Mode
from fnrun.core.checkpoint_name import Entry
from fnrun.core.counts import count

#: What names a checkpoint: its step (the newest of several), "best" by the metric monitored first, "best:METRIC", an Entry, or None for the
#: newest.
Which = int | str | Entry | None


def which(text: str) -> int | str | None:
    """The checkpoint that a flag names. Raises CheckpointError for another text.

    >>> which("latest"), which("115"), which("best:val/loss")
    (None, 115, 'best:val/loss')
    """
    if text == "latest":
        return None
    if text.isdecimal():
        return int(text)
    if text.partition(":")[0] != "best":
        raise CheckpointError(f"a checkpoint is latest, best, best:METRIC or a step, not {text!r}")
    return text


def monitors_of(monitor: str | Mapping[str, Mode] | None, mode: Mode) -> dict[str, Mode]:
    """The monitored metrics with their modes. Raises ValueError for a mode that is neither "min" nor "max"."""
    monitors: dict[str, Mode] = {monitor: mode} if isinstance(monitor, str) else dict(monitor or {})
    for one in (mode, *monitors.values()):
        if one not in ("min", "max"):
            raise ValueError(f"mode is 'min' or 'max', not {one!r}")
    return monitors


def judges(manifests: Mapping[Entry, Judgement | Manifest]) -> dict[str, Mode]:
    """The metrics by which checkpoints are judged, those of the newest monitored one first."""
    found: dict[str, Mode] = {}
    for manifest in reversed(list(manifests.values())):
        found = {**found, **{metric: mode for metric, mode in manifest.monitors.items() if metric not in found}}
    return found


def best(manifests: Mapping[Entry, Judgement | Manifest], metric: str | None = None) -> Entry | None:
    """The checkpoint with the best value of `metric`, or of the first of the `judges`; None where there is no finite value.

    Of equals it is the first; of several at one step and tick, the last.
    """
    known = judges(manifests)
    metric = metric or next(iter(known), None)
    if metric not in known:
        return None
    values = [(value, entry) for entry, manifest in manifests.items() if (value := manifest.value(metric, known[metric])) is not None]
    return min(values, key=lambda found: (found[0], found[1][:2], -found[1].version))[1] if values else None


def superfluous(
    entries: list[Entry], manifests: Mapping[Entry, Judgement | Manifest], keep: int, keep_every: int | None = None
) -> list[Entry]:
    """All of the sorted `entries` but the `keep` newest, the best by each metric and the first at or after each k-th step (`keep_every=k`).

    Those without a manifest stay: they may be the best. One that was overtaken at its step and tick counts as old.
    """
    newest = list({entry[:2]: entry for entry in entries}.values())
    kept = {*newest[-keep:], *(best(manifests, metric) for metric in judges(manifests))}
    if keep_every is not None:
        kept.update({bucket: entry for entry in reversed(newest) if (bucket := entry.step // keep_every)}.values())
    return [entry for entry in entries if entry in manifests and entry not in kept]


def check_keep(who: str, keep: int | None, keep_every: int | None) -> None:
    """Raise ValueError for a `keep` or a `keep_every` below 1."""
    if keep is not None:
        count(f"{who}: keep", keep)
    if keep_every is not None:
        count(f"{who}: keep_every", keep_every, unit=" step")
