from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from tasks.contracts.errors import QuantizeError
from tasks.contracts.spec import QuantSpec, SchemeName
from tasks.quant.calibrate import calibrate
from tasks.quant.capture import aten, capture, fold_batch_norm, read_tensor
from tasks.quant.fake_quantize import Mode, PerChannelFakeQuantizer
from tasks.quant.schemes import SCHEMES
from tasks.quant.simulate import LARGEST_INT32, Simulation, convert, exact_tensors, fit_biases, predictions, simulate

ORT: SchemeName = "onnxruntime"
TRT: SchemeName = "tensorrt"


def calibrated(folded: GraphModule, scheme: SchemeName, images_NCHW: Tensor) -> Simulation:
    simulation = simulate(folded, SCHEMES[scheme], frozenset())
    calibrate(simulation, lambda: torch.split(images_NCHW, 16), QuantSpec())
    return simulation


def folded_from(model: nn.Module, images_NCHW: Tensor) -> GraphModule:
    graph = capture(model, images_NCHW[:2])
    fold_batch_norm(graph)
    return graph


@torch.no_grad()
def logits(simulation: Simulation, images_NCHW: Tensor, mode: Mode = Mode.SIMULATE) -> Tensor:
    with simulation.mode(mode) as graph:
        answer: Tensor = graph(images_NCHW)
        return answer


@pytest.mark.parametrize("scheme", SCHEMES)
def test_simulation_passes_float_until_told_otherwise(
    scheme: SchemeName, folded: GraphModule, images_NCHW: Tensor
) -> None:
    """The float graph is copied, not touched, and the copy computes the same."""
    before = copy.deepcopy(folded.state_dict())
    simulation = simulate(folded, SCHEMES[scheme], frozenset())
    expected = folded(images_NCHW)
    torch.testing.assert_close(logits(simulation, images_NCHW, Mode.PASS), expected)
    calibrate(simulation, lambda: [images_NCHW], QuantSpec())
    assert all(torch.equal(tensor, before[name]) for name, tensor in folded.state_dict().items())


def test_layers_know_their_parts(folded: GraphModule, images_NCHW: Tensor) -> None:
    """Names as in the module, a bias for each, and the quantizer that the input came through."""
    simulation = calibrated(folded, ORT, images_NCHW)
    layers = {layer.name: layer for layer in simulation.layers}
    assert set(layers) == {"stem.0", "deep.0", "reduce", "expand", "project.0", "left.0", "right.1", "head"}
    for layer in layers.values():
        assert layer.bias is not None
        outputs = len(read_tensor(simulation.graph, layer.weight))
        assert layer.weight_quantizer.scale.shape == read_tensor(simulation.graph, layer.bias).shape == (outputs,)
    assert layers["reduce"].input_quantizer is not layers["expand"].input_quantizer
    assert layers["stem.0"].input_quantizer.low == float(images_NCHW.min())


@pytest.mark.parametrize(("scheme", "num_layers", "num_scales"), [(ORT, 8, 17), (TRT, 4, 3)])
def test_tensors_at_one_scale_share_one_quantizer(
    scheme: SchemeName, num_layers: int, num_scales: int, folded: GraphModule
) -> None:
    """The pooled tensor with its view, the sum with both layers that read it.

    TensorRT leaves float what is too small: the gate, the projection of eight channels, the classifier of five classes.
    """
    simulation = simulate(folded, SCHEMES[scheme], frozenset())
    assert len(simulation.layers) == num_layers
    assert len(simulation.activations()) == num_scales


def test_model_without_integer_layer_is_refused(folded: GraphModule, images_NCHW: Tensor) -> None:
    """Everything kept float, or nothing that has weights."""
    everything = frozenset({"stem.0", "deep.0", "reduce", "expand", "project.0", "left.0", "right.1", "head"})
    with pytest.raises(QuantizeError, match="Scheme tensorrt finds no layer to quantize"):
        simulate(folded, SCHEMES[TRT], everything)
    with pytest.raises(QuantizeError, match="Scheme onnxruntime finds no layer"):
        simulate(folded_from(nn.Flatten(), images_NCHW), SCHEMES[ORT], frozenset())


def test_mode_lasts_as_long_as_its_block(folded: GraphModule, images_NCHW: Tensor) -> None:
    """Also when the block fails; weights are never observed."""
    simulation = calibrated(folded, ORT, images_NCHW)
    with simulation.mode(Mode.OBSERVE_ENDS):
        assert {quantizer.mode for quantizer in simulation.activations()} == {Mode.OBSERVE_ENDS}
        weights = [module for module in simulation.quantizers() if isinstance(module, PerChannelFakeQuantizer)]
        assert {quantizer.mode for quantizer in weights} == {Mode.PASS}
    with pytest.raises(RuntimeError), simulation.mode(Mode.PASS) as graph:
        graph(torch.zeros(1, 7, 1, 1))
    assert {quantizer.mode for quantizer in simulation.quantizers()} == {Mode.SIMULATE}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_stored_and_loaded_gives_the_same_logits(
    scheme: SchemeName, folded: GraphModule, images_NCHW: Tensor, tmp_path: Path
) -> None:
    """Bit for bit, into a simulation that was never calibrated."""
    simulation = calibrated(folded, scheme, images_NCHW)
    with torch.no_grad():
        for parameter in simulation.graph.parameters():
            parameter.mul_(1.01)  # as if trained
    simulation.save(tmp_path / "state.safetensors")
    fresh = simulate(folded, SCHEMES[scheme], frozenset())
    fresh.load(tmp_path / "state.safetensors")
    assert torch.equal(logits(fresh, images_NCHW), logits(simulation, images_NCHW))


class Tied(nn.Module):
    """Two convolutions that share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 1, 3), nn.Conv2d(1, 1, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu()).flatten(1)  # type: ignore[no-any-return]


def test_tied_weights_are_restored_everywhere(tmp_path: Path) -> None:
    """One tensor under two names is one tensor in the file, and both names get it back."""
    images_NCHW = torch.randn(4, 1, 8, 8)
    folded = folded_from(Tied(), images_NCHW)
    simulation = calibrated(folded, ORT, images_NCHW)
    with torch.no_grad():
        for parameter in simulation.graph.parameters():
            parameter.mul_(1.1)
    simulation.save(tmp_path / "state.safetensors")
    fresh = simulate(folded, SCHEMES[ORT], frozenset())
    fresh.load(tmp_path / "state.safetensors")
    assert torch.equal(logits(fresh, images_NCHW), logits(simulation, images_NCHW))


@pytest.mark.parametrize("classes", [5, 6])
def test_state_of_another_model_is_refused(
    classes: int, model: nn.Module, folded: GraphModule, images_NCHW: Tensor, tmp_path: Path
) -> None:
    """Other names, or the same names with other shapes; nothing is loaded then."""
    calibrated(folded, TRT if classes == 5 else ORT, images_NCHW).save(tmp_path / "other.safetensors")
    other = folded if classes == 5 else folded_from(type(model)(classes), images_NCHW)
    simulation = simulate(other, SCHEMES[ORT], frozenset())
    before = copy.deepcopy(simulation.graph.state_dict())
    with pytest.raises(QuantizeError, match=r"other\.safetensors is the state of another model: \d+ .* such as \S+\."):
        simulation.load(tmp_path / "other.safetensors")
    assert all(torch.equal(tensor, before[name]) for name, tensor in simulation.graph.state_dict().items())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_converted_graph_computes_what_was_simulated(
    scheme: SchemeName, folded: GraphModule, images_NCHW: Tensor
) -> None:
    """Bit for bit; its weights are INT8 and stored once."""
    simulation = calibrated(folded, scheme, images_NCHW)
    converted = convert(simulation)
    with torch.no_grad():
        assert torch.equal(converted(images_NCHW), logits(simulation, images_NCHW))
    weights = [tensor for tensor in converted.state_dict().values() if tensor.dtype == torch.int8 and tensor.dim() > 1]
    assert len(weights) == len(simulation.layers)
    assert {tensor.shape for tensor in weights} <= {
        read_tensor(simulation.graph, layer.weight).shape for layer in simulation.layers
    }


def hard_to_bias() -> nn.Module:
    """Channel 0 has tiny weights and a large bias, as MobileNetV3 has after folding."""
    conv = nn.Conv2d(1, 8, 3)
    assert conv.bias is not None
    with torch.no_grad():
        conv.weight[0] = 1e-10
        conv.bias[0] = 5.0
    return nn.Sequential(conv, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)).eval()


def test_biases_are_made_to_fit_int32() -> None:
    """Only the scale of the channel at fault widens, and the logits stay."""
    images_NCHW = torch.randn(32, 1, 8, 8)
    simulation = calibrated(folded_from(hard_to_bias(), images_NCHW), ORT, images_NCHW)
    conv = simulation.layers[0]
    before_O, answers = conv.weight_quantizer.scale.detach(), logits(simulation, images_NCHW)
    assert conv.bias is not None
    bias_O = read_tensor(simulation.graph, conv.bias).detach()
    assert float((bias_O / (conv.input_quantizer.scale * before_O)).detach().abs().max()) > LARGEST_INT32
    assert fit_biases(simulation) == 1
    after_O = conv.weight_quantizer.scale.detach()
    steps_O = (bias_O / (conv.input_quantizer.scale * after_O)).detach().abs()
    assert float(steps_O.max()) <= LARGEST_INT32 / 2 * 1.001
    assert after_O[0] > before_O[0]
    torch.testing.assert_close(after_O[1:], before_O[1:])
    torch.testing.assert_close(logits(simulation, images_NCHW), answers, rtol=0, atol=1e-4)
    assert fit_biases(simulation) == 0


def test_float_biases_need_no_room() -> None:
    """TensorRT adds its bias in float, so no weight scale is widened for it."""
    images_NCHW = torch.randn(32, 1, 8, 8)
    simulation = calibrated(folded_from(hard_to_bias(), images_NCHW), TRT, images_NCHW)
    assert fit_biases(simulation) == 0


def test_scale_behind_relu6_has_a_limit() -> None:
    """Also where the tensor is pooled, and not where it shares its scale with others."""
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU6(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Flatten())
    simulation = simulate(folded_from(model, torch.randn(2, 1, 8, 8)), SCHEMES[ORT], frozenset())
    inputs = [layer.input_quantizer.largest_scale for layer in simulation.layers]
    assert inputs == [float("inf"), 6 / 255]


class Read(nn.Module):
    """One convolution's output is read by a hard-swish, the other's by a gate and a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(1, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(nn.functional.hardswish(self.first(x)))
        gate = nn.functional.hardsigmoid(self.last(x))
        logits: Tensor = (x + nn.functional.hardswish(x) * gate).flatten(1)
        return logits


def test_ranges_end_where_all_readers_stop_looking() -> None:
    """A tensor that a convolution or a sum reads too has no bounds."""
    simulation = simulate(folded_from(Read(), torch.randn(2, 1, 4, 4)), SCHEMES[ORT], frozenset())
    bounds = {
        str(node.args[0]): simulation.graph.get_submodule(str(node.target)).bounds
        for node in simulation.graph.graph.nodes
        if node.op == "call_module" and node.args[0].target == aten.conv2d.default
    }
    assert bounds == {
        "conv2d": (pytest.approx(-3.0, abs=1e-5), math.inf), "conv2d_1": (-math.inf, math.inf), "conv2d_2": (-3.0, 3.0)
    }  # fmt: skip


def test_exact_tensors_are_shown_as_their_readers_see_them() -> None:
    """What lies below -3 is no error where a hard-swish alone reads it."""
    simulation = simulate(folded_from(Read(), torch.randn(2, 1, 4, 4)), SCHEMES[ORT], frozenset())
    _, before_swish, swished, *_ = exact_tensors(simulation, 100 * torch.randn(8, 1, 4, 4))
    assert float(before_swish.min()) == pytest.approx(-3.0, abs=1e-5)
    assert torch.equal(nn.functional.hardswish(before_swish), swished)


def test_exact_tensors_are_the_float_models(folded: GraphModule, images_NCHW: Tensor) -> None:
    """One per quantized place in the graph's order, the input first, whatever mode is on."""
    simulation = calibrated(folded, ORT, images_NCHW)
    exact = exact_tensors(simulation, images_NCHW)
    quantize = torch.ops.quantized_decomposed.quantize_per_tensor.default
    places = [node for node in convert(simulation).graph.nodes if node.target == quantize]
    assert torch.equal(exact[0], images_NCHW)
    assert [len(tensor) for tensor in exact] == [len(images_NCHW)] * len(exact)
    assert len(exact) == len(places)
    assert {quantizer.mode for quantizer in simulation.quantizers()} == {Mode.SIMULATE}


def test_predictions_are_the_classes_of_all_batches(folded: GraphModule, images_NCHW: Tensor) -> None:
    """One class per image, in order."""
    expected = folded(images_NCHW).argmax(1)
    assert torch.equal(predictions(folded, torch.split(images_NCHW, 7)), expected)
