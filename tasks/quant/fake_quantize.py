"""One module that observes a tensor, chooses its range, simulates INT8 on it and learns its scale.

Learned scales follow LSQ (Esser et al., Learned Step Size Quantization, ICLR 2020). The scale is kept as its logarithm,
so it stays positive and one learning rate suits all layers. With y the simulated x, equation 3 times the scale becomes

    dL/d(log s) = sum(dL/dy * y) - sum(dL/dx * x)

which needs two products and no tensor of its own. On a CPU they are taken over a part of the batch: a batch is a random
sample already, and a scale stands for so many values that a part of them tells its gradient as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchao.quantization.pt2e.fake_quantize import FakeQuantizeBase

from tasks.contracts.spec import QuantSpec
from tasks.quant.ranges import SMALLEST_SCALE, Grid, mse_range, percentile_range, scale_and_zero_point

NUM_BINS = 2048
_SAMPLE = 2**20  # values of one batch that enter the histogram; the observed ends are exact
_BATCH_SHARE = 4  # of this many images, one tells the gradient of the scales


class Mode(Enum):
    """What a pass through the model does with each tensor."""

    PASS = "pass"  # noqa: S105 - no password
    OBSERVE_ENDS = "observe ends"
    OBSERVE_HISTOGRAM = "observe histogram"
    SIMULATE = "simulate"


class FakeQuantizer(FakeQuantizeBase):  # type: ignore[misc]
    """Per-tensor simulation of INT8. `PerChannelFakeQuantizer` is the same for weights.

    PT2E makes one for each quantized tensor and, at conversion, asks `calculate_qparams`.
    """

    def __init__(
        self,
        *,
        dtype: torch.dtype,
        quant_min: int,
        quant_max: int,
        qscheme: torch.qscheme,
        ch_axis: int = -1,
        is_dynamic: bool = False,
        eps: float = 0.0,
    ) -> None:
        super().__init__()
        for flag in ("fake_quant_enabled", "observer_enabled"):
            delattr(self, flag)  # tensors that would cost a device round trip each time they are read
        assert not is_dynamic
        assert eps == 0.0
        self.dtype, self.qscheme, self.ch_axis, self.is_dynamic = dtype, qscheme, ch_axis, is_dynamic
        self.quant_min, self.quant_max = quant_min, quant_max
        symmetric = qscheme in (torch.per_tensor_symmetric, torch.per_channel_symmetric)
        self.grid = Grid(quant_min, quant_max, symmetric)
        self.mode = Mode.PASS
        self.log_scale = nn.Parameter(torch.zeros(1))
        self.zero_point: Tensor
        self.register_buffer("zero_point", torch.zeros(1, dtype=torch.int32))
        self.largest_scale: float = float("inf")  # that training may reach
        self.bounds: tuple[float, float] = (float("-inf"), float("inf"))  # no reader tells apart what lies beyond
        self.used: tuple[Tensor, Tensor] | None = None  # what `floored_together` has computed already
        self.low: float = float("inf")
        self.high: float = float("-inf")
        self.histogram_B: Tensor | None = None

    @property
    def scale(self) -> Tensor:
        return self.parameters_used()[0].exp()

    @property
    def is_floored(self) -> bool:
        """Whether there is a lower bound alone, which then is a whole number of steps from zero."""
        return not self.grid.symmetric and self.bounds[0] > float("-inf") and self.bounds[1] == float("inf")

    @property
    def is_low_fixed(self) -> bool:
        """Whether values were observed down to such a bound: the range starts there."""
        return self.is_floored and self.low <= self.bounds[0]

    def parameters_used(self) -> tuple[Tensor, Tensor]:
        """Logarithm of the scale, and zero point, each [1] or, per channel, [channels].

        Above a lower bound the scale divides it, and no step lies below it, also while the scale learns: `zero_point`
        is then only the most that there may be below zero.
        """
        if self.used is not None:
            return self.used
        if not self.is_floored:
            return self.log_scale, self.zero_point
        return _above_floor(self.log_scale, self.zero_point, self.bounds[0])

    def forward(self, x: Tensor) -> Tensor:
        if self.mode is Mode.SIMULATE:
            return self._simulate(x)
        if self.mode is not Mode.PASS:
            self._observe(x.detach())
        return x

    def _simulate(self, x: Tensor) -> Tensor:
        # The image's own scale does not learn: it would cost the first convolution the gradient of its input.
        log_scale, zero_point = self.parameters_used()
        log_scale = log_scale if x.requires_grad else log_scale.detach()
        if x.is_cpu:
            return SimulatePerTensor.apply(x, log_scale, zero_point, self.quant_min, self.quant_max)  # type: ignore[no-any-return]
        ends = self.quant_min, self.quant_max
        return SimulateByKernel.apply(x, log_scale, zero_point, *ends, self.is_floored)  # type: ignore[no-any-return]

    def _observe(self, x: Tensor) -> None:
        x = x.clamp(*self.bounds)
        if self.mode is Mode.OBSERVE_ENDS:
            low, high = torch.aminmax(x)
            self.low = float(np.minimum(self.low, float(low)))  # keeps a NaN; Python's min does not
            self.high = float(np.maximum(self.high, float(high)))
            return
        values = x.flatten()
        values = values[:: max(1, values.numel() // _SAMPLE)].float()
        counts_B = torch.histc(values, NUM_BINS, self.low, self.high) if self.high > self.low else None
        if counts_B is not None:
            self.histogram_B = counts_B if self.histogram_B is None else self.histogram_B + counts_B

    def choose_range(self, spec: QuantSpec) -> None:
        """Set scale and zero point from what was observed.

        Args:
            spec: says how; minmax needs the ends alone, the others the histogram.
        """
        low, high = torch.tensor(self.low), torch.tensor(self.high)
        if self.histogram_B is not None and spec.ranges == "percentile":
            low, high = percentile_range(self.histogram_B.cpu(), self.low, self.high, spec.percentile)
        elif self.histogram_B is not None and spec.ranges == "mse":
            low, high = mse_range(self.histogram_B.cpu(), self.low, self.high, self.grid)
        self.set_range(low.reshape(1), high.reshape(1))
        self.histogram_B = None

    @torch.no_grad()
    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Cover low..high, each [1] or, per channel, [channels]."""
        low = torch.full_like(low, self.bounds[0]) if self.is_low_fixed else low
        scale, zero_point = scale_and_zero_point(low, high, self.grid)
        if self.is_low_fixed:
            zero_point = torch.full_like(zero_point, self.quant_max)
        self.log_scale = nn.Parameter(scale.log().to(self.log_scale.device))
        self.zero_point = zero_point.to(self.zero_point.device)

    def covered(self) -> tuple[float, float]:
        """The range that the present scale and zero point cover."""
        log_scale, below_zero = self.parameters_used()
        scale, zero_point = float(log_scale.detach().exp()), int(below_zero)
        return (self.quant_min - zero_point) * scale, (self.quant_max - zero_point) * scale

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point as PT2E writes them into the converted graph."""
        log_scale, zero_point = self.parameters_used()
        return log_scale.detach().exp().clamp(min=SMALLEST_SCALE), zero_point


class PerChannelFakeQuantizer(FakeQuantizer):
    """For weights [O, ...]: one symmetric range for each output channel."""

    simulated: Tensor | None = None  # what `simulated_together` has computed already

    def _simulate(self, x: Tensor) -> Tensor:
        if self.simulated is not None:
            return self.simulated
        simulated: tuple[Tensor] = SimulatePerChannel.apply(self.quant_min, self.quant_max, x, self.log_scale)
        return simulated[0]

    @torch.no_grad()
    def choose_weight_range(self, weight: Tensor, spec: QuantSpec) -> None:
        """Ranges from the weights themselves: all of each channel, or the one with least squared error."""
        weight_ON = weight.detach().flatten(1).float().cpu()
        reach_O = weight_ON.abs().amax(1)
        if spec.ranges == "mse":
            best_O = torch.full_like(reach_O, float("inf"))
            chosen_O = reach_O.clone()
            for share in torch.linspace(0.5, 1.0, 51):
                scale_O, _ = scale_and_zero_point(-reach_O * share, reach_O * share, self.grid)
                steps_ON = torch.round(weight_ON / scale_O[:, None]).clamp(self.quant_min, self.quant_max)
                error_O = (steps_ON * scale_O[:, None] - weight_ON).square().sum(1)
                chosen_O = torch.where(error_O < best_O, reach_O * share, chosen_O)
                best_O = torch.minimum(error_O, best_O)
            reach_O = chosen_O
        self.set_range(-reach_O, reach_O)


def _above_floor(log_scale: Tensor, zero_point: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """Of any number of tensors: the nearest scale that divides the floor, and no step below it."""
    learned = log_scale.detach()
    steps = (-floor / learned.exp()).round().clamp(min=1)
    log_scale = log_scale + ((-floor / steps).log() - learned)  # learns as if it were not rounded
    return log_scale, torch.minimum(steps, zero_point).to(torch.int32)


@contextmanager
def left_exact(quantizers: Sequence[FakeQuantizer]) -> Iterator[None]:
    """In this block these quantizers, which simulate, let their tensors pass."""
    for quantizer in quantizers:
        quantizer.mode = Mode.PASS
    try:
        yield
    finally:
        for quantizer in quantizers:
            quantizer.mode = Mode.SIMULATE


@contextmanager
def floored_together(quantizers: Sequence[FakeQuantizer]) -> Iterator[None]:
    """In this block the parameters of these floored quantizers are those of now, computed by one call for all."""
    if quantizers:
        (floor,) = {quantizer.bounds[0] for quantizer in quantizers}
        log_scales, zero_points = _above_floor(
            torch.cat([quantizer.log_scale for quantizer in quantizers]),
            torch.cat([quantizer.zero_point for quantizer in quantizers]),
            floor,
        )
        for number, quantizer in enumerate(quantizers):
            quantizer.used = log_scales[number : number + 1], zero_points[number : number + 1]
    try:
        yield
    finally:
        for quantizer in quantizers:
            quantizer.used = None


@contextmanager
def simulated_together(weights: Mapping[PerChannelFakeQuantizer, Tensor]) -> Iterator[None]:
    """In this block the quantizers give what one call has made of all these weights, whatever they are given.

    Weights are small and many: by themselves, to call each operation costs more than the operation.
    """
    ((low, high),) = {(quantizer.quant_min, quantizer.quant_max) for quantizer in weights}
    log_scales = [quantizer.log_scale for quantizer in weights]
    simulated: tuple[Tensor, ...] = SimulatePerChannel.apply(low, high, *weights.values(), *log_scales)
    for quantizer, values in zip(weights, simulated, strict=True):
        quantizer.simulated = values
    try:
        yield
    finally:
        for quantizer in weights:
            quantizer.simulated = None


class SimulatePerTensor(torch.autograd.Function):
    """By plain vector operations: on a CPU ten times faster than ATen's fake-quantize kernel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, log_scale: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
        scale = log_scale.exp()
        lowest, highest = low - int(zero_point), high - int(zero_point)
        # Half to even, by the inverse of the scale, as PT2E's own quantize operation does.
        y = (x * scale.reciprocal()).round_().clamp_(lowest, highest).mul_(scale)
        ctx.ends = (lowest - 0.5) * float(scale), (highest + 0.5) * float(scale)
        ctx.high = high
        ctx.save_for_backward(x, y)
        return y

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, y = ctx.saved_tensors
        gradient_x = _within(upstream[0], x, *ctx.ends)
        part = max(1, len(x) // _BATCH_SHARE) if x.dim() == 4 else len(x)  # only of images is the first axis the batch
        upstream_K, y_K, gradient_K, x_K = _flat(part, upstream[0], y, gradient_x, x)
        gradient_scale = torch.dot(upstream_K, y_K).sub_(torch.dot(gradient_K, x_K))
        gradient_scale.mul_(len(x) / part * _shrink(x.numel(), ctx.high))
        return gradient_x, gradient_scale.view(1), None, None, None


class SimulateByKernel(torch.autograd.Function):
    """The same by ATen's kernel, which is one pass on CUDA and asks the device for nothing."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, log_scale: Tensor, zero_point: Tensor, low: int, high: int, is_floored: bool = False
    ) -> Tensor:
        enabled = torch.ones(1, dtype=torch.long, device=x.device)
        y, inside = torch.ops.aten._fake_quantize_per_tensor_affine_cachemask_tensor_qparams(
            x, log_scale.exp(), zero_point, enabled, low, high
        )
        ctx.shrink, ctx.is_floored = _shrink(x.numel(), high), is_floored
        ctx.save_for_backward(x, y, inside)
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, y, inside = ctx.saved_tensors
        # The two sums nearly cancel: in bfloat16 they are taken together, and y - x is exact.
        # A floor does not move with the scale; in float32 its readers' slope is zero there anyhow.
        moved = y.clamp(min=0) if ctx.is_floored else y
        products = upstream[0] * torch.where(inside, y - x, moved)
        gradient_scale = products.sum(dtype=torch.float32) * ctx.shrink
        return upstream[0] * inside, gradient_scale.reshape(1), None, None, None, None


class SimulatePerChannel(torch.autograd.Function):
    """Of any number of weights, each [O, ...], and after them as many scales, each [O]."""

    @staticmethod
    def forward(ctx: Any, low: int, high: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        weights, log_scales = tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :]
        scales = [
            scale.reshape(-1, *(1,) * (weight.dim() - 1))
            for weight, scale in zip(weights, torch._foreach_exp(log_scales), strict=True)
        ]
        steps = torch._foreach_mul(weights, torch._foreach_reciprocal(scales))
        simulated = torch._foreach_round(steps)
        torch._foreach_clamp_min_(simulated, low)
        torch._foreach_clamp_max_(simulated, high)
        torch._foreach_mul_(simulated, scales)
        ctx.save_for_backward(*weights, *steps, *simulated)
        ctx.ends, ctx.high = (low - 0.5, high + 0.5), high
        return tuple(simulated)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        count, saved = len(upstream), ctx.saved_tensors
        weights, steps, simulated = saved[:count], saved[count : 2 * count], saved[2 * count :]
        gradients = [_within(*both, *ctx.ends) for both in zip(upstream, steps, strict=True)]
        products = torch._foreach_mul(upstream, simulated)
        torch._foreach_addcmul_(products, gradients, weights, value=-1)
        of_scales = [product.sum(tuple(range(1, product.dim()))) for product in products]
        torch._foreach_mul_(of_scales, [_shrink(weight.numel() // len(weight), ctx.high) for weight in weights])
        return None, None, *gradients, *of_scales


def _shrink(count: int, high: int) -> float:
    """LSQ, section 2.2: keeps the step of a scale in proportion to those of the values that it stands for."""
    return float((count * high) ** -0.5)


def _within(upstream: Tensor, x: Tensor, low: float, high: float) -> Tensor:
    """The gradient where x lies between the ends, and zero elsewhere, in one pass."""
    gradient: Tensor = torch.ops.aten.hardtanh_backward(upstream, x, low, high)
    return gradient


def _flat(part: int, *tensors: Tensor) -> list[Tensor]:
    """The first `part` of tensors of one shape along the first axis, each [K] in one order; views where they can be."""
    plain = tensors[-1].dim() != 4 or tensors[-1].is_contiguous()
    layout = torch.contiguous_format if plain else torch.channels_last
    size = (part * (tensors[0].numel() // len(tensors[0])),)
    return [tensor.contiguous(memory_format=layout).as_strided(size, (1,)) for tensor in tensors]
