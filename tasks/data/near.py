"""Near duplicates: images that look alike, found through an index and never by comparing all pairs.

Axes: N image, P pair.
"""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

BITS = 64
AT_ONCE = 2**16  # pairs whose thumbnails are compared at once: bounds the memory
MAX_DISTANCE = 0.05  # mean difference of two thumbnails, of the whole range, that is still the same picture


def near_pairs(hashes_N: np.ndarray, thumbnails_NB: np.ndarray, *, radius: int = 4) -> np.ndarray:
    """Pairs of images that look alike: rows [P, 2], the smaller one first, sorted, each pair once.

    Two hashes that differ in at most `radius` bits agree on at least two of `radius + 2` bands of bits, so only images
    that share two bands are compared (the tables of Manku et al., Detecting Near-Duplicates for Web Crawling, WWW 2007,
    section 3): by one band of twelve bits, a million images would have hundreds of partners each. Thumbnails then tell
    what is alike from what only hashes alike.

    Args:
        hashes_N: perceptual hashes, uint64.
        thumbnails_NB: grey copies of a few pixels, uint8.
        radius: bits that two hashes may differ in.
    """
    masks = [first | second for first, second in combinations(_bands(radius + 2), 2)]
    found = [_pairs_sharing(hashes_N, masks[: number + 1], radius) for number in range(len(masks))]
    pairs_P2 = np.sort(np.concatenate(found), axis=1)
    pairs_P2 = pairs_P2[np.lexsort(pairs_P2.T[::-1])]
    parts = np.split(pairs_P2, range(AT_ONCE, len(pairs_P2), AT_ONCE))
    return np.concatenate([part[_differences(thumbnails_NB, part) <= 255 * MAX_DISTANCE] for part in parts])


def groups_of(pairs_P2: np.ndarray, count: int) -> np.ndarray:
    """A number for each of `count` images, the same for images that a chain of pairs links: int32 [N]."""
    links = coo_array((np.ones(len(pairs_P2), bool), (pairs_P2[:, 0], pairs_P2[:, 1])), shape=(count, count))
    groups_N: np.ndarray = connected_components(links, directed=False)[1]
    return groups_N


def _differences(thumbnails_NB: np.ndarray, pairs_P2: np.ndarray) -> np.ndarray:
    """Mean difference of each pair's thumbnails."""
    first, second = (thumbnails_NB[pairs_P2[:, side]].astype(np.int16) for side in (0, 1))
    differences_P: np.ndarray = np.abs(first - second).mean(1)
    return differences_P


def _bands(count: int) -> list[np.uint64]:
    """Masks of `count` parts of nearly equal width."""
    edges = [BITS * part // count for part in range(count + 1)]
    return [np.uint64(2**high - 2**low) for low, high in pairwise(edges)]


def _pairs_sharing(hashes_N: np.ndarray, masks: list[np.uint64], radius: int) -> np.ndarray:
    """Near pairs that agree under the last mask and under none before, so that no pair is found twice.

    Sorted by what the mask leaves, an image's partners follow it without a gap.
    """
    shared_N = hashes_N & masks[-1]
    order_N = np.argsort(shared_N, kind="stable")
    shared_N, hashes_N = shared_N[order_N], hashes_N[order_N]
    found = [np.empty((0, 2), np.int64)]
    step, rows = 1, np.arange(len(order_N) - 1)
    while len(rows := rows[shared_N[rows] == shared_N[rows + step]]):
        differing = hashes_N[rows] ^ hashes_N[rows + step]
        is_new = np.bitwise_count(differing) <= radius
        for mask in masks[:-1]:
            is_new &= (differing & mask) != 0
        found.append(np.stack([order_N[rows[is_new]], order_N[rows[is_new] + step]], axis=1))
        step += 1
        rows = rows[rows + step < len(order_N)]
    return np.concatenate(found)
