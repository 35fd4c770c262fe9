"""What a Q/DQ graph must keep for its target, as a table of small rules over one index of the graph.

A rule is a function that yields the offending node and what was found there; its row in `RULES` says how bad that is
and what to do. Ids are stable, and rules of one subject share one:

    L01 valid ONNX             L06 biases                  L12 residual adds
    L02 plain operators        L07 integer tensors         L17 integer layers without integer output
    L03 zero points            L08 half quantized layers   L20 inputs and outputs
    L04 scales                 L10 between weight and op   L24 leftovers
    L05 axes                   L11 batch norm              L26 weights stored twice
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import onnx
from onnx import AttributeProto, NodeProto, TensorProto, numpy_helper

from tasks.contracts.errors import ExportError
from tasks.contracts.spec import SchemeName

OPSETS = range(13, 21)  # per-channel Q/DQ came with 13; 20 is the last that TensorRT 10 reads
CONVOLUTIONS = ("Conv", "ConvTranspose")
WEIGHTED = (*CONVOLUTIONS, "Gemm", "MatMul")
INTEGER_BIAS = ("Conv", "Gemm")  # the layers that ONNX Runtime adds an int32 bias in
QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
RESHAPING = ("Cast", "Clip", "Identity", "Reshape", "Transpose")  # each hides a weight from its layer
INTEGER_OPERATORS = (
    "ConvInteger",
    "DynamicQuantizeLinear",
    "MatMulInteger",
    "QLinearConv",
    "QLinearMatMul",
)
LARGE_BYTES = 4096  # below it a constant costs nothing
BIAS_SCALE_TOLERANCE = 1e-6  # relative; the product of two float32 scales is exact to 6e-8
LARGEST_PRODUCT = 255 * 128  # of one UINT8 activation and one INT8 weight
SHOWN = 5  # errors named in a refusal

Severity = Literal["error", "warning"]
Problem = tuple[str, str]  # node, what was found there


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One broken rule at one node."""

    rule: str
    severity: Severity
    node: str
    found: str
    remedy: str


class Graph:
    """A valid model's nodes by what they read and write, indexed once, in time linear in the graph.

    Names without a producer are constants (initializers and Constant nodes) or inputs of the graph.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.nodes: tuple[NodeProto, ...] = tuple(node for node in model.graph.node if node.op_type != "Constant")
        self.constants: dict[str, TensorProto] = {tensor.name: tensor for tensor in model.graph.initializer}
        for node in model.graph.node:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                self.constants[node.output[0]] = node.attribute[0].t
        self.producers: dict[str, NodeProto] = {name: node for node in self.nodes for name in node.output}
        self.consumers: dict[str, list[NodeProto]] = defaultdict(list)
        self.roots: dict[str, str] = {name: name for name in self.constants}  # tensor -> constant it only restates
        for node in self.nodes:  # in topological order, as ONNX demands
            for name in dict.fromkeys(node.input):
                self.consumers[name].append(node)
            if node.op_type in (QUANTIZE, DEQUANTIZE, *RESHAPING) and node.input[0] in self.roots:
                self.roots[node.output[0]] = self.roots[node.input[0]]
        self.outputs = frozenset(value.name for value in model.graph.output)

    def of_type(self, *op_types: str) -> Iterator[NodeProto]:
        return (node for node in self.nodes if node.op_type in op_types)

    @property
    def layers(self) -> Iterator[NodeProto]:
        """Nodes with a constant weight."""
        return (node for node in self.of_type(*WEIGHTED) if node.input[1] in self.roots)

    def array(self, node: NodeProto, slot: int) -> np.ndarray | None:
        """The constant at an input of `node`; None if there is none or it is computed."""
        tensor = self.constants.get(node.input[slot]) if slot < len(node.input) else None
        return None if tensor is None else numpy_helper.to_array(tensor)

    def readers(self, node: NodeProto) -> list[NodeProto]:
        return self.consumers.get(node.output[0], [])

    def weight_path(self, layer: NodeProto) -> Iterator[NodeProto]:
        """Nodes from the layer's weight back to the constant."""
        name = layer.input[1]
        while name not in self.constants:
            node = self.producers[name]
            yield node
            name = node.input[0]

    def weight_dequantize(self, layer: NodeProto) -> NodeProto | None:
        return next((node for node in self.weight_path(layer) if node.op_type == DEQUANTIZE), None)

    def input_dequantize(self, layer: NodeProto) -> NodeProto | None:
        producer = self.producers.get(layer.input[0])
        return producer if producer is not None and producer.op_type == DEQUANTIZE else None

    def is_quantized(self, layer: NodeProto) -> bool:
        """Whether both the input and the weight come from integers."""
        return self.weight_dequantize(layer) is not None and self.input_dequantize(layer) is not None

    def is_bias(self, node: NodeProto) -> bool:
        """Whether a DequantizeLinear holds an int32 constant."""
        tensor = self.constants.get(node.input[0])
        return tensor is not None and tensor.data_type == TensorProto.INT32


def name_of(node: NodeProto) -> str:
    """The node's name, or that of what it computes."""
    return node.name or next(iter(node.output), node.op_type)


def size_bytes(tensor: TensorProto) -> int:
    """Bytes of the values."""
    return int(np.prod(tensor.dims)) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize


def lint(model: onnx.ModelProto, scheme: SchemeName) -> tuple[Finding, ...]:
    """All findings, in the order of the rules. A graph that is not valid ONNX is not read any further."""
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        found = " ".join(str(error).split())
        return (Finding(rule="L01", severity="error", node=model.graph.name, found=found, remedy="Export it anew."),)
    graph = Graph(model)
    return tuple(
        Finding(rule=rule.name, severity=rule.severity, node=node, found=found, remedy=rule.remedy)
        for rule in RULES[scheme]
        for node, found in rule.check(graph)
    )


def refuse_findings(findings: Iterable[Finding], *, path_name: str) -> None:
    """Refuse a graph that breaks a rule; warnings pass.

    Raises:
        ExportError: if one of the findings is an error.
    """
    errors = [finding for finding in findings if finding.severity == "error"]
    if not errors:
        return
    shown = "; ".join(f"{error.rule} {error.node}: {error.found}" for error in errors[:SHOWN])
    more = f"; and {len(errors) - SHOWN} more" if len(errors) > SHOWN else ""
    raise ExportError(
        f"{path_name} breaks the rules of its target: {shown}{more}.",
        remedy=" ".join(dict.fromkeys(error.remedy for error in errors[:SHOWN])),
    )


@dataclass(frozen=True)
class Rule:
    """One row: what is checked, how bad a breach is, what to do about it."""

    name: str
    severity: Severity
    check: Callable[[Graph], Iterator[Problem]]
    remedy: str


def _kind(data_type: int) -> str:
    return str(TensorProto.DataType.Name(data_type))


def _foreign_opset(graph: Graph) -> Iterator[Problem]:
    for opset in graph.model.opset_import:
        if opset.domain in ("", "ai.onnx") and opset.version not in OPSETS:
            yield graph.model.graph.name, f"opset {opset.version}"


def _foreign_operators(graph: Graph) -> Iterator[Problem]:
    for node in graph.nodes:
        if node.domain not in ("", "ai.onnx"):
            yield name_of(node), f"{node.op_type} of domain {node.domain}"
        elif node.op_type in INTEGER_OPERATORS:
            yield name_of(node), f"{node.op_type}, integer arithmetic without Q/DQ"
        elif any(attribute.type == AttributeProto.GRAPH for attribute in node.attribute):
            yield name_of(node), f"{node.op_type}, a graph inside the graph that no rule looks into"


def _zero_points(graph: Graph, *, activation: int, symmetric: bool) -> Iterator[Problem]:
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
            found = _kind(graph.constants[node.input[2]].data_type)
            yield name_of(node), f"a zero point of type {found}, not {_kind(wanted)}"
        elif (symmetric or is_weight) and np.any(graph.array(node, 2)):
            yield name_of(node), "a zero point other than 0"


def _scales(graph: Graph) -> Iterator[Problem]:
    for node in graph.of_type(QUANTIZE, DEQUANTIZE):
        scale = graph.array(node, 1)
        if scale is None:
            yield name_of(node), f"a computed scale {node.input[1]}"
        elif not (np.isfinite(scale) & (scale > 0)).all():
            yield name_of(node), f"scales from {scale.min()} to {scale.max()}"


def _axes(graph: Graph) -> Iterator[Problem]:
    for node in graph.of_type(QUANTIZE, DEQUANTIZE):
        scale = graph.array(node, 1)
        if scale is None or scale.ndim == 0:
            continue
        if node.input[0] not in graph.roots:
            yield name_of(node), f"{scale.size} scales on an activation"
            continue
        axis = _attribute(node, "axis")
        shape = graph.constants[graph.roots[node.input[0]]].dims
        for layer in graph.readers(node):
            wanted = _channel_axis(layer, node.output[0])
            if wanted is None:
                continue
            if axis != wanted:
                yield name_of(node), f"axis {axis}, and the channels of {layer.op_type} are on axis {wanted}"
            elif wanted >= len(shape) or scale.shape != (shape[wanted],):
                yield name_of(node), f"scales of shape {list(scale.shape)} for axis {axis} of {list(shape)}"


def _attribute(node: NodeProto, name: str) -> int | None:
    return next((attribute.i for attribute in node.attribute if attribute.name == name), None)


def _channel_axis(layer: NodeProto, tensor: str) -> int | None:
    """The axis of output channels of a weight or a bias; None for any other operand."""
    slot = list(layer.input).index(tensor)
    if layer.op_type not in WEIGHTED or slot == 0:
        return None
    if slot == 2 or layer.op_type == "Conv":
        return 0
    return 0 if layer.op_type == "Gemm" and _attribute(layer, "transB") else 1


def _integer_biases(graph: Graph) -> Iterator[Problem]:
    for node in graph.of_type(DEQUANTIZE):
        if graph.is_bias(node):
            yield name_of(node), f"an INT32 constant {node.input[0]}"


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
    products = int(np.prod(graph.constants[graph.roots[layer.input[1]]].dims)) // max(steps_O.size, 1)
    largest = int(np.abs(steps_O.astype(np.int64)).max(initial=0)) + products * LARGEST_PRODUCT
    if largest > np.iinfo(np.int32).max:
        yield name_of(bias), f"a bias that can overflow the layer's int32 sum ({largest:.3g})"


def _agree(left: np.ndarray, right: np.ndarray) -> bool:
    same_size = left.size == right.size or 1 in (left.size, right.size)
    return same_size and np.allclose(left, right, rtol=BIAS_SCALE_TOLERANCE, atol=0)


def _loose_integers(graph: Graph) -> Iterator[Problem]:
    for node in graph.of_type(QUANTIZE):
        if node.output[0] in graph.outputs:
            yield name_of(node), "an integer tensor that leaves the graph"
        for reader in graph.readers(node):
            if reader.op_type != DEQUANTIZE:
                yield name_of(node), f"an integer tensor that {reader.op_type} {name_of(reader)} reads"
    for node in graph.of_type(DEQUANTIZE):
        producer = graph.producers.get(node.input[0])
        if node.input[0] not in graph.constants and (producer is None or producer.op_type != QUANTIZE):
            source = f"input {node.input[0]}" if producer is None else f"{producer.op_type} {name_of(producer)}"
            yield name_of(node), f"integers from {source}"


def _unequal_pairs(graph: Graph) -> Iterator[Problem]:
    for node in graph.of_type(QUANTIZE):
        for reader in graph.readers(node):
            if reader.op_type == DEQUANTIZE and not all(_same(graph, node, reader, slot) for slot in (1, 2)):
                yield name_of(reader), f"another scale or zero point than {name_of(node)} before it"


def _same(graph: Graph, left: NodeProto, right: NodeProto, slot: int) -> bool:
    if list(left.input[slot : slot + 1]) == list(right.input[slot : slot + 1]):
        return True
    first, second = graph.array(left, slot), graph.array(right, slot)
    return first is not None and second is not None and np.array_equal(first, second)


def _float_inputs(graph: Graph) -> Iterator[Problem]:
    for layer in graph.layers:
        if graph.weight_dequantize(layer) is not None and graph.input_dequantize(layer) is None:
            yield name_of(layer), "an INT8 weight and a float input"


def _float_weights(graph: Graph) -> Iterator[Problem]:
    for layer in graph.layers:
        if graph.weight_dequantize(layer) is None and graph.input_dequantize(layer) is not None:
            yield name_of(layer), "an INT8 input and a float weight"


def _hidden_weights(graph: Graph) -> Iterator[Problem]:
    for layer in graph.layers:
        hiding: list[str] = []
        for node in graph.weight_path(layer):
            if node.op_type == DEQUANTIZE:
                yield from ((name_of(layer), f"{op_type} between its INT8 weight and itself") for op_type in hiding)
            elif node.op_type in RESHAPING:
                hiding.append(node.op_type)


def _batch_norm(graph: Graph) -> Iterator[Problem]:
    for node in graph.of_type("BatchNormalization"):
        producer = graph.producers.get(node.input[0])
        if producer is not None and producer.op_type in CONVOLUTIONS:
            yield name_of(node), f"batch norm behind {name_of(producer)}"


def _float_skips(graph: Graph) -> Iterator[Problem]:
    for node in graph.of_type("Add"):
        producers = [graph.producers.get(name) for name in node.input]
        fusible = [producer is not None and _adds_into(graph, producer) for producer in producers]
        has_integer = any(producer is not None and producer.op_type == DEQUANTIZE for producer in producers)
        if any(fusible) and not has_integer and not any(name in graph.roots for name in node.input):
            yield name_of(node), "a residual add whose skip operand is float"


def _adds_into(graph: Graph, producer: NodeProto) -> bool:
    """Whether an integer convolution could take the add into its own kernel."""
    is_layer = producer.op_type in CONVOLUTIONS and producer.input[1] in graph.roots
    return is_layer and graph.is_quantized(producer) and len(graph.readers(producer)) == 1


def _float_outputs(graph: Graph) -> Iterator[Problem]:
    for layer in graph.layers:
        if layer.op_type != "Conv" or not graph.is_quantized(layer):
            continue
        readers = graph.readers(layer)
        if len(readers) == 1 and readers[0].op_type in ("Relu", "Clip"):
            readers = graph.readers(readers[0])
        if [reader.op_type for reader in readers] != [QUANTIZE]:
            yield name_of(layer), "INT8 operands and a float output"


def _interface(graph: Graph) -> Iterator[Problem]:
    for value in (*graph.model.graph.input, *graph.model.graph.output):
        tensor = value.type.tensor_type
        sizes = [size.dim_value or size.dim_param or "?" for size in tensor.shape.dim]
        is_fixed = all(isinstance(size, int) for size in sizes[1:])
        if tensor.elem_type != TensorProto.FLOAT or len(sizes) < 2 or not is_fixed:
            yield value.name, f"{_kind(tensor.elem_type)} [{', '.join(map(str, sizes))}]"


def _unused(graph: Graph, *, is_large: bool) -> Iterator[Problem]:
    for name, tensor in graph.constants.items():
        if name not in graph.consumers and name not in graph.outputs and (size_bytes(tensor) > LARGE_BYTES) == is_large:
            yield name, f"{size_bytes(tensor):,} bytes that nothing reads"


def _leftovers(graph: Graph) -> Iterator[Problem]:
    for node in graph.of_type("Identity", "Dropout"):
        yield name_of(node), f"{node.op_type}, which does nothing"


def _float_copies(graph: Graph) -> Iterator[Problem]:
    for node in graph.of_type(QUANTIZE):
        if node.input[0] in graph.roots:
            yield name_of(node), f"constant {graph.roots[node.input[0]]} stored before it is quantized"


def _duplicates(graph: Graph) -> Iterator[Problem]:
    first: dict[str, str] = {}
    for name, tensor in graph.constants.items():
        if size_bytes(tensor) > LARGE_BYTES:
            digest = hashlib.sha256(numpy_helper.to_array(tensor).tobytes()).hexdigest()
            if first.setdefault(digest, name) != name:
                yield name, f"the same {size_bytes(tensor):,} bytes as {first[digest]}"


COMMON = (
    Rule("L01", "error", _foreign_opset, f"Export with opset {OPSETS[0]} to {OPSETS[-1]}."),
    Rule("L02", "error", _foreign_operators, "Export with plain operators of the default domain and Q/DQ."),
    Rule("L04", "error", _scales, "Calibrate again; a scale is a constant, finite and above 0."),
    Rule("L05", "error", _axes, "Give one scale per tensor; per channel only for weights, on the output channels."),
    Rule("L07", "error", _loose_integers, "Put a DequantizeLinear directly behind each QuantizeLinear."),
    Rule("L07", "error", _unequal_pairs, "Dequantize with the scale and zero point that quantized."),
    Rule("L08", "error", _float_inputs, "Quantize the layer's input too, or keep the layer float."),
    Rule("L10", "error", _hidden_weights, "Store the weight as the layer reads it, behind a DequantizeLinear only."),
    Rule("L11", "error", _batch_norm, "Fold batch norm into the convolution before quantizing."),
    Rule("L20", "error", _interface, "Take and give float32 tensors in which only the batch is dynamic."),
    Rule("L24", "error", partial(_unused, is_large=True), "Remove the constant; it would be shipped for nothing."),
    Rule("L24", "warning", partial(_unused, is_large=False), "Remove the constant."),
    Rule("L24", "warning", _leftovers, "Export for inference, with the optimizer on."),
    Rule("L26", "error", _float_copies, "Store the weight as INT8, with only a DequantizeLinear behind it."),
    Rule("L26", "warning", _duplicates, "Let both readers share one initializer."),
)
RULES: dict[SchemeName, tuple[Rule, ...]] = {
    "onnxruntime": (
        *COMMON,
        Rule(
            "L03",
            "error",
            partial(_zero_points, activation=TensorProto.UINT8, symmetric=False),
            "Write zero points as constants: UINT8 for activations, INT8 and 0 for weights.",
        ),
        Rule("L06", "error", _wrong_biases, "Store biases of INT8 layers as INT32 in input scale times weight scale."),
        Rule("L17", "warning", _float_outputs, "Quantize its output too, or it runs in float between conversions."),
    ),
    "tensorrt": (
        *COMMON,
        Rule(
            "L03",
            "error",
            partial(_zero_points, activation=TensorProto.INT8, symmetric=True),
            "Write every zero point as an INT8 constant 0: TensorRT is symmetric.",
        ),
        Rule("L06", "error", _integer_biases, "Keep biases float; TensorRT refuses an INT32 DequantizeLinear."),
        Rule("L08", "warning", _float_weights, "Quantize the layer's weight too, or let it read a float tensor."),
        Rule("L12", "warning", _float_skips, "Quantize the skip operand, or the convolution's output is float."),
    ),
}
