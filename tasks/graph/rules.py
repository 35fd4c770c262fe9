"""Rules that a Q/DQ graph keeps for any target. A rule is a function over an indexed graph that yields the offending
node and what was found there; its row in a table says how bad that is and what to do.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from onnx import AttributeProto, NodeProto, TensorProto, numpy_helper

from tasks.graph.amx import is_large
from tasks.graph.index import (
    CONVOLUTIONS,
    DEQUANTIZE,
    QUANTIZE,
    RESHAPING,
    WEIGHTED,
    Graph,
    attribute,
    name_of,
    size_bytes,
)

OPSETS = range(13, 21)  # per-channel Q/DQ came with 13; 20 is the last that TensorRT 10 is sure to read
INTEGER_OPERATORS = (
    "ConvInteger",
    "DynamicQuantizeLinear",
    "MatMulInteger",
    "QLinearConv",
    "QLinearMatMul",
)
LARGE_BYTES = 4096  # below it a constant costs nothing

Severity = Literal["error", "warning", "info"]
Problem = tuple[str, str]  # node, what was found there


@dataclass(frozen=True)
class Rule:
    """One row: what is checked, how bad a breach is, what to do about it."""

    name: str
    severity: Severity
    check: Callable[[Graph], Iterator[Problem]]
    remedy: str


def kind_of(data_type: int) -> str:
    return str(TensorProto.DataType.Name(data_type))


def foreign_opset(graph: Graph) -> Iterator[Problem]:
    for opset in graph.model.opset_import:
        if opset.domain in ("", "ai.onnx") and opset.version not in OPSETS:
            yield graph.model.graph.name, f"opset {opset.version}"


def foreign_operators(graph: Graph) -> Iterator[Problem]:
    for node in graph.nodes:
        if node.domain not in ("", "ai.onnx"):
            yield name_of(node), f"{node.op_type} of domain {node.domain}"
        elif node.op_type in INTEGER_OPERATORS:
            yield name_of(node), f"{node.op_type}, integer arithmetic without Q/DQ"
        elif any(attribute.type == AttributeProto.GRAPH for attribute in node.attribute):
            yield name_of(node), f"{node.op_type}, a graph inside the graph that no rule looks into"


def zero_points(graph: Graph, *, activation: int, symmetric: bool) -> Iterator[Problem]:
    for node in graph.of_type(QUANTIZE, DEQUANTIZE):
        if graph.is_bias(node):
            continue
        is_weight = node.input[0] in graph.roots
        wanted = TensorProto.INT8 if is_weight else activation
        if len(node.input) < 3 or not node.input[2]:
            yield name_of(node), "no zero point, which ONNX reads as UINT8"
        elif node.input[2] not in graph.constants:
            yield name_of(node), f"a computed zero point {node.input[2]}"
        elif graph.constants[node.input[2]].data_type != wanted:
            found = kind_of(graph.constants[node.input[2]].data_type)
            yield name_of(node), f"a zero point of type {found}, not {kind_of(wanted)}"
        elif node.input[1] in graph.constants and dims_of(graph, node.input[2]) != dims_of(graph, node.input[1]):
            yield name_of(node), f"a zero point of shape {dims_of(graph, node.input[2])}, unlike its scale"
        elif (symmetric or is_weight) and np.any(graph.array(node, 2)) and (symmetric or not _is_for_amx(graph, node)):
            yield name_of(node), "a zero point other than 0"


def _is_for_amx(graph: Graph, node: NodeProto) -> bool:
    """Whether it is a large weight as `tasks.graph.amx` writes it; a small one would be slower so."""
    steps = graph.array(node, 0)
    return steps is not None and is_large(steps) and bool((graph.value(node.input[2]) == -1).all())


def dims_of(graph: Graph, constant: str) -> list[int]:
    return list(graph.constants[constant].dims)


def scales(graph: Graph) -> Iterator[Problem]:
    for node in graph.of_type(QUANTIZE, DEQUANTIZE):
        scale = graph.array(node, 1)
        if scale is None:
            yield name_of(node), f"a computed scale {node.input[1]}"
        elif not (np.isfinite(scale) & (scale > 0)).all():
            yield name_of(node), f"scales from {scale.min()} to {scale.max()}"


def axes(graph: Graph) -> Iterator[Problem]:
    for node in graph.of_type(QUANTIZE, DEQUANTIZE):
        scale = graph.array(node, 1)
        if scale is None or scale.ndim == 0:
            continue
        if node.input[0] not in graph.roots:
            yield name_of(node), f"{scale.size} scales on an activation"
            continue
        axis = attribute(node, "axis")
        shape = graph.constants[graph.roots[node.input[0]]].dims
        for layer in graph.readers(node):
            wanted = channel_axis(layer, node.output[0])
            if wanted is None:
                continue
            if axis != wanted:
                yield name_of(node), f"axis {axis}, and the channels of {layer.op_type} are on axis {wanted}"
            elif wanted >= len(shape) or scale.shape != (shape[wanted],):
                yield name_of(node), f"scales of shape {list(scale.shape)} for axis {axis} of {list(shape)}"


def channel_axis(layer: NodeProto, tensor: str) -> int | None:
    """The axis of output channels of a weight or a bias; None for any other operand."""
    slot = list(layer.input).index(tensor)
    if layer.op_type not in WEIGHTED or slot == 0:
        return None
    if slot == 2 or layer.op_type == "Conv":
        return 0
    return 0 if layer.op_type == "Gemm" and attribute(layer, "transB") else 1


def loose_integers(graph: Graph, *, computing: tuple[str, ...] = ()) -> Iterator[Problem]:
    """`computing`: operators that may stand between QuantizeLinear and DequantizeLinear, one at a time."""
    for node in graph.of_type(QUANTIZE):
        if node.output[0] in graph.outputs:
            yield name_of(node), "an integer tensor that leaves the graph"
        for reader in graph.readers(node):
            for last in graph.readers(reader) if reader.op_type in computing else [reader]:
                if last.op_type != DEQUANTIZE:
                    yield name_of(node), f"an integer tensor that {last.op_type} {name_of(last)} reads"
    for node in graph.of_type(DEQUANTIZE):
        producer = graph.producers.get(node.input[0])
        if producer is not None and producer.op_type in computing:
            producer = graph.producers.get(producer.input[0])
        if node.input[0] not in graph.constants and (producer is None or producer.op_type != QUANTIZE):
            source = f"input {node.input[0]}" if producer is None else f"{producer.op_type} {name_of(producer)}"
            yield name_of(node), f"integers from {source}"


def unequal_pairs(graph: Graph) -> Iterator[Problem]:
    for node in graph.of_type(QUANTIZE):
        for reader in graph.readers(node):
            if reader.op_type == DEQUANTIZE and not all(same(graph, node, reader, slot) for slot in (1, 2)):
                yield name_of(reader), f"another scale or zero point than {name_of(node)} before it"


def same(graph: Graph, left: NodeProto, right: NodeProto, slot: int) -> bool:
    if list(left.input[slot : slot + 1]) == list(right.input[slot : slot + 1]):
        return True
    first, second = graph.array(left, slot), graph.array(right, slot)
    return first is not None and second is not None and np.array_equal(first, second)


def float_inputs(graph: Graph) -> Iterator[Problem]:
    for layer in graph.layers:
        if graph.weight_dequantize(layer) is not None and graph.input_dequantize(layer) is None:
            yield name_of(layer), "an INT8 weight and a float input"


def hidden_weights(graph: Graph) -> Iterator[Problem]:
    for layer in graph.layers:
        hiding: list[str] = []
        for node in graph.weight_path(layer):
            if node.op_type == DEQUANTIZE:
                yield from ((name_of(layer), f"{op_type} between its INT8 weight and itself") for op_type in hiding)
            elif node.op_type in RESHAPING:
                hiding.append(node.op_type)


def batch_norm(graph: Graph) -> Iterator[Problem]:
    for node in graph.of_type("BatchNormalization"):
        producer = graph.producers.get(node.input[0])
        if producer is not None and producer.op_type in CONVOLUTIONS:
            yield name_of(node), f"batch norm behind {name_of(producer)}"


def interface(graph: Graph) -> Iterator[Problem]:
    if len(graph.inputs) != 1:
        yield graph.model.graph.name, f"{len(graph.inputs)} inputs"
    for value in (*graph.inputs, *graph.model.graph.output):
        tensor = value.type.tensor_type
        sizes = [size.dim_value or size.dim_param or "?" for size in tensor.shape.dim]
        is_fixed = all(isinstance(size, int) for size in sizes[1:])
        if tensor.elem_type != TensorProto.FLOAT or len(sizes) < 2 or not is_fixed:
            yield value.name, f"{kind_of(tensor.elem_type)} [{', '.join(map(str, sizes))}]"


def unused(graph: Graph, *, is_large: bool) -> Iterator[Problem]:
    for name, tensor in graph.constants.items():
        if name not in graph.consumers and name not in graph.outputs and (size_bytes(tensor) > LARGE_BYTES) == is_large:
            yield name, f"{size_bytes(tensor):,} bytes that nothing reads"


def leftovers(graph: Graph) -> Iterator[Problem]:
    for node in graph.of_type("Identity", "Dropout"):
        yield name_of(node), f"{node.op_type}, which does nothing"


def float_copies(graph: Graph) -> Iterator[Problem]:
    for node in graph.of_type(QUANTIZE):
        if node.input[0] in graph.roots:
            yield name_of(node), f"constant {graph.roots[node.input[0]]} stored before it is quantized"


def duplicates(graph: Graph) -> Iterator[Problem]:
    first: dict[str, str] = {}
    for name, tensor in graph.constants.items():
        if size_bytes(tensor) > LARGE_BYTES:
            digest = hashlib.sha256(numpy_helper.to_array(tensor).tobytes()).hexdigest()
            if first.setdefault(digest, name) != name:
                yield name, f"the same {size_bytes(tensor):,} bytes as {first[digest]}"


COMMON = (
    Rule("L02", "error", foreign_operators, "Export with plain operators of the default domain and Q/DQ."),
    Rule("L04", "error", scales, "Calibrate again; a scale is a constant, finite and above 0."),
    Rule("L05", "error", axes, "Give one scale per tensor; per channel only for weights, on the output channels."),
    Rule("L07", "error", unequal_pairs, "Dequantize with the scale and zero point that quantized."),
    Rule("L08", "error", float_inputs, "Quantize the layer's input too, or keep the layer float."),
    Rule("L10", "error", hidden_weights, "Store the weight as the layer reads it, behind a DequantizeLinear only."),
    Rule("L20", "error", interface, "Take one float32 tensor and give float32, with only the batch dynamic."),
    Rule("L26", "warning", duplicates, "Let both readers share one initializer."),
)
