from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.cluster.hierarchy import DisjointSet

from tasks.data import near
from tasks.data.near import near_groups


def same_look(count: int) -> np.ndarray:
    """Thumbnails that never tell two images apart."""
    return np.zeros((count, 4), np.uint8)


def groups(numbers_N: np.ndarray) -> set[frozenset[int]]:
    return {frozenset(np.flatnonzero(numbers_N == number).tolist()) for number in numbers_N}


def all_groups(hashes_N: np.ndarray, thumbnails_NB: np.ndarray, radius: int) -> set[frozenset[int]]:
    """The slow way."""
    values, looks_NB = hashes_N.tolist(), thumbnails_NB.astype(float)
    found = DisjointSet(range(len(values)))
    for i in range(len(values)):
        for j in range(i):
            is_near = (values[i] ^ values[j]).bit_count() <= radius
            if is_near and np.abs(looks_NB[i] - looks_NB[j]).mean() <= 255 * near.MAX_DISTANCE:
                found.merge(i, j)
    return {frozenset(subset) for subset in found.subsets()}


@pytest.mark.parametrize("crowd", [1, 3, 1000])
@given(
    families=st.lists(st.sampled_from(range(6)), min_size=1, max_size=40),
    centres=st.lists(st.integers(0, 2**64 - 1), min_size=6, max_size=6),
    radius=st.integers(0, 8),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=60)
def test_the_index_finds_what_all_pairs_would(
    crowd: int, families: list[int], centres: list[int], radius: int, seed: int
) -> None:
    """Whatever the hashes and thumbnails, and however many images a bucket takes to be a crowd."""
    random = np.random.default_rng(seed)
    hashes_N = np.array([centres[family] for family in families], np.uint64)
    for _ in range(3):
        hashes_N ^= np.uint64(1) << random.integers(0, 64, len(hashes_N), dtype=np.uint64)
    thumbnails_NB = random.integers(0, 30, (len(hashes_N), 4), dtype=np.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(near, "CROWD", crowd)
        found_N = near_groups(hashes_N, thumbnails_NB, radius=radius)
    assert groups(found_N) == all_groups(hashes_N, thumbnails_NB, radius)


def test_what_only_hashes_alike_is_not_alike() -> None:
    """The thumbnails decide."""
    hashes_N = np.array([7, 7, 7], np.uint64)
    thumbnails_NB = np.array([[10, 10, 10, 10], [12, 9, 10, 11], [200, 10, 10, 10]], np.uint8)
    assert groups(near_groups(hashes_N, thumbnails_NB)) == {frozenset({0, 1}), frozenset({2})}


@pytest.mark.parametrize("count", [0, 1])
def test_no_image_is_near_itself(count: int) -> None:
    """Nor does an empty set fail."""
    assert near_groups(np.zeros(count, np.uint64), same_look(count)).tolist() == [0] * count


def test_chains_are_one_group() -> None:
    """Images 0, 2 and 4 are linked; 1 and 3 stand alone."""
    hashes_N = np.array([0, 2**64 - 1, 0b1111, 0xFFFF0000, 0b11111111], np.uint64)
    assert groups(near_groups(hashes_N, same_look(5))) == {frozenset({0, 2, 4}), frozenset({1}), frozenset({3})}


def test_a_crowd_is_not_compared_pair_by_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a fixed camera: about as many comparisons as images, where there are thousands of times as many pairs."""
    random = np.random.default_rng(0)
    hashes_N = np.full(8000, 0x123456789ABCDEF0, np.uint64) ^ (np.uint64(1) << random.integers(0, 64, 8000, np.uint64))
    compared = []
    original = near._alike

    def counting(thumbnails_NB: np.ndarray, pairs_P2: np.ndarray) -> np.ndarray:
        compared.append(len(pairs_P2))
        return original(thumbnails_NB, pairs_P2)

    monkeypatch.setattr(near, "_alike", counting)
    assert len(groups(near_groups(hashes_N, random.integers(100, 104, (8000, 256), np.uint8)))) == 1
    assert sum(compared) < 3 * 8000
