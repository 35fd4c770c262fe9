"""Zero points by which ONNX Runtime multiplies large layers with AMX.

ONNX Runtime 1.31 has two kernels for an integer convolution. Where all zero points of the weight are zero it takes one
that uses VNNI and not AMX; otherwise a matrix product, which uses AMX. Steps q about zero are also steps q - 1 about
minus one: both kernels see the same differences, so the answers are the same to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, numpy_helper

from tasks.graph.index import Graph, attribute, name_of

# Where AMX was faster, layer by layer in ResNet50 (docs/results.md): smaller products pay more for being laid out.
SUMMED = 512  # products in each sum
CHANNELS = 128


def for_amx(model: onnx.ModelProto) -> list[str]:
    """Shift the weights of layers that gain by it, in place, and name these layers."""
    graph, shifted = Graph(model), []
    for layer, *tensors in list(_large(graph)):
        for tensor in tensors:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) - np.int8(1), tensor.name))
        shifted.append(name_of(layer))
    return shifted


def is_large(steps: np.ndarray) -> bool:
    """Whether these are the steps of a convolution [O, I, H, W] that AMX multiplies faster."""
    return steps.dtype == np.int8 and steps.ndim == 4 and len(steps) >= CHANNELS and steps[0].size >= SUMMED


def _large(graph: Graph) -> Iterator[tuple[NodeProto, TensorProto, TensorProto]]:
    """Layers of UINT8 inputs with large INT8 weights: the layer, the weight's steps and its zero points."""
    for layer in graph.of_type("Conv"):
        data, weight = graph.input_dequantize(layer), graph.weight_dequantize(layer)
        if data is None or weight is None or attribute(layer, "group") not in (None, 1):
            continue
        names = [weight.input[0], *weight.input[2:]]
        stored = [graph.constants.get(name) for name in names]
        if len(names) != 2 or any(tensor is None or len(graph.consumers[tensor.name]) > 1 for tensor in stored):
            continue  # no zero points of its own
        steps, zeros = (graph.value(name) for name in names)
        fits = is_large(steps) and steps.min() > np.iinfo(np.int8).min and not zeros.any()
        zero_point = graph.array(data, 2)
        if fits and zero_point is not None and zero_point.dtype == np.uint8:
            yield layer, graph.constants[names[0]], graph.constants[names[1]]
