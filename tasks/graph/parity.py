"""Does the runtime compute what the simulation computes? Asked of the whole model and of every layer by itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx.utils import Extractor
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule, Interpreter, Node

from tasks.contracts.errors import ExportError
from tasks.contracts.records import LayerError, Parity
from tasks.graph.export import INPUT

Feed = Mapping[str, np.ndarray]
_QUANTIZE = "quantized_decomposed.quantize_per_tensor.default"  # by name: torchao alone loads the operator
_WEIGHTED = ("Conv", "Gemm", "MatMul", "ConvTranspose")


def parity_of(
    simulated_N: np.ndarray, engine_N: np.ndarray, labels_N: np.ndarray, layers: tuple[LayerError, ...]
) -> Parity:
    """Whole-model agreement from the classes that both gave to the same images, in percent."""
    return Parity(
        num_images=len(labels_N),
        agreement=100.0 * float(np.mean(simulated_N == engine_N)),
        simulation_top1=100.0 * float(np.mean(simulated_N == labels_N)),
        runtime_top1=100.0 * float(np.mean(engine_N == labels_N)),
        layers=layers,
    )


@torch.no_grad()
def layer_errors(
    program: ExportedProgram,
    path: Path,
    exact: Sequence[Tensor],
    images_NCHW: Tensor,
    run: Callable[[Path, Feed], Feed],
    work: Path,
) -> tuple[LayerError, ...]:
    """Each integer layer of the file at `path`, run alone on what the simulation gave its inputs.

    A layer reaches from quantized tensors to the next quantized tensor. Float rounding of a sum that lies between two
    steps may tip it either way, so one step of difference is to be expected, and more is a fault of one of the two.

    Args:
        program: what was exported to `path`; gives the simulation's values.
        exact: the same tensors in the float model, in the order of the graph, for signal over noise.
        run: runs an ONNX file on a feed.
        work: folder for the small models.

    Raises:
        ExportError: if a tensor of the program is not in the file.
    """
    graph = program.module(check_guards=False)
    assert isinstance(graph, GraphModule)
    recorder = _Recorder(graph)
    recorder.run(images_NCHW)
    model = onnx.load(path)
    extractor = Extractor(onnx.shape_inference.infer_shapes(model))
    producers = {output: node for node in model.graph.node for output in node.output}
    errors = []
    quantizing = [node for node in graph.graph.nodes if str(node.target) == _QUANTIZE]
    for node, exact_value in zip(quantizing, exact, strict=True):
        if node.name not in producers:
            if any(recorder.is_equal(node, other) for other in quantizing if other.name in producers):
                continue  # the exporter made one tensor of the two
            raise ExportError(
                f"Tensor {node.name} of the simulation is not in {path.name}.", remedy="Report the model."
            )
        inputs, core = _region(producers, recorder.values, node.name)
        if core is None:
            continue  # the model's input, or a tensor that was only moved
        piece = work / "layer.onnx"
        onnx.save(extractor.extract_model(sorted(inputs), [node.name]), piece)
        feed = {name: recorder.values[name].numpy() for name in inputs}
        got = run(piece, feed)[node.name].astype(np.int32)
        expected = recorder.values[node.name].numpy().astype(np.int32)
        errors.append(
            LayerError(
                layer=core.name,
                op_type=core.op_type,
                max_steps=float(np.abs(got - expected).max()),
                sqnr_db=_sqnr_db(exact_value, recorder.values[node.name], node),
            )
        )
    return tuple(errors)


class _Recorder(Interpreter):
    """Keeps each tensor that the graph computes, by its name."""

    def __init__(self, graph: GraphModule) -> None:
        super().__init__(graph)
        self.values: dict[str, Tensor] = {}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.values[INPUT if n.op == "placeholder" else n.name] = value
        return value

    def is_equal(self, left: Node, right: Node) -> bool:
        """Whether two tensors hold the same steps of the same scale."""
        same_grid = left.args[1:] == right.args[1:]
        return same_grid and torch.equal(self.values[left.name], self.values[right.name])


def _region(
    producers: Mapping[str, onnx.NodeProto], values: Mapping[str, Tensor], output: str
) -> tuple[set[str], onnx.NodeProto | None]:
    """Quantized tensors of the simulation that another is computed from, and the node that does most of the work."""
    inputs: set[str] = set()
    core: onnx.NodeProto | None = None
    waiting = [producers[output].input[0]]
    while waiting:
        name = waiting.pop()
        node = producers.get(name)
        if name == INPUT or (name in values and node is not None and node.op_type == "QuantizeLinear"):
            inputs.add(name)
            continue
        if node is None:
            continue  # an initializer
        if node.op_type != "DequantizeLinear" and (core is None or node.op_type in _WEIGHTED):
            core = node
        waiting.extend(part for part in node.input if part)
    return inputs, core


def _sqnr_db(exact: Tensor, steps: Tensor, quantize: Node) -> float:
    """Signal over noise, in decibels."""
    scale, zero_point = float(quantize.args[1]), int(quantize.args[2])  # type: ignore[arg-type]
    noise = (steps.float() - zero_point) * scale - exact
    power = float(noise.square().mean())
    return 10.0 * math.log10(float(exact.square().mean()) / power) if power else math.inf


def steps_apart(layers: tuple[LayerError, ...], limit: float = 1.0) -> Iterator[LayerError]:
    """The layers that differ by more than `limit` steps."""
    return (layer for layer in layers if layer.max_steps > limit)
