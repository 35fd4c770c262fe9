"""What a graph costs: parameters and multiply-accumulates of each layer, and what INT8 saves in the file.

A layer is a Conv, ConvTranspose, Gemm or MatMul with a constant weight; all else is left out of the counts.
"""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Literal

import onnx
from onnx import NodeProto, TensorProto

from tasks.contracts.errors import ExportError
from tasks.contracts.records import Compression, LayerCost
from tasks.graph.index import Graph, name_of, read_onnx, size_bytes

Shape = tuple[int, ...]
FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
BYTES = (TensorProto.INT8, TensorProto.UINT8)


def count_layers(model: onnx.ModelProto, input_shape: Shape) -> tuple[LayerCost, ...]:
    """The cost of each layer for one image, in the order of the graph.

    Args:
        model: float or with Q/DQ.
        input_shape: [batch, channels, height, width]; the batch is taken as 1.

    Raises:
        ExportError: if the shape does not fit the graph, or leaves that of a layer open.
    """
    shapes = _shapes(model, input_shape)  # refuses what is no graph
    graph = Graph(model)
    return tuple(_cost(graph, layer, shapes) for layer in graph.layers)


def compression(float_path: Path, int8_path: Path, input_shape: Shape) -> Compression:
    """Both files compared. Parameters are the float graph's; layers and their precision are the INT8 graph's.

    Bits per weight count all that replaces the parameters: weights, biases, scales and zero points.

    Raises:
        ExportError: if a file cannot be read, or a graph cannot be counted.
    """
    float_model, int8_model = read_onnx(float_path), read_onnx(int8_path)
    parameters = sum(prod(tensor.dims) for tensor in Graph(float_model).constants.values() if _is_parameter(tensor))
    if not parameters:
        raise ExportError(f"{float_path.name} holds no float parameters.", remedy="Name the float model first.")
    stored = (tensor for tensor in Graph(int8_model).constants.values() if tensor.data_type != TensorProto.INT64)
    layers = count_layers(int8_model, input_shape)
    float_bytes, int8_bytes = float_path.stat().st_size, int8_path.stat().st_size
    return Compression(
        float_bytes=float_bytes,
        int8_bytes=int8_bytes,
        ratio=float_bytes / int8_bytes,
        parameters=parameters,
        bits_per_weight=8 * sum(map(size_bytes, stored)) / parameters,
        macs=sum(layer.macs for layer in layers),
        int8_macs=sum(layer.macs for layer in layers if layer.precision == "int8"),
        layers=layers,
    )


def _is_parameter(tensor: TensorProto) -> bool:
    """Scalars are bounds and factors of operators, not parameters."""
    return tensor.data_type in FLOATS and len(tensor.dims) > 0


def _shapes(model: onnx.ModelProto, input_shape: Shape) -> dict[str, Shape]:
    """Shape of each tensor whose shape is known, for one image."""
    if len(model.graph.input) != 1:
        raise ExportError(f"The graph has {len(model.graph.input)} inputs, not 1.", remedy="Name a classifier's graph.")
    single = onnx.ModelProto()
    single.CopyFrom(model)
    sizes = single.graph.input[0].type.tensor_type.shape.dim
    shape = (1, *input_shape[1:])
    taken = [size.dim_value or size.dim_param for size in sizes]
    fits = [size == given or isinstance(size, str) for size, given in zip(taken[1:], shape[1:], strict=False)]
    if len(taken) != len(shape) or not all(fits):
        raise ExportError(f"The graph takes {taken}, not {list(shape)}.", remedy="Count it at the shape it takes.")
    for size, given in zip(sizes, shape, strict=True):
        size.dim_value = given
    del single.graph.value_info[:]  # they name the batch that was just fixed
    for output in single.graph.output:
        output.type.tensor_type.ClearField("shape")
    try:
        inferred = onnx.shape_inference.infer_shapes(single, strict_mode=True, data_prop=True)
    except onnx.shape_inference.InferenceError as error:
        raise ExportError(f"The graph does not compute on {list(shape)}: {error}", remedy="Check the shape.") from error
    shapes = {tensor.name: tuple(tensor.dims) for tensor in inferred.graph.initializer}
    for value in (*inferred.graph.input, *inferred.graph.value_info, *inferred.graph.output):
        sizes = value.type.tensor_type.shape.dim
        if all(size.HasField("dim_value") for size in sizes):
            shapes[value.name] = tuple(size.dim_value for size in sizes)
    return shapes


def _cost(graph: Graph, layer: NodeProto, shapes: dict[str, Shape]) -> LayerCost:
    try:
        data, weight, output = (shapes[name] for name in (*layer.input[:2], layer.output[0]))
    except KeyError as error:
        raise ExportError(
            f"The shape of {error} at {layer.op_type} {name_of(layer)} is not known.",
            remedy="Export with every size but the batch fixed.",
        ) from error
    bias = layer.input[2] if len(layer.input) > 2 else ""
    return LayerCost(
        layer=name_of(layer),
        op_type=layer.op_type,
        parameters=prod(weight) + (prod(shapes[bias]) if bias in graph.roots else 0),
        macs=_macs(layer.op_type, data, weight, output),
        precision="int8" if _computes_in_int8(graph, layer) else _float_type(graph, layer),
    )


def _macs(op_type: str, data: Shape, weight: Shape, output: Shape) -> int:
    if op_type == "Conv":  # weight [O, I / groups, *kernel]: each output sums over one group
        return prod(output) * prod(weight[1:])
    if op_type == "ConvTranspose":  # weight [I, O / groups, *kernel]: each input is spread over one group
        return prod(data) * prod(weight[1:])
    if op_type == "MatMul":
        return prod(output) * data[-1]
    return prod(data) * output[-1]  # Gemm, transposed or not


def _computes_in_int8(graph: Graph, layer: NodeProto) -> bool:
    """Whether both operands come from 8-bit integers."""
    dequantizes = (graph.input_dequantize(layer), graph.weight_dequantize(layer))
    return all(node is not None and _integer_type(graph, node) in BYTES for node in dequantizes)


def _float_type(graph: Graph, layer: NodeProto) -> Literal["float16", "float32"]:
    """That of the weight as the layer reads it: its constant's, or of the scale that dequantizes it."""
    dequantize = graph.weight_dequantize(layer)
    name = graph.roots[layer.input[1]] if dequantize is None else dequantize.input[1]
    tensor = graph.constants.get(name)  # a computed scale is no constant
    return "float16" if tensor is not None and tensor.data_type == TensorProto.FLOAT16 else "float32"


def _integer_type(graph: Graph, dequantize: NodeProto) -> int:
    """What a DequantizeLinear reads; its zero point has the same type."""
    for name in (dequantize.input[0], *dequantize.input[2:]):
        if name in graph.constants:
            return graph.constants[name].data_type
    return TensorProto.UINT8  # what ONNX takes a missing zero point for
