"""How far a sample has drifted from a reference, and how far it may by chance. Axes: N and M values, B bin, K class."""

from __future__ import annotations

import numpy as np
from scipy.stats import chi2, kstwobign

NUM_BINS = 10


def psi(reference_M: np.ndarray, sample_N: np.ndarray) -> float:
    """Population stability index over ten bins that hold equal shares of the reference; 0 is no drift.

    Each bin counts half a value more than it holds, so that an empty one does not make the index infinite. Values that
    repeat may leave fewer bins.
    """
    edges = np.unique(np.quantile(reference_M, np.linspace(0, 1, NUM_BINS + 1)[1:-1]))
    counts = (
        np.bincount(np.searchsorted(edges, values), minlength=len(edges) + 1) for values in (reference_M, sample_N)
    )
    return psi_of_counts(*counts)


def psi_of_counts(reference_B: np.ndarray, sample_B: np.ndarray) -> float:
    """The same of two histograms over the same bins, such as how often each class is predicted."""
    expected_B, found_B = ((counts + 0.5) / (counts.sum() + 0.5 * len(counts)) for counts in (reference_B, sample_B))
    return float(((found_B - expected_B) * np.log(found_B / expected_B)).sum())


def psi_by_chance(num_reference: int, num_sample: int, *, num_bins: int = NUM_BINS, chance: float = 0.01) -> float:
    """What the index exceeds with probability `chance` although nothing drifted.

    Without drift it is a chi-squared variable with B - 1 degrees of freedom, times 1/N + 1/M (Yurdakul and Naranjo,
    Statistical properties of the population stability index, Journal of Risk Model Validation 14, 2020).
    """
    return float(chi2.isf(chance, num_bins - 1) * (1 / num_reference + 1 / num_sample))


def ks(reference_M: np.ndarray, sample_N: np.ndarray) -> float:
    """Largest distance between the two cumulative distributions (Kolmogorov and Smirnov), in 0..1."""
    values = np.concatenate([reference_M, sample_N])
    shares = (np.searchsorted(np.sort(part), values, side="right") / len(part) for part in (reference_M, sample_N))
    return float(np.abs(np.subtract(*shares)).max())


def ks_by_chance(num_reference: int, num_sample: int, *, chance: float = 0.01) -> float:
    """What the distance exceeds with probability `chance` although nothing drifted (the limit of large samples)."""
    return float(kstwobign.isf(chance) * np.sqrt(1 / num_reference + 1 / num_sample))
