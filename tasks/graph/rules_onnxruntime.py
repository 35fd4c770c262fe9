"""The rules of ONNX Runtime on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
from onnx import NodeProto, TensorProto

from tasks.graph.index import DEQUANTIZE, QUANTIZE, Graph, name_of
from tasks.graph.rules import (
    COMMON,
    OPSETS,
    Problem,
    Rule,
    batch_norm,
    channel_axis,
    float_copies,
    foreign_opset,
    leftovers,
    loose_integers,
    unused,
    zero_points,
)

INTEGER_BIAS = ("Conv", "Gemm")  # the layers that ONNX Runtime adds an int32 bias in
BIAS_SCALE_TOLERANCE = 1e-6  # relative; the product of two float32 scales is exact to 6e-8
LARGEST_ACTIVATION = 255  # steps from its zero point
LARGEST_INT32 = 2**31 - 1


def _wrong_biases(graph: Graph) -> Iterator[Problem]:
    added: set[str] = set()
    for layer in graph.layers:
        if layer.op_type in INTEGER_BIAS and len(layer.input) > 2 and layer.input[2] and graph.is_quantized(layer):
            added.add(layer.input[2])
            yield from _wrong_bias(graph, layer)
    for node in graph.of_type(DEQUANTIZE):
        if graph.is_bias(node) and node.output[0] not in added:
            yield name_of(node), f"an INT32 constant {node.input[0]} that no integer layer adds"


def _wrong_bias(graph: Graph, layer: NodeProto) -> Iterator[Problem]:
    bias = graph.producers.get(layer.input[2])
    data, weight = graph.input_dequantize(layer), graph.weight_dequantize(layer)
    if bias is None or bias.op_type != DEQUANTIZE or not graph.is_bias(bias):
        yield name_of(layer), f"bias {layer.input[2]} is not INT32 behind a {DEQUANTIZE}"
        return
    assert data is not None
    assert weight is not None
    input_scale, weight_scale_O, scale_O = (graph.array(node, 1) for node in (data, weight, bias))
    steps_O = graph.array(bias, 0)
    if input_scale is None or weight_scale_O is None or scale_O is None or steps_O is None:
        return  # L04 says so
    if np.any(graph.array(bias, 2)):
        yield name_of(bias), "a zero point other than 0"
    wanted_O = input_scale.astype(np.float64) * weight_scale_O
    if not _agree(scale_O.ravel(), wanted_O.ravel()):
        yield name_of(bias), "scales other than input scale times weight scale"


def _agree(left: np.ndarray, right: np.ndarray) -> bool:
    same_size = left.size == right.size or 1 in (left.size, right.size)
    return same_size and np.allclose(left, right, rtol=BIAS_SCALE_TOLERANCE, atol=0)


def _overflowing_sums(graph: Graph) -> Iterator[Problem]:
    """By the largest sum that each output channel can reach with the weights it has."""
    for layer in graph.layers:
        weight = graph.producers.get(layer.input[1])
        steps = graph.array(weight, 0) if weight is not None and weight.op_type == DEQUANTIZE else None
        axis = channel_axis(layer, layer.input[1])
        if weight is None or steps is None or axis is None or axis >= steps.ndim or not graph.is_quantized(layer):
            continue
        zero_point = graph.array(weight, 2)
        zero = 0 if zero_point is None or not zero_point.size else int(zero_point.flat[0])  # L03 says if others differ
        others = tuple(other for other in range(steps.ndim) if other != axis)
        largest_O = LARGEST_ACTIVATION * np.abs(steps.astype(np.int64) - zero).sum(axis=others)
        bias = graph.producers.get(layer.input[2]) if len(layer.input) > 2 else None
        bias_O = graph.array(bias, 0) if bias is not None and graph.is_bias(bias) else None
        if bias_O is not None and bias_O.size in (1, largest_O.size):
            largest_O = largest_O + np.abs(bias_O.astype(np.int64)).reshape(-1)
        if largest_O.max(initial=0) > LARGEST_INT32:
            yield name_of(layer), f"a sum that may reach {largest_O.max():,}, over the {LARGEST_INT32:,} of int32"


def _float_outputs(graph: Graph) -> Iterator[Problem]:
    for layer in graph.layers:
        if layer.op_type != "Conv" or not graph.is_quantized(layer):
            continue
        readers = graph.readers(layer)
        if len(readers) == 1 and readers[0].op_type in ("Relu", "Clip"):
            readers = graph.readers(readers[0])
        if [reader.op_type for reader in readers] != [QUANTIZE]:
            yield name_of(layer), "INT8 operands and a float output"


ONNXRUNTIME = (
    Rule("L01", "error", foreign_opset, f"Export with opset {OPSETS[0]} to {OPSETS[-1]}."),
    *COMMON,
    Rule(
        "L07",
        "error",
        partial(loose_integers, computing=("Clip",)),
        "Put a DequantizeLinear behind each QuantizeLinear, with at most a Clip of the integers between.",
    ),
    Rule("L11", "error", batch_norm, "Fold batch norm into the convolution before quantizing."),
    Rule("L24", "error", partial(unused, is_large=True), "Remove the constant; it would be shipped for nothing."),
    Rule("L24", "warning", partial(unused, is_large=False), "Remove the constant."),
    Rule("L24", "warning", leftovers, "Export for inference, with the optimizer on."),
    Rule("L26", "error", float_copies, "Store the weight as INT8, with only a DequantizeLinear behind it."),
    Rule(
        "L03",
        "error",
        partial(zero_points, activation=TensorProto.UINT8, symmetric=False),
        "Write zero points as constants: UINT8 for activations, INT8 and 0 for weights.",
    ),
    Rule("L06", "error", _wrong_biases, "Store biases of INT8 layers as INT32 in input scale times weight scale."),
    Rule("L06", "error", _overflowing_sums, "Keep the layer float: quant.keep_float names it."),
    Rule("L17", "warning", _float_outputs, "Quantize its output too, or it runs in float between conversions."),
)
