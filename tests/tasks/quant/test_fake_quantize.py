from __future__ import annotations

import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import Tensor

from tasks.contracts.spec import QuantSpec, SchemeName
from tasks.quant import simulate
from tasks.quant.fake_quantize import (
    NUM_BINS,
    FakeQuantizer,
    Mode,
    PerChannelFakeQuantizer,
    SimulateByKernel,
    SimulatePerTensor,
    floored_together,
    simulated_together,
)
from tasks.quant.ranges import SMALLEST_SCALE
from tasks.quant.schemes import SCHEMES

LAYOUTS = [torch.contiguous_format, torch.channels_last]
MINMAX = QuantSpec(ranges="minmax")


def activation(scheme: SchemeName = "onnxruntime") -> FakeQuantizer:
    """As the scheme asks for it, simulating."""
    spec = SCHEMES[scheme].activation
    made = FakeQuantizer(
        dtype=spec.dtype, quant_min=spec.quant_min, quant_max=spec.quant_max, qscheme=spec.qscheme, ch_axis=-1
    )
    made.mode = Mode.SIMULATE
    return made


def weight() -> PerChannelFakeQuantizer:
    made = PerChannelFakeQuantizer(
        dtype=torch.int8, quant_min=-127, quant_max=127, qscheme=torch.per_channel_symmetric, ch_axis=0
    )
    made.mode = Mode.SIMULATE
    return made


def covering(quantizer: FakeQuantizer, low: float, high: float) -> FakeQuantizer:
    quantizer.set_range(torch.tensor([low]), torch.tensor([high]))
    return quantizer


def simulated(x: Tensor, quantizer: FakeQuantizer) -> np.ndarray:
    """The definition, in numpy: round half to even, shift by the zero point, saturate, and back.

    The kernels multiply by the scale's inverse in float32, as PT2E's own quantize operation does.
    """
    shape = (-1,) + (1,) * (x.dim() - 1)
    scale = quantizer.scale.detach().numpy().reshape(shape)
    zero_point = quantizer.zero_point.numpy().reshape(shape).astype(np.float32)
    steps = np.rint(x.detach().numpy() * (np.float32(1) / scale)) + zero_point
    kept: np.ndarray = (np.clip(steps, quantizer.quant_min, quantizer.quant_max) - zero_point) * scale
    return kept


def naive_gradients(x: Tensor, upstream: Tensor, quantizer: FakeQuantizer) -> tuple[Tensor, Tensor]:
    """LSQ equations 3 and 5 times the scale, element by element in float64: for x, and for each log scale."""
    x, upstream = x.detach().double(), upstream.double()
    shape = (-1,) + (1,) * (x.dim() - 1)
    scale = quantizer.scale.detach().double().reshape(shape)
    zero_point = quantizer.zero_point.double().reshape(shape)
    ratio = x / scale
    lowest, highest = quantizer.quant_min - zero_point, quantizer.quant_max - zero_point
    inside = (torch.round(ratio) >= lowest) & (torch.round(ratio) <= highest)
    by_scale = torch.where(inside, torch.round(ratio) - ratio, torch.where(ratio < lowest, lowest, highest))
    product = upstream * by_scale * scale
    groups = quantizer.log_scale.numel()
    shrink = (x.numel() / groups * quantizer.quant_max) ** -0.5
    return upstream * inside, product.reshape(groups, -1).sum(1) * shrink


@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels last"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_forward_is_round_half_to_even_and_saturate(scheme: SchemeName, layout: torch.memory_format) -> None:
    """Ties, both saturated ends and the sign of small values, exactly as numpy does it."""
    quantizer = covering(activation(scheme), -4.0, 60.0)
    step = float(quantizer.scale.detach())
    ties = (torch.arange(-300, 300) + 0.5) * step
    x = torch.cat([torch.randn(600) * 40, ties, torch.tensor([-1e9, 1e9, 0.0])])[:1200].reshape(2, 6, 10, 10)
    x = x.contiguous(memory_format=layout)
    y = quantizer(x)
    np.testing.assert_array_equal(y.detach().numpy(), simulated(x, quantizer))
    assert y.is_contiguous(memory_format=layout)


def test_256_values_pass_unchanged() -> None:
    """What lies on a step is not moved."""
    x = torch.arange(-56, 200) / 16
    assert torch.equal(covering(activation(), -3.5, 12.4375)(x), x)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels last"])
def test_forward_of_weights_has_one_scale_per_output_channel(layout: torch.memory_format) -> None:
    """Each channel is rounded in its own steps, and -128 is never used."""
    weight_OIHW = (torch.randn(5, 4, 3, 3) * torch.logspace(-3, 2, 5)[:, None, None, None]).contiguous(
        memory_format=layout
    )
    quantizer = weight()
    quantizer.choose_weight_range(weight_OIHW, MINMAX)
    weight_OIHW = weight_OIHW * 1.5  # so that some values saturate
    kept = quantizer(weight_OIHW).detach()
    np.testing.assert_array_equal(kept.numpy(), simulated(weight_OIHW, quantizer))
    steps_O = kept.abs().flatten(1).amax(1) / quantizer.scale.detach()
    torch.testing.assert_close(steps_O, torch.full((5,), 127.0))


@pytest.mark.parametrize("upstream_layout", LAYOUTS, ids=["upstream contiguous", "upstream channels last"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels last"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradients_of_activations_are_those_of_the_paper(
    scheme: SchemeName, layout: torch.memory_format, upstream_layout: torch.memory_format
) -> None:
    """Straight through inside the range, none outside; the scale's by equation 3, from a quarter of the images."""
    quantizer = covering(activation(scheme), -1.0, 2.0)
    x = (torch.randn(8, 6, 7, 5) * 2).contiguous(memory_format=layout).requires_grad_()
    upstream = torch.randn(8, 6, 7, 5).contiguous(memory_format=upstream_layout)
    quantizer(x).backward(upstream)
    expected_x, _ = naive_gradients(x, upstream, quantizer)
    _, expected_scale = naive_gradients(x[:2], upstream[:2], quantizer)
    expected_scale *= 4 / 4**0.5  # four times the sum, and its factor that shrinks with the root of all values
    assert x.grad is not None
    assert quantizer.log_scale.grad is not None
    torch.testing.assert_close(x.grad.double(), expected_x, rtol=0, atol=0)
    torch.testing.assert_close(quantizer.log_scale.grad.double(), expected_scale, rtol=1e-4, atol=1e-5)


def check_gradients_of_weights(weight_O: Tensor, upstream: Tensor) -> None:
    weight_O.requires_grad_()
    quantizer = weight()
    reach_O = torch.linspace(0.3, 3.0, len(weight_O))
    quantizer.set_range(-reach_O, reach_O)
    quantizer(weight_O).backward(upstream)
    expected_x, expected_scale_O = naive_gradients(weight_O, upstream, quantizer)
    assert weight_O.grad is not None
    assert quantizer.log_scale.grad is not None
    torch.testing.assert_close(weight_O.grad.double(), expected_x, rtol=0, atol=0)
    torch.testing.assert_close(quantizer.log_scale.grad.double(), expected_scale_O, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("upstream_layout", LAYOUTS, ids=["upstream contiguous", "upstream channels last"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels last"])
def test_gradients_of_weights_are_those_of_the_paper(
    layout: torch.memory_format, upstream_layout: torch.memory_format
) -> None:
    """The same, for each output channel by itself."""
    weight_OIHW = torch.randn(6, 4, 3, 3).contiguous(memory_format=layout)
    check_gradients_of_weights(weight_OIHW, torch.randn(6, 4, 3, 3).contiguous(memory_format=upstream_layout))


def test_gradients_of_linear_weights() -> None:
    """Two axes, one scale for each row."""
    check_gradients_of_weights(torch.randn(6, 40), torch.randn(6, 40))


def test_weights_are_simulated_together_as_they_are_alone() -> None:
    """Bit for bit, forward and backward; after the block each is by itself again."""
    shapes = [(6, 4, 3, 3), (16, 1, 5, 5), (10, 40)]
    found = []
    for together in (False, True):
        torch.manual_seed(0)
        weights = {weight(): (torch.randn(shape) * 2).requires_grad_() for shape in shapes}
        for quantizer, values in weights.items():
            reach_O = torch.linspace(0.3, 3.0, len(values))
            quantizer.set_range(-reach_O, reach_O)
        unseen = torch.zeros(1)  # in the block, what they are given does not count
        with simulated_together(weights) if together else nullcontext():
            results = [quantizer(unseen if together else values) for quantizer, values in weights.items()]
        torch.autograd.backward(results, [torch.randn(shape) for shape in shapes])
        leaves = [*weights.values(), *(quantizer.log_scale for quantizer in weights)]
        found.append([*results, *(leaf.grad for leaf in leaves)])
        afterwards = [quantizer(values) for quantizer, values in weights.items()]
        assert all(map(torch.equal, afterwards, results))
    for alone, joined in zip(*found, strict=True):
        assert alone is not None
        assert torch.equal(alone, joined)


def test_gradients_of_a_linear_layer_and_of_an_odd_layout() -> None:
    """Two axes, and a tensor that is dense in no known order."""
    for shape, move in [((8, 10), None), ((3, 4, 5), (2, 0, 1)), ((1, 16, 1, 1), None)]:
        quantizer = covering(activation(), -1.0, 2.0)
        x = torch.randn(shape) * 2
        x = (x.permute(move) if move else x).detach().requires_grad_()
        upstream = torch.randn(x.shape)
        quantizer(x).backward(upstream)
        expected_x, expected_scale = naive_gradients(x, upstream, quantizer)
        assert x.grad is not None
        assert quantizer.log_scale.grad is not None
        torch.testing.assert_close(x.grad.double(), expected_x, rtol=0, atol=0)
        torch.testing.assert_close(quantizer.log_scale.grad.double(), expected_scale, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_simulation_equals_the_operators_that_conversion_writes(scheme: SchemeName) -> None:
    """Bit for bit, activations and weights."""
    quantizer, x = covering(activation(scheme), -1.0, 2.0), torch.randn(4, 6, 7, 5) * 2
    scale, zero_point = (float(part) for part in quantizer.calculate_qparams())
    bounds, ops = (quantizer.quant_min, quantizer.quant_max), torch.ops.quantized_decomposed
    steps = ops.quantize_per_tensor(x, scale, int(zero_point), *bounds, quantizer.dtype)
    back = ops.dequantize_per_tensor(steps, scale, int(zero_point), *bounds, quantizer.dtype)
    assert torch.equal(quantizer(x), back)
    by_channel, weight_OI = weight(), torch.randn(5, 30)
    by_channel.choose_weight_range(weight_OI / 2, MINMAX)
    scale_O, zero_point_O = by_channel.calculate_qparams()
    kept = ops.dequantize_per_channel(
        ops.quantize_per_channel(weight_OI, scale_O, zero_point_O, 0, -127, 127, torch.int8),
        scale_O, zero_point_O, 0, -127, 127, torch.int8,
    )  # fmt: skip
    assert torch.equal(by_channel(weight_OI), kept)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_kernel_for_cuda_computes_the_same(scheme: SchemeName) -> None:
    """The same bits forward, the same gradients; it runs on a CPU too."""
    quantizer = covering(activation(scheme), -1.0, 2.0)
    x, upstream = torch.randn(2, 6, 7, 5).repeat(4, 1, 1, 1).requires_grad_(), torch.randn(2, 6, 7, 5)
    upstream = upstream.repeat(4, 1, 1, 1)  # so that a quarter of the images tells the same as all
    found = []
    for function in (SimulatePerTensor, SimulateByKernel):
        y = function.apply(x, quantizer.log_scale, quantizer.zero_point, quantizer.quant_min, quantizer.quant_max)
        found.append((y.detach(), *torch.autograd.grad(y, (x, quantizer.log_scale), upstream)))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    torch.testing.assert_close(found[0][2], found[1][2], rtol=1e-4, atol=1e-5)


def test_gradient_of_a_scale_survives_bfloat16() -> None:
    """As CUDA trains: the sums that nearly cancel are not rounded before they do."""
    quantizer = covering(activation("tensorrt"), -3.0, 3.0)
    x = torch.randn(8, 16, 16, 16).bfloat16().requires_grad_()
    upstream = (x.detach() + torch.randn(8, 16, 16, 16)).bfloat16()
    arguments = quantizer.log_scale, quantizer.zero_point, quantizer.quant_min, quantizer.quant_max
    SimulateByKernel.apply(x, *arguments).backward(upstream)
    _, expected = naive_gradients(x, upstream, quantizer)
    assert quantizer.log_scale.grad is not None
    torch.testing.assert_close(quantizer.log_scale.grad.double(), expected, rtol=0.1, atol=0)


def test_scale_of_the_image_does_not_learn() -> None:
    """What needs no gradient itself asks for none."""
    quantizer = covering(activation(), -1.0, 1.0)
    assert not quantizer(torch.randn(3, 4)).requires_grad
    assert quantizer(torch.randn(3, 4, requires_grad=True)).requires_grad


def test_learning_finds_the_better_scale() -> None:
    """A range ten times too wide shrinks until the error is far smaller."""
    torch.manual_seed(0)
    x = torch.randn(1, 4096, requires_grad=True)
    quantizer = covering(activation("tensorrt"), -40.0, 40.0)
    before = float((quantizer(x) - x).detach().square().mean())
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        torch.autograd.backward((quantizer(x) - x).square().sum())
        optimizer.step()
    assert float((quantizer(x) - x).detach().square().mean()) < before / 20


def test_passing_changes_nothing() -> None:
    """Until a range is chosen the model is the float model."""
    quantizer, x = activation(), torch.randn(3, 4)
    quantizer.mode = Mode.PASS
    assert quantizer(x) is x


def test_observing_passes_through_and_keeps_the_ends_of_all_batches() -> None:
    """The ends are exact, over every batch."""
    quantizer = activation()
    quantizer.mode = Mode.OBSERVE_ENDS
    for batch in (torch.tensor([-1.0, 2.0]), torch.tensor([-3.0, 0.5])):
        assert quantizer(batch) is batch
    assert (quantizer.low, quantizer.high) == (-3.0, 2.0)


def test_observing_counts_every_batch_into_one_histogram() -> None:
    """Bins span the observed ends, which both batches share."""
    quantizer = activation()
    batches = [torch.linspace(-1.0, 1.0, 5000), torch.linspace(0.0, 3.0, 3000)]
    for mode in (Mode.OBSERVE_ENDS, Mode.OBSERVE_HISTOGRAM):
        quantizer.mode = mode
        for batch in batches:
            quantizer(batch)
    assert quantizer.histogram_B is not None
    assert quantizer.histogram_B.shape == (NUM_BINS,)
    expected_B = torch.histc(torch.cat(batches), NUM_BINS, -1.0, 3.0)
    assert torch.equal(quantizer.histogram_B, expected_B)
    assert float(quantizer.histogram_B.sum()) == 8000


def test_constant_tensor_needs_no_histogram() -> None:
    """A tensor that is always zero, or always the same, still gets a usable range."""
    for value in (0.0, 2.55):
        quantizer = activation()
        for mode in (Mode.OBSERVE_ENDS, Mode.OBSERVE_HISTOGRAM):
            quantizer.mode = mode
            quantizer(torch.full((10,), value))
        quantizer.choose_range(QuantSpec(ranges="mse"))
        quantizer.mode = Mode.SIMULATE
        torch.testing.assert_close(quantizer(torch.full((10,), value)), torch.full((10,), value))


@pytest.mark.parametrize(
    ("spec", "low", "high"),
    [
        (QuantSpec(ranges="minmax"), -1.0, 1000.0),
        (QuantSpec(ranges="percentile", percentile=99.0), -1.0, 2.0),
        (QuantSpec(ranges="mse"), -1.0, 2.0),
    ],
    ids=["minmax", "percentile", "mse"],
)
def test_range_is_chosen_as_the_spec_says(spec: QuantSpec, low: float, high: float) -> None:
    """An outlier counts for minmax alone."""
    quantizer = activation()
    x = torch.cat([torch.linspace(-1.0, 2.0, 1_000_000), torch.tensor([40.0])])
    if spec.ranges == "minmax":
        x[-1] = 1000.0
    for mode in (Mode.OBSERVE_ENDS, Mode.OBSERVE_HISTOGRAM):
        quantizer.mode = mode
        quantizer(x)
    quantizer.choose_range(spec)
    found_low, found_high = quantizer.covered()
    assert found_high == pytest.approx(high, rel=0.01, abs=0.05) if spec.ranges != "mse" else found_high < 20
    assert found_low == pytest.approx(low, abs=float(quantizer.scale.detach()))
    assert quantizer.histogram_B is None


def test_weight_range_by_least_squares_is_never_worse() -> None:
    """For no channel, and better for one with a lone large weight."""
    torch.manual_seed(0)
    weight_ON = torch.randn(4, 200_000) * 0.01
    weight_ON[3, 0] = 0.1
    errors = {}
    for ranges in ("minmax", "mse"):
        quantizer = weight()
        quantizer.choose_weight_range(weight_ON, QuantSpec(ranges=ranges))
        errors[ranges] = (quantizer(weight_ON) - weight_ON).detach().square().sum(1)
    assert (errors["mse"] <= errors["minmax"] * (1 + 1e-5)).all()
    assert errors["mse"][3] < 0.9 * errors["minmax"][3]


def test_dead_channel_stays_zero() -> None:
    """A channel of zeros, as pruning leaves it."""
    weight_ON = torch.randn(3, 8)
    weight_ON[1] = 0
    for ranges in ("minmax", "mse"):
        quantizer = weight()
        quantizer.choose_weight_range(weight_ON, QuantSpec(ranges=ranges))
        kept = quantizer(weight_ON)
        assert torch.equal(kept[1], torch.zeros(8))
        assert kept.isfinite().all()


def observed(x: Tensor, bounds: tuple[float, float], scheme: SchemeName = "onnxruntime") -> FakeQuantizer:
    """Calibrated on x, and simulating; readers see nothing beyond the bounds."""
    quantizer = activation(scheme)
    quantizer.bounds = bounds
    for mode in (Mode.OBSERVE_ENDS, Mode.OBSERVE_HISTOGRAM):
        quantizer.mode = mode
        quantizer(x)
    quantizer.choose_range(QuantSpec(ranges="mse"))
    quantizer.mode = Mode.SIMULATE
    return quantizer


@pytest.mark.parametrize("share", [1.0, 0.5, 0.7, 1.3, 3.0])
def test_a_floor_is_the_lowest_step_whatever_the_scale_learns(share: float) -> None:
    """It is a whole number of steps from zero, so that integers can be clipped there; nothing lies below."""
    x = torch.linspace(-8.0, 6.0, 10_000)
    quantizer = observed(x, (-3.0, float("inf")))
    assert quantizer.covered() == pytest.approx((-3.0, 6.0), abs=0.2)
    with torch.no_grad():
        quantizer.log_scale.add_(math.log(share))
    scale, zero_point = (float(part) for part in quantizer.calculate_qparams())
    assert scale * zero_point == pytest.approx(3.0, rel=1e-6)
    assert float(scale) == pytest.approx(float(quantizer.log_scale.detach().exp()), rel=0.5 / zero_point)
    assert quantizer.covered()[0] == pytest.approx(-3.0, rel=1e-6)
    steps = torch.unique((quantizer(x) / scale).round())
    assert (int(steps.min()), int(steps.max() - steps.min()) <= 255) == (-zero_point, True)


def test_floored_tensors_are_simulated_together_as_they_are_alone() -> None:
    """Bit for bit, forward and backward, whether they reach the floor or not; afterwards each is by itself again."""
    torch.manual_seed(0)
    values = [torch.linspace(low, high, 1000).reshape(4, -1) for low, high in ((-8.0, 6.0), (-4.0, 9.0), (-1.0, 2.0))]
    found = []
    for together in (False, True):
        quantizers = [observed(x, (-3.0, float("inf"))) for x in values]
        with floored_together(quantizers) if together else nullcontext():
            results = [quantizer(x.clone().requires_grad_()) for quantizer, x in zip(quantizers, values, strict=True)]
        torch.autograd.backward(results, values)
        found.append([*results, *(quantizer.log_scale.grad for quantizer in quantizers)])
        again = [quantizer(x) for quantizer, x in zip(quantizers, values, strict=True)]
        assert all(map(torch.equal, again, results))
    for alone, joined in zip(*found, strict=True):
        assert torch.equal(alone, joined)


@pytest.mark.parametrize(
    ("x", "bounds", "scheme", "low"),
    [
        (torch.linspace(-1.0, 6.0, 1000), (-3.0, float("inf")), "onnxruntime", -1.0),
        (torch.linspace(-8.0, 8.0, 1000), (-3.0, 3.0), "onnxruntime", -3.0),
        (torch.linspace(-8.0, 6.0, 1000), (-3.0, float("inf")), "tensorrt", -6.0),
    ],
    ids=["not reached", "both ends", "symmetric"],
)
def test_no_step_is_spent_beyond_the_bounds(
    x: Tensor, bounds: tuple[float, float], scheme: SchemeName, low: float
) -> None:
    """And none is added up to a bound that no value reaches."""
    quantizer = observed(x, bounds, scheme)
    assert quantizer.covered()[0] == pytest.approx(low, abs=0.2)
    assert quantizer.covered()[1] == pytest.approx(min(6.0, bounds[1]), abs=0.2)


@pytest.mark.parametrize(
    ("function", "dtype"),
    [(SimulatePerTensor, torch.float32), (SimulateByKernel, torch.float32), (SimulateByKernel, torch.bfloat16)],
)
def test_what_lies_below_the_floor_does_not_move_the_scale(function: type, dtype: torch.dtype) -> None:
    """Hard-swish reads it: with the values that it makes zero of, the scale's gradient is that of the others."""
    torch.manual_seed(0)
    inner = torch.rand(4, 1000) * 8 - 2.5
    x = torch.cat([inner, -4 - torch.rand(4, 1000)], 1)
    quantizer = observed(x, simulate._BOUNDS[torch.ops.aten.hardswish.default])
    gradients = []
    for values in (inner, x):
        values = values.to(dtype).requires_grad_()
        log_scale, zero_point = quantizer.parameters_used()
        more = (True,) if function is SimulateByKernel else ()
        simulated = function.apply(values, log_scale, zero_point, 0, 255, *more)  # type: ignore[attr-defined]
        loss = torch.nn.functional.hardswish(simulated).float().square().sum()
        (gradient,) = torch.autograd.grad(loss, quantizer.log_scale)
        gradients.append(float(gradient) * values.numel() ** 0.5)  # without its factor that shrinks with their number
    assert gradients[0] != 0
    assert gradients[1] == pytest.approx(gradients[0], rel=1e-3 if dtype is torch.float32 else 0.05)


def test_parameters_for_pt2e_are_those_that_were_simulated() -> None:
    """Scale and zero point as the converted graph holds them, positive whatever training did."""
    quantizer = covering(activation(), -1.0, 1.55)
    scale, zero_point = quantizer.calculate_qparams()
    assert float(scale) == float(quantizer.scale.detach())
    assert int(zero_point) == 100
    assert not scale.requires_grad
    with torch.no_grad():
        quantizer.log_scale.fill_(-1000.0)
    assert float(quantizer.calculate_qparams()[0]) == SMALLEST_SCALE


def test_range_covered_is_the_range_that_was_set() -> None:
    """The inverse of `set_range`, up to the step that holds zero."""
    assert covering(activation("tensorrt"), -1.27, 0.0).covered() == pytest.approx((-1.28, 1.27))
    assert covering(activation(), -0.5, 2.05).covered() == pytest.approx((-0.5, 2.05))
