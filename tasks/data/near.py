"""Near duplicates: images that look alike, found through an index and never by comparing all pairs.

Axes: N image, P pair, M image of one bucket, B bucket.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, pairwise

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

BITS = 64
AT_ONCE = 2**16  # pairs whose thumbnails are compared at once: bounds the memory
MAX_DISTANCE = 0.05  # mean difference of two thumbnails, of the whole range, that is still the same picture
CROWD = 32  # images in one bucket from which on they are many alike, as a fixed camera's, and not by chance


def near_groups(hashes_N: np.ndarray, thumbnails_NB: np.ndarray, *, radius: int = 4) -> np.ndarray:
    """A number for each image, the same for images that a chain of look-alikes links: int32 [N].

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
    links_P2 = np.empty((0, 2), np.int64)
    for number in range(len(masks)):
        links_P2 = np.concatenate(
            [links_P2, *_new_links(hashes_N, thumbnails_NB, masks[: number + 1], radius, links_P2)]
        )
    return _components(links_P2, len(hashes_N))


def _components(links_P2: np.ndarray, count: int) -> np.ndarray:
    links = coo_array((np.ones(len(links_P2), bool), (links_P2[:, 0], links_P2[:, 1])), shape=(count, count))
    groups_N: np.ndarray = connected_components(links, directed=False)[1]
    return groups_N


def _alike(thumbnails_NB: np.ndarray, pairs_P2: np.ndarray) -> np.ndarray:
    """Those of the pairs whose thumbnails hardly differ."""

    def differences(part_P2: np.ndarray) -> np.ndarray:
        first, second = (thumbnails_NB[part_P2[:, side]].astype(np.int16) for side in (0, 1))
        differences_P: np.ndarray = np.abs(first - second).mean(1)
        return differences_P

    parts = np.split(pairs_P2, range(AT_ONCE, len(pairs_P2), AT_ONCE))
    return np.concatenate([part[differences(part) <= 255 * MAX_DISTANCE] for part in parts])


def _bands(count: int) -> list[np.uint64]:
    """Masks of `count` parts of nearly equal width."""
    edges = [BITS * part // count for part in range(count + 1)]
    return [np.uint64(2**high - 2**low) for low, high in pairwise(edges)]


def _new_links(
    hashes_N: np.ndarray, thumbnails_NB: np.ndarray, masks: list[np.uint64], radius: int, links_P2: np.ndarray
) -> Iterator[np.ndarray]:
    """Pairs [P, 2] that look alike and that agree under the last mask: with `links_P2` they link all that do."""
    rows_M = np.argsort(hashes_N & masks[-1], kind="stable")
    shared_M = hashes_N[rows_M] & masks[-1]
    if (shared_M[CROWD:] == shared_M[:-CROWD]).any():
        groups_N = _components(links_P2, len(hashes_N))
        starts_B = np.flatnonzero(np.diff(shared_M, prepend=~shared_M[:1]))
        sizes_B = np.diff(starts_B, append=len(rows_M))
        is_crowd_B = sizes_B > CROWD
        for start, size in zip(starts_B[is_crowd_B], sizes_B[is_crowd_B], strict=True):
            crowd_M = rows_M[start : start + size]
            yield _links_of_crowd(crowd_M, hashes_N, thumbnails_NB, masks, radius, groups_N)
        rows_M = rows_M[np.repeat(~is_crowd_B, sizes_B)]
    yield _alike(thumbnails_NB, _pairs_of_few(rows_M, hashes_N, masks, radius))


def _pairs_of_few(rows_M: np.ndarray, hashes_N: np.ndarray, masks: list[np.uint64], radius: int) -> np.ndarray:
    """Near pairs. Sorted by what the last mask leaves, an image's partners follow it without a gap."""
    hashes_M = hashes_N[rows_M]
    shared_M = hashes_M & masks[-1]
    found = [np.empty((0, 2), np.int64)]
    step, places = 1, np.arange(len(rows_M) - 1)
    while len(places := places[shared_M[places] == shared_M[places + step]]):
        is_new = _are_new(hashes_M[places] ^ hashes_M[places + step], masks, radius)
        found.append(np.stack([rows_M[places[is_new]], rows_M[places[is_new] + step]], axis=1))
        step += 1
        places = places[places + step < len(rows_M)]
    return np.concatenate(found)


def _links_of_crowd(
    rows_M: np.ndarray,
    hashes_N: np.ndarray,
    thumbnails_NB: np.ndarray,
    masks: list[np.uint64],
    radius: int,
    groups_N: np.ndarray,
) -> np.ndarray:
    """Fewer links than images: each is compared only with those that no chain of links has reached yet."""
    found = [np.empty((0, 2), np.int64)]
    rest = rows_M
    while len(rest):
        reached, rest = [rest[0]], rest[1:]
        while reached and len(rest):
            row = reached.pop()
            is_reached = groups_N[rest] == groups_N[row]
            others = rest[~is_reached & _are_new(hashes_N[rest] ^ hashes_N[row], masks, radius)]
            links_P2 = _alike(thumbnails_NB, np.stack([np.full(len(others), row), others], axis=1))
            found.append(links_P2)
            is_reached |= np.isin(rest, links_P2[:, 1])
            reached.extend(rest[is_reached])
            rest = rest[~is_reached]
    return np.concatenate(found)


def _are_new(differing_P: np.ndarray, masks: list[np.uint64], radius: int) -> np.ndarray:
    """Whether hashes are near that agree under none but the last mask, so that no pair is compared twice."""
    is_new_P: np.ndarray = np.bitwise_count(differing_P) <= radius
    for mask in masks[:-1]:
        is_new_P &= (differing_P & mask) != 0
    return is_new_P
