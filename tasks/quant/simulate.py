"""The float graph with INT8 simulated in it: made, calibrated or trained, stored, and turned into real INT8."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from tasks.contracts.errors import QuantizeError
from tasks.quant.capture import WEIGHTED, aten, layer_of, read_tensor
from tasks.quant.fake_quantize import FakeQuantizer, Mode, PerChannelFakeQuantizer
from tasks.quant.schemes import MOVING, Scheme, SchemeQuantizer

LARGEST_INT32 = 2**31 - 1
# Where a reader answers nothing new: hard-swish gives zero below -3 (just below, its slope is zero too), a hard-sigmoid
# zero and one.
_BOUNDS = {aten.hardswish.default: (-3.0 * (1 + 2**-19), math.inf), aten.hardsigmoid.default: (-3.0, 3.0)}
_SET_BY_CALIBRATION = ("log_scale", "zero_point")  # one value, and then one for each channel


@dataclass(frozen=True)
class Simulation:
    """A graph with fake quantizers, and how they hang together."""

    graph: GraphModule
    scheme: Scheme
    layers: tuple[SimulatedLayer, ...]

    def set_mode(self, mode: Mode) -> None:
        """Weights never need observing, so they only pass or simulate."""
        for quantizer in self.quantizers():
            weight = isinstance(quantizer, PerChannelFakeQuantizer)
            quantizer.mode = mode if not weight or mode is Mode.SIMULATE else Mode.PASS

    @contextmanager
    def mode(self, mode: Mode) -> Iterator[GraphModule]:
        """The graph in `mode`, for as long as the block lasts."""
        before = [quantizer.mode for quantizer in self.quantizers()]
        self.set_mode(mode)
        try:
            yield self.graph
        finally:
            for quantizer, old in zip(self.quantizers(), before, strict=True):
                quantizer.mode = old

    def quantizers(self) -> list[FakeQuantizer]:
        return [module for module in self.graph.modules() if isinstance(module, FakeQuantizer)]

    def activations(self) -> list[FakeQuantizer]:
        return [module for module in self.quantizers() if not isinstance(module, PerChannelFakeQuantizer)]

    def save(self, path: Path) -> None:
        """Weights and quantization parameters, as safetensors."""
        path.write_bytes(save({name: tensor.detach().cpu().contiguous() for name, tensor in _state(self.graph)}))

    def load(self, path: Path) -> None:
        """The inverse of `save`, into a simulation of the same model and scheme.

        Raises:
            QuantizeError: if the file holds another model's state.
        """
        stored = load_file(path)
        shapes = {name: tensor.shape for name, tensor in _state(self.graph)}
        odd = sorted(shapes.keys() ^ stored.keys()) or [
            name
            for name, shape in shapes.items()
            if stored[name].shape != shape and not name.endswith(_SET_BY_CALIBRATION)
        ]
        if odd:
            raise QuantizeError(
                f"{path.name} is the state of another model: {len(odd)} tensors differ, such as {odd[0]}.",
                remedy="Quantize this model again.",
            )
        _restore(self.graph, stored)


@dataclass(frozen=True)
class SimulatedLayer:
    """A weighted layer whose input and weight are INT8."""

    name: str
    node: Node
    weight: Node  # get_attr
    weight_quantizer: PerChannelFakeQuantizer
    input_quantizer: FakeQuantizer
    bias: Node | None  # get_attr


def simulate(folded: GraphModule, scheme: Scheme, keep_float: frozenset[str]) -> Simulation:
    """A copy of `folded` with a fake quantizer on each tensor that `scheme` wants in INT8.

    Raises:
        QuantizeError: if nothing can be quantized.
    """
    graph = prepare_pt2e(copy.deepcopy(folded), SchemeQuantizer(scheme, keep_float))
    _limit_scales(graph)
    _limit_ranges(graph)
    layers = tuple(_simulated_layers(graph))
    if not layers:
        raise QuantizeError(
            f"Scheme {scheme.name} finds no layer to quantize.",
            remedy="Keep fewer layers float, or choose a model with convolutions.",
        )
    return Simulation(graph, scheme, layers)


def _limit_scales(graph: GraphModule) -> None:
    """Let no scale behind a ReLU6 cover more than it lets through.

    ONNX Runtime drops the ReLU6 only if the integers saturate no later; otherwise the convolution before it is float.
    """
    tops: dict[FakeQuantizer, list[float]] = {}
    for node in graph.graph.nodes:
        quantizer = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(quantizer, FakeQuantizer):
            source = node.args[0]
            while source.target in MOVING or source.op == "call_module":
                source = source.args[0]
            bounds: tuple[Any, ...] = source.args[1:] if source.target == aten.hardtanh.default else ()
            tops.setdefault(quantizer, []).append(bounds[1] if len(bounds) == 2 and bounds[0] == 0 else math.inf)
    for quantizer, reached in tops.items():
        quantizer.largest_scale = max(reached) / quantizer.quant_max


def _limit_ranges(graph: GraphModule) -> None:
    """Spend no step on what no reader of a tensor tells apart."""
    bounds: dict[FakeQuantizer, list[tuple[float, float]]] = {}
    for node in graph.graph.nodes:
        quantizer = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(quantizer, FakeQuantizer):
            readers = (_BOUNDS.get(reader.target, (-math.inf, math.inf)) for reader in node.users)
            bounds.setdefault(quantizer, []).extend(readers)
    for quantizer, seen in bounds.items():
        lows, highs = zip(*seen, strict=True)
        quantizer.bounds = min(lows), max(highs)


def _simulated_layers(graph: GraphModule) -> Iterator[SimulatedLayer]:
    modules = dict(graph.named_modules(remove_duplicate=False))
    for node in graph.graph.nodes:
        if node.target not in WEIGHTED:
            continue
        weight_quantizer = modules.get(str(node.args[1].target))
        if isinstance(weight_quantizer, PerChannelFakeQuantizer):
            input_quantizer = modules[str(node.args[0].target)]
            assert isinstance(input_quantizer, FakeQuantizer)
            bias = node.args[2] if len(node.args) > 2 else None
            yield SimulatedLayer(
                name=layer_of(node),
                node=node,
                weight=node.args[1].args[0],
                weight_quantizer=weight_quantizer,
                input_quantizer=input_quantizer,
                bias=bias if isinstance(bias, Node) else None,
            )


def _state(graph: GraphModule) -> Iterator[tuple[str, Tensor]]:
    """Each tensor once, though quantizers are shared."""
    yield from graph.named_parameters()
    yield from graph.named_buffers()


@torch.no_grad()
def _restore(graph: GraphModule, stored: dict[str, Tensor]) -> None:
    for name, tensor in list(_state(graph)):
        owner = graph.get_submodule(name.rpartition(".")[0])
        value = stored[name].to(tensor.device)
        if isinstance(tensor, torch.nn.Parameter):
            value = torch.nn.Parameter(value)
        setattr(owner, name.rpartition(".")[2], value)


def fit_biases(simulation: Simulation) -> int:
    """Widen weight scales until every bias fits int32, and say for how many channels.

    A bias is stored in steps of input scale times weight scale. A channel whose weights are all tiny has a tiny step,
    and its bias then overflows: MobileNetV3 is known to lose half of its accuracy to that. Float biases always fit.
    """
    if not simulation.scheme.integer_bias:
        return 0
    widened = 0
    for layer in simulation.layers:
        if layer.bias is None:
            continue
        quantizer = layer.weight_quantizer
        bias_O = read_tensor(simulation.graph, layer.bias).detach().abs()
        # Half of the range: rounding of the product of two float32 scales may not tip it over.
        needed_O = bias_O / (LARGEST_INT32 / 2) / layer.input_quantizer.scale.detach()
        tight_O = quantizer.scale.detach() < needed_O
        if tight_O.any():
            widened += int(tight_O.sum())
            scale_O = torch.where(tight_O, needed_O, quantizer.scale.detach())
            quantizer.log_scale = torch.nn.Parameter(scale_O.log())
    return widened


def convert(simulation: Simulation) -> GraphModule:
    """The same model with weights stored as INT8 and explicit quantize and dequantize operations.

    Export refuses a bias that does not fit int32: call `fit_biases` before.
    """
    converted = convert_pt2e(copy.deepcopy(simulation.graph).cpu())
    assert isinstance(converted, GraphModule)
    return converted


@torch.no_grad()
def exact_tensors(simulation: Simulation, images_NCHW: Tensor) -> list[Tensor]:
    """What the float model holds wherever an activation is quantized, in the order of the graph.

    Of a tensor whose readers tell nothing apart beyond some bound, as much as they see.
    """
    found: list[Tensor] = []
    hooks = [
        quantizer.register_forward_hook(lambda module, inputs, _output: found.append(inputs[0].clamp(*module.bounds)))
        for quantizer in simulation.activations()
    ]
    with simulation.mode(Mode.PASS) as exact:
        exact(images_NCHW)
    for hook in hooks:
        hook.remove()
    return found


def predictions(graph: GraphModule, batches_NCHW: Iterable[Tensor]) -> Tensor:
    """Class of each image, [N]."""
    with torch.no_grad():
        return torch.cat([graph(images).argmax(1).cpu() for images in batches_NCHW])
