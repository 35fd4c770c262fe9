from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from tasks.contracts.errors import SpecError
from tasks.contracts.spec import SchemeName
from tasks.quant.capture import aten, capture, fold_batch_norm, layer_of
from tasks.quant.schemes import SCHEMES, expand_silu, layers_kept_float

ORT: SchemeName = "onnxruntime"
TRT: SchemeName = "tensorrt"
Planned = tuple[set[str], dict[str, str | None]]


def graph_of(model: nn.Module, channels: int = 3) -> GraphModule:
    graph = capture(model, torch.randn(2, channels, 8, 8))
    fold_batch_norm(graph)
    return graph


def planned(graph: GraphModule, scheme: SchemeName, *keep_float: str) -> Planned:
    """Nodes whose weight becomes INT8, and each quantized tensor with the one whose scale it shares."""
    if SCHEMES[scheme].expand_silu:
        expand_silu(graph)
    plan = SCHEMES[scheme].plan(graph, layers_kept_float(graph, keep_float))
    tensors = {tensor.name: like.name if like else None for tensor, like in plan.tensors.items()}
    return {layer.name for layer in plan.weights}, tensors


def alone(*tensors: str) -> dict[str, str | None]:
    """Tensors with scales of their own."""
    return dict.fromkeys(tensors)


def sequence(activation: Callable[[], nn.Module], classes: int = 16) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), activation(), nn.Conv2d(16, 16, 3), activation(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, classes),
    )  # fmt: skip


class Block(nn.Module):
    """A stem, two inner convolutions, a skip and a head, wired by the classes below."""

    def __init__(self, channels: int = 3, *, head: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, 16, 3, padding=1)
        self.a, self.b = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 1)
        self.skip = nn.Conv2d(16, 16, 1)
        self.head = nn.Conv2d(head, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.inner(self.stem(x).relu()))
        return y.flatten(1)

    def inner(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Residual(Block):
    def inner(self, x: Tensor) -> Tensor:
        y: Tensor = (x + self.b(self.a(x).relu())).relu()
        return y


class Downsampling(Block):
    def inner(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(self.a(x).relu()) + self.skip(x)
        return y


class SqueezeExcite(Block):
    def inner(self, x: Tensor) -> Tensor:
        gate = self.b(self.skip(nn.functional.adaptive_avg_pool2d(x, 1)).relu())
        return x * nn.functional.hardsigmoid(gate)


class Concatenation(Block):
    def inner(self, x: Tensor) -> Tensor:
        return torch.cat([self.a(x).relu(), self.b(x), nn.functional.max_pool2d(x, 3, 1, 1)], 1)


class Pooling(Block):
    def inner(self, x: Tensor) -> Tensor:
        x = self.a(nn.functional.max_pool2d(x, 2)).relu()
        return nn.functional.avg_pool2d(x, 2)


class Inception(Block):
    """One branch pools what the other convolves."""

    def inner(self, x: Tensor) -> Tensor:
        return torch.cat([self.a(x).relu(), self.b(nn.functional.max_pool2d(x, 3, 1, 1)).relu()], 1)


class Shuffle(Block):
    """Channels split, one half convolved, joined, and shuffled, as in ShuffleNetV2."""

    def __init__(self) -> None:
        super().__init__(head=32)
        self.stem, self.a = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(16, 16, 1)

    def inner(self, x: Tensor) -> Tensor:
        kept, changed = x.chunk(2, 1)
        y = torch.cat([kept, self.a(changed).relu()], 1)
        count, channels, height, width = y.shape
        y = y.view(count, 2, channels // 2, height, width).transpose(1, 2).contiguous()
        return y.view(count, channels, height, width)


LAYERS = {"conv2d", "conv2d_1", "linear"}
PLANS: dict[str, tuple[nn.Module, Planned, Planned]] = {
    "relu": (
        sequence(nn.ReLU),
        (LAYERS, alone("input_1", "relu", "relu_1", "adaptive_avg_pool2d") | {"view": "adaptive_avg_pool2d"}),
        (LAYERS, alone("input_1", "relu", "view")),
    ),
    "relu6": (
        sequence(nn.ReLU6),
        (LAYERS, alone("input_1", "hardtanh", "hardtanh_1", "adaptive_avg_pool2d") | {"view": "adaptive_avg_pool2d"}),
        (LAYERS, alone("input_1", "hardtanh", "view")),
    ),
    "hardswish": (
        sequence(nn.Hardswish),
        (
            LAYERS,
            alone("input_1", "conv2d", "hardswish", "conv2d_1", "hardswish_1", "adaptive_avg_pool2d")
            | {"view": "adaptive_avg_pool2d"},
        ),
        (LAYERS, alone("input_1", "hardswish", "view")),
    ),
    "silu": (
        sequence(nn.SiLU),
        (
            LAYERS,
            alone("input_1", "conv2d", "sigmoid_default", "mul_tensor")
            | alone("conv2d_1", "sigmoid_default_1", "mul_tensor_1", "adaptive_avg_pool2d")
            | {"view": "adaptive_avg_pool2d"},
        ),
        (LAYERS, alone("input_1", "silu", "view")),
    ),
    "residual": (  # TensorRT adds the skip, which the next convolution reads as well, inside the second convolution
        Residual(),
        ({"conv2d", "conv2d_1", "conv2d_2", "conv2d_3"}, alone("x", "relu", "relu_1", "conv2d_2", "relu_2")),
        ({"conv2d", "conv2d_1", "conv2d_2", "conv2d_3"}, alone("x", "relu", "relu_1", "relu_2")),
    ),
    "downsampling": (  # of two convolutions TensorRT adds the shorter branch into the longer one
        Downsampling(),
        (
            {"conv2d", "conv2d_1", "conv2d_2", "conv2d_3", "conv2d_4"},
            alone("x", "relu", "relu_1", "conv2d_2", "conv2d_3", "add"),
        ),
        (
            {"conv2d", "conv2d_1", "conv2d_2", "conv2d_3", "conv2d_4"},
            alone("x", "relu", "relu_1", "conv2d_3", "add"),
        ),
    ),
    "squeeze-excite": (  # integer as a whole for one, float as a whole for the other
        SqueezeExcite(),
        (
            {"conv2d", "conv2d_1", "conv2d_2", "conv2d_3"},
            alone("x", "relu", "adaptive_avg_pool2d", "relu_1", "conv2d_2", "hardsigmoid", "mul"),
        ),
        ({"conv2d", "conv2d_3"}, alone("x", "mul")),
    ),
    "concatenation": (
        Concatenation(head=48),
        (
            {"conv2d", "conv2d_1", "conv2d_2", "conv2d_3"},
            alone("x", "relu", "relu_1", "conv2d_2", "cat") | {"max_pool2d": "relu"},
        ),
        (
            {"conv2d", "conv2d_1", "conv2d_2", "conv2d_3"},
            alone("x", "relu", "relu_1") | dict.fromkeys(("conv2d_2", "max_pool2d", "cat"), "relu_1"),
        ),
    ),
    "pooling": (
        Pooling(),
        ({"conv2d", "conv2d_1", "conv2d_2"}, alone("x", "relu", "relu_1", "avg_pool2d") | {"max_pool2d": "relu"}),
        ({"conv2d", "conv2d_1", "conv2d_2"}, alone("x", "max_pool2d", "relu_1", "avg_pool2d")),
    ),
    "inception": (
        Inception(head=32),
        (
            {"conv2d", "conv2d_1", "conv2d_2", "conv2d_3"},
            alone("x", "relu", "relu_1", "relu_2", "cat") | {"max_pool2d": "relu"},
        ),
        (
            {"conv2d", "conv2d_1", "conv2d_2", "conv2d_3"},
            alone("x", "relu", "relu_1") | {"max_pool2d": "relu", "relu_2": "relu_1", "cat": "relu_1"},
        ),
    ),
    "shuffle": (
        Shuffle(),
        (
            {"conv2d", "conv2d_1", "conv2d_2"},
            alone("x", "relu", "relu_1", "cat")
            | {"getitem": "relu", "getitem_1": "relu"}
            | {"view": "cat", "transpose": "view", "clone": "transpose", "view_1": "clone"},
        ),
        ({"conv2d", "conv2d_1", "conv2d_2"}, alone("x", "getitem_1", "view_1")),
    ),
}


@pytest.mark.parametrize(("model", "onnxruntime", "tensorrt"), PLANS.values(), ids=PLANS.keys())
def test_plan_names_exactly_these_tensors(model: nn.Module, onnxruntime: Planned, tensorrt: Planned) -> None:
    """Weights and activations of one block, for each target."""
    graph = graph_of(model)
    assert planned(graph, TRT) == tensorrt
    assert planned(graph, ORT) == onnxruntime  # last: it writes SiLU out


class SumOfHeads(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        y: Tensor = (self.a(x).mean((2, 3)) + self.b(x).mean((2, 3))).relu()
        return y.unsqueeze(1).flatten(1)


def test_logits_stay_float() -> None:
    """Whatever computes them, and also where they are only reshaped on the way out."""
    layers = {"conv2d", "conv2d_1", "conv2d_2"}
    graph = graph_of(SumOfHeads())
    assert planned(graph, TRT) == (layers, alone("x", "relu"))
    assert planned(graph, ORT) == (layers, alone("x", "relu", "conv2d_1", "conv2d_2", "mean", "mean_1"))


def test_silu_is_written_as_product_with_its_gate() -> None:
    """The same values, by operators that ONNX Runtime has integer kernels for; names of layers stay."""
    model, images = sequence(nn.SiLU), torch.randn(3, 3, 8, 8)
    graph = graph_of(model)
    expand_silu(graph)
    called = [node.target for node in graph.graph.nodes]
    assert aten.silu.default not in called
    assert called.count(aten.sigmoid.default) == called.count(aten.mul.Tensor) == 2
    assert {layer_of(node) for node in graph.graph.nodes if node.target == aten.mul.Tensor} == {"1", "3"}
    torch.testing.assert_close(graph(images), model(images))


def test_layer_kept_float_for_onnxruntime_ends_the_integer_part_on_both_sides() -> None:
    """Its input is still what the integer layer before it gives; what follows is float up to the next layer's input."""
    weights, tensors = planned(graph_of(sequence(nn.Hardswish)), ORT, "2")
    assert weights == {"conv2d", "linear"}
    assert tensors == alone("input_1", "conv2d", "hardswish", "adaptive_avg_pool2d") | {"view": "adaptive_avg_pool2d"}


def test_layer_kept_float_for_tensorrt_quantizes_nothing_around_it() -> None:
    """Neither its input nor its output, unless another layer reads them."""
    assert planned(graph_of(sequence(nn.Hardswish)), TRT, "2") == ({"conv2d", "linear"}, alone("input_1", "view"))
    weights, tensors = planned(graph_of(Residual()), TRT, "a")
    assert weights == {"conv2d", "conv2d_2", "conv2d_3"}
    assert tensors == alone("x", "relu", "relu_1", "relu_2")  # relu is the skip operand, relu_1 the input of b


def test_everything_kept_float_plans_nothing() -> None:
    """No layer, no tensor."""
    for scheme in SCHEMES:
        assert planned(graph_of(sequence(nn.ReLU)), scheme, "*") == (set(), {})


def test_globs_name_layers_as_modules_are_named() -> None:
    """One name, a pattern, and several at once."""
    graph = graph_of(Residual())
    assert layers_kept_float(graph, []) == frozenset()
    assert layers_kept_float(graph, ["stem"]) == {"stem"}
    assert layers_kept_float(graph, ["[ab]", "he*"]) == {"a", "b", "head"}


def test_glob_that_matches_nothing_is_refused() -> None:
    """It would be a typo, and the message shows what names look like."""
    with pytest.raises(SpecError, match=r"'stm' matches none of the 4 layers") as caught:
        layers_kept_float(graph_of(Residual()), ["stem", "stm"])
    assert "stem, a, b" in caught.value.remedy


def test_tensorrt_leaves_layers_float_that_have_no_fast_kernel() -> None:
    """Few channels on both sides; depthwise needs a kernel of at least three."""
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3),  # 0: neither side is a multiple of eight
        nn.Conv2d(4, 24, 3),  # 1
        nn.Conv2d(24, 24, 3, groups=24),  # 2
        nn.Conv2d(24, 12, 1, groups=12),  # 3: grouped and one pixel
        nn.Conv2d(12, 8, 3, padding=1),  # 4: few on both sides, and not the first
        nn.Conv2d(8, 24, (1, 3), padding=(0, 1)),  # 5: few on one side, and not square
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(24, 10),  # 8: ten classes
    )
    assert planned(graph_of(model, 1), TRT)[0] == {"conv2d_1", "conv2d_2"}
    assert planned(graph_of(model, 1), ORT)[0] == {f"conv2d_{number}" for number in range(1, 6)} | {"conv2d", "linear"}
    assert planned(graph_of(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten())), TRT)[0] == {"conv2d"}  # reads the image


def test_schemes_ask_for_what_their_runtime_computes() -> None:
    """UINT8 with zero points against INT8 without; weights narrow and symmetric in both."""
    ort, trt = SCHEMES[ORT].activation, SCHEMES[TRT].activation
    assert (ort.dtype, ort.quant_min, ort.quant_max, ort.qscheme) == (torch.uint8, 0, 255, torch.per_tensor_affine)
    assert (trt.dtype, trt.quant_min, trt.quant_max, trt.qscheme) == (torch.int8, -128, 127, torch.per_tensor_symmetric)
    for scheme in SCHEMES.values():
        weight = scheme.weight
        assert (weight.quant_min, weight.quant_max, weight.qscheme) == (-127, 127, torch.per_channel_symmetric)
