"""From a histogram of a tensor's values to the range that INT8 should cover. Pure functions.

Letters: B histogram bins, C candidate ranges. Ranges are float, bounds are integer, a scale is float units per step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SMALLEST_SCALE = 2.0**-40  # a tensor that is always zero still needs a positive scale
_SHRINK_STEPS = 64  # candidates per end of the range


@dataclass(frozen=True)
class Grid:
    """The integers that a tensor may take."""

    lowest: int
    highest: int
    symmetric: bool  # zero point 0 and equal reach on both sides

    @property
    def steps(self) -> int:
        return self.highest - self.lowest


def scale_and_zero_point(low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Quantization parameters that cover low..high, which is widened to hold zero.

    Zero is always a step of its own: padding and ReLU produce it exactly.
    """
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    if grid.symmetric:
        scale = (torch.maximum(-low, high) / grid.highest).clamp(min=SMALLEST_SCALE)
        return scale, torch.zeros_like(scale, dtype=torch.int32)
    scale = ((high - low) / grid.steps).clamp(min=SMALLEST_SCALE)
    zero_point = (grid.lowest - torch.round(low / scale)).clamp(grid.lowest, grid.highest)
    return scale, zero_point.to(torch.int32)


def percentile_range(histogram_B: Tensor, low: float, high: float, percentile: float) -> tuple[Tensor, Tensor]:
    """The range that holds `percentile` percent of all values, the rest cut off equally at both ends.

    An end that lies at zero is kept: after ReLU only the upper tail is cut.
    """
    edges = torch.linspace(low, high, len(histogram_B) + 1, dtype=torch.float64)
    share_B = histogram_B.double().cumsum(0) / histogram_B.sum()
    one_sided = low >= 0 or high <= 0
    cut = (100.0 - percentile) / 100.0 / (1 if one_sided else 2)
    first = int(torch.searchsorted(share_B, torch.tensor(cut, dtype=torch.float64), right=True))
    last = int(torch.searchsorted(share_B, torch.tensor(1.0 - cut, dtype=torch.float64)))
    new_low = edges[0] if low >= 0 else edges[min(first, len(edges) - 2)]
    new_high = edges[-1] if high <= 0 else edges[min(last + 1, len(edges) - 1)]
    return new_low.float(), new_high.float()


def mse_range(histogram_B: Tensor, low: float, high: float, grid: Grid) -> tuple[Tensor, Tensor]:
    """The range with the least squared error over the histogram, rounding and clipping together.

    Every pair of ends is tried, each between a 64th of the observed one and all of it; symmetric grids have one end.
    """
    width = (high - low) / len(histogram_B)
    centers_B = torch.arange(len(histogram_B), dtype=torch.float32) * width + (low + width / 2)
    shares = torch.linspace(1.0 / _SHRINK_STEPS, 1.0, _SHRINK_STEPS)
    lows, highs = low * shares, high * shares
    if grid.symmetric:
        reach = max(-low, high) * shares
        lows_C, highs_C = -reach, reach
    elif low >= 0 or high <= 0:
        lows_C, highs_C = (torch.zeros_like(highs), highs) if low >= 0 else (lows, torch.zeros_like(lows))
    else:
        pairs = torch.cartesian_prod(lows, highs)
        lows_C, highs_C = pairs[:, 0], pairs[:, 1]
    filled = histogram_B > 0
    best = _squared_error(centers_B[filled], histogram_B[filled].float(), lows_C, highs_C, grid).argmin()
    return lows_C[best], highs_C[best]


def _squared_error(values_B: Tensor, counts_B: Tensor, lows_C: Tensor, highs_C: Tensor, grid: Grid) -> Tensor:
    """Sum over the histogram for each candidate, [C]; in chunks, to bound memory."""
    errors = []
    for start in range(0, len(lows_C), 512):
        chunk = slice(start, start + 512)
        scale_C, zero_point_C = scale_and_zero_point(lows_C[chunk], highs_C[chunk], grid)
        steps_CB = torch.round(values_B / scale_C[:, None]) + zero_point_C[:, None]
        kept_CB = (steps_CB.clamp(grid.lowest, grid.highest) - zero_point_C[:, None]) * scale_C[:, None]
        errors.append(((kept_CB - values_B).square() * counts_B).sum(1))
    return torch.cat(errors)
