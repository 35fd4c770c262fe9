"""Post-training quantization: ranges from calibration images, then biases moved by the error that rounding adds."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Interpreter, Node

from tasks.contracts.errors import DataError, QuantizeError
from tasks.contracts.spec import QuantSpec
from tasks.quant.capture import aten, layer_of, read_tensor
from tasks.quant.fake_quantize import FakeQuantizer, Mode
from tasks.quant.simulate import Simulation

Progress = Callable[[int, int], None]
_RANKING_IMAGES = 32
_COSTLY = 0.1  # of the sum of all tensors' errors
_SHARES = tuple(2.0 ** (-step / 4) for step in range(13))  # 1 down to an eighth


@torch.no_grad()
def calibrate(
    simulation: Simulation,
    batches_NCHW: Callable[[], Iterable[Tensor]],
    spec: QuantSpec,
    progress: Progress | None = None,
) -> None:
    """Choose every range: weights from themselves, activations from what the calibration images make of them.

    Two passes of bounded memory: the ends of each tensor's range, then a histogram between them.

    Args:
        batches_NCHW: gives the calibration images anew at each call.
        progress: is told passes done of all passes.

    Raises:
        DataError: if there are no images.
        QuantizeError: if a tensor is not finite.
    """
    graph = simulation.graph
    for layer in simulation.layers:
        layer.weight_quantizer.choose_weight_range(read_tensor(graph, layer.weight), spec)
    modes = [Mode.OBSERVE_ENDS] if spec.ranges == "minmax" else [Mode.OBSERVE_ENDS, Mode.OBSERVE_HISTOGRAM]
    for number, mode in enumerate(modes):
        seen = 0
        with simulation.mode(mode) as observing:
            for images in batches_NCHW():
                observing(images)
                seen += len(images)
        if not seen:
            raise DataError("There are no calibration images.", remedy="Raise data.calibration.")
        _refuse_non_finite(simulation)
        if progress:
            progress(number + 1, len(modes))
    for quantizer in simulation.activations():
        quantizer.choose_range(spec)
    simulation.set_mode(Mode.SIMULATE)


def _refuse_non_finite(simulation: Simulation) -> None:
    names = {id(module): name for name, module in simulation.graph.named_modules()}
    nodes = {str(node.target): node for node in simulation.graph.graph.nodes if node.op == "call_module"}
    for quantizer in simulation.activations():
        if not (abs(quantizer.low) < float("inf") and abs(quantizer.high) < float("inf")):
            node = nodes[names[id(quantizer)]]
            raise QuantizeError(
                f"Layer {layer_of(node.all_input_nodes[0])} gives values from {quantizer.low} to {quantizer.high} "
                "on the calibration images.",
                remedy="Look for NaN or overflow in the float model there.",
            )


@torch.no_grad()
def search_ranges(simulation: Simulation, images_NCHW: Tensor, progress: Progress | None = None) -> int:
    """Search the ranges of the few tensors that cost most, by the error of the logits; say how many were searched.

    A tensor's own squared error cannot see that a channel of small values matters more than one of large values; the
    logits can. After Nahshan et al., Loss Aware Post-training Quantization (Machine Learning 110, 2021), section 4,
    with the search kept to tensors that alone make more than a tenth of all tensors' errors.

    Args:
        images_NCHW: calibration images; the first few rank the tensors, all of them judge each range.
    """
    with simulation.mode(Mode.PASS) as exact:
        logits = exact(images_NCHW)
    costly = costly_tensors(simulation, images_NCHW)
    with simulation.mode(Mode.SIMULATE) as simulated:
        for number, quantizer in enumerate(costly):
            _search_range(quantizer, lambda: float((simulated(images_NCHW) - logits).square().mean()))
            if progress:
                progress(number + 1, len(costly))
    return len(costly)


@torch.no_grad()
def costly_tensors(simulation: Simulation, images_NCHW: Tensor) -> list[FakeQuantizer]:
    """Activations that alone make more than a tenth of all activations' errors in the logits, costliest first."""
    ranking_NCHW = images_NCHW[:_RANKING_IMAGES]
    with simulation.mode(Mode.PASS) as exact:
        logits = exact(ranking_NCHW)
        alone = [_alone_error(simulation, quantizer, ranking_NCHW, logits) for quantizer in simulation.activations()]
    total = sum(alone)
    ranked = sorted(zip(alone, simulation.activations(), strict=True), key=lambda pair: -pair[0])
    return [quantizer for error, quantizer in ranked if error > total * _COSTLY]


def _alone_error(simulation: Simulation, quantizer: FakeQuantizer, images_NCHW: Tensor, logits: Tensor) -> float:
    quantizer.mode = Mode.SIMULATE
    error = float((simulation.graph(images_NCHW) - logits).square().mean())
    quantizer.mode = Mode.PASS
    return error


def _search_range(quantizer: FakeQuantizer, error: Callable[[], float]) -> None:
    """Shrink one end of what was observed, then the other, and keep what serves the logits best.

    A symmetric range has but one end, and so has one whose low end is fixed.
    """
    best, kept = error(), (quantizer.log_scale, quantizer.zero_point)
    low, high = quantizer.covered()
    ends = ("both",) if quantizer.grid.symmetric else ("high",) if quantizer.is_low_fixed else ("high", "low")
    for end in ends:
        for share in _SHARES:
            trial = low if end == "high" else quantizer.low * share, high if end == "low" else quantizer.high * share
            quantizer.set_range(*(torch.tensor([value]) for value in trial))
            found = error()
            if found < best:
                best, kept, (low, high) = found, (quantizer.log_scale, quantizer.zero_point), trial
    quantizer.log_scale, quantizer.zero_point = kept


def correct_biases(simulation: Simulation, images_NCHW: Tensor) -> None:
    """Move each layer's bias by the mean error of its output, layer after layer, in one pass.

    Quantization shifts the mean of what a layer puts out; the shift is measured with all layers before it already
    corrected, as in Nagel et al., Data-Free Quantization through Weight Equalization and Bias Correction, ICCV 2019,
    section 4.2, with measured means in place of predicted ones.

    Args:
        images_NCHW: held in memory at once, together with two copies of the widest activation.
    """
    with simulation.mode(Mode.SIMULATE), torch.no_grad():
        _BiasCorrection(simulation).run(images_NCHW)


class _BiasCorrection(Interpreter):
    """Runs the float and the simulated model side by side; every value is a pair of the two."""

    def __init__(self, simulation: Simulation) -> None:
        super().__init__(simulation.graph)
        self._simulation = simulation
        self._layers = {layer.node: layer for layer in simulation.layers}

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().placeholder(target, args, kwargs)
        return value, value

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        return value, value

    def run_node(self, node: Node) -> Any:
        if node.op == "output":
            return None
        if node.op in ("placeholder", "get_attr"):
            return super().run_node(node)
        quantizer = self._simulation.graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(quantizer, FakeQuantizer):
            exact, simulated = self.env[node.args[0]]  # type: ignore[index]
            return exact, quantizer(simulated)
        exact, simulated = (self._evaluate(node, side) for side in (0, 1))
        layer = self._layers.get(node)
        if (
            layer is not None and layer.bias is not None and len(layer.bias.users) == 1
        ):  # one bias cannot undo two errors
            channels = exact.dim() - 1 if node.target == aten.linear.default else 1
            others = [axis for axis in range(exact.dim()) if axis != channels]
            shift_O = (exact - simulated).mean(others)
            read_tensor(self._simulation.graph, layer.bias).add_(shift_O)
            simulated = simulated + shift_O.reshape([-1 if axis not in others else 1 for axis in range(exact.dim())])
        return exact, simulated

    def _evaluate(self, node: Node, side: int) -> Any:
        pick = lambda argument: self.env[argument][side]  # noqa: E731
        args = torch.fx.map_arg(node.args, pick)
        kwargs = torch.fx.map_arg(node.kwargs, pick)
        return getattr(self, node.op)(node.target, args, kwargs)
