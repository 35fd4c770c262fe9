from __future__ import annotations

import copy
import hashlib
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torchvision
from onnx import TensorProto, numpy_helper
from torch import Tensor, nn
from torch.fx import GraphModule

from tasks.contracts.errors import ExportError
from tasks.contracts.spec import QuantSpec, SchemeName
from tasks.engines.onnxruntime import OnnxRuntimeEngine
from tasks.graph.export import INPUT, OPSET, OUTPUT, export_onnx
from tasks.graph.lint import Finding, lint
from tasks.models.digits import digits_net
from tasks.quant.calibrate import calibrate
from tasks.quant.capture import capture, fold_batch_norm
from tasks.quant.schemes import SCHEMES
from tasks.quant.simulate import convert, simulate

ORT: SchemeName = "onnxruntime"
TRT: SchemeName = "tensorrt"
WEIGHTED = ("Conv", "Gemm")
SUMS = {"resnet18": 8, "mobilenet_v2": 10, "mobilenet_v3_large": 10, "efficientnet_b0": 9}  # of residual blocks
LEFTOVERS = {"BatchNormalization", "Cast", "Identity", "ReduceMean"}


def settled(model: nn.Module, images_NCHW: Tensor, passes: int = 10) -> nn.Module:
    """In inference mode, with batch norms that know the images."""
    model.train()
    with torch.no_grad():
        for _ in range(passes):
            model(images_NCHW)
    return model.eval()


def folded_from(model: nn.Module, images_NCHW: Tensor) -> GraphModule:
    graph = capture(model, images_NCHW[:2])
    fold_batch_norm(graph)
    return graph


def converted_from(folded: GraphModule, scheme: SchemeName, images_NCHW: Tensor) -> GraphModule:
    simulation = simulate(folded, SCHEMES[scheme], frozenset())
    calibrate(simulation, lambda: [images_NCHW], QuantSpec(ranges="minmax"))
    return convert(simulation)


def write(graph: GraphModule, example_NCHW: Tensor, path: Path, scheme: SchemeName | None) -> onnx.ModelProto:
    integer_bias = scheme is not None and SCHEMES[scheme].integer_bias
    export_onnx(graph, example_NCHW, path, integer_bias=integer_bias)
    return onnx.load(path)


@dataclass(frozen=True)
class Exported:
    """The digits model three times: float, and INT8 for both schemes."""

    network: nn.Module
    images_NCHW: Tensor
    graphs: dict[SchemeName | None, GraphModule]
    paths: dict[SchemeName | None, Path]
    models: dict[SchemeName | None, onnx.ModelProto]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    torch.manual_seed(0)
    images_NCHW = torch.randn(16, 1, 32, 32)
    network = settled(digits_net(), images_NCHW)
    folded = folded_from(network, images_NCHW)
    graphs: dict[SchemeName | None, GraphModule] = {None: folded}
    graphs |= {scheme: converted_from(folded, scheme, images_NCHW) for scheme in SCHEMES}
    folder = tmp_path_factory.mktemp("exported")
    paths = {scheme: folder / f"{scheme}.onnx" for scheme in graphs}
    models = {scheme: write(graph, images_NCHW[:2], paths[scheme], scheme) for scheme, graph in graphs.items()}
    return Exported(network, images_NCHW, graphs, paths, models)


def initializers(model: onnx.ModelProto) -> dict[str, TensorProto]:
    return {tensor.name: tensor for tensor in model.graph.initializer}


def producer_of(model: onnx.ModelProto, name: str) -> onnx.NodeProto | None:
    return next((node for node in model.graph.node if name in node.output), None)


def faults(model: onnx.ModelProto, scheme: SchemeName) -> list[Finding]:
    """What the lint finds worse than plain facts."""
    return [finding for finding in lint(model, scheme) if finding.severity != "info"]


def optimised_counts(path: Path) -> Counter[str]:
    """Operators that ONNX Runtime makes of the file."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(path.with_suffix(".optimised.onnx")), 3
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(path.with_suffix(".optimised.onnx")).graph.node)


def float_clips(model: onnx.ModelProto) -> list[str]:
    """A ReLU6 that did not become a layer's saturation; hard-swish clips integers."""
    clips = [node for node in model.graph.node if node.op_type == "Clip"]
    before = {node.name: producer_of(model, node.input[0]) for node in clips}
    return [name for name, node in before.items() if node is None or node.op_type != "QuantizeLinear"]


def layers_by_weight(model: onnx.ModelProto) -> dict[str, str]:
    """Type of the weight as it is stored, by the layer's name."""
    stored, found = initializers(model), {}
    for layer in model.graph.node:
        if layer.op_type in WEIGHTED:
            before = producer_of(model, layer.input[1])
            weight = stored[before.input[0] if before is not None else layer.input[1]]
            found[layer.name] = TensorProto.DataType.Name(weight.data_type)
    return found


@pytest.mark.parametrize("scheme", [None, ORT, TRT])
def test_file_is_plain_onnx(scheme: SchemeName | None, exported: Exported) -> None:
    """One opset, one input and one output by name, a batch of any size, nothing external."""
    model = exported.models[scheme]
    onnx.checker.check_model(model, full_check=True)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", OPSET)]
    (source,), (logits,) = model.graph.input, model.graph.output
    assert (source.name, logits.name) == (INPUT, OUTPUT)
    sizes = [[size.dim_value or None for size in value.type.tensor_type.shape.dim] for value in (source, logits)]
    assert sizes == [[None, 1, 32, 32], [None, 10]]
    assert {path.name for path in exported.paths[scheme].parent.iterdir()} == {
        f"{name}.onnx" for name in (None, *SCHEMES)
    }


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("scheme", [None, ORT, TRT])
def test_onnx_runtime_gives_the_graphs_logits(scheme: SchemeName | None, count: int, exported: Exported) -> None:
    """For batches of any size, up to a few roundings that tip over."""
    images_NCHW = exported.images_NCHW[:count]
    with torch.no_grad():
        expected_NC = exported.graphs[scheme](images_NCHW).numpy()
    with OnnxRuntimeEngine(exported.paths[scheme], threads=1) as engine:
        found_NC = engine.answer(images_NCHW.numpy())
    tolerance = 1e-4 if scheme is None else 0.1
    np.testing.assert_allclose(found_NC, expected_NC, rtol=0, atol=tolerance * expected_NC.std())


@pytest.mark.parametrize("scheme", [None, ORT, TRT])
def test_layers_are_named_as_in_the_module(scheme: SchemeName | None, exported: Exported) -> None:
    """Names that a user knows, and each once."""
    names = [node.name for node in exported.models[scheme].graph.node if node.op_type in WEIGHTED]
    modules = exported.network.named_modules()
    assert sorted(names) == sorted(name for name, module in modules if isinstance(module, nn.Conv2d | nn.Linear))
    every = [node.name for node in exported.models[scheme].graph.node]
    assert len(every) == len(set(every))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_are_stored_once_as_int8(scheme: SchemeName, exported: Exported) -> None:
    """One initializer, one reader, symmetric, one scale for each output channel; the file shrinks accordingly."""
    model, stored = exported.models[scheme], initializers(exported.models[scheme])
    integer = {name for name, tensor in stored.items() if tensor.data_type == TensorProto.INT8 and len(tensor.dims) > 1}
    readers = Counter(name for node in model.graph.node for name in node.input if name in integer)
    assert set(readers) == integer
    assert set(readers.values()) == {1}
    for name in integer:
        (dequantize,) = (node for node in model.graph.node if name in node.input)
        scale_O, zero_point_O = (numpy_helper.to_array(stored[part]) for part in dequantize.input[1:3])
        assert dequantize.op_type == "DequantizeLinear"
        assert scale_O.shape == zero_point_O.shape == (stored[name].dims[0],)
        assert not zero_point_O.any()
        assert numpy_helper.to_array(stored[name]).min() >= -127
    by_layer = layers_by_weight(model)
    gate = {"2.body.2.reduce", "2.body.2.expand"}
    floats = {name for name, kind in by_layer.items() if kind == "FLOAT"}
    assert floats == (gate | {"7"} if scheme == TRT else set())  # ten classes are too few for TensorRT
    sizes = {key: path.stat().st_size for key, path in exported.paths.items()}
    assert sizes[None] / sizes[scheme] > 3.3


def test_biases_are_int32_for_onnxruntime(exported: Exported) -> None:
    """In steps of input scale times weight scale, within half a step of the float bias."""
    model, stored = exported.models[ORT], initializers(exported.models[ORT])
    exact = initializers(exported.models[None])
    for layer in model.graph.node:
        if layer.op_type not in WEIGHTED:
            continue
        dequantizing = [producer_of(model, name) for name in layer.input]
        parts = [
            [numpy_helper.to_array(stored[name]) for name in node.input if name in stored]
            for node in dequantizing
            if node is not None
        ]
        assert len(parts) == 3
        (input_scale, _), (_, weight_scale_O, _), (steps_O, scale_O, zero_point_O) = parts
        assert steps_O.dtype == zero_point_O.dtype == np.int32
        np.testing.assert_array_equal(scale_O, (input_scale * weight_scale_O).astype(np.float32))
        twin = next(node for node in exported.models[None].graph.node if node.name == layer.name)
        float_O = numpy_helper.to_array(exact[twin.input[2]])
        assert (np.abs(steps_O * scale_O.astype(np.float64) - float_O) <= 0.5001 * scale_O).all()


def test_biases_are_float_for_tensorrt(exported: Exported) -> None:
    """It adds them in its own precision."""
    stored = initializers(exported.models[TRT])
    layers = [node for node in exported.models[TRT].graph.node if node.op_type in WEIGHTED]
    assert {stored[layer.input[2]].data_type for layer in layers} == {TensorProto.FLOAT}
    assert not any(tensor.data_type == TensorProto.INT32 for tensor in stored.values())


def test_pooling_is_the_operator_with_an_integer_kernel(exported: Exported) -> None:
    """A mean over height and width is GlobalAveragePool in every file."""
    for model in exported.models.values():
        counts = Counter(node.op_type for node in model.graph.node)
        assert counts["GlobalAveragePool"] == 2
        assert not counts.keys() & LEFTOVERS
        assert not float_clips(model)


@pytest.mark.parametrize("scheme", [None, ORT, TRT])
def test_same_model_gives_the_same_bytes(scheme: SchemeName | None, exported: Exported, tmp_path: Path) -> None:
    """Artifacts are named by their content. Strides of the example leave no trace in it."""
    example_NCHW = exported.images_NCHW[2:5].contiguous(memory_format=torch.channels_last)
    write(exported.graphs[scheme], example_NCHW, tmp_path / "again.onnx", scheme)
    first, again = (path.read_bytes() for path in (exported.paths[scheme], tmp_path / "again.onnx"))
    assert hashlib.sha256(first).hexdigest() == hashlib.sha256(again).hexdigest()


def test_file_tells_nothing_of_the_machine(exported: Exported) -> None:
    """No path, no source line, no stack."""
    secrets = [str(Path(__file__).parents[3]), str(Path.home()), "site-packages", ".py", "File ", "nn_module", "pkg."]
    for path in exported.paths.values():
        content = path.read_bytes()
        assert [secret for secret in secrets if secret.encode() in content] == []


@pytest.mark.parametrize("scheme", SCHEMES)
def test_digits_keep_the_rules_of_their_target(scheme: SchemeName, exported: Exported) -> None:
    """Not even a warning."""
    assert faults(exported.models[scheme], scheme) == []


def test_bias_that_does_not_fit_is_refused(exported: Exported, tmp_path: Path) -> None:
    """Rather than wrapped around or clipped; no file is left."""
    graph = copy.deepcopy(exported.graphs[ORT])
    with torch.no_grad():
        for name, parameter in graph.named_parameters():
            if "bias" in name:
                parameter.mul_(1e9)
    with pytest.raises(ExportError, match=r"A bias of \S+ needs \S+ steps and int32 has 2\.1e9"):
        export_onnx(graph, exported.images_NCHW[:2], tmp_path / "model.onnx", integer_bias=True)
    assert list(tmp_path.iterdir()) == []


class Unknown(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.svdvals(x.mean(1)).float()  # type: ignore[no-any-return]


def test_operator_that_onnx_lacks_is_refused(tmp_path: Path) -> None:
    """With the exporter's own words, chained."""
    images_NCHW = torch.randn(2, 1, 4, 4)
    graph = capture(Unknown(), images_NCHW)
    with pytest.raises(ExportError, match=r"torch\.onnx cannot export the graph: .+") as caught:
        export_onnx(graph, images_NCHW, tmp_path / "model.onnx", integer_bias=False)
    assert caught.value.__cause__ is not None
    assert list(tmp_path.iterdir()) == []


def test_relu6_disappears_into_its_convolution(tmp_path: Path) -> None:
    """At the largest scale that training may reach ONNX Runtime still runs everything in integers."""
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU6(), nn.Conv2d(16, 8, 3), nn.Flatten(), nn.Linear(128, 4)).eval()
    images_NCHW = 100 * torch.randn(4, 3, 8, 8)
    simulation = simulate(folded_from(model, images_NCHW), SCHEMES[ORT], frozenset())
    calibrate(simulation, lambda: [images_NCHW], QuantSpec(ranges="minmax"))
    with torch.no_grad():
        inner = simulation.layers[1].input_quantizer
        inner.log_scale.fill_(math.log(inner.largest_scale))
    export_onnx(convert(simulation), images_NCHW, tmp_path / "relu6.onnx", integer_bias=True)
    counts = optimised_counts(tmp_path / "relu6.onnx")
    assert counts["QLinearConv"] == 2
    assert not counts.keys() & {"Clip", "Conv", "FusedConv"}


def swishing(reach: float, folder: Path) -> tuple[GraphModule, Tensor, Path]:
    """A convolution that only passes its input of [-reach, 2 reach] on to a hard-swish, and a layer behind it."""
    first = nn.Conv2d(1, 4, 1, bias=False)
    nn.init.ones_(first.weight)
    model = nn.Sequential(first, nn.Hardswish(), nn.Conv2d(4, 2, 1), nn.Flatten(), nn.Linear(128, 4))
    images_NCHW = torch.linspace(-reach, 2 * reach, 1024).reshape(16, 1, 8, 8)
    graph = converted_from(folded_from(model.eval(), images_NCHW), ORT, images_NCHW)
    write(graph, images_NCHW, folder / "swish.onnx", ORT)
    return graph, images_NCHW, folder / "swish.onnx"


@pytest.mark.parametrize("reach", [3.1, 5.0, 20.0])
def test_hard_swish_is_computed_on_integers(reach: float, tmp_path: Path) -> None:
    """Clipped and multiplied, not in float, and on each of the 256 values at most a step from the definition."""
    _, images_NCHW, path = swishing(reach, tmp_path)
    assert faults(onnx.load(path), ORT) == []
    counts = optimised_counts(path)
    assert counts["Clip"] == counts["QLinearMul"] == 1
    assert not counts.keys() & {"HardSwish", "HardSigmoid", "Mul"}

    model = onnx.load(path)
    product = next(node for node in model.graph.node if node.op_type == "Mul")
    assert product.name == "1"  # still the layer's
    inner, gate = (producer_of(model, name) for name in product.input)
    outer = next(node for node in model.graph.node if product.output[0] in node.input)
    assert inner is not None
    assert gate is not None
    constants = {name: numpy_helper.to_array(tensor) for name, tensor in initializers(model).items()}
    scale, zero = float(constants[inner.input[1]]), int(constants[inner.input[2]])
    step, none = float(constants[outer.input[1]]), int(constants[outer.input[2]])
    x = scale * (np.arange(256) - zero)
    wanted = np.clip(x * np.clip(x / 6 + 0.5, 0, 1) / step + none, 0, 255)
    clip = producer_of(model, gate.input[0])
    assert clip is not None
    low, high = (int(constants[name]) for name in clip.input[1:])
    gates = float(constants[gate.input[1]]) * (np.clip(np.arange(256), low, high) - int(constants[gate.input[2]]))
    np.testing.assert_allclose(np.clip(x * gates / step + none, 0, 255), wanted, atol=1e-3)
    with OnnxRuntimeEngine(path, threads=1) as exact, OnnxRuntimeEngine(path, threads=1, optimise=False) as plain:
        logits_NC, written_NC = (engine.run({INPUT: images_NCHW.numpy()})[OUTPUT] for engine in (exact, plain))
    np.testing.assert_allclose(logits_NC, written_NC, atol=0.02 * np.ptp(written_NC))


def test_hard_swish_of_a_narrow_range_stays_float(tmp_path: Path) -> None:
    """Its range would have to reach -3, in coarser steps."""
    _, _, path = swishing(1.0, tmp_path)
    model = onnx.load(path)
    counts = Counter(node.op_type for node in model.graph.node)
    assert counts["HardSwish"] == 1
    assert not counts.keys() & {"Clip", "Mul"}


class Twice(nn.Module):
    """One convolution, used again on its own output."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8 * 64, 4)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        features_NCHW = self.body(self.stem(images_NCHW).relu()).relu()
        logits: Tensor = self.head(self.body(features_NCHW).relu().flatten(1))
        return logits


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_layer_that_is_used_twice(scheme: SchemeName, tmp_path: Path) -> None:
    """Its weights and biases have a scale for each input, and names of their own; any CPU opens the file."""
    torch.manual_seed(0)
    images_NCHW = torch.randn(8, 3, 8, 8)
    graph = converted_from(folded_from(Twice().eval(), images_NCHW), scheme, images_NCHW)
    model = write(graph, images_NCHW[:2], tmp_path / "twice.onnx", scheme)
    assert faults(model, scheme) == []
    with OnnxRuntimeEngine(tmp_path / "twice.onnx", threads=1) as engine:
        logits_NC = engine.run({"input": images_NCHW.numpy()})["logits"]
    np.testing.assert_allclose(logits_NC, graph(images_NCHW).detach().numpy(), atol=0.02)


class Attention(nn.Module):
    """Patches that attend to each other; the layer behind has no bias."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 32, 4, 4), nn.LayerNorm(32)
        self.wide, self.narrow, self.head = nn.Linear(32, 96), nn.Linear(32, 32, bias=False), nn.Linear(32, 32)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        tokens_NTC = self.stem(images_NCHW).flatten(2).transpose(1, 2)
        query, key, value = self.wide(self.norm(tokens_NTC)).chunk(3, -1)
        seen_NTC = (query @ key.transpose(1, 2) / 32**0.5).softmax(-1) @ value
        logits_NK: Tensor = self.head((tokens_NTC + self.narrow(seen_NTC)).mean(1))
        return logits_NK


class Inverted(nn.Module):
    """ConvNeXt's block: linear layers on [N, H, W, C]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 32, 4, 4), nn.LayerNorm(32)
        self.deep = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.wide, self.narrow, self.head = nn.Linear(32, 96), nn.Linear(96, 32), nn.Linear(32, 32)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        skip_NCHW = self.stem(images_NCHW)
        wide_NHWC = nn.functional.gelu(self.wide(self.norm(self.deep(skip_NCHW).permute(0, 2, 3, 1))))
        logits_NK: Tensor = self.head((skip_NCHW + self.narrow(wide_NHWC).permute(0, 3, 1, 2)).mean((2, 3)))
        return logits_NK


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("network", [Attention, Inverted])
def test_linear_layers_on_tokens(network: type[nn.Module], scheme: SchemeName, tmp_path: Path) -> None:
    """Their weights are stored as MatMul reads them, and multiplied as integers, by the layer's name."""
    torch.manual_seed(0)
    images_NCHW = torch.randn(8, 3, 16, 16)
    graph = converted_from(folded_from(network().eval(), images_NCHW), scheme, images_NCHW)
    model = write(graph, images_NCHW[:2], tmp_path / "tokens.onnx", scheme)
    assert [finding for finding in lint(model, scheme) if finding.severity == "error"] == []
    stored = initializers(model)
    for layer in (next(node for node in model.graph.node if node.name == name) for name in ("wide", "narrow")):
        dequantize = producer_of(model, layer.input[1])
        assert layer.op_type == "MatMul"
        assert dequantize is not None
        scale_O, zero_point_O = (stored[name] for name in dequantize.input[1:])
        inputs, outputs = stored[dequantize.input[0]].dims
        assert network().get_parameter(f"{layer.name}.weight").shape == (outputs, inputs)
        assert scale_O.dims == zero_point_O.dims == [outputs]
    counts = optimised_counts(tmp_path / "tokens.onnx")
    assert counts["MatMulIntegerToFloat"] + counts["QLinearMatMul"] == 2
    with OnnxRuntimeEngine(tmp_path / "tokens.onnx", threads=1) as engine:
        logits_NK = engine.answer(images_NCHW.numpy())
    expected_NK = graph(images_NCHW).detach().numpy()
    np.testing.assert_allclose(logits_NK, expected_NK, atol=0.05 * expected_NK.std())


class Recycled(nn.Module):
    """Its first layer is used again, and two have names that a count of uses could give."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.conv_1, self.conv_2 = (nn.Conv2d(32, 32, 1) for _ in range(3))
        self.head = nn.Linear(32, 32)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        features_NCHW = self.conv(self.conv(images_NCHW).relu()).relu()
        logits: Tensor = self.head(self.conv_2(self.conv_1(features_NCHW).relu()).mean((2, 3)))
        return logits


@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_two_nodes_have_the_same_name(scheme: SchemeName, tmp_path: Path) -> None:
    """ONNX Runtime refuses such a file, though it is valid; each layer has its own name."""
    torch.manual_seed(0)
    images_NCHW = torch.randn(4, 32, 4, 4)
    graph = converted_from(folded_from(Recycled().eval(), images_NCHW), scheme, images_NCHW)
    model = write(graph, images_NCHW[:2], tmp_path / "recycled.onnx", scheme)
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names)
    layers = [node.name for node in model.graph.node if node.op_type in WEIGHTED]
    assert layers == ["conv", "conv_3", "conv_1", "conv_2", "head"]
    with OnnxRuntimeEngine(tmp_path / "recycled.onnx", threads=1) as engine:
        logits_NC = engine.answer(images_NCHW.numpy())
    np.testing.assert_allclose(logits_NC, graph(images_NCHW).detach().numpy(), atol=0.02)


@pytest.mark.parametrize("padding", [0, 1])
def test_average_over_the_edge_divides_by_what_is_inside(padding: int, tmp_path: Path) -> None:
    """With `ceil_mode`, in ONNX Runtime's integer kernel as in the file as it is written."""
    torch.manual_seed(0)
    pool = nn.AvgPool2d(3, 2, padding, ceil_mode=True)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), pool, nn.Conv2d(8, 8, 1), nn.Flatten(), nn.LazyLinear(4)).eval()
    images_NCHW = torch.rand(8, 3, 8, 8)
    model(images_NCHW)
    path = tmp_path / "pool.onnx"
    graph = converted_from(folded_from(model, images_NCHW), ORT, images_NCHW)
    assert faults(write(graph, images_NCHW[:2], path, ORT), ORT) == []
    assert optimised_counts(path)["QLinearAveragePool"] == 1
    expected_NC = graph(images_NCHW).detach().numpy()
    for optimise in (False, True):
        with OnnxRuntimeEngine(path, threads=1, optimise=optimise) as engine:
            found_NC = engine.answer(images_NCHW.numpy())
        np.testing.assert_allclose(found_NC, expected_NC, atol=0.005)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_sums_that_overflow_16_bits_are_exact(scheme: SchemeName, tmp_path: Path) -> None:
    """The largest image on the largest weights: what CPUs without VNNI get wrong by default."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 4)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0 if parameter.dim() > 1 else 0.0)
    images_NCHW = torch.ones(2, 3, 3, 3)
    graph = converted_from(folded_from(model, images_NCHW), scheme, images_NCHW)
    write(graph, images_NCHW, tmp_path / "largest.onnx", scheme)
    with OnnxRuntimeEngine(tmp_path / "largest.onnx", threads=1) as engine:
        logits_NC = engine.run({"input": images_NCHW.numpy()})["logits"]
    np.testing.assert_allclose(logits_NC, np.full((2, 4), 8 * 27.0), rtol=0.01)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
def test_torchvision_models_keep_the_rules_of_both_targets(name: str, tmp_path: Path) -> None:
    """Every convolution has INT8 weights but those of squeeze-excite in TensorRT, and nothing is left over."""
    torch.manual_seed(0)
    images_NCHW = torch.randn(4, 3, 64, 64)
    folded = folded_from(settled(torchvision.models.get_model(name, num_classes=16), images_NCHW), images_NCHW)
    for scheme in SCHEMES:
        graph = converted_from(folded, scheme, images_NCHW)
        model = write(graph, images_NCHW[:2], tmp_path / f"{scheme}.onnx", scheme)
        assert faults(model, scheme) == []
        for layer, kind in layers_by_weight(model).items():
            gate = layer.endswith((".fc1", ".fc2"))
            assert kind == ("FLOAT" if scheme == TRT and gate else "INT8"), layer
        assert not {node.op_type for node in model.graph.node} & LEFTOVERS
        assert not float_clips(model)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0"])
def test_torchvision_models_are_ready_for_tensorrt(name: str, tmp_path: Path) -> None:
    """No finding; all layers but squeeze-excite in INT8, all residual sums with an INT8 operand, hard-swish whole."""
    torch.manual_seed(0)
    images_NCHW = torch.randn(4, 3, 32, 32)
    network = settled(torchvision.models.get_model(name, num_classes=32), images_NCHW, passes=1)
    graph = converted_from(folded_from(network, images_NCHW), TRT, images_NCHW)
    model = write(graph, images_NCHW[:2], tmp_path / "model.onnx", TRT)
    assert faults(model, TRT) == []
    floats = {layer for layer, kind in layers_by_weight(model).items() if kind == "FLOAT"}
    assert floats == {layer for layer in layers_by_weight(model) if layer.endswith((".fc1", ".fc2"))}
    sums = [[producer_of(model, name) for name in node.input] for node in model.graph.node if node.op_type == "Add"]
    kinds = [sorted(producer.op_type for producer in producers if producer is not None) for producers in sums]
    assert kinds == [["Conv", "DequantizeLinear"]] * SUMS[name]
    counts = Counter(node.op_type for node in model.graph.node)
    assert counts["HardSwish"] == sum(isinstance(module, nn.Hardswish) for module in network.modules())
