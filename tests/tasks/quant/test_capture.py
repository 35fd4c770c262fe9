from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from tasks.contracts.errors import ModelError, QuantizeError
from tasks.quant.capture import (
    FOLD_TOLERANCE,
    WEIGHTED,
    aten,
    capture,
    fold_batch_norm,
    fold_error,
    layer_of,
    read_tensor,
)


@torch.no_grad()
def settled(model: nn.Module, images: Tensor) -> nn.Module:
    """Batch norms that hold statistics and weights of their own, then inference mode."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            module.weight.uniform_(0.5, 2.0)
            module.bias.normal_()
    model.train()
    for _ in range(5):
        model(images * 2 + 1)
    return model.eval()


def targets(graph: GraphModule) -> list[str]:
    """What the graph calls, without namespaces."""
    return [str(node.target).split(".")[1] for node in graph.graph.nodes if node.op == "call_function"]


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.conv(x))
        x += 1
        x[:, 0].mul_(2)
        return x.clamp_(max=3.0).flatten(1)


def test_in_place_operations_become_functional() -> None:
    """Nothing in the graph writes to what another node made, and the values are the model's."""
    model, images = InPlace().eval(), torch.randn(2, 3, 8, 8)
    graph = capture(model, images)
    for node in graph.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload):
            assert not node.target._schema.is_mutable, node
    torch.testing.assert_close(graph(images), model(images))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_batch_is_dynamic(count: int) -> None:
    """Traced with two images, run with any number."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 5)).eval()
    graph, images = capture(model, torch.randn(2, 3, 8, 8)), torch.randn(count, 3, 8, 8)
    torch.testing.assert_close(graph(images), model(images))


def test_layers_keep_the_names_of_their_modules() -> None:
    """What a user writes into keep_float is what named_modules says."""
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), nn.Flatten(), nn.Linear(144, 5)).eval()
    graph = capture(model, torch.randn(2, 3, 8, 8))
    fold_batch_norm(graph)
    names = {str(node.target).split(".")[1]: layer_of(node) for node in graph.graph.nodes if node.op == "call_function"}
    assert names["conv2d"] == "0.0"
    assert names["linear"] == "2"


def test_memory_layout_of_the_example_leaves_no_trace() -> None:
    """Strides of the example do not enter the graph."""
    model, example = InPlace().eval(), torch.randn(2, 3, 8, 8)
    plain, channels_last = (
        capture(model, example.contiguous(memory_format=layout))
        for layout in (torch.contiguous_format, torch.channels_last)
    )
    assert str(plain.graph) == str(channels_last.graph)


def test_graph_runs_on_any_memory_layout() -> None:
    """Flattening what has more than one pixel is no view of a channels-last tensor."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 5)).eval()
    images = torch.randn(3, 3, 8, 8)
    graph = capture(model, images).to(memory_format=torch.channels_last)
    found = graph(images.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(found, model(images), rtol=1e-4, atol=1e-5)


FOLDABLE = {
    "conv": (nn.Sequential(nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8)), (6, 6, 6)),
    "conv without bias": (nn.Sequential(nn.Conv2d(6, 8, 3, bias=False), nn.BatchNorm2d(8)), (6, 6, 6)),
    "depthwise": (nn.Sequential(nn.Conv2d(6, 6, 3, groups=6, bias=False), nn.BatchNorm2d(6)), (6, 6, 6)),
    "grouped": (nn.Sequential(nn.Conv2d(6, 9, 3, groups=3, stride=2, padding=1), nn.BatchNorm2d(9)), (6, 6, 6)),
    "conv1d": (nn.Sequential(nn.Conv1d(6, 8, 3, dilation=2), nn.BatchNorm1d(8)), (6, 9)),
    "conv3d": (nn.Sequential(nn.Conv3d(2, 4, 3), nn.BatchNorm3d(4)), (2, 5, 5, 5)),
    "same padding": (nn.Sequential(nn.Conv2d(6, 8, 3, dilation=2, padding="same"), nn.BatchNorm2d(8)), (6, 6, 6)),
    "linear": (nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8)), (6,)),
    "linear without bias": (nn.Sequential(nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8)), (6,)),
    "plain norm": (nn.Sequential(nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8, affine=False)), (6, 6, 6)),
    "two in a row": (
        nn.Sequential(nn.Conv2d(6, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4)),
        (6, 6, 6),
    ),
}


@pytest.mark.parametrize(("model", "shape"), FOLDABLE.values(), ids=FOLDABLE.keys())
def test_batch_norm_disappears_into_its_layer(model: nn.Module, shape: tuple[int, ...]) -> None:
    """No operation is left of it, every layer has a bias, and the logits are the same."""
    images = torch.randn(7, *shape)
    graph = capture(settled(model, images), images[:2])
    fold_batch_norm(graph)
    assert not set(targets(graph)) - {"conv1d", "conv2d", "conv3d", "linear", "relu"}
    assert fold_error(model, graph, [images]) < 1e-5


NAMED_PADDING = {
    "odd kernel": (nn.Conv2d(3, 4, (3, 5), padding="same"), (3, 8, 8), [1, 2]),
    "dilated": (nn.Conv2d(3, 4, 3, padding="same", dilation=(1, 3), bias=False), (3, 8, 8), [1, 3]),
    "even kernel": (nn.Conv2d(4, 4, (2, 3), padding="same", groups=2), (4, 8, 8), [0, 1]),
    "even and dilated": (nn.Conv2d(3, 4, (4, 2), padding="same", dilation=(1, 3)), (3, 9, 9), [1, 1]),
    "valid": (nn.Conv2d(3, 4, 3, 2, padding="valid"), (3, 8, 8), [0, 0]),
    "conv1d": (nn.Conv1d(3, 4, 4, padding="same"), (3, 9), [1]),
    "conv3d": (nn.Conv3d(2, 4, (2, 3, 4), padding="same"), (2, 5, 5, 5), [0, 1, 1]),
}


@pytest.mark.parametrize(("conv", "shape", "pads"), NAMED_PADDING.values(), ids=NAMED_PADDING.keys())
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_padding_by_name_becomes_numbers(conv: nn.Module, shape: tuple[int, ...], pads: list[int]) -> None:
    """So that the layer is one of those that are folded and quantized, with the values of the model."""
    images = torch.randn(3, *shape)
    graph = capture(nn.Sequential(conv, nn.Flatten()), images[:2])
    (layer,) = (node for node in graph.graph.nodes if node.target in WEIGHTED)
    assert layer.args[4] == pads
    assert ("constant_pad_nd" in targets(graph)) == any(size % 2 == 0 for size in conv.kernel_size)  # type: ignore[union-attr]
    torch.testing.assert_close(graph(images), conv(images).flatten(1))


class Standardized(nn.Conv2d):
    """Its weight is standardized at each call."""

    def forward(self, x: Tensor) -> Tensor:
        weight = (self.weight - self.weight.mean((1, 2, 3), keepdim=True)) / self.weight.std((1, 2, 3), keepdim=True)
        return nn.functional.conv2d(x, weight, self.bias, self.stride, self.padding)


class Computed(nn.Module):
    """Weights as they are written by hand: tied and transposed, or normalized for the cosine of an angle."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel, self.classes = nn.Parameter(torch.randn(4, 3, 1, 1)), nn.Parameter(torch.randn(5, 3))
        self.norms = nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(3)])

    def forward(self, x: Tensor) -> Tensor:
        wide, narrow = self.norms
        x = wide(nn.functional.conv2d(x, self.kernel))
        x = narrow(nn.functional.conv2d(x, self.kernel.transpose(0, 1))).mean((2, 3))
        return nn.functional.linear(x, nn.functional.normalize(self.classes), self.classes.sum(1))


COMPUTED = {
    "weight norm": nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4)),
    "spectral norm": nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4)),
    "standardized": nn.Sequential(Standardized(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), Standardized(4, 4, 3)),
    "by hand": Computed(),
}


@pytest.mark.parametrize("model", COMPUTED.values(), ids=COMPUTED.keys())
def test_a_computed_weight_becomes_a_parameter(model: nn.Module) -> None:
    """Computed once, trained from then on, and each batch norm goes into the layer before it."""
    images = torch.randn(7, 3, 8, 8)
    graph = capture(settled(model, images), images[:2])
    fold_batch_norm(graph)
    parameters = dict(graph.named_parameters())
    layers = [node for node in graph.graph.nodes if node.target in WEIGHTED]
    assert all(str(given.target) in parameters for layer in layers for given in layer.all_input_nodes[1:])
    assert not {"sub", "div", "transpose", "sum", "_weight_norm_interface"} & set(targets(graph))
    assert fold_error(model, graph, [images]) < 1e-5


class Dynamic(nn.Module):
    """A convolution whose kernel the image decides."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = nn.functional.conv2d(x, self.conv.weight * x.mean())
        return y


def test_a_weight_that_depends_on_the_image_is_refused() -> None:
    """It has no steps of its own; the message names the layer."""
    with pytest.raises(ModelError, match="Layer 0 computes its weight from the image") as caught:
        capture(nn.Sequential(Dynamic()), torch.randn(2, 3, 4, 4))
    assert "torch.matmul" in caught.value.remedy


class Dense(nn.Module):
    """A block that begins with a batch norm and concatenates, as in DenseNet."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return torch.cat([x, self.conv(torch.relu(self.norm(x)))], 1)


class Twice(nn.Module):
    """One convolution, used twice, each time behind it a batch norm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(3), nn.BatchNorm2d(3)])

    def forward(self, x: Tensor) -> Tensor:
        for norm in self.norms:
            x = norm(self.conv(x))
        return x


class Tied(Twice):
    """Two convolutions that share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Conv2d(3, 3, 3, padding=1)
        self.other.weight = self.conv.weight

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.norms
        y: Tensor = second(self.other(first(self.conv(x))))
        return y


class TwoReaders(nn.Module):
    """What the convolution gives is read by a batch norm and by someone else."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        y: Tensor = x + self.norm(x)
        return y


class OnTokens(nn.Module):
    """A linear layer on tokens and a batch norm over them: eight tokens of eight features."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(24, 8), nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.linear(x.transpose(1, 2).flatten(2)))
        return y


@pytest.mark.parametrize(
    "model", [Dense(), Twice(), Tied(), TwoReaders(), OnTokens()], ids=lambda model: type(model).__name__
)
def test_batch_norm_without_a_layer_of_its_own_becomes_scale_and_shift(model: nn.Module) -> None:
    """It cannot be folded, so it is one product and one sum, and the logits are the same."""
    images = torch.randn(7, 3, 8, 8)
    graph = capture(settled(model, images), images[:2])
    fold_batch_norm(graph)
    assert "mul" in targets(graph)
    assert not any("batch_norm" in target for target in targets(graph))
    assert fold_error(model, graph, [images]) < 1e-5


def test_folding_keeps_the_model_itself() -> None:
    """The graph has weights of its own; the user's module is not touched."""
    model, images = settled(FOLDABLE["conv"][0], torch.randn(7, 6, 6, 6)), torch.randn(7, 6, 6, 6)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fold_batch_norm(capture(model, images))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("damage", [1.1, float("nan")])
def test_fold_that_changes_logits_is_refused(damage: float) -> None:
    """The fold is proven on data, by the size of what it changed."""
    images = torch.randn(7, 6, 6, 6)
    model = settled(nn.Sequential(nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8)), images)
    graph = capture(model, images)
    fold_batch_norm(graph)
    (weight,) = (read_tensor(graph, node) for node in graph.graph.nodes if str(node.target).endswith("weight"))
    with torch.no_grad():
        weight[0] *= damage
    with pytest.raises(QuantizeError, match=f"of their spread; at most {FOLD_TOLERANCE} is rounding"):
        fold_error(model, graph, [images])


def test_fold_error_is_the_worst_of_all_batches() -> None:
    """One difference in one batch is enough."""
    model = nn.Flatten().eval()
    graph = capture(nn.Flatten(), torch.zeros(2, 1, 2, 2))
    assert fold_error(model, graph, [torch.randn(3, 1, 2, 2), torch.randn(2, 1, 2, 2)]) == 0.0


class DataDependent(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:  # this line
            return x
        return -x


def test_control_flow_on_data_is_refused_by_file_and_line() -> None:
    """The message leads to the user's own code."""
    line = next(number for number, text in enumerate(Path(__file__).read_text().splitlines(), 1) if "this line" in text)
    with pytest.raises(ModelError, match="cannot capture Sequential: Could not guard") as caught:
        capture(nn.Sequential(nn.Conv2d(3, 3, 1), DataDependent()), torch.randn(2, 3, 4, 4))
    assert re.search(rf"At \S*test_capture\.py:{line}, in forward: if x\.sum\(\) > 0", caught.value.problem)
    assert "control flow" in caught.value.remedy


class FixedBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, -1)


class Broken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("no such thing")


@pytest.mark.parametrize("model", [FixedBatch(), Broken()], ids=lambda model: type(model).__name__)
def test_models_that_cannot_be_traced_are_refused(model: nn.Module) -> None:
    """A batch of fixed size, or an error of the model's own."""
    with pytest.raises(ModelError, match=f"cannot capture {type(model).__name__}: .") as caught:
        capture(model, torch.randn(2, 3, 4, 4))
    assert isinstance(caught.value.__cause__, Exception)


@pytest.mark.parametrize(("pool", "size"), [(nn.AvgPool2d, (4, 4)), (nn.AvgPool3d, (4, 4, 4))])
def test_a_pooling_with_a_divisor_of_its_own_is_refused(pool: type[nn.Module], size: tuple[int, ...]) -> None:
    """The ONNX file would divide by the kernel's size all the same."""
    images = torch.randn(2, 3, *size)
    with pytest.raises(ModelError, match="Pooling 0 has divisor_override=3, which ONNX cannot say") as caught:
        capture(nn.Sequential(pool(2, divisor_override=3)), images)
    assert "multiply the result" in caught.value.remedy
    assert "avg_pool" in targets(capture(nn.Sequential(pool(2)), images))[0]


def test_aten_names_are_the_operators() -> None:
    """Rules elsewhere compare targets with these."""
    graph = capture(nn.Conv2d(3, 4, 3).eval(), torch.randn(2, 3, 8, 8))
    assert aten.conv2d.default in [node.target for node in graph.graph.nodes]
