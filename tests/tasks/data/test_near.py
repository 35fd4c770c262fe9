from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.data.near import groups_of, near_pairs


def same_look(count: int) -> np.ndarray:
    """Thumbnails that never tell two images apart."""
    return np.zeros((count, 4), np.uint8)


def all_pairs(hashes_N: np.ndarray, radius: int) -> list[list[int]]:
    """The slow way."""
    values = hashes_N.tolist()
    count = len(values)
    return [[i, j] for i in range(count) for j in range(i + 1, count) if (values[i] ^ values[j]).bit_count() <= radius]


@given(
    st.lists(st.sampled_from(range(6)), min_size=1, max_size=40),
    st.lists(st.integers(0, 2**64 - 1), min_size=6, max_size=6),
    st.integers(0, 8),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=60, deadline=None)
def test_the_index_finds_what_all_pairs_would(families: list[int], centres: list[int], radius: int, seed: int) -> None:
    """Whatever the hashes, and each pair once."""
    random = np.random.default_rng(seed)
    hashes_N = np.array([centres[family] for family in families], np.uint64)
    for _ in range(3):
        hashes_N ^= np.uint64(1) << random.integers(0, 64, len(hashes_N), dtype=np.uint64)
    assert near_pairs(hashes_N, same_look(len(hashes_N)), radius=radius).tolist() == all_pairs(hashes_N, radius)


def test_what_only_hashes_alike_is_no_pair() -> None:
    """The thumbnails decide."""
    hashes_N = np.array([7, 7, 7], np.uint64)
    thumbnails_NB = np.array([[10, 10, 10, 10], [12, 9, 10, 11], [200, 10, 10, 10]], np.uint8)
    assert near_pairs(hashes_N, thumbnails_NB).tolist() == [[0, 1]]


@pytest.mark.parametrize("count", [0, 1])
def test_no_image_is_near_itself(count: int) -> None:
    """Nor does an empty set fail."""
    assert near_pairs(np.zeros(count, np.uint64), same_look(count)).shape == (0, 2)


def test_chains_are_one_group() -> None:
    """Images 0, 2 and 4 are linked; 1 and 3 stand alone."""
    groups_N = groups_of(np.array([[0, 2], [2, 4]]), 5)
    assert groups_N[0] == groups_N[2] == groups_N[4]
    assert len(set(groups_N.tolist())) == 3
    assert len(set(groups_of(np.empty((0, 2), np.int64), 3).tolist())) == 3
