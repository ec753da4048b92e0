import itertools

import numpy as np
import pytest
from hypothesis import given, strategies as st

from fnrun.core.key import Key
from fnrun.data import permutation
from tests.data.streams import unhurried


def whole(key: Key, n: int) -> np.ndarray:
    return permutation(key, n, np.arange(n))


@unhurried
@given(st.integers(1, 3000), st.integers())
def test_it_is_a_permutation(n, seed):
    assert sorted(whole(Key(seed), n)) == list(range(n))


@unhurried
@given(st.integers(1, 10**12), st.integers(), st.data())
def test_each_position_is_computed_alone(n, seed, draw):
    positions = np.array(draw.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=20)))
    together = permutation(Key(seed), n, positions)
    assert together.dtype == np.int64
    assert [int(permutation(Key(seed), n, positions[i : i + 1])[0]) for i in range(len(positions))] == together.tolist()
    assert 0 <= together.min() <= together.max() < n


def test_positions_outside_are_refused():
    for positions in ([5], [-1]):
        with pytest.raises(ValueError, match=r"0 .. 4"):
            permutation(Key(0), 5, np.array(positions))
    assert permutation(Key(0), 5, np.array([], np.int64)).tolist() == []


def test_small_sets_are_permuted_in_every_way_alike():
    for n in (2, 3, 4):
        ways = dict.fromkeys(itertools.permutations(range(n)), 0)
        draws = 100 * len(ways)
        for seed in range(draws):
            ways[tuple(whole(Key(seed), n).tolist())] += 1
        assert chi_square(np.array(list(ways.values()))) < 4


@pytest.mark.parametrize("n", [5, 8, 12, 33])
def test_pairs_of_positions_are_uniform(n):
    """Where two positions go, over many keys: every ordered pair of places is as likely as any other."""
    pairs = ((0, 1), (0, n - 1), (n // 2, n // 2 + 1))
    went = np.stack([permutation(Key(seed), n, np.array(pairs).ravel()) for seed in range(6000)]).reshape(-1, len(pairs), 2)
    for pair in range(len(pairs)):
        counts = np.bincount(went[:, pair, 0] * n + went[:, pair, 1], minlength=n * n).reshape(n, n)
        assert chi_square(counts.sum(1)) < 4
        assert chi_square(counts[~np.eye(n, dtype=bool)]) < 4


@pytest.mark.parametrize("n", [1000, 4096, 1_000_003])
def test_neighbours_are_scattered(n):
    """In one pass: the places, coarsely, of each position and the next are independent; so are position and place."""
    cells = 16
    for seed in range(5):
        coarse = permutation(Key(seed), n, np.arange(min(n, 100_000))) * cells // n
        assert abs(chi_square(np.bincount(coarse[:-1] * cells + coarse[1:], minlength=cells * cells))) < 4
        assert abs(np.corrcoef(np.arange(len(coarse)), coarse)[0, 1]) < 4 / np.sqrt(len(coarse))


def chi_square(counts: np.ndarray) -> float:
    """How many standard deviations the chi-square statistic of equal chances lies above its mean."""
    expected, freedom = counts.mean(), counts.size - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom))


def test_golden_values():
    """The order of every run there ever was: these never change."""
    positions = {n: np.linspace(0, n - 1, 6).astype(np.int64) for n in (10**3, 10**6, 10**9)}
    assert whole(Key(0), 10).tolist() == GOLDEN[10]
    for n, at in positions.items():
        assert permutation(Key(0).fold_in(3, "order"), n, at).tolist() == GOLDEN[n]


GOLDEN = {
    10: [3, 9, 5, 4, 2, 1, 0, 7, 8, 6],
    10**3: [641, 933, 689, 428, 870, 434],
    10**6: [52177, 506243, 270213, 94864, 721712, 539193],
    10**9: [729818797, 752526640, 325801952, 532340778, 600862397, 403834489],
}
