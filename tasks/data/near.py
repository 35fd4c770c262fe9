"""Near duplicates: images that look alike, found through an index and never by comparing all pairs.

Axes: N image, P pair.
"""

from __future__ import annotations

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

BITS = 64
MAX_DISTANCE = 0.05  # mean difference of two thumbnails, of the whole range, that is still the same picture


def near_pairs(hashes_N: np.ndarray, thumbnails_NB: np.ndarray, *, radius: int = 4) -> np.ndarray:
    """Pairs of images that look alike: rows [P, 2], the smaller one first, sorted, each pair once.

    Two hashes that differ in at most `radius` bits agree on at least one of `radius + 1` bands of bits, so only images
    that share a band are compared (the pigeonhole principle of Manku et al., Detecting Near-Duplicates for Web
    Crawling, WWW 2007, section 3). Thumbnails then tell what is alike from what only hashes alike.

    Args:
        hashes_N: perceptual hashes, uint64.
        thumbnails_NB: grey copies of a few pixels, uint8.
        radius: bits that two hashes may differ in.
    """
    found = [_pairs_in_band(hashes_N, band_N, radius) for band_N in _bands(hashes_N, radius + 1)]
    pairs_P2 = np.unique(np.sort(np.concatenate(found), axis=1), axis=0)
    if not len(pairs_P2):
        return pairs_P2
    first, second = (thumbnails_NB[pairs_P2[:, side]].astype(np.int16) for side in (0, 1))
    alike_P2: np.ndarray = pairs_P2[np.abs(first - second).mean(1) <= 255 * MAX_DISTANCE]
    return alike_P2


def groups_of(pairs_P2: np.ndarray, count: int) -> np.ndarray:
    """A number for each of `count` images, the same for images that a chain of pairs links: int32 [N]."""
    links = coo_array((np.ones(len(pairs_P2), bool), (pairs_P2[:, 0], pairs_P2[:, 1])), shape=(count, count))
    groups_N: np.ndarray = connected_components(links, directed=False)[1]
    return groups_N


def _bands(hashes_N: np.ndarray, count: int) -> list[np.ndarray]:
    """The bits of each hash in `count` parts of nearly equal width."""
    edges = [BITS * part // count for part in range(count + 1)]
    widths = np.diff(edges).tolist()
    return [
        (hashes_N >> np.uint64(low)) & np.uint64(2**width - 1) for low, width in zip(edges[:-1], widths, strict=True)
    ]


def _pairs_in_band(hashes_N: np.ndarray, band_N: np.ndarray, radius: int) -> np.ndarray:
    """Pairs that share the band and are near. Sorted by band, an image's partners follow it without a gap."""
    order_N = np.argsort(band_N, kind="stable")
    band_N, hashes_N = band_N[order_N], hashes_N[order_N]
    found = [np.empty((0, 2), np.int64)]
    step, rows = 1, np.arange(len(order_N) - 1)
    while len(rows := rows[band_N[rows] == band_N[rows + step]]):
        near = rows[np.bitwise_count(hashes_N[rows] ^ hashes_N[rows + step]) <= radius]
        found.append(np.stack([order_N[near], order_N[near + step]], axis=1))
        step += 1
        rows = rows[rows + step < len(order_N)]
    return np.concatenate(found)
