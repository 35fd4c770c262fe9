from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import ks_2samp

from tasks.data.drift import ks, ks_by_chance, psi, psi_by_chance, psi_of_counts


def draws(num_reference: int, num_sample: int, *, shift: float = 0.0, count: int = 400) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [
        np.array(
            [statistic(random.normal(size=num_reference), random.normal(shift, size=num_sample)) for _ in range(count)]
        )
        for statistic in (psi, ks)
    ]


@pytest.mark.parametrize(("num_reference", "num_sample"), [(5000, 128), (5000, 512), (512, 512)])
def test_limits_by_chance_are_kept_by_chance(num_reference: int, num_sample: int) -> None:
    """Of samples that did not drift one in a hundred is above, give or take."""
    psis, distances = draws(num_reference, num_sample)
    assert 0.0 < (psis > psi_by_chance(num_reference, num_sample, chance=0.05)).mean() < 0.1
    assert 0.0 < (distances > ks_by_chance(num_reference, num_sample, chance=0.05)).mean() < 0.1


def test_a_shift_of_half_a_deviation_is_seen() -> None:
    """At 512 images every draw is above what chance gives."""
    psis, distances = draws(5000, 512, shift=0.5, count=50)
    assert (psis > psi_by_chance(5000, 512)).all()
    assert (distances > ks_by_chance(5000, 512)).all()
    assert np.median(psis) == pytest.approx(0.25, abs=0.05)


def test_distance_is_scipys() -> None:
    """Also where values repeat."""
    random = np.random.default_rng(0)
    reference, sample = random.integers(0, 20, 300), random.integers(2, 25, 90)
    assert ks(reference, sample) == pytest.approx(ks_2samp(reference, sample).statistic)


def test_no_drift_is_zero_and_empty_bins_are_finite() -> None:
    """A constant property, and a class that is never predicted."""
    assert psi(np.arange(100), np.arange(100)) == 0
    assert psi(np.ones(50), np.ones(50)) == 0
    assert ks(np.ones(50), np.ones(9)) == 0
    assert 1 < psi_of_counts(np.array([50, 50, 0]), np.array([0, 50, 50])) < 100
