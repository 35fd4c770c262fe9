"""From a torch graph to ONNX: float as it is, INT8 with explicit Q/DQ, both in one plain form.

Opset 20 holds per-channel Q/DQ and hard-swish, and both ONNX Runtime and TensorRT 10 read it.
"""

from __future__ import annotations

import warnings
from collections import Counter
from itertools import count
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule

from tasks.contracts.errors import ExportError

OPSET = 20
INPUT, OUTPUT = "input", "logits"
_WEIGHTED = ("Conv", "Gemm")
_WHOLE = 1e-3  # how far a number of steps may be from a whole one


def export_onnx(graph: GraphModule, example_NCHW: Tensor, path: Path, *, integer_bias: bool) -> ExportedProgram:
    """Write `graph` to `path` and give the program that was written, whose names are the file's.

    Args:
        graph: float, or converted by `tasks.quant.simulate.convert`.
        example_NCHW: at least two images; the batch stays dynamic.
        integer_bias: store biases of INT8 layers as int32 in steps of input scale times weight scale.

    Raises:
        ExportError: if torch or the ONNX checker refuses the graph, or a bias does not fit int32.
    """
    batch = {0: torch.export.Dim("batch", min=1)}
    example_NCHW = example_NCHW.contiguous()  # other strides would be traced into the graph
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside torch.onnx itself
        try:
            with torch.no_grad():
                program = torch.export.export(graph, (example_NCHW,), dynamic_shapes=(batch,))
            exported = torch.onnx.export(
                program,
                (example_NCHW,),
                dynamo=True,
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=[OUTPUT],
                optimize=True,
                verbose=False,
            )
        except (RuntimeError, ValueError, torch.onnx.errors.OnnxExporterError) as error:
            first = str(error).strip().splitlines()[0]
            raise ExportError(
                f"torch.onnx cannot export the graph: {first}", remedy="See the chained error."
            ) from error
    assert exported is not None
    model = exported.model
    _global_pooling(model)
    _average_of_what_is_inside(model)
    _integer_hard_swish(model)
    if integer_bias:
        _integer_biases(model)
    _transposed_weights(model)
    _own_weights(model)
    _plain(model)
    ir.save(model, path)
    try:
        onnx.checker.check_model(path, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        path.unlink()
        raise ExportError(f"The exported graph is not valid ONNX: {error}", remedy="Report the model.") from error
    return program


def _array(value: ir.Value | None) -> np.ndarray | None:
    """The constant behind a value; None if it is computed."""
    return value.const_value.numpy() if value is not None and value.const_value is not None else None


def _global_pooling(model: ir.Model) -> None:
    """A mean over height and width is GlobalAveragePool: runtimes have an integer kernel for that one only."""
    for node in model.graph:
        if node.op_type != "ReduceMean" or len(node.inputs) < 2:
            continue
        axes, source = _array(node.inputs[1]), node.inputs[0]
        image = source is not None and source.shape is not None and len(source.shape) == 4
        keeps = node.attributes.get_int("keepdims", 1)
        if image and keeps and axes is not None and sorted(int(axis) % 4 for axis in axes) == [2, 3]:
            node.op_type = "GlobalAveragePool"
            node.resize_inputs(1)
            node.attributes.clear()


def _average_of_what_is_inside(model: ir.Model) -> None:
    """Let an average whose last window reaches over the edge (`ceil_mode`) count no padding.

    ONNX Runtime's integer kernel divides by the whole window where it counts padding. So padding that does count is
    written as zeros around the integers: they must be quantized again, or ONNX Runtime makes padding of them.
    """
    for node in list(model.graph):
        counts = (node.attributes.get_int(key, 0) for key in ("ceil_mode", "count_include_pad"))
        if node.op_type != "AveragePool" or not all(counts):
            continue
        sides = node.attributes.get_ints("pads", ())
        if any(sides):
            before = _dequantize_before(node.inputs[0])
            if before is None:
                continue  # its float kernel is right
            begins, ends = np.split(np.array(sides, np.int64), 2)
            name, grid = str(node.outputs[0].name), before.inputs[1:]
            pads = _initializer(model, f"{name}_pads", np.concatenate([[0, 0], begins, [0, 0], ends]))
            pad = ir.node("Pad", [before.outputs[0], pads], name=f"{name}_pad")
            quantize = ir.node("QuantizeLinear", [pad.outputs[0], *grid], name=f"{name}_quantize")
            dequantize = ir.node("DequantizeLinear", [quantize.outputs[0], *grid], name=f"{name}_dequantize")
            model.graph.insert_before(node, [pad, quantize, dequantize])
            node.replace_input_with(0, dequantize.outputs[0])
            node.attributes.add(ir.AttrInt64s("pads", [0] * len(sides)))
        node.attributes.add(ir.AttrInt64("count_include_pad", 0))


def _integer_hard_swish(model: ir.Model) -> None:
    """Write x * clip(x / 6 + 1/2, 0, 1) between UINT8 tensors so that nothing but its product is computed.

    With x = s (q - z) and n = 3 / s a whole number, the second factor is s/6 (clip(q, z - n, z + n) - (z - n)): the
    same integers, clipped and read at another scale. ONNX Runtime clips integers and multiplies them; hard-swish
    itself it computes in float, by four passes over memory.
    """
    for node in list(model.graph):
        if node.op_type != "HardSwish" or any(use.node.op_type != "QuantizeLinear" for use in node.outputs[0].uses()):
            continue
        dequantize = _dequantize_before(node.inputs[0])
        if dequantize is None or len(dequantize.inputs) < 3:
            continue
        scale, zero_point = (_array(value) for value in dequantize.inputs[1:3])
        if scale is None or zero_point is None or zero_point.dtype != np.uint8:
            continue
        three, zero = 3 / float(scale), int(zero_point)
        steps = round(three)
        if abs(three - steps) > _WHOLE or steps > zero:
            continue
        name = str(node.outputs[0].name)
        constants: dict[str, np.ndarray] = {
            f"{name}_low": np.array(zero - steps, np.uint8),
            f"{name}_high": np.array(min(zero + steps, 255), np.uint8),
            f"{name}_sixth": np.array(scale / 6, np.float32),
        }
        low, high, sixth = (_initializer(model, key, array) for key, array in constants.items())
        clip = ir.node("Clip", [dequantize.inputs[0], low, high], name=f"{name}_clip")
        gate = ir.node("DequantizeLinear", [clip.outputs[0], sixth, low], name=f"{name}_gate")
        model.graph.insert_before(node, [clip, gate])
        node.op_type = "Mul"
        node.resize_inputs(2)
        node.replace_input_with(1, gate.outputs[0])


def _integer_biases(model: ir.Model) -> None:
    taken: Counter[str] = Counter()
    for node in list(model.graph):
        if node.op_type not in _WEIGHTED or len(node.inputs) < 3 or node.inputs[2] is None:
            continue
        data, weight = (_dequantize_before(value) for value in node.inputs[:2])
        bias_O = _array(node.inputs[2])
        if data is None or weight is None or bias_O is None:
            continue
        input_scale, weight_scale_O = _array(data.inputs[1]), _array(weight.inputs[1])
        assert input_scale is not None
        assert weight_scale_O is not None
        scale_O = (input_scale * weight_scale_O).astype(np.float32).reshape(-1)
        steps_O = np.rint(bias_O.astype(np.float64) / scale_O)
        if np.abs(steps_O).max() > np.iinfo(np.int32).max:
            raise ExportError(
                f"A bias of {node.name} needs {np.abs(steps_O).max():.3g} steps and int32 has 2.1e9.",
                remedy="Widen the weight scales first (fit_biases).",
            )
        name = str(node.inputs[2].name)
        taken[name] += 1
        if taken[name] > 1:  # a layer that is used again, on inputs of another scale
            name = f"{name}_{taken[name]}"
        constants = {
            f"{name}_int32": steps_O.astype(np.int32),
            f"{name}_scale": scale_O,
            f"int32_zeros_{len(scale_O)}": np.zeros(len(scale_O), np.int32),  # shared by all of this length
        }
        inputs = [_initializer(model, key, array) for key, array in constants.items()]
        dequantize = ir.node("DequantizeLinear", inputs, {"axis": 0}, name=f"{name}_dequantize")
        model.graph.insert_before(node, dequantize)
        node.replace_input_with(2, dequantize.outputs[0])


def _transposed_weights(model: ir.Model) -> None:
    """Store an INT8 weight as its layer reads it: a linear layer on tokens is a MatMul of the transposed weight."""
    for node in list(model.graph):
        dequantize = _dequantize_before(node.inputs[0]) if node.op_type == "Transpose" else None
        steps = _array(dequantize.inputs[0]) if dequantize is not None else None
        if dequantize is None or steps is None or steps.dtype != np.int8:
            continue
        order = node.attributes.get_ints("perm", tuple(reversed(range(steps.ndim))))
        axis = order.index(dequantize.attributes.get_int("axis", 1))
        name = str(node.outputs[0].name)
        weight = _initializer(model, f"{name}_int8", np.ascontiguousarray(steps.transpose(order)))
        inputs = [weight, *dequantize.inputs[1:]]
        transposed = ir.node("DequantizeLinear", inputs, {"axis": axis}, name=f"{name}_dequantize")
        model.graph.insert_before(node, transposed)
        node.outputs[0].replace_all_uses_with(transposed.outputs[0])
        model.graph.remove(node, safe=True)
        if not dequantize.outputs[0].uses():
            model.graph.remove(dequantize, safe=True)


def _own_weights(model: ir.Model) -> None:
    """Give each use of an INT8 weight its own steps and zero points.

    ONNX Runtime makes uint8 of int8 weights where the CPU would saturate, and fails if two nodes share such a tensor.
    """
    for node in list(model.graph):
        if node.op_type != "DequantizeLinear":
            continue
        weight, scale = node.inputs[:2]
        steps = _array(weight)
        if weight is None or steps is None or steps.dtype != np.int8:
            continue
        name = str(weight.name)
        zeros = np.zeros_like(_array(scale), np.int8)
        node.resize_inputs(3)
        node.replace_input_with(2, _initializer(model, f"{name}_zero_point", zeros))
        for number, (user, index) in enumerate(list(node.outputs[0].uses())[1:], 2):  # a layer that is used again
            constants = {f"{name}_{number}": steps, f"{name}_{number}_zero_point": zeros}
            own_steps, own_zeros = (_initializer(model, key, array) for key, array in constants.items())
            inputs = [own_steps, scale, own_zeros]
            again = ir.node("DequantizeLinear", inputs, node.attributes, name=f"{node.name}_{number}")
            model.graph.insert_before(user, again)
            user.replace_input_with(index, again.outputs[0])


def _dequantize_before(value: ir.Value | None) -> ir.Node | None:
    producer = value.producer() if value is not None else None
    return producer if producer is not None and producer.op_type == "DequantizeLinear" else None


def _initializer(model: ir.Model, name: str, array: np.ndarray) -> ir.Value:
    if name in model.graph.initializers:
        return model.graph.initializers[name]
    value = ir.Value(
        name=name,
        shape=ir.Shape(array.shape),
        type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
        const_value=ir.tensor(array, name=name),
    )
    model.graph.register_initializer(value)
    return value


def _layer(node: ir.Node) -> str | None:
    """The module that a node computes a part of; None of what belongs to none below the model itself."""
    text = node.metadata_props.get("pkg.torch.onnx.name_scopes", "")
    scopes = [scope for scope in text.strip("[]").replace("'", "").split(", ") if scope]
    return scopes[-2] if len(scopes) > 1 and node.op_type not in ("QuantizeLinear", "DequantizeLinear") else None


def _plain(model: ir.Model) -> None:
    """Nodes named by their layer, no two alike; unused constants gone, and no trace of the machine that exported."""
    names = [_layer(node) or str(node.name) for node in model.graph]
    reserved, taken = set(names), set()
    for node, name in zip(model.graph, names, strict=True):
        numbered = (f"{name}_{number}" for number in count(1))
        node.name = name if name not in taken else next(free for free in numbered if free not in reserved)
        taken.add(node.name)
        reserved.add(node.name)
    for holder in (model, model.graph, *model.graph, *(value for node in model.graph for value in node.outputs)):
        holder.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    for name, value in list(model.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del model.graph.initializers[name]
    model.doc_string = model.graph.doc_string = None
