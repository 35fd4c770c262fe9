"""From a module to the graph that everything else works on: functional, batch-dynamic, batch norm folded."""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from tasks.contracts.errors import ModelError, QuantizeError

aten = torch.ops.aten
CONVOLUTIONS = (aten.conv2d.default, aten.conv1d.default, aten.conv3d.default)
WEIGHTED = (*CONVOLUTIONS, aten.linear.default)
_PADDED_BY_NAME = (aten.conv2d.padding, aten.conv1d.padding, aten.conv3d.padding)
_POOLED_BY_DIVISOR = (aten.avg_pool2d.default, aten.avg_pool3d.default)
_BATCH_NORM = aten._native_batch_norm_legit_no_training.default
FOLD_TOLERANCE = 1e-3  # of the logits' spread; float32 rounding through 160 layers stays a hundred times below


def capture(model: nn.Module, example_NCHW: Tensor) -> GraphModule:
    """The inference graph of `model`, functional ATen, with a dynamic batch.

    Raises:
        ModelError: if `torch.export` cannot take the model (the message says where in the user's code), a weight is
            computed from the image, or a pooling has a divisor of its own.
    """
    batch = {0: torch.export.Dim.DYNAMIC}
    try:
        with torch.no_grad():
            program = torch.export.export(model.eval(), (example_NCHW.contiguous(),), dynamic_shapes=(batch,))
            graph = program.run_decompositions({}).module(check_guards=False)
    except Exception as error:  # torch.export raises every kind; all mean the same to the user
        raise ModelError(
            f"torch.export cannot capture {type(model).__name__}: {_reason(error)}",
            remedy="Make its forward free of data-dependent control flow and of operations on a fixed batch.",
        ) from error
    assert isinstance(graph, GraphModule)
    for node in graph.graph.nodes:
        if node.target == aten.view.default:
            node.target = aten.reshape.default  # a view fails on the channels-last tensors of training
        elif node.target in _PADDED_BY_NAME:
            _pad_by_numbers(graph, node)
        elif node.target in _POOLED_BY_DIVISOR and len(node.args) == 7 and node.args[6] is not None:
            raise ModelError(
                f"Pooling {layer_of(node)} has divisor_override={node.args[6]}, which ONNX cannot say.",
                remedy="Leave it out and multiply the result by the kernel's size over the divisor.",
            )
    _store_computed_weights(graph)
    graph.recompile()
    return graph


def _reason(error: Exception) -> str:
    """What went wrong and the deepest line of user code, out of a long report."""
    text = str(error)
    first = next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
    places = re.findall(r'File "([^"]+)", line (\d+), in (\w+)\n\s*(.+)', text)
    ours = [place for place in places if "/torch/" not in place[0]]
    if not ours:
        return first
    path, line, function, code = ours[-1]
    return f"{first} At {path}:{line}, in {function}: {code.strip()}"


def _pad_by_numbers(graph: GraphModule, layer: Node) -> None:
    """Write padding "same" or "valid" as numbers; what an even kernel needs more at its end, as a pad before."""
    args: list[Any] = list(layer.args)
    kernel = args[1].meta["val"].shape[2:]
    defaults = [None, [1] * len(kernel), "valid", [1] * len(kernel), 1]
    source, weight, bias, stride, padding, dilation, groups = args + defaults[len(args) - 2 :]
    totals = [step * (size - 1) if padding == "same" else 0 for step, size in zip(dilation, kernel, strict=True)]
    if any(total % 2 for total in totals):
        ends = [end for total in reversed(totals) for end in (0, total % 2)]
        with graph.graph.inserting_before(layer):
            padded = graph.graph.call_function(aten.constant_pad_nd.default, (source, ends))
        padded.meta = {**layer.meta, "val": aten.constant_pad_nd.default(source.meta["val"], ends)}
        source = padded
    assert isinstance(layer.target, torch._ops.OpOverload)
    layer.target = layer.target.overloadpacket.default
    layer.args = (source, weight, bias, stride, [total // 2 for total in totals], dilation, groups)


@torch.no_grad()
def _store_computed_weights(graph: GraphModule) -> None:
    """Make a weight that is computed from parameters alone, such as a normalized one, a parameter of its own."""

    @functools.cache
    def value_of(node: Node) -> Any:
        if node.op == "get_attr":
            return read_tensor(graph, node)
        assert callable(node.target)
        args: Any = torch.fx.map_arg(node.args, value_of)
        kwargs: Any = torch.fx.map_arg(node.kwargs, value_of)
        return node.target(*args, **kwargs)

    of_images: set[Node] = set()
    for layer in graph.graph.nodes:
        if layer.op == "placeholder" or not of_images.isdisjoint(layer.all_input_nodes):
            of_images.add(layer)
        if layer.target not in (*WEIGHTED, _BATCH_NORM):
            continue
        for argument, given in zip(layer.target._schema.arguments[1:], layer.args[1:], strict=False):
            if not isinstance(given, Node) or given.op == "get_attr":
                continue
            if given in of_images:
                raise ModelError(
                    f"Layer {layer_of(layer)} computes its {argument.name} from the image; INT8 needs a constant one.",
                    remedy="Compute it from parameters alone, or write a product as torch.matmul, which stays float.",
                )
            name = f"{layer.name}_{argument.name}"
            write_parameter(graph, name, value_of(given).contiguous())
            with graph.graph.inserting_before(given):
                stored = graph.graph.get_attr(name)
            stored.meta = dict(given.meta)
            given.replace_all_uses_with(stored)
    graph.graph.eliminate_dead_code()


def layer_of(node: Node) -> str:
    """Dotted name of the module that `node` was traced from, such as features.0.0; its own name at top level."""
    stack = node.meta.get("nn_module_stack")
    return (list(stack.values())[-1][0] if stack else "") or node.name


def read_tensor(graph: GraphModule, node: Node) -> Tensor:
    """The parameter or buffer that a get_attr node reads."""
    value: object = graph
    for part in str(node.target).split("."):
        value = getattr(value, part)
    assert isinstance(value, Tensor)
    return value


def write_parameter(graph: GraphModule, name: str, value: Tensor) -> None:
    *path, leaf = name.split(".")
    owner: nn.Module = graph
    for part in path:
        owner = getattr(owner, part)
    owner._buffers.pop(leaf, None)
    setattr(owner, leaf, nn.Parameter(value.detach().clone()))


def fold_batch_norm(graph: GraphModule) -> None:
    """Fold each batch norm that follows a convolution or a linear layer of its own into that layer's weights.

    Raises:
        QuantizeError: if a batch norm has no such layer before it and cannot be folded.
    """
    for node in list(graph.graph.nodes):
        if node.target != _BATCH_NORM:
            continue
        layer = node.args[0]
        foldable = layer.target in WEIGHTED and len(layer.users) == 1 and len(layer.args[1].users) == 1
        # Of tokens, a linear layer's channels are the last axis and a batch norm's the second.
        on_tokens = layer.target == aten.linear.default and layer.meta["val"].dim() > 2
        if foldable and not on_tokens:
            _fold(graph, layer, node)
        else:
            _as_scale_and_shift(graph, node)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    if any(node.target == _BATCH_NORM for node in graph.graph.nodes):
        raise QuantizeError("A batch norm is left in the graph.", remedy="Report the model; this is a defect.")


def _statistics(graph: GraphModule, norm: Node) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    """Weight, bias, mean, variance [C] and epsilon."""
    mean, variance = (read_tensor(graph, node) for node in norm.args[3:5])  # type: ignore[arg-type]
    weight = read_tensor(graph, norm.args[1]) if isinstance(norm.args[1], Node) else torch.ones_like(mean)
    bias = read_tensor(graph, norm.args[2]) if isinstance(norm.args[2], Node) else torch.zeros_like(mean)
    return weight, bias, mean, variance, float(norm.args[6])  # type: ignore[arg-type]


def _fold(graph: GraphModule, layer: Node, norm: Node) -> None:
    weight_node = layer.args[1]
    assert isinstance(weight_node, Node)
    gamma, beta, mean, variance, epsilon = _statistics(graph, norm)
    old_bias = layer.args[2] if len(layer.args) > 2 else None
    bias = read_tensor(graph, old_bias) if isinstance(old_bias, Node) else torch.zeros_like(mean)
    fuse = fuse_linear_bn_weights if layer.target == aten.linear.default else fuse_conv_bn_weights
    weight, bias = fuse(read_tensor(graph, weight_node), bias, mean, variance, epsilon, gamma, beta)
    write_parameter(graph, str(weight_node.target), weight)
    bias_name = str(weight_node.target).removesuffix("weight") + "folded_bias"
    write_parameter(graph, bias_name, bias)
    with graph.graph.inserting_before(layer):
        bias_node = graph.graph.get_attr(bias_name)
    layer.args = (layer.args[0], weight_node, bias_node, *layer.args[3:])
    _replace_output(norm, layer)


def _as_scale_and_shift(graph: GraphModule, norm: Node) -> None:
    """A batch norm with no layer to fold into (DenseNet begins its blocks with one): x * scale + shift."""
    gamma, beta, mean, variance, epsilon = _statistics(graph, norm)
    scale = gamma / torch.sqrt(variance + epsilon)
    source = norm.args[0]
    assert isinstance(source, Node)
    shape = (-1,) + (1,) * (source.meta["val"].dim() - 2)
    prefix = f"{norm.name}_folded"
    write_parameter(graph, f"{prefix}_scale", scale.reshape(shape))
    write_parameter(graph, f"{prefix}_shift", (beta - mean * scale).reshape(shape))
    with graph.graph.inserting_before(norm):
        scaled = graph.graph.call_function(aten.mul.Tensor, (source, graph.graph.get_attr(f"{prefix}_scale")))
        shifted = graph.graph.call_function(aten.add.Tensor, (scaled, graph.graph.get_attr(f"{prefix}_shift")))
    scaled.meta, shifted.meta = dict(norm.meta), dict(norm.meta)
    scaled.meta["val"] = shifted.meta["val"] = source.meta["val"]
    _replace_output(norm, shifted)


def _replace_output(norm: Node, replacement: Node) -> None:
    for user in list(norm.users):
        assert user.target is operator.getitem
        user.replace_all_uses_with(replacement)


@torch.no_grad()
def fold_error(model: nn.Module, folded: GraphModule, batches_NCHW: Iterable[Tensor]) -> float:
    """Largest difference that folding makes to any logit, over the standard deviation of all logits.

    Raises:
        QuantizeError: if it is more than rounding explains.
    """
    worst, spread = torch.zeros(()), torch.zeros(())
    for images_NCHW in batches_NCHW:
        expected = model(images_NCHW)
        worst = torch.maximum(worst, (folded(images_NCHW) - expected).abs().max())  # keeps a NaN; Python's max does not
        spread = torch.maximum(spread, expected.std())
    error = float(worst / spread if spread else worst)
    if not error <= FOLD_TOLERANCE:  # NaN included
        raise QuantizeError(
            f"Folding batch norm changes logits by {error:.2g} of their spread; at most {FOLD_TOLERANCE} is rounding.",
            remedy="Look for a batch norm with near-zero variance, or weights that hold NaN.",
        )
    return error
