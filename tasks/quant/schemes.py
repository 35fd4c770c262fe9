"""Which tensors become INT8 for which target. One rule set per scheme; a graph goes in, annotations come out.

A tensor is quantized as a whole: where its producer's output carries Q/DQ, every consumer reads it. That is what the
integer engines do, and it makes the two operands of a residual add or the two branches of a fork share one scale.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatch

import torch
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.quantizer import (
    QuantizationAnnotation,
    QuantizationSpec,
    Quantizer,
    SharedQuantizationSpec,
)

from tasks.contracts.errors import SpecError
from tasks.contracts.spec import SchemeName
from tasks.quant.capture import CONVOLUTIONS, WEIGHTED, aten, layer_of
from tasks.quant.fake_quantize import FakeQuantizer, PerChannelFakeQuantizer
from tasks.quant.integer_kernels import convolution_is_worth_integer, product_is_worth_integer

# A ReLU costs nothing behind an integer layer: the layer's own saturation does it.
SATURATING = (aten.relu.default, aten.hardtanh.default)
SATURATED = (*WEIGHTED, aten.add.Tensor)
UNARY = (
    aten.hardswish.default,
    aten.hardsigmoid.default,
    aten.silu.default,
    aten.sigmoid.default,
    aten.leaky_relu.default,
    aten.gelu.default,
    aten.tanh.default,
    aten.elu.default,
    *SATURATING,
)
BINARY = (aten.add.Tensor, aten.mul.Tensor)
POOLING = (aten.adaptive_avg_pool2d.default, aten.avg_pool2d.default, aten.mean.dim)
BETWEEN = (*UNARY, *BINARY, *POOLING, aten.cat.default)  # integer when all they compute on is
GATES = (aten.sigmoid.default, aten.hardsigmoid.default)
# Values pass unchanged, so the output shares the input's scale.
MOVING = (
    aten.max_pool2d.default,
    aten.view.default,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.permute.default,
    aten.transpose.int,
    aten.clone.default,
    aten.slice.Tensor,
    aten.split.Tensor,
    aten.squeeze.dim,
    aten.unsqueeze.default,
    operator.getitem,
)


@dataclass
class Plan:
    """What a scheme decided about one graph."""

    weights: list[Node] = field(default_factory=list)  # layers whose weight becomes INT8
    tensors: dict[Node, Node | None] = field(default_factory=dict)  # producer -> the one whose scale it shares

    def quantize(self, tensor: Node, *, like: Node | None = None) -> None:
        self.tensors.setdefault(tensor, like)


@dataclass(frozen=True)
class Scheme:
    """How one target wants INT8 to look."""

    name: SchemeName
    activation_dtype: torch.dtype
    activation_bounds: tuple[int, int]
    symmetric: bool
    integer_bias: bool  # the runtime adds an int32 bias; otherwise it stays float
    expand_silu: bool  # into sigmoid and product, when the runtime has integer kernels for these two only
    plan: Callable[[GraphModule, frozenset[str]], Plan]

    @property
    def activation(self) -> QuantizationSpec:
        return QuantizationSpec(
            dtype=self.activation_dtype,
            observer_or_fake_quant_ctr=FakeQuantizer,
            quant_min=self.activation_bounds[0],
            quant_max=self.activation_bounds[1],
            qscheme=torch.per_tensor_symmetric if self.symmetric else torch.per_tensor_affine,
        )

    @property
    def weight(self) -> QuantizationSpec:
        return QuantizationSpec(
            dtype=torch.int8,
            observer_or_fake_quant_ctr=PerChannelFakeQuantizer,
            quant_min=-127,
            quant_max=127,
            qscheme=torch.per_channel_symmetric,
            ch_axis=0,
        )


class SchemeQuantizer(Quantizer):  # type: ignore[misc]
    """Tells PT2E what a scheme planned."""

    def __init__(self, scheme: Scheme, keep_float: frozenset[str]) -> None:
        super().__init__()
        self._scheme = scheme
        self._keep_float = keep_float

    def transform_for_annotation(self, model: GraphModule) -> GraphModule:
        if self._scheme.expand_silu:
            expand_silu(model)
        return model

    def annotate(self, model: GraphModule) -> GraphModule:
        plan = self._scheme.plan(model, self._keep_float)
        for layer in plan.weights:
            _annotation(layer).input_qspec_map[layer.args[1]] = self._scheme.weight
        for tensor, like in plan.tensors.items():
            _annotation(tensor).output_qspec = SharedQuantizationSpec(like) if like else self._scheme.activation
        return model

    def validate(self, model: GraphModule) -> None:
        """Nothing to refuse: `plan` only names what the graph holds."""


def _annotation(node: Node) -> QuantizationAnnotation:
    annotation = node.meta.setdefault("quantization_annotation", QuantizationAnnotation())
    annotation._annotated = True
    return annotation


def layers_kept_float(graph: GraphModule, globs: Iterable[str]) -> frozenset[str]:
    """Names of the layers that match.

    Raises:
        SpecError: if a glob matches no layer; it would be a typo.
    """
    layers = [layer_of(node) for node in graph.graph.nodes if node.target in WEIGHTED]
    kept: set[str] = set()
    for glob in globs:
        matches = {layer for layer in layers if fnmatch(layer, glob)}
        if not matches:
            raise SpecError(
                f"quant.keep_float: {glob!r} matches none of the {len(layers)} layers.",
                remedy=f"Layers are named like {', '.join(layers[:3])}.",
            )
        kept |= matches
    return frozenset(kept)


def _operands(node: Node) -> list[Node]:
    """The tensors that a node computes on, without weights and bias."""
    if node.target in WEIGHTED:
        return [node.args[0]]  # type: ignore[list-item]
    if node.target == aten.cat.default:
        return list(node.args[0])  # type: ignore[arg-type]
    return [arg for arg in node.args if isinstance(arg, Node) and "val" in arg.meta and _is_tensor(arg)]


def _is_tensor(node: Node) -> bool:
    return isinstance(node.meta["val"], torch.Tensor | tuple | list)


def _source(tensor: Node) -> Node:
    """Where the values come from, back through whatever only moves them."""
    while tensor.target in MOVING:
        tensor = tensor.args[0]  # type: ignore[assignment]
    return tensor


def _reaches_output(tensor: Node) -> bool:
    """Whether the values leave the model unchanged: logits stay float."""
    return any(user.op == "output" or (user.target in MOVING and _reaches_output(user)) for user in tensor.users)


def _saturates(node: Node) -> Node | None:
    """The ReLU that an integer layer does for free, if that is the only reader."""
    users = list(node.users)
    free = len(users) == 1 and users[0].target in SATURATING and node.target in SATURATED
    return users[0] if free else None


def expand_silu(graph: GraphModule) -> None:
    """Write SiLU as x * sigmoid(x), so that both can be integer: EfficientNet-B0 ran at 0.86 times float without."""
    for node in list(graph.graph.nodes):
        if node.target == aten.silu.default:
            with graph.graph.inserting_before(node):
                gate = graph.graph.call_function(aten.sigmoid.default, (node.args[0],))
                product = graph.graph.call_function(aten.mul.Tensor, (node.args[0], gate))
            gate.meta, product.meta = dict(node.meta), dict(node.meta)
            node.replace_all_uses_with(product)
            graph.graph.erase_node(node)
    graph.recompile()


def plan_onnxruntime(graph: GraphModule, keep_float: frozenset[str]) -> Plan:
    """ONNX Runtime on a CPU: everything between integer layers is integer too.

    A layer runs in INT8 only with Q/DQ on all its operands and its output. Between a convolution and a hard-swish the
    tensor is quantized as well: without it the convolution falls back to float with a transpose on either side
    (MobileNetV3-Large ran at 0.65 times float so, and at 1.1 times with it). Squeeze-excite is integer as a whole,
    for the same reason: each change of type costs a pass over memory.
    """
    plan = Plan()
    integer: set[Node] = {node for node in graph.graph.nodes if node.op == "placeholder"}
    for node in graph.graph.nodes:
        if node.op != "call_function":
            continue
        operands = _operands(node)
        if node.target in WEIGHTED:
            if layer_of(node) in keep_float:
                continue
            plan.weights.append(node)
        elif node.target not in BETWEEN or not operands or not integer.issuperset(map(_source, operands)):
            continue
        integer.add(node)
        for operand in operands:
            if _saturates(operand) is not node:
                _quantize_with_moves(plan, operand)
        if not _reaches_output(node) and not _saturates(node) and node.target != aten.linear.default:
            plan.quantize(node)
    return plan


def _quantize_with_moves(plan: Plan, tensor: Node) -> None:
    """Quantize a tensor, and at the same scale what it was moved from."""
    if tensor.target in MOVING:
        moved_from: Node = tensor.args[0]  # type: ignore[assignment]
        _quantize_with_moves(plan, moved_from)
        if tensor.target == aten.split.Tensor:
            return  # a tuple; its parts are quantized one by one
        root = moved_from.args[0] if moved_from.target == aten.split.Tensor else moved_from
        plan.quantize(tensor, like=root)  # type: ignore[arg-type]
    else:
        plan.quantize(tensor)


def plan_tensorrt(graph: GraphModule, keep_float: frozenset[str]) -> Plan:
    """TensorRT: inputs of weighted layers and the skip operand of a residual add; never a layer's output as such.

    Rules of NVIDIA's explicit-quantization guide. Squeeze-excite, whose convolutions see one pixel, stays float.
    """
    plan = Plan()
    gating = _squeeze_excite(graph)
    for node in graph.graph.nodes:
        if node.target in WEIGHTED:
            if layer_of(node) in keep_float or node in gating or not _worth_integer(node):
                continue
            plan.weights.append(node)
            _quantize_input(plan, node.args[0])
    for node in graph.graph.nodes:
        if node.target == aten.add.Tensor and len(_operands(node)) == 2:
            skip = _skip_operand(_operands(node), plan)
            if skip is not None:
                plan.quantize(skip)
    _keep_integers_together(plan)
    return plan


def _quantize_input(plan: Plan, tensor: Node) -> None:
    if tensor.target == aten.cat.default:
        first, *rest = _operands(tensor)
        plan.quantize(first)
        root = plan.tensors[first] or first
        for other in rest:  # a concatenation is integer only at one common scale
            plan.quantize(other, like=root)
        plan.quantize(tensor, like=root)
    else:
        plan.quantize(tensor)


def _worth_integer(layer: Node) -> bool:
    """Whether TensorRT has a fast integer kernel for the layer's channels."""
    outputs, inputs, *kernel = layer.args[1].meta["val"].shape  # type: ignore[union-attr]
    if layer.target not in CONVOLUTIONS:
        return product_is_worth_integer(outputs, inputs)
    groups = int(layer.args[6]) if len(layer.args) > 6 else 1  # type: ignore[arg-type]
    reads_image = layer.args[0].op == "placeholder"  # type: ignore[union-attr]
    return convolution_is_worth_integer(outputs, inputs, kernel, groups, reads_image=reads_image)


def _keep_integers_together(plan: Plan) -> None:
    """A pooling between two integer tensors computes on integers; a tensor that was only moved keeps its scale."""
    for tensor in list(plan.tensors):
        if tensor.target == aten.avg_pool2d.default:
            plan.quantize(tensor.args[0])  # type: ignore[arg-type]
    for tensor, like in plan.tensors.items():
        source = tensor
        while like is None and source.target in MOVING:
            source = source.args[0]  # type: ignore[assignment]
            if source in plan.tensors:
                plan.tensors[tensor] = like = plan.tensors[source] or source


def _squeeze_excite(graph: GraphModule) -> frozenset[Node]:
    """The layers between a pooling and the gate that multiplies with what was pooled."""
    gating: set[Node] = set()
    for node in graph.graph.nodes:
        if node.target != aten.mul.Tensor:
            continue
        for operand in _operands(node):
            found: list[Node] = []
            step = operand
            while step.target in (*UNARY, *WEIGHTED, *MOVING):
                found.append(step)
                step = step.args[0]  # type: ignore[assignment]
            if operand.target in GATES and step.target in POOLING:
                gating.update(found)
    return frozenset(gating)


def _skip_operand(operands: list[Node], plan: Plan) -> Node | None:
    """The operand that no convolution can add into itself; of two convolutions, the one with fewer before it."""
    fusible = [operand for operand in operands if operand in plan.weights and len(operand.users) == 1]
    if not fusible:
        return None
    others = [operand for operand in operands if operand not in fusible]
    return others[0] if others else min(operands, key=_depth)


def _depth(tensor: Node) -> int:
    """Weighted layers on the longest way from the input."""
    order: dict[Node, int] = {}
    for node in tensor.graph.nodes:
        before = max((order[parent] for parent in node.all_input_nodes), default=0)
        order[node] = before + (node.target in WEIGHTED)
        if node is tensor:
            break
    return order[tensor]


SCHEMES: dict[SchemeName, Scheme] = {
    "onnxruntime": Scheme(
        name="onnxruntime",
        activation_dtype=torch.uint8,
        activation_bounds=(0, 255),
        symmetric=False,
        integer_bias=True,
        expand_silu=True,
        plan=plan_onnxruntime,
    ),
    "tensorrt": Scheme(
        name="tensorrt",
        activation_dtype=torch.int8,
        activation_bounds=(-128, 127),
        symmetric=True,
        integer_bias=False,
        expand_silu=False,
        plan=plan_tensorrt,
    ),
}
