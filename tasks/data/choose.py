"""Which images ranges are measured on. Axes: N image, K class, D feature."""

from __future__ import annotations

import numpy as np


def draw(labels_N: np.ndarray, counts_K: np.ndarray, seed: int) -> np.ndarray:
    """Positions of `counts_K` random images of each class, in an order that mixes the classes."""
    random = np.random.default_rng(seed)
    order_N = random.permutation(len(labels_N))
    chosen = [order_N[labels_N[order_N] == label][:count] for label, count in enumerate(counts_K)]
    return random.permutation(np.concatenate(chosen))


def cover(features_ND: np.ndarray, labels_N: np.ndarray, counts_K: np.ndarray, seed: int) -> np.ndarray:
    """Positions of `counts_K` images of each class that leave no image far from a chosen one, in a mixed order.

    Greedy k-center in each class, from the image nearest to the class's mean: the next is always the one farthest from
    all that are chosen, which is within twice the best radius (Gonzalez, Clustering to Minimize the Maximum
    Intercluster Distance, 1985; as core-set: Sener and Savarese, Active Learning for Convolutional Neural Networks,
    ICLR 2018).
    """
    chosen = []
    for label, count in enumerate(counts_K):
        members = np.flatnonzero(labels_N == label)
        if count and len(members):
            chosen.append(members[_farthest_first(features_ND[members], int(count))])
    return np.random.default_rng(seed).permutation(np.concatenate(chosen))


def radius(features_ND: np.ndarray, chosen: np.ndarray) -> float:
    """Mean distance of an image to the nearest chosen one, over the mean distance of images to their mean."""
    nearest_N = np.full(len(features_ND), np.inf, np.float32)
    for center_D in features_ND[chosen]:
        np.minimum(nearest_N, np.linalg.norm(features_ND - center_D, axis=1), out=nearest_N)
    return float(nearest_N.mean() / np.linalg.norm(features_ND - features_ND.mean(0), axis=1).mean())


def _farthest_first(features_ND: np.ndarray, count: int) -> np.ndarray:
    first = int(np.linalg.norm(features_ND - features_ND.mean(0), axis=1).argmin())
    nearest_N = np.linalg.norm(features_ND - features_ND[first], axis=1)
    chosen = [first]
    while len(chosen) < min(count, len(features_ND)):
        nearest_N[chosen[-1]] = -1  # never again, also among equals
        chosen.append(int(nearest_N.argmax()))
        np.minimum(nearest_N, np.linalg.norm(features_ND - features_ND[chosen[-1]], axis=1), out=nearest_N)
    return np.array(chosen)
