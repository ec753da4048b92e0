"""Law 6: the newest checkpoint that was completed restores exactly, or an error of ours names what is damaged.

A sample of what `tests/torture` does in full.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path

import pytest

from fnrun.checkpoint import writing
from tests.torture.flips import Damage, Sweep, large, small, whole
from tests.torture.kills import SPREAD, Kills
from tests.torture.training import WAYS


@pytest.mark.parametrize("way", WAYS)
def test_a_kill_at_any_moment_loses_nothing(way: str, tmp_path: Path):
    chance, kills = random.Random(way), Kills()
    kills.at_moments(way, tmp_path / "moments", [chance.uniform(0, SPREAD) for _ in range(4)])
    kills.at_operations(way, tmp_path / "operations", sorted(chance.sample(range(150), 4)))
    assert (kills.lost, kills.wrong, kills.kills) == ([], [], 8)


def some(damages: Iterable[Damage], count: int) -> list[Damage]:
    return random.Random(0).sample(list(damages), count)


def test_a_flipped_bit_anywhere_is_an_error_that_names_the_file_and_what_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(writing, "PACKED", 2**18)  # in packs, and in files of their own
    sweep = Sweep(tmp_path, large)
    assert sweep(some(sweep.flips(random.Random(0), 101), 150)).bad == []
    assert set(sweep.found) == {"errors that name the file", "errors that name the file and what is lost"}


def test_files_that_are_cut_missing_mixed_up_or_added_are_named_or_do_not_matter(tmp_path: Path):
    sweep = Sweep(tmp_path, small)
    assert sweep(whole(sweep)).bad == []
    assert sweep.found["exact"] == 20, "what was added, beside the checkpoint or in it, and no more"


def test_damage_that_the_manifest_agrees_with_is_noticed_by_leaf_or_does_not_matter(tmp_path: Path):
    sweep = Sweep(tmp_path, small)
    assert sweep(some(sweep.forged(sweep.flips(random.Random(0))), 100)).bad == []
    assert set(sweep.found) == {"errors that name the file and what is lost", "exact"}
