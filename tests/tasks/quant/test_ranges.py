from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tasks.quant.ranges import SMALLEST_SCALE, Grid, mse_range, percentile_range, scale_and_zero_point

UINT8 = Grid(0, 255, symmetric=False)
INT8 = Grid(-128, 127, symmetric=True)
WEIGHT = Grid(-127, 127, symmetric=True)
GRIDS = st.sampled_from([UINT8, INT8, WEIGHT])
ENDS = st.floats(-1e6, 1e6, width=32).filter(lambda end: end == 0 or abs(end) > 1e-6)


def rounded(values: Tensor, low: float, high: float, grid: Grid) -> tuple[Tensor, Tensor]:
    """Codes, and the values they stand for, when low..high is covered."""
    scale, zero_point = scale_and_zero_point(torch.tensor([low]), torch.tensor([high]), grid)
    codes = (torch.round(values / scale) + zero_point).clamp(grid.lowest, grid.highest)
    return codes, (codes - zero_point) * scale


def squared_error(histogram_B: Tensor, low: float, high: float, ends: tuple[float, float], grid: Grid) -> float:
    """Of covering `ends`, over a histogram between low and high; float64 and by definition."""
    width = (high - low) / len(histogram_B)
    centers_B = low + width * (torch.arange(len(histogram_B), dtype=torch.float64) + 0.5)
    return float(((rounded(centers_B, *ends, grid)[1] - centers_B).square() * histogram_B).sum())


@pytest.mark.parametrize("grid", [UINT8, Grid(-128, 127, symmetric=False)], ids=["uint8", "int8"])
def test_256_values_take_256_codes(grid: Grid) -> None:
    """Values that lie on the steps are kept exactly, each by a code of its own."""
    values = torch.arange(-56, 200) / 16
    codes, kept = rounded(values, -3.5, 12.4375, grid)
    assert torch.equal(codes, torch.arange(grid.lowest, grid.highest + 1).float())
    assert torch.equal(kept, values)


def test_narrow_weights_take_255_codes() -> None:
    """-128 has no positive twin, so weights do without it."""
    values = torch.arange(-127, 128) / 32
    codes, kept = rounded(values, -127 / 32, 127 / 32, WEIGHT)
    assert torch.equal(codes, torch.arange(-127, 128).float())
    assert torch.equal(kept, values)


def test_symmetric_range_reaches_as_far_on_both_sides() -> None:
    """The longer end decides."""
    for low, high in [(-254.0, 10.0), (-10.0, 254.0)]:
        scale, zero_point = scale_and_zero_point(torch.tensor([low]), torch.tensor([high]), INT8)
        assert (float(scale), int(zero_point)) == (2.0, 0)


@pytest.mark.parametrize(
    ("low", "high", "scale", "zero_point"), [(1.0, 255.0, 1.0, 0), (-255.0, -1.0, 1.0, 255), (-1.0, 254.0, 1.0, 1)]
)
def test_range_is_widened_to_hold_zero(low: float, high: float, scale: float, zero_point: int) -> None:
    """One-sided tensors keep zero at the edge of the grid."""
    found_scale, found_zero_point = scale_and_zero_point(torch.tensor([low]), torch.tensor([high]), UINT8)
    assert (float(found_scale), int(found_zero_point)) == (scale, zero_point)
    assert found_zero_point.dtype == torch.int32


@pytest.mark.parametrize("grid", [UINT8, INT8, WEIGHT], ids=str)
def test_dead_tensor_has_a_positive_scale_and_stays_zero(grid: Grid) -> None:
    """A tensor that is always zero divides by no zero."""
    scale, _ = scale_and_zero_point(torch.zeros(1), torch.zeros(1), grid)
    assert float(scale) == SMALLEST_SCALE
    assert torch.equal(rounded(torch.zeros(3), 0.0, 0.0, grid)[1], torch.zeros(3))


def test_channels_are_independent() -> None:
    """One range per element, a dead one among them."""
    scale, zero_point = scale_and_zero_point(torch.tensor([-127.0, 0.0, -1.0]), torch.tensor([1.0, 0.0, 254.0]), WEIGHT)
    assert torch.equal(scale, torch.tensor([1.0, SMALLEST_SCALE, 2.0]))
    assert torch.equal(zero_point, torch.zeros(3, dtype=torch.int32))


@given(ends=st.tuples(ENDS, ENDS).map(sorted), grid=GRIDS, share=st.floats(0, 1))
def test_no_covered_value_moves_by_more_than_half_a_step(ends: list[float], grid: Grid, share: float) -> None:
    """Inside the range only rounding happens; the zero point's own rounding may cut half a step at an end."""
    low, high = ends
    value = torch.tensor([low + share * (high - low)])
    scale, zero_point = scale_and_zero_point(torch.tensor([low]), torch.tensor([high]), grid)
    kept = rounded(value, low, high, grid)[1]
    bottom, top = ((end - zero_point) * scale for end in (grid.lowest, grid.highest))
    limit = 0.5 if bool(bottom <= value) and bool(value <= top) else 1.0
    assert float((kept - value).abs()) <= limit * float(scale) * (1 + 1e-4)


@given(ends=st.tuples(ENDS, ENDS).map(sorted), grid=GRIDS)
def test_zero_is_always_kept_exactly(ends: list[float], grid: Grid) -> None:
    """Padding and ReLU produce zero; its error would be a shift of everything."""
    scale, zero_point = scale_and_zero_point(torch.tensor([ends[0]]), torch.tensor([ends[1]]), grid)
    assert float(scale) > 0
    assert grid.lowest <= int(zero_point) <= grid.highest
    assert float(rounded(torch.zeros(1), ends[0], ends[1], grid)[1]) == 0.0


@given(
    counts=st.lists(st.integers(0, 1000), min_size=8, max_size=64).filter(any),
    ends=st.tuples(ENDS, ENDS).map(sorted).filter(lambda ends: ends[0] < ends[1]),
    grid=GRIDS,
)
def test_least_squares_is_never_worse_than_everything(counts: list[int], ends: list[float], grid: Grid) -> None:
    """The observed range is among the candidates."""
    low, high = ends
    histogram_B = torch.tensor(counts, dtype=torch.float32)
    new_low, new_high = mse_range(histogram_B, low, high, grid)
    found = squared_error(histogram_B, low, high, (float(new_low), float(new_high)), grid)
    everything = squared_error(histogram_B, low, high, (low, high), grid)
    assert found <= everything * (1 + 1e-3) + 1e-30


def test_least_squares_cuts_a_lone_outlier() -> None:
    """One value of a hundred million at 100 times the rest does not cost the rest their steps."""
    histogram_B = torch.zeros(1000)
    histogram_B[:10] = 1e7
    histogram_B[-1] = 1
    low, high = mse_range(histogram_B, 0.0, 1000.0, UINT8)
    assert float(low) == 0.0
    assert float(high) < 100.0


def test_least_squares_keeps_what_is_spread_evenly() -> None:
    """Cutting costs more than it saves."""
    low, high = mse_range(torch.ones(2048), -1.0, 1.0, UINT8)
    assert (float(low), float(high)) == (-1.0, 1.0)


def test_least_squares_stays_symmetric() -> None:
    """A symmetric grid has one end."""
    histogram_B = torch.zeros(512)
    histogram_B[200:300] = 1e5
    histogram_B[-1] = 1
    low, high = mse_range(histogram_B, -1.0, 1.0, INT8)
    assert float(low) == -float(high)
    assert float(high) < 0.5


@given(
    counts=st.lists(st.integers(0, 1000), min_size=4, max_size=64).filter(any),
    percentile=st.floats(50.5, 100),
    ends=st.sampled_from([(-2.0, 6.0), (0.0, 8.0), (-8.0, 0.0), (1.0, 9.0)]),
)
def test_percentile_keeps_its_share(counts: list[int], percentile: float, ends: tuple[float, float]) -> None:
    """At least that share of the values lies inside, and the range lies within the observed one."""
    histogram_B = torch.tensor(counts, dtype=torch.float32)
    low, high = (float(end) for end in percentile_range(histogram_B, *ends, percentile))
    assert ends[0] <= low < high <= ends[1]
    edges = torch.linspace(*ends, len(counts) + 1)
    inside_B = (edges[:-1] >= low - 1e-5) & (edges[1:] <= high + 1e-5)
    assert float(histogram_B[inside_B].sum()) >= float(histogram_B.sum()) * percentile / 100 * (1 - 1e-6)


def test_percentile_cuts_equally_at_both_ends() -> None:
    """Half of what is cut comes off each end of a tensor with two signs."""
    low, high = percentile_range(torch.ones(1000), -1.0, 1.0, 90.0)
    assert float(low) == pytest.approx(-0.9, abs=0.003)
    assert float(high) == pytest.approx(0.9, abs=0.003)


def test_percentile_cuts_only_the_tail_behind_a_relu() -> None:
    """An end at zero is kept, and all of the cut comes off the other one."""
    low, high = percentile_range(torch.ones(1000), 0.0, 1.0, 90.0)
    assert float(low) == 0.0
    assert float(high) == pytest.approx(0.9, abs=0.002)


def test_hundred_percent_keeps_everything() -> None:
    """Nothing is cut when nothing may be cut."""
    histogram_B = torch.tensor([1.0, 0.0, 5.0, 0.0, 1.0])
    assert [float(end) for end in percentile_range(histogram_B, -1.0, 4.0, 100.0)] == [-1.0, 4.0]
