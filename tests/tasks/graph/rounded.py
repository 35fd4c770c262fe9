"""A float16 graph for a runtime that computes float16 in float32, as ONNX Runtime does on x86."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def rounded(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph in float32, with each float16 result rounded to float16 by a pair of Casts.

    ONNX Runtime computes float16 nodes in float32 and drops the rounding between two of them; Casts that were in the
    graph it keeps. Operators still sum in float32.
    """
    typed = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    half = {value.name for value in typed.graph.value_info if value.type.tensor_type.elem_type == TensorProto.FLOAT16}
    nodes = []
    for node in typed.graph.node:
        nodes.append(node)
        for slot, name in enumerate(node.output):
            if name in half:
                node.output[slot] = f"{name}_exact"
                nodes.append(helper.make_node("Cast", [f"{name}_exact"], [f"{name}_half"], to=TensorProto.FLOAT16))
                nodes.append(helper.make_node("Cast", [f"{name}_half"], [name], to=TensorProto.FLOAT))
    constants = [
        numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name)
        if tensor.data_type == TensorProto.FLOAT16
        else tensor
        for tensor in typed.graph.initializer
    ]
    graph = helper.make_graph(nodes, model.graph.name, typed.graph.input, typed.graph.output, constants)
    return helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
