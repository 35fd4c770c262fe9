"""The rules of TensorRT: what its parser refuses, what its compiler cannot fuse, and where INT8 does not pay.

After NVIDIA's guide to explicit quantization and the rules by which its Model-Optimizer places Q/DQ.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
from onnx import NodeProto, TensorProto

from tasks.contracts.errors import ExportError
from tasks.contracts.records import LayerCost
from tasks.graph.count import FLOATS, count_layers
from tasks.graph.index import CONVOLUTIONS, DEQUANTIZE, MOVING, QUANTIZE, WEIGHTED, Graph, attribute, name_of
from tasks.graph.rules import (
    COMMON,
    OPSETS,
    Problem,
    Rule,
    batch_norm,
    channel_axis,
    float_copies,
    kind_of,
    leftovers,
    loose_integers,
    same,
    unused,
    zero_points,
)
from tasks.quant.integer_kernels import convolution_is_worth_integer, product_is_worth_integer

NEWEST_IR = 10  # what the oldest parser of TensorRT 10 knows
WIDTH = 32  # channels that one INT8 matrix instruction takes; others are padded
SMALLEST_HALF = float(np.float16(6.1e-5))  # scales below lose digits in FP16, and below 6e-8 become 0
ACTIVATIONS = (
    "Clip", "Elu", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Mish", "PRelu", "Relu", "Sigmoid", "Softplus",
    "Tanh",
)  # fmt: skip
# A kernel that writes INT8 takes these with it: its QuantizeLinear may stand behind them.
FUSED = (*ACTIVATIONS, *MOVING, "Add", "BatchNormalization", "Cast", "Concat", "Div", "Mul", "Pad", "Sub")
BOUNDS = {"HardSigmoid": 1.0, "Sigmoid": 1.0, "Softmax": 1.0, "Tanh": 1.0}
APART = 4  # times that a range may differ from the values in it
SATURATED = 0.1  # share of a layer's weights at the ends of INT8, besides the one in each channel that sets its scale
SHOWN = 5


def _new_opset(graph: Graph) -> Iterator[Problem]:
    for opset in graph.model.opset_import:
        if opset.domain in ("", "ai.onnx") and opset.version > OPSETS[-1]:
            yield graph.model.graph.name, f"opset {opset.version}"


def _foreign_versions(graph: Graph) -> Iterator[Problem]:
    if graph.model.ir_version > NEWEST_IR:
        yield graph.model.graph.name, f"IR version {graph.model.ir_version}"
    versions = Counter(opset.domain or "ai.onnx" for opset in graph.model.opset_import)
    for domain, count in versions.items():
        if count > 1:
            yield graph.model.graph.name, f"{count} opsets of domain {domain}"
    for opset in graph.model.opset_import:
        if opset.domain in ("", "ai.onnx") and opset.version < OPSETS[0]:
            yield graph.model.graph.name, f"opset {opset.version}"


def _small_half_scales(graph: Graph) -> Iterator[Problem]:
    for node in graph.of_type(QUANTIZE, DEQUANTIZE):
        scale = graph.array(node, 1)
        if scale is not None and scale.dtype == np.float16 and (scale < SMALLEST_HALF).any():
            yield name_of(node), f"an FP16 scale of {scale.min():.2g}"


def _integer_biases(graph: Graph) -> Iterator[Problem]:
    for node in graph.of_type(DEQUANTIZE):
        if graph.is_bias(node):
            yield name_of(node), f"an INT32 constant {node.input[0]}"


def _float_weights(graph: Graph) -> Iterator[Problem]:
    """A float layer that reads integers which no integer layer and no sum reads; beside one of those it may."""
    for layer in graph.layers:
        dequantize = graph.input_dequantize(layer)
        if dequantize is None or graph.weight_dequantize(layer) is not None:
            continue
        quantize = graph.producers.get(dequantize.input[0])
        readers = graph.final_readers(quantize) if quantize is not None else graph.readers(dequantize)
        if all(_is_float_layer(graph, reader) for reader in readers):
            yield name_of(layer), "an INT8 input and a float weight"


def _is_float_layer(graph: Graph, node: NodeProto) -> bool:
    return node.op_type in WEIGHTED and node.input[1] in graph.roots and graph.weight_dequantize(node) is None


def _shared_weights(graph: Graph) -> Iterator[Problem]:
    for node in graph.of_type(DEQUANTIZE):
        if node.input[0] not in graph.roots:
            continue
        if node.output[0] in graph.outputs:
            yield name_of(node), "a weight that leaves the graph"
        uses = {(reader.op_type, channel_axis(reader, node.output[0])) for reader in graph.readers(node)}
        if len(uses) > 1:
            yield name_of(node), f"a weight that {' and '.join(sorted(op_type for op_type, _ in uses))} read"


def _early_quantize(graph: Graph) -> Iterator[Problem]:
    for node in graph.of_type(QUANTIZE):
        layer, readers = graph.producers.get(node.input[0]), graph.final_readers(node)
        if layer is None or layer.op_type not in CONVOLUTIONS or not readers:
            continue
        kinds = {reader.op_type for reader in readers}
        if kinds & {*ACTIVATIONS, "BatchNormalization"} and kinds <= {*ACTIVATIONS, "BatchNormalization", "Mul"}:
            yield name_of(node), f"between {layer.op_type} {name_of(layer)} and its {' and '.join(sorted(kinds))}"


def _quantized_sums(graph: Graph) -> Iterator[Problem]:
    for node in graph.of_type("Add"):
        operands = [graph.producers.get(name) for name in node.input]
        if all(operand is not None and operand.op_type == DEQUANTIZE for operand in operands):
            quantizing = [graph.producers.get(operand.input[0]) for operand in operands if operand is not None]
            if any(quantize is not None and _only_for(graph, quantize, node) for quantize in quantizing):
                yield name_of(node), "both operands quantized, so that no convolution can add into itself"


def _only_for(graph: Graph, quantize: NodeProto, add: NodeProto) -> bool:
    """Whether a convolution's output is quantized for one sum alone."""
    layer = graph.producers.get(quantize.input[0])
    is_convolution = layer is not None and layer.op_type in CONVOLUTIONS and len(graph.readers(layer)) == 1
    return is_convolution and [name_of(reader) for reader in graph.final_readers(quantize)] == [name_of(add)]


def _float_skips(graph: Graph) -> Iterator[Problem]:
    for node in graph.of_type("Add"):
        if any(name in graph.roots for name in node.input):
            continue  # a bias
        producers = [graph.producers.get(name) for name in node.input]
        fusible = any(producer is not None and _adds_into(graph, producer) for producer in producers)
        sources = [graph.source(name) for name in node.input]
        if fusible and not any(source is not None and source.op_type == DEQUANTIZE for source in sources):
            yield name_of(node), "a residual add whose skip operand is float"


def _adds_into(graph: Graph, producer: NodeProto) -> bool:
    """Whether an integer convolution could take the add into its own kernel."""
    is_layer = producer.op_type in CONVOLUTIONS and producer.input[1] in graph.roots
    return is_layer and graph.is_quantized(producer) and len(graph.readers(producer)) == 1


def _several_scales(graph: Graph) -> Iterator[Problem]:
    first: dict[str, NodeProto] = {}
    for node in graph.of_type(QUANTIZE):
        earlier = first.setdefault(node.input[0], node)
        if not same(graph, earlier, node, 1):
            yield name_of(node), f"{node.input[0]} quantized with another scale than by {name_of(earlier)}"
        source = graph.source(node.input[0])
        if source is not None and source.op_type == DEQUANTIZE and not same(graph, source, node, 1):
            yield name_of(node), f"integers of {name_of(source)} quantized anew with another scale"


def _repeated_quantize(graph: Graph) -> Iterator[Problem]:
    first: dict[str, NodeProto] = {}
    for node in graph.of_type(QUANTIZE):
        earlier = first.setdefault(node.input[0], node)
        if earlier is not node and same(graph, earlier, node, 1):
            yield name_of(node), f"the same as {name_of(earlier)}"


def _uneven_concatenations(graph: Graph) -> Iterator[Problem]:
    for node in graph.of_type("Concat"):
        sources = [graph.source(name) for name in node.input]
        integer = [source for source in sources if source is not None and source.op_type == DEQUANTIZE]
        if integer and len(integer) < len(sources):
            yield name_of(node), f"{len(integer)} of {len(sources)} inputs quantized"
        elif any(not same(graph, integer[0], other, 1) for other in integer[1:]):
            yield name_of(node), "inputs with several scales"


def _weight_shape(graph: Graph, layer: NodeProto) -> tuple[int, int, Sequence[int], int]:
    """Output channels, input channels of one group, kernel, groups."""
    sizes = list(graph.constants[graph.roots[layer.input[1]]].dims)
    if layer.op_type in CONVOLUTIONS:
        groups = attribute(layer, "group") or 1
        first, second, *kernel = sizes
        if layer.op_type == "Conv":
            return first, second, kernel, groups
        return second * groups, first // groups, kernel, groups
    rows, columns = sizes[-2:]
    transposed = layer.op_type == "Gemm" and attribute(layer, "transB")
    return (rows, columns, (), 1) if transposed else (columns, rows, (), 1)


def _is_worth_integer(graph: Graph, layer: NodeProto) -> bool:
    if len(graph.constants[graph.roots[layer.input[1]]].dims) < 2:
        return False  # a vector
    outputs, inputs, kernel, groups = _weight_shape(graph, layer)
    if layer.op_type in CONVOLUTIONS:
        reads_image = _reads_image(graph, layer)
        return convolution_is_worth_integer(outputs, inputs, kernel, groups, reads_image=reads_image)
    return product_is_worth_integer(outputs, inputs)


def _reads_image(graph: Graph, layer: NodeProto) -> bool:
    name = layer.input[0]
    while (producer := graph.producers.get(name)) is not None and producer.op_type in (QUANTIZE, DEQUANTIZE, "Cast"):
        name = producer.input[0]
    return producer is None


def _few_channels(graph: Graph) -> Iterator[Problem]:
    for layer in graph.layers:
        if graph.is_quantized(layer) and not _is_worth_integer(graph, layer):
            outputs, inputs, kernel, groups = _weight_shape(graph, layer)
            shape = " x ".join(map(str, (outputs, inputs, *kernel)))
            yield name_of(layer), f"{layer.op_type} of {shape} in INT8" + (f", {groups} groups" if groups > 1 else "")


def _padded_channels(graph: Graph) -> Iterator[Problem]:
    for layer in graph.layers:
        if graph.is_quantized(layer) and not _reads_image(graph, layer):
            outputs, inputs, _, groups = _weight_shape(graph, layer)
            if groups == 1 and (outputs % WIDTH or inputs % WIDTH):
                yield name_of(layer), f"channels that are no multiple of {WIDTH}"


def _depthwise(graph: Graph) -> Iterator[Problem]:
    for layer in graph.layers:
        if layer.op_type in CONVOLUTIONS and graph.is_quantized(layer):
            _, inputs, _, groups = _weight_shape(graph, layer)
            if groups > 1 and inputs == 1:
                yield name_of(layer), "a depthwise convolution in INT8"


def _quantized_gates(graph: Graph) -> Iterator[Problem]:
    for node in _gating(graph):
        if node.op_type == QUANTIZE and (producer := graph.producers.get(node.input[0])) is not None:
            yield name_of(producer), f"{producer.op_type} of a squeeze-excite, whose output is quantized"


def _gating(graph: Graph) -> Iterator[NodeProto]:
    """The nodes from a pooling to the product of what was pooled with what came of it."""
    pooled: dict[str, NodeProto] = {}  # tensors of one pixel -> what gives them
    gates: list[str] = []
    for node in graph.nodes:
        operands = [name for name in node.input if name and name not in graph.constants]
        inner = [name for name in operands if name in pooled or name in graph.roots]
        if _pools_to_a_pixel(graph, node) or (operands and len(inner) == len(operands) and operands[0] in pooled):
            pooled |= dict.fromkeys(node.output, node)
        elif node.op_type == "Mul":
            gates += [name for name in operands if name in pooled]
    while gates:
        gating = pooled.pop(gates.pop(), None)
        if gating is not None:
            yield gating
            if not _pools_to_a_pixel(graph, gating):
                gates += gating.input


def _pools_to_a_pixel(graph: Graph, node: NodeProto) -> bool:
    if node.op_type != "ReduceMean":
        return node.op_type in ("GlobalAveragePool", "GlobalMaxPool")
    axes = graph.array(node, 1) if len(node.input) > 1 else attribute(node, "axes")
    return axes is not None and {int(axis) % 4 for axis in axes} == {2, 3}


def _float_output(graph: Graph) -> tuple[dict[str, str], dict[str, str]]:
    """Where integer layers write float: layer -> the operator that keeps it from a QuantizeLinear behind, or the float
    layer that reads it. What was pooled to one pixel, or leaves the graph, costs nothing.
    """
    integer: set[str] = set()  # tensors that are quantized, at once or behind what a kernel takes with it
    blocked: dict[str, str] = {}
    read: dict[str, str] = {}
    for node in reversed(graph.nodes):
        if node.op_type == QUANTIZE:
            integer.add(node.input[0])
        elif node.op_type in WEIGHTED:
            read.setdefault(node.input[0], f"{node.op_type} {name_of(node)}")
        elif node.op_type != DEQUANTIZE and not _pools_to_a_pixel(graph, node):
            is_fused = node.op_type in FUSED
            for behind, name in ((behind, name) for behind in node.output for name in node.input):
                if behind in blocked or (behind in integer and not is_fused):
                    blocked.setdefault(name, blocked.get(behind, f"{node.op_type} {name_of(node)}"))
                elif behind in integer:
                    integer.add(name)
                if behind in read:
                    read.setdefault(name, read[behind])
    written = {layer.output[0]: name_of(layer) for layer in graph.layers if graph.is_quantized(layer)}
    missing = [name for name in written if name not in integer]
    return (
        {written[name]: blocked[name] for name in missing if name in blocked},
        {written[name]: read[name] for name in missing if name in read and name not in blocked},
    )


def _blocked_outputs(graph: Graph) -> Iterator[Problem]:
    for layer, operator in _float_output(graph)[0].items():
        yield layer, f"a float output, and {operator} before the next {QUANTIZE}"


def _outputs_read_as_float(graph: Graph) -> Iterator[Problem]:
    for layer, reader in _float_output(graph)[1].items():
        yield layer, f"a float output, which float {reader} reads"


def _casts_behind_dequantize(graph: Graph) -> Iterator[Problem]:
    for node in graph.of_type(DEQUANTIZE):
        for reader in graph.readers(node):
            if reader.op_type == "Cast" and reader.output[0] not in graph.outputs:
                yield name_of(reader), f"a Cast between {name_of(node)} and what reads it"


def _float_types(graph: Graph) -> dict[str, int]:
    """Float type of each operator that computes."""
    return {
        node.output[0]: graph.types[node.output[0]]
        for node in graph.nodes
        if node.op_type not in (QUANTIZE, DEQUANTIZE, "Cast") and graph.types.get(node.output[0]) in FLOATS
    }


def _mixed_layers(graph: Graph) -> Iterator[Problem]:
    types = _float_types(graph)
    narrow = TensorProto.FLOAT16 if TensorProto.FLOAT16 in types.values() else TensorProto.BFLOAT16
    if narrow not in types.values():
        return
    for layer in graph.layers:
        found = types.get(layer.output[0], narrow)
        if found != narrow:
            yield name_of(layer), f"{kind_of(found)} in a graph that computes in {kind_of(narrow)}"


def _wide_types(graph: Graph) -> Iterator[Problem]:
    counts = Counter(_float_types(graph).values())
    if counts[TensorProto.FLOAT] + counts[TensorProto.DOUBLE]:
        shown = ", ".join(f"{count} in {kind_of(kind)}" for kind, count in counts.most_common())
        yield graph.model.graph.name, f"operators beside Q/DQ: {shown}"


def _written_out(graph: Graph) -> Iterator[Problem]:
    for node in graph.of_type("Clip"):
        add = graph.producers.get(node.input[0])
        if add is not None and add.op_type == "Add" and len(node.input) == 3:
            bounds = [graph.number(name) for name in node.input[1:]]
            offsets = [graph.number(name) for name in add.input]
            if (bounds == [0, 6] and 3 in offsets) or (bounds == [0, 1] and 0.5 in offsets):
                yield name_of(node), "a hard-sigmoid written out as Add and Clip"
    for node in graph.of_type("Mul"):
        for name, other in (node.input, node.input[::-1]):
            gate = graph.producers.get(name)
            is_sixth = gate is not None and abs((attribute(gate, "alpha") or 0.2) - 1 / 6) < 1e-3
            if gate is not None and gate.op_type == "HardSigmoid" and gate.input[0] == other and is_sixth:
                yield name_of(node), "a hard-swish written out as HardSigmoid and Mul"


def _unfit_weights(graph: Graph) -> Iterator[Problem]:
    for node in graph.of_type(DEQUANTIZE):
        steps_ON, scale_O = _weight_steps(graph, node)
        if steps_ON is None:
            continue
        largest_O = np.abs(steps_ON).max(axis=1)
        is_lowest_O = (scale_O.dtype == np.float16) & (scale_O <= np.finfo(np.float16).smallest_normal)
        coarse = int(((largest_O > 0) & (largest_O < 127 / APART) & ~is_lowest_O).sum())
        if coarse:
            yield name_of(node), f"{coarse} of {largest_O.size} scales over {APART} times what the weights need"
        at_ends = (np.abs(steps_ON) >= 127).sum(axis=1)
        share = float(np.maximum(at_ends - 1, 0).sum()) / steps_ON.size
        if share > SATURATED:
            yield name_of(node), f"{share:.0%} of the weights at the ends of INT8"


def _weight_steps(graph: Graph, dequantize: NodeProto) -> tuple[np.ndarray | None, np.ndarray]:
    """A weight in steps of its scale [O, N], not yet rounded where it is stored as float, and its scales [O] or [1]."""
    none = None, np.empty(0)
    scale = graph.array(dequantize, 1)
    if dequantize.input[0] not in graph.roots or graph.is_bias(dequantize) or scale is None or not (scale > 0).all():
        return none
    weight = graph.value(graph.roots[dequantize.input[0]])
    axis = attribute(dequantize, "axis")
    scale_O = scale.reshape(-1)
    if scale_O.size == 1:
        weight_ON = weight.reshape(1, -1)
    elif axis is None or axis >= weight.ndim or weight.shape[axis] != scale_O.size:
        return none  # L05 says so
    else:
        weight_ON = np.moveaxis(weight, axis, 0).reshape(scale_O.size, -1)
    if not weight_ON.size:
        return none
    if weight_ON.dtype == np.int8:
        return weight_ON.astype(np.int16), scale_O
    if not np.issubdtype(weight_ON.dtype, np.floating):
        return none  # L03 says so
    return weight_ON.astype(np.float32) / scale_O.astype(np.float32)[:, None], scale_O


def _unfit_activations(graph: Graph) -> Iterator[Problem]:
    for node in graph.of_type(QUANTIZE):
        source, scale = graph.source(node.input[0]), graph.array(node, 1)
        if source is None or scale is None or scale.size != 1:
            continue
        bound = BOUNDS.get(source.op_type)
        if source.op_type == "Clip" and len(source.input) == 3:
            ends = [graph.number(name) for name in source.input[1:]]
            bound = max(abs(end) for end in ends if end is not None) if None not in ends else None
        if bound is not None and 127 * float(scale.item()) > APART * bound:
            reach = 127 * float(scale.item())
            yield name_of(node), f"a scale that reaches {reach:.3g} where {source.op_type} ends at {bound:.3g}"


def _counted(graph: Graph) -> tuple[LayerCost, ...]:
    """Layers with their cost for one image; none if the input is not one of fixed size, which L20 says."""
    sizes = [size.dim_value for size in graph.inputs[0].type.tensor_type.shape.dim] if graph.inputs else []
    try:
        return count_layers(graph.model, (1, *sizes[1:]))
    except ExportError:
        return ()


def _nothing_in_integers(graph: Graph) -> Iterator[Problem]:
    layers = list(graph.layers)
    if not any(graph.is_quantized(layer) for layer in layers):
        yield graph.model.graph.name, f"none of {len(layers)} layers in INT8"


def _coverage(graph: Graph) -> Iterator[Problem]:
    layers = _counted(graph)
    total = sum(layer.macs for layer in layers)
    if not total:
        return
    share = sum(layer.macs for layer in layers if layer.precision == "int8") / total
    floats = sorted((layer for layer in layers if layer.precision != "int8"), key=lambda layer: -layer.macs)
    found = f"{share:.1%} of {total / 1e6:,.1f} million multiply-accumulates in INT8"
    if floats:
        shown = ", ".join(f"{layer.layer} ({layer.macs / total:.1%})" for layer in floats[:SHOWN])
        more = f" and {len(floats) - SHOWN} more" if len(floats) > SHOWN else ""
        found += f"; float: {shown}{more}"
    yield graph.model.graph.name, found


def _training_mode(graph: Graph) -> Iterator[Problem]:
    for node in graph.of_type("BatchNormalization", "Dropout"):
        flag = attribute(node, "training_mode") if node.op_type == "BatchNormalization" else None
        if node.op_type == "Dropout" and len(node.input) > 2:
            flag = graph.number(node.input[2])
        if flag:
            yield name_of(node), f"{node.op_type} in training mode"


TENSORRT = (
    Rule(
        "L01",
        "error",
        _foreign_versions,
        f"Save it with IR version {NEWEST_IR} or less and one opset from {OPSETS[0]} on.",
    ),
    Rule("L01", "warning", _new_opset, f"Export with opset {OPSETS[-1]}, which every TensorRT 10 reads."),
    *COMMON,
    Rule("L07", "error", loose_integers, "Put a DequantizeLinear directly behind each QuantizeLinear."),
    Rule(
        "L03",
        "error",
        partial(zero_points, activation=TensorProto.INT8, symmetric=True),
        "Write every zero point as an INT8 constant 0: TensorRT is symmetric.",
    ),
    Rule("L04", "error", _small_half_scales, "Raise FP16 scales to 6.1e-5 and quantize their weights anew."),
    Rule("L06", "error", _integer_biases, "Keep biases float; TensorRT refuses an INT32 DequantizeLinear."),
    Rule("L08", "warning", _float_weights, "Quantize the layer's weight too, or let it read a float tensor."),
    Rule("L09", "error", _shared_weights, "Give each layer a DequantizeLinear of its own for its weight."),
    Rule("L11", "error", batch_norm, "Fold batch norm into the convolution before quantizing."),
    Rule("L11", "warning", _early_quantize, "Quantize behind the activation: it is then part of the layer's kernel."),
    Rule("L11", "warning", _quantized_sums, "Leave the operand float that the last convolution gives."),
    Rule("L12", "warning", _float_skips, "Quantize the skip operand, or the convolution's output is float."),
    Rule("L13", "warning", _several_scales, "Quantize a tensor once and let all its readers share that scale."),
    Rule("L14", "warning", _uneven_concatenations, "Quantize all inputs of a Concat with one scale, or none."),
    Rule("L15", "warning", _few_channels, "Keep the layer float: with so few channels INT8 has no fast kernel."),
    Rule(
        "L15", "info", _padded_channels, "Nothing, or channels in multiples of 32: the rest of each 32 is computed too."
    ),
    Rule(
        "L16",
        "warning",
        _quantized_gates,
        "Keep squeeze-excite float: its layers see one pixel, its gate costs accuracy.",
    ),
    Rule(
        "L16", "info", _depthwise, "Measure it float as well: it is bound by memory, and INT8 may cost accuracy there."
    ),
    Rule("L17", "warning", _blocked_outputs, "Quantize directly behind the layer and its activation."),
    Rule("L17", "info", _outputs_read_as_float, "Nothing if the reader is float by intent; else quantize it."),
    Rule(
        "L18",
        "warning",
        _casts_behind_dequantize,
        "Give the scale the type that the reader computes in, without a Cast.",
    ),
    Rule("L18", "info", _mixed_layers, "Nothing if FP16 cannot hold them, as the export says; else use one type."),
    Rule(
        "L18", "info", _wide_types, "TensorRT computes in the types of the graph: write in FP16 what should run in it."
    ),
    Rule("L19", "warning", _written_out, "Export with opset 14 or later, which has HardSwish and HardSigmoid."),
    Rule("L22", "warning", _unfit_weights, "Choose the weight's scales from its own largest values."),
    Rule("L22", "warning", _unfit_activations, "Calibrate again, on what the layer gives."),
    Rule("L23", "warning", _nothing_in_integers, "Quantize the model first."),
    Rule("L23", "info", _coverage, "Nothing if these layers are float by intent."),
    Rule("L24", "error", partial(unused, is_large=True), "Remove the constant; it would be shipped for nothing."),
    Rule("L24", "info", partial(unused, is_large=False), "Remove the constant."),
    Rule("L24", "info", leftovers, "Export for inference, with the optimizer on."),
    Rule("L24", "info", _training_mode, "Export in evaluation mode."),
    Rule("L24", "info", _repeated_quantize, "Quantize once and let all readers share it."),
    Rule("L26", "error", float_copies, "Store the weight as INT8, with only a DequantizeLinear behind it."),
)
