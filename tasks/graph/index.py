"""An ONNX graph by what its nodes read and write, indexed once; and how it is read from a file."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import NodeProto, TensorProto, numpy_helper

from tasks.contracts.errors import ExportError

CONVOLUTIONS = ("Conv", "ConvTranspose")
WEIGHTED = (*CONVOLUTIONS, "Gemm", "MatMul")
QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
MOVING = ("Flatten", "Identity", "MaxPool", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze")
RESHAPING = ("Cast", "Clip", "Identity", "Reshape", "Transpose")  # each hides a weight from its layer
LARGEST_BYTES = 2**31 - 1  # of one protobuf message, which ONNX is checked as


class Graph:
    """A valid model's nodes by what they read and write, indexed once, in time linear in the graph.

    Names without a producer are constants (initializers and Constant nodes) or inputs of the graph.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.nodes: tuple[NodeProto, ...] = tuple(node for node in model.graph.node if node.op_type != "Constant")
        self.constants: dict[str, TensorProto] = {tensor.name: tensor for tensor in model.graph.initializer}
        for node in model.graph.node:
            if node.op_type == "Constant":
                tensors = filter(None, map(_constant, node.attribute))
                self.constants |= zip(node.output, tensors, strict=False)  # none if it gives text
        self.producers: dict[str, NodeProto] = {name: node for node in self.nodes for name in node.output if name}
        self.consumers: dict[str, list[NodeProto]] = defaultdict(list)
        self.roots: dict[str, str] = {name: name for name in self.constants}  # tensor -> constant it only restates
        for node in self.nodes:  # in topological order, as ONNX demands
            for name in dict.fromkeys(node.input):
                self.consumers[name].append(node)
            if node.op_type in (QUANTIZE, DEQUANTIZE, *RESHAPING) and node.input[0] in self.roots:
                self.roots[node.output[0]] = self.roots[node.input[0]]
        stored = {tensor.name for tensor in model.graph.initializer}  # old files list them as inputs too
        self.inputs = tuple(value for value in model.graph.input if value.name not in stored)
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

    def value(self, name: str) -> np.ndarray:
        """The constant of that name."""
        return numpy_helper.to_array(self.constants[name])

    def number(self, name: str) -> float | None:
        """The constant of that name if it is a single number."""
        tensor = self.constants.get(name)
        return float(self.value(name).item()) if tensor is not None and size_of(tensor) == 1 else None

    @cached_property
    def types(self) -> dict[str, int]:
        """Type of each tensor that has one, as `TensorProto.DataType`."""
        inferred = onnx.shape_inference.infer_shapes(self.model).graph
        values = (*inferred.input, *inferred.value_info, *inferred.output)
        return {value.name: value.type.tensor_type.elem_type for value in values}

    def readers(self, node: NodeProto) -> list[NodeProto]:
        return self.consumers.get(node.output[0], [])

    def source(self, name: str) -> NodeProto | None:
        """What computed a tensor's values, back through whatever only moves them; None for inputs and constants."""
        producer = self.producers.get(name)
        while producer is not None and producer.op_type in MOVING:
            producer = self.producers.get(producer.input[0])
        return producer

    def final_readers(self, quantize: NodeProto) -> list[NodeProto]:
        """Who reads a quantized tensor behind its DequantizeLinear nodes."""
        return [reader for node in self.readers(quantize) for reader in self.readers(node)]

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


def size_of(tensor: TensorProto) -> int:
    """How many values it holds."""
    return prod(tensor.dims)


def size_bytes(tensor: TensorProto) -> int:
    """Bytes of the values."""
    return size_of(tensor) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize


def attribute(node: NodeProto, name: str) -> Any:
    """An attribute's value; None if it is not given."""
    found = next((attribute for attribute in node.attribute if attribute.name == name), None)
    return None if found is None else onnx.helper.get_attribute_value(found)


def _constant(attribute: onnx.AttributeProto) -> TensorProto | None:
    """The tensor that an attribute of a Constant node gives, if it is one of numbers."""
    if attribute.name == "value":
        return attribute.t
    if attribute.name in ("value_float", "value_floats", "value_int", "value_ints"):
        dtype = np.float32 if "float" in attribute.name else np.int64
        return numpy_helper.from_array(np.array(onnx.helper.get_attribute_value(attribute), dtype))
    return None


def read_onnx(path: Path) -> onnx.ModelProto:
    """The model with all its weights, wherever they are stored.

    Raises:
        ExportError: if the file or what it refers to is missing, is not ONNX, or is too large for one message.
    """
    try:
        size = path.stat().st_size
        model = onnx.load(path, load_external_data=False) if size <= LARGEST_BYTES else onnx.ModelProto()
    except (OSError, DecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not ONNX"
        raise ExportError(f"{path} cannot be read: {reason}.", remedy="Name an ONNX file.") from error
    size += sum(_external_bytes(tensor) for tensor in external_tensors(model))
    if size > LARGEST_BYTES:
        raise ExportError(
            f"{path} holds {size / 2**30:.1f} GiB; one ONNX message holds at most 2.",
            remedy="Store INT8 weights as INT8.",
        )
    if not model.ir_version or not model.HasField("graph"):  # much that is no ONNX can be read as an empty message
        raise ExportError(f"{path} holds no ONNX graph.", remedy="Name an ONNX file.")
    try:
        onnx.load_external_data_for_model(model, str(path.parent))
    except (OSError, ValueError, onnx.checker.ValidationError) as error:
        found = " ".join(str(error).split())
        raise ExportError(
            f"Weights that {path} stores outside itself cannot be read: {found}",
            remedy="Put the file with its weights beside it, or export all into one file.",
        ) from error
    return model


def external_tensors(model: onnx.ModelProto) -> Iterator[TensorProto]:
    """Constants whose values are in another file."""
    constants = (attribute.t for node in model.graph.node for attribute in node.attribute if attribute.HasField("t"))
    for tensor in (*model.graph.initializer, *constants):
        if tensor.data_location == TensorProto.EXTERNAL:
            yield tensor


def _external_bytes(tensor: TensorProto) -> int:
    stored = {entry.key: entry.value for entry in tensor.external_data}
    return int(stored["length"]) if stored.get("length", "").isdigit() else size_bytes(tensor)
