from __future__ import annotations

import numpy as np
import pytest

from tasks.data.choose import cover, draw, radius

LABELS = np.repeat([0, 1, 2], [50, 30, 20])
COUNTS = np.array([10, 6, 4])


def blobs(seed: int = 0) -> np.ndarray:
    """A hundred points: most near the origin, three far out, one of them in each class."""
    points = np.random.default_rng(seed).normal(0, 0.1, (100, 4)).astype(np.float32)
    points[[5, 60, 95]] += 10
    return points


def test_a_draw_keeps_the_counts_and_follows_the_seed() -> None:
    """Each class gives its number, none twice, and another seed gives others."""
    chosen = draw(LABELS, COUNTS, 1)
    assert np.bincount(LABELS[chosen]).tolist() == COUNTS.tolist()
    assert len(set(chosen.tolist())) == 20
    np.testing.assert_array_equal(draw(LABELS, COUNTS, 1), chosen)
    assert set(draw(LABELS, COUNTS, 2).tolist()) != set(chosen.tolist())


def test_covering_takes_what_lies_far_out() -> None:
    """Of each class as many as asked, and no point stays far from a chosen one."""
    features = blobs()
    chosen = cover(features, LABELS, COUNTS, 0)
    assert np.bincount(LABELS[chosen]).tolist() == COUNTS.tolist()
    assert {5, 60, 95} <= set(chosen.tolist())
    distances = np.linalg.norm(features[:, None] - features[chosen], axis=2).min(1)
    assert distances.max() < 0.5


@pytest.mark.parametrize("seed", range(5))
def test_covering_is_within_twice_the_best_radius(seed: int) -> None:
    """Gonzalez' bound, against random sets of the same size: none may be better than half as far."""
    random = np.random.default_rng(seed)
    features = random.normal(size=(60, 3)).astype(np.float32)
    labels = np.zeros(60, np.int64)

    def farthest(chosen: np.ndarray) -> float:
        return float(np.linalg.norm(features[:, None] - features[chosen], axis=2).min(1).max())

    mine = farthest(cover(features, labels, np.array([8]), seed))
    best = min(farthest(random.permutation(60)[:8]) for _ in range(500))
    assert mine <= 2 * best


def test_equal_features_are_chosen_once() -> None:
    """Where nothing is left to cover, the rest is still made of different images."""
    chosen = cover(np.zeros((100, 4), np.float32), LABELS, COUNTS, 0)
    assert len(set(chosen.tolist())) == 20


def test_a_class_smaller_than_its_count_gives_all() -> None:
    chosen = cover(blobs(), LABELS, np.array([10, 6, 40]), 0)
    assert np.bincount(LABELS[chosen]).tolist() == [10, 6, 20]


def test_the_radius_is_relative_to_the_spread() -> None:
    """Zero when all are chosen, one when only the mean is."""
    features = np.concatenate([blobs(), -blobs()])
    features[0] = features[1:].mean(0)
    assert radius(features, np.arange(200)) == 0
    assert radius(features, np.array([0])) == pytest.approx(1, abs=1e-3)
    assert 0 < radius(features, np.arange(20)) < 1
