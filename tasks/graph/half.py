"""A float32 graph, plain or with Q/DQ, written anew so that it computes in float16 wherever that is safe.

A strongly typed engine computes each tensor in the type that the graph gives it, so FP16 must be in the graph. Inputs
and outputs stay float32. A DequantizeLinear gives the type of its scale: it is written once for each type that is read,
so that no Cast ever stands between it and its readers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass, RemoveUnusedNodesPass

from tasks.contracts.errors import ExportError
from tasks.graph.export import INPUT
from tasks.graph.index import DEQUANTIZE, QUANTIZE, WEIGHTED
from tasks.graph.lint import SHOWN
from tasks.graph.parity import Feed

FLOAT, FLOAT16 = ir.DataType.FLOAT, ir.DataType.FLOAT16
LARGEST = float(np.finfo(np.float16).max)  # 65,504
SMALLEST = float(np.finfo(np.float16).smallest_normal)  # 6.1e-5; below it a value loses digits, or is flushed to 0
OPSETS = (19, 20)  # Q/DQ take float16 from 19 on; 20 is the last that TensorRT 10 reads
HEADROOM = 8  # what a few images do not show
TOLERANCE = 2**-10  # of a constant's norm; rounding a value to float16 moves it by half of that at most
# With the running sum in float16 too, the mean of 256 values is wrong by 0.2 % (at worst 0.8 %, one INT8 step), that of
# 784 by 0.5 %, of 3,136 by 5 %, of 12,544 by a half.
LONGEST_SUM = 256
SUMS = ("AveragePool", "GlobalAveragePool", "ReduceL1", "ReduceMean", "ReduceSum")
# They square, multiply up or exponentiate, so that what lies between input and output leaves float16's range.
DELICATE = (
    "CumSum", "Exp", "GlobalLpPool", "GroupNormalization", "InstanceNormalization", "LRN", "LayerNormalization",
    "LogSoftmax", "LpNormalization", "LpPool", "MeanVarianceNormalization", "Pow", "ReduceL2", "ReduceLogSum",
    "ReduceLogSumExp", "ReduceProd", "ReduceSumSquare", "Softmax",
)  # fmt: skip


def half_from(
    model: onnx.ModelProto, largest: Mapping[str, float] | None = None
) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """The same model in float16, and what was not simply rounded: a line for each.

    A node stays float32 if ONNX has no float16 for it, if it is one of `DELICATE`, sums more than `LONGEST_SUM` values,
    reads a constant that float16 does not hold, or a tensor that comes near float16's largest value. What only passes
    such a node's result on stays float32 too, up to the next layer.

    Args:
        model: opset 19 or 20, one plain graph; is left as it was.
        largest: magnitudes of tensors by name, as `largest_values` observes them.

    Raises:
        ExportError: if the graph is not such a graph, or has integer biases.
    """
    graph_model = ir.from_proto(_typed(model))
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(graph_model)
    graph = graph_model.graph
    for node in graph:
        _refuse(node)
    reasons = {node: reason for node in graph if (reason := next(_reasons(node, largest or {}), None))}
    _round_activation_scales(graph)
    writer = _Writer(graph)
    for node in graph:
        if node.op_type != DEQUANTIZE:
            writer.write(node, FLOAT if node in reasons or _follows_float(node) else FLOAT16)
    writer.keep_outputs()
    RemoveUnusedNodesPass()(graph_model)
    writer.take_names()
    notes = (*writer.notes, *(f"{_name(node)} stays float32: {reason}" for node, reason in reasons.items()))
    return _checked(ir.to_proto(graph_model)), notes


def largest_values(
    path: Path, images_NCHW: np.ndarray, run: Callable[[Path, Feed], Feed], work: Path
) -> dict[str, float]:
    """Largest magnitude of each float tensor of the file at `path`, by name; dequantized ones lie within their scale.

    Args:
        run: runs an ONNX file on a feed.
        work: folder for a copy of the file that gives these magnitudes.
    """
    model = _typed(onnx.load(path))
    typed = {
        value.name
        for value in (*model.graph.value_info, *model.graph.output)
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    }
    computed = (node for node in model.graph.node if node.op_type != DEQUANTIZE)
    names = [name for node in computed for name in node.output if name in typed]
    del model.graph.output[:]
    for name in names:
        size, top = f"{name}_size", f"{name}_largest"
        model.graph.node.append(onnx.helper.make_node("Abs", [name], [size]))
        model.graph.node.append(onnx.helper.make_node("ReduceMax", [size], [top], keepdims=0))
        model.graph.output.append(onnx.helper.make_tensor_value_info(top, onnx.TensorProto.FLOAT, []))
    observed = work / "observed.onnx"
    onnx.save(model, observed)
    found = run(observed, {INPUT: images_NCHW})
    return {name: float(found[f"{name}_largest"]) for name in names}


class _Writer:
    """Writes a graph node by node, in its order. Constants, Casts and DequantizeLinears are made once for each type."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._made: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self.notes: list[str] = []

    def write(self, node: ir.Node, dtype: ir.DataType) -> None:
        """Let `node` compute in `dtype`."""
        formals = _schema(node).inputs
        for slot, value in enumerate(node.inputs):
            if value is not None and value.dtype in (FLOAT, FLOAT16):
                wanted = dtype if _allows_half(_formal(formals, slot)) else FLOAT
                node.replace_input_with(slot, self._as(value, wanted))
        for output in node.outputs:
            if output.dtype == FLOAT:
                output.dtype = dtype
                if node.op_type == "Cast":
                    node.attributes["to"] = ir.AttrInt64("to", dtype)

    def keep_outputs(self) -> None:
        """What leaves the graph is float32, under its own name."""
        for slot, value in enumerate(self._graph.outputs):
            if value.dtype == FLOAT16:
                name = str(value.name)
                value.name = f"{name}_float16"
                self._graph.outputs[slot] = self._cast(value, FLOAT, name)

    def take_names(self) -> None:
        """What has replaced its original is called like it."""
        for (value, _), made in self._made.items():
            if value.graph is None:
                made.name = value.name
                producer, original = made.producer(), value.producer()
                if producer is not None and original is not None:
                    producer.name = original.name

    def _as(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        if value.dtype == dtype:
            return value
        if (value, dtype) not in self._made:
            self._made[value, dtype] = self._make(value, dtype)
        return self._made[value, dtype]

    def _make(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        name = f"{value.name}_{dtype.name.lower()}"
        producer = value.producer()
        if value.const_value is not None:
            return self._constant(name, _rounded(_array(value)))
        if producer is not None and producer.op_type == DEQUANTIZE:
            return self._dequantize(producer, name)
        return self._cast(value, dtype, name)

    def _constant(self, name: str, array: np.ndarray) -> ir.Value:
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self._graph.register_initializer(value)
        return value

    def _dequantize(self, node: ir.Node, name: str) -> ir.Value:
        steps, scale, *zero_point = node.inputs
        assert steps is not None
        assert scale is not None
        if (scale, FLOAT16) not in self._made:
            self._made[scale, FLOAT16] = self._constant(f"{scale.name}_float16", _half_scale(_array(scale)))
        if steps.const_value is not None and (weight := _Weight.of(node)).is_raised.any():
            self.notes.append(weight.note())
            self._made[steps, FLOAT16] = self._constant(f"{steps.name}_float16", weight.half_steps)
            steps = self._made[steps, FLOAT16]
        inputs = [steps, self._made[scale, FLOAT16], *zero_point]
        made = ir.node(DEQUANTIZE, inputs, node.attributes, name=f"{node.name}_float16")
        _describe(made.outputs[0], node.outputs[0], name, FLOAT16)
        self._graph.insert_after(node, made)
        return made.outputs[0]

    def _cast(self, value: ir.Value, dtype: ir.DataType, name: str) -> ir.Value:
        cast = ir.node("Cast", [value], {"to": dtype}, name=f"{value.name}_to_{dtype.name.lower()}")
        _describe(cast.outputs[0], value, name, dtype)
        producer = value.producer()
        if producer is None:
            self._graph.insert_before(self._graph[0], cast)
        else:
            self._graph.insert_after(producer, cast)
        return cast.outputs[0]


def _describe(value: ir.Value, like: ir.Value, name: str, dtype: ir.DataType) -> None:
    value.name, value.type = name, ir.TensorType(dtype)
    value.merge_shapes(like.shape)


@dataclass(frozen=True)
class _Weight:
    """Constant integers with the scales that dequantize them, and what float16 makes of both."""

    name: str
    steps: np.ndarray
    scale: np.ndarray  # float32, shaped to meet the steps: one for all, or one for each index of the axis

    @classmethod
    def of(cls, dequantize: ir.Node) -> Self:
        steps, scale = (_array(value) for value in dequantize.inputs[:2])
        if scale.size > 1:
            axis = dequantize.attributes.get_int("axis", 1) % steps.ndim
            scale = np.expand_dims(scale, [other for other in range(steps.ndim) if other != axis])
        return cls(_name(dequantize.inputs[0]), steps, scale)

    @property
    def is_raised(self) -> np.ndarray:
        """Which scales float16 holds only when they are raised to its smallest."""
        return np.asarray(self.scale < SMALLEST)

    @property
    def half_steps(self) -> np.ndarray:
        """The same values in steps of float16's scale; other integers only where that one was raised."""
        lowered = np.rint(self.steps * (self.scale / SMALLEST))
        return np.where(self.is_raised, lowered, self.steps).astype(self.steps.dtype)

    @property
    def moved(self) -> float:
        """By how much of their norm the values change."""
        half = self.half_steps * _half_scale(self.scale).astype(np.float32)
        return _change(self.steps * self.scale, half)

    def note(self) -> str:
        raised = np.flatnonzero(self.is_raised)
        shown = ", ".join(map(str, raised[:SHOWN])) + (", ..." if len(raised) > SHOWN else "")
        return (
            f"{self.name}: {len(raised)} of {self.scale.size} scales ({shown}; smallest {self.scale.min():.2g}) "
            f"raised to {SMALLEST:.2g}, and their weights quantized anew"
        )


def _typed(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which each tensor has its type, and its shape where it is known."""
    try:
        return onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    except onnx.shape_inference.InferenceError as error:
        raise ExportError(f"The graph has tensors without type: {error}", remedy="Export it anew.") from error


def _checked(model: onnx.ModelProto) -> onnx.ModelProto:
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"The float16 graph is not valid ONNX: {error}", remedy="Report the model.") from error
    return model


def _refuse(node: ir.Node) -> None:
    """Refuse what is not a plain float32 operator of ours.

    Raises:
        ExportError: if a node has another float type, holds a graph, or has no place beside float16.
    """
    name = _name(node)
    assert node.graph is not None
    opset = node.graph.opset_imports.get("", 0)
    if opset not in OPSETS:
        raise ExportError(f"The graph has opset {opset}.", remedy=f"Export it with opset {OPSETS[-1]}.")
    if node.domain or any(attribute.type == ir.AttributeType.GRAPH for attribute in node.attributes.values()):
        raise ExportError(f"{node.op_type} {name} is not a plain ONNX operator.", remedy="Export without it.")
    for value in (*node.inputs, *node.outputs):
        if value is not None and value.dtype is not None and value.dtype.is_floating_point() and value.dtype != FLOAT:
            raise ExportError(
                f"{value.name} at {node.op_type} {name} is {value.dtype.name}.", remedy="Give a graph in float32."
            )
    if node.op_type in (QUANTIZE, DEQUANTIZE):
        steps, scale = node.inputs[:2]
        if scale is None or scale.const_value is None:
            raise ExportError(f"{node.op_type} {name} has a computed scale.", remedy="Export constant scales.")
        if steps is not None and steps.dtype == ir.DataType.INT32:
            raise ExportError(
                f"{name} holds an INT32 bias, in steps that float16 cannot name.",
                remedy="Export with float biases (scheme tensorrt).",
            )
        if _is_constant(steps) and len(node.inputs) > 2 and np.any(_array(node.inputs[2])):
            raise ExportError(f"{name} has a zero point other than 0.", remedy="Quantize weights symmetrically.")


def _reasons(node: ir.Node, largest: Mapping[str, float]) -> Iterator[str]:
    """Why a node may not compute in float16; a DequantizeLinear leaves that to its readers."""
    if node.op_type == DEQUANTIZE:
        return
    if not _exists_in_half(node):
        yield "ONNX has no float16 for it"
    elif node.op_type in DELICATE:
        yield f"{node.op_type} leaves float16's range on the way"
    elif node.op_type in SUMS and (count := _num_summed(node)) > LONGEST_SUM:
        yield f"it sums {count:,.0f} values" if count < math.inf else "it may sum any number of values"
    if node.op_type == QUANTIZE:
        yield from _scale_reasons(node)
    else:
        for value in node.inputs:
            yield from _constant_reasons(value)
    for value in (*node.inputs, *node.outputs):
        if value is not None and not largest.get(str(value.name), 0.0) <= LARGEST / HEADROOM:  # NaN is not either
            yield f"{value.name} reaches {largest[str(value.name)]:,.0f}"


def _scale_reasons(node: ir.Node) -> Iterator[str]:
    """An activation's scale cannot be moved into float16's range: its integers are not known yet."""
    if not _is_half_scale(node):
        yield f"scale {_name(node.inputs[1])} is {_array(node.inputs[1]):.2g}"


def _constant_reasons(value: ir.Value | None) -> Iterator[str]:
    """What float16 would do to a constant, or to what is read from integers."""
    if value is None or value.dtype != FLOAT:
        return
    name, moved, producer = value.name, 0.0, value.producer()
    if value.const_value is not None:
        moved = _change(_array(value), _rounded(_array(value)))
    elif producer is not None and producer.op_type == DEQUANTIZE:
        if _is_constant(producer.inputs[0]):
            weight = _Weight.of(producer)
            name, moved = weight.name, weight.moved
        else:
            yield from _scale_reasons(producer)
    if moved > TOLERANCE:
        yield f"float16 cannot hold {name}" + (f" (off by {100 * moved:.2g} %)" if moved < 1 else "")


def _change(exact: np.ndarray, rounded: np.ndarray) -> float:
    """Of the norm of what is finite; infinite if that overflows."""
    finite = np.isfinite(exact)
    exact, rounded = exact[finite].astype(np.float64), rounded[finite].astype(np.float64)
    norm = float(np.linalg.norm(exact))
    return float(np.linalg.norm(rounded - exact)) / norm if norm else 0.0


def _exists_in_half(node: ir.Node) -> bool:
    """Whether ONNX defines it for float16, with a type of its result that comes from an input's, or can be chosen."""
    schema = _schema(node)
    taken = {
        _formal(schema.inputs, slot).type_str
        for slot, value in enumerate(node.inputs)
        if value is not None and value.dtype == FLOAT and _allows_half(_formal(schema.inputs, slot))
    }
    given = [_formal(schema.outputs, slot) for slot, value in enumerate(node.outputs) if value.dtype == FLOAT]
    return all(_allows_half(formal) and (node.op_type == "Cast" or formal.type_str in taken) for formal in given)


def _schema(node: ir.Node) -> onnx.defs.OpSchema:
    assert node.graph is not None
    return onnx.defs.get_schema(node.op_type, node.graph.opset_imports[""])


def _formal(formals: Sequence[onnx.defs.OpSchema.FormalParameter], slot: int) -> onnx.defs.OpSchema.FormalParameter:
    return formals[min(slot, len(formals) - 1)]  # the last one may be given many times


def _allows_half(formal: onnx.defs.OpSchema.FormalParameter) -> bool:
    return "tensor(float16)" in formal.types


def _num_summed(node: ir.Node) -> float:
    """Values behind each result; infinite if a size is open."""
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    if node.op_type == "AveragePool":
        return math.prod(node.attributes.get_ints("kernel_shape", ()))
    if shape is None:
        return math.inf
    if node.op_type == "GlobalAveragePool":
        axes: Iterable[int] = range(2, len(shape))
    elif len(node.inputs) > 1 and node.inputs[1] is not None:
        if not _is_constant(node.inputs[1]):
            return math.inf
        axes = _array(node.inputs[1]).tolist()
    else:
        axes = range(len(shape))
    sizes = [shape[axis] for axis in axes]
    return math.prod(size if isinstance(size, int) else math.inf for size in sizes)


def _follows_float(node: ir.Node) -> bool:
    """Whether all that it computes with is one float32 tensor. It is as quick there, and no Cast comes between."""
    computed = {value for value in node.inputs if value is not None and not _is_constant(value)}
    floats = [value for value in computed if value.dtype in (FLOAT, FLOAT16)]
    return (
        node.op_type not in WEIGHTED and [value.dtype for value in floats] == [FLOAT] and not _is_dequantized(floats[0])
    )


def _round_activation_scales(graph: ir.Graph) -> None:
    """Quantize and dequantize with one value, whichever of the two computes in float16."""
    for node in graph:
        if node.op_type in (QUANTIZE, DEQUANTIZE) and not _is_constant(node.inputs[0]) and _is_half_scale(node):
            scale = node.inputs[1]
            assert scale is not None
            scale.const_value = ir.tensor(_rounded(_array(scale)).astype(np.float32), name=scale.name)


def _is_half_scale(node: ir.Node) -> bool:
    scale = _array(node.inputs[1])
    return bool(scale.min() >= SMALLEST and scale.max() <= LARGEST)


def _half_scale(scale: np.ndarray) -> np.ndarray:
    return _rounded(np.maximum(scale, np.float32(SMALLEST)))


def _rounded(array: np.ndarray) -> np.ndarray:
    """To float16; what is too large becomes infinite, and whoever asks refuses it."""
    with np.errstate(over="ignore"):
        return np.asarray(array.astype(np.float16))


def _is_constant(value: ir.Value | None) -> bool:
    return value is not None and value.const_value is not None


def _is_dequantized(value: ir.Value) -> bool:
    producer = value.producer()
    return producer is not None and producer.op_type == DEQUANTIZE


def _array(value: ir.Value | None) -> np.ndarray:
    """The constant that a value is."""
    assert value is not None
    assert value.const_value is not None
    return np.asarray(value.const_value.numpy())


def _name(thing: ir.Node | ir.Value | None) -> str:
    assert thing is not None
    return thing.name or (_name(thing.outputs[0]) if isinstance(thing, ir.Node) else "a tensor")
