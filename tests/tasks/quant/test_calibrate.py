from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from tasks.contracts.errors import DataError, QuantizeError
from tasks.contracts.spec import QuantSpec
from tasks.quant.calibrate import calibrate, correct_biases, search_ranges
from tasks.quant.capture import capture, fold_batch_norm, read_tensor
from tasks.quant.fake_quantize import Mode
from tasks.quant.schemes import SCHEMES
from tasks.quant.simulate import Simulation, simulate


def simulation_of(folded: GraphModule, scheme: str = "onnxruntime") -> Simulation:
    return simulate(folded, SCHEMES[scheme], frozenset())  # type: ignore[index]


def graph_of(model: nn.Module, images_NCHW: Tensor) -> GraphModule:
    graph = capture(model, images_NCHW[:2])
    fold_batch_norm(graph)
    return graph


@torch.no_grad()
def logits(simulation: Simulation, images_NCHW: Tensor, mode: Mode) -> Tensor:
    with simulation.mode(mode) as graph:
        answer: Tensor = graph(images_NCHW)
        return answer


def logits_error(simulation: Simulation, images_NCHW: Tensor) -> float:
    exact = logits(simulation, images_NCHW, Mode.PASS)
    return float((logits(simulation, images_NCHW, Mode.SIMULATE) - exact).square().mean())


@pytest.mark.parametrize("ranges", ["minmax", "percentile", "mse"])
def test_every_tensor_gets_a_range(ranges: Any, folded: GraphModule, images_NCHW: Tensor) -> None:
    """The simulation is near the float model, and the input covers what its kind of range says."""
    simulation = simulation_of(folded)
    calibrate(simulation, lambda: torch.split(images_NCHW, 16), QuantSpec(ranges=ranges, percentile=98))
    exact = logits(simulation, images_NCHW, Mode.PASS)
    assert logits_error(simulation, images_NCHW) < (0.05 if ranges == "percentile" else 0.002) * float(exact.var())
    low, high = simulation.layers[0].input_quantizer.covered()
    observed = float(images_NCHW.min()), float(images_NCHW.max())
    step = float(simulation.layers[0].input_quantizer.scale.detach())
    if ranges == "minmax":
        assert (low, high) == pytest.approx(observed, abs=step)
    elif ranges == "percentile":
        share = float(((images_NCHW > low - step) & (images_NCHW < high + step)).float().mean())
        assert share == pytest.approx(0.98, abs=0.003)
    assert observed[0] - step <= low < high <= observed[1] + step
    assert {quantizer.mode for quantizer in simulation.quantizers()} == {Mode.SIMULATE}


def test_calibration_does_not_depend_on_the_batches(folded: GraphModule, images_NCHW: Tensor) -> None:
    """Ends and histograms add up over batches of any size."""
    scales = []
    for size in (48, 7):
        simulation = simulation_of(folded)
        calibrate(simulation, partial(torch.split, images_NCHW, size), QuantSpec())
        scales.append(torch.cat([quantizer.scale.detach() for quantizer in simulation.quantizers()]))
    torch.testing.assert_close(scales[0], scales[1], rtol=0.02, atol=0)


def test_progress_is_told(folded: GraphModule, images_NCHW: Tensor) -> None:
    """Pass by pass, to the end."""
    told: list[tuple[int, int]] = []
    simulation = simulation_of(folded)
    calibrate(simulation, lambda: [images_NCHW], QuantSpec(), lambda done, total: told.append((done, total)))
    assert told == [(1, 2), (2, 2)]


def test_no_images_are_refused(folded: GraphModule) -> None:
    """There would be no range."""
    with pytest.raises(DataError, match="no calibration images"):
        calibrate(simulation_of(folded), list, QuantSpec())


class Explodes(nn.Module):
    """A layer in the middle gives `value` for images that are brighter than one."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.stem, self.middle, self.head = nn.Conv2d(1, 2, 1), nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        y = self.middle(self.stem(x).relu())
        bright = x.amax((1, 2, 3), keepdim=True) > 1
        return self.head(torch.where(bright, self.value, y)).flatten(1)  # type: ignore[no-any-return]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    """In whichever batch they come, and the message names where."""
    good = [torch.rand(2, 1, 4, 4) for _ in range(3)]
    graph = graph_of(Explodes(value), good[0])
    for bad, ranges in itertools.product(range(3), ("minmax", "mse")):
        batches = [batch + 1.5 * (number == bad) for number, batch in enumerate(good)]
        with pytest.raises(QuantizeError, match=r"Layer where\S* gives values from .*(nan|inf)") as caught:
            calibrate(simulation_of(graph), partial(iter, batches), QuantSpec(ranges=ranges))
        assert "NaN or overflow" in caught.value.remedy


def test_broken_weight_is_named_by_its_layer() -> None:
    """The first tensor that is not finite is what a broken weight gives."""
    model, images_NCHW = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Hardswish(), nn.Flatten()), torch.randn(2, 1, 4, 4)
    with torch.no_grad():
        next(model.parameters())[0] = float("nan")
    with pytest.raises(QuantizeError, match="Layer 0 gives values from nan to nan"):
        calibrate(simulation_of(graph_of(model, images_NCHW)), lambda: [images_NCHW], QuantSpec())


class Dominated(nn.Module):
    """Of two live channels the large one is hardly read; the small one makes the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(2, 16, 1, bias=False), nn.Conv2d(16, 16, 1)  # wide enough for INT8
        with torch.no_grad():
            self.stem.weight.zero_()[:2, :, 0, 0] = torch.diag(torch.tensor([100.0, 1.0]))
            self.head.weight[:, 0] = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stem(x).relu()).mean((2, 3))  # type: ignore[no-any-return]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_search_finds_the_range_that_serves_the_logits(scheme: str) -> None:
    """A tensor's own error wants the large channel kept; the logits want steps for the small one."""
    images_NCHW = torch.rand(64, 2, 4, 4)
    simulation = simulation_of(graph_of(Dominated(), images_NCHW), scheme)
    calibrate(simulation, lambda: [images_NCHW], QuantSpec())
    inner = simulation.layers[1].input_quantizer
    before, wide = logits_error(simulation, images_NCHW), inner.covered()[1]
    told: list[tuple[int, int]] = []
    searched = search_ranges(simulation, images_NCHW, lambda done, total: told.append((done, total)))
    assert wide > 90
    assert inner.covered()[1] < 15
    assert logits_error(simulation, images_NCHW) < before / 10
    assert told == [(number + 1, searched) for number in range(searched)]
    assert {quantizer.mode for quantizer in simulation.quantizers()} == {Mode.SIMULATE}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_search_is_never_worse(scheme: str, folded: GraphModule, images_NCHW: Tensor) -> None:
    """What it keeps was measured on the logits."""
    simulation = simulation_of(folded, scheme)
    calibrate(simulation, lambda: [images_NCHW], QuantSpec(ranges="minmax"))
    before = logits_error(simulation, images_NCHW)
    assert search_ranges(simulation, images_NCHW) >= 1
    after = logits_error(simulation, images_NCHW)
    assert after <= before
    search_ranges(simulation, images_NCHW)
    assert logits_error(simulation, images_NCHW) <= after  # a range that is already the best stays exactly


class _Outputs(Interpreter):
    """What each integer layer gives."""

    def __init__(self, simulation: Simulation) -> None:
        super().__init__(simulation.graph)
        self.names = {layer.node: layer.name for layer in simulation.layers}
        self.outputs: dict[str, Tensor] = {}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n in self.names:
            self.outputs[self.names[n]] = value
        return value


@torch.no_grad()
def layer_outputs(simulation: Simulation, images_NCHW: Tensor, mode: Mode) -> dict[str, Tensor]:
    with simulation.mode(mode):
        interpreter = _Outputs(simulation)
        interpreter.run(images_NCHW)
    return interpreter.outputs


def mean_errors(exact: dict[str, Tensor], simulated: dict[str, Tensor]) -> Iterator[float]:
    """Of each layer: how far the means of its channels have moved, in the spread of its values."""
    for name, value in exact.items():
        axes = [axis for axis in range(value.dim()) if axis != 1]
        yield float((simulated[name] - value).mean(axes).abs().max() / value.std())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_bias_correction_takes_the_mean_error_from_every_layer(
    scheme: str, folded: GraphModule, images_NCHW: Tensor
) -> None:
    """On the images that it was measured on; values that sit between two steps may still tip."""
    simulation = simulation_of(folded, scheme)
    calibrate(simulation, lambda: [images_NCHW], QuantSpec(ranges="percentile", percentile=99))
    exact = layer_outputs(simulation, images_NCHW, Mode.PASS)
    before = list(mean_errors(exact, layer_outputs(simulation, images_NCHW, Mode.SIMULATE)))
    correct_biases(simulation, images_NCHW)
    after = list(mean_errors(exact, layer_outputs(simulation, images_NCHW, Mode.SIMULATE)))
    assert min(before) > 5e-4
    assert all(new < old / 10 for new, old in zip(after, before, strict=True))
    assert {quantizer.mode for quantizer in simulation.quantizers()} == {Mode.SIMULATE}


class Tokens(nn.Module):
    """A linear layer on pixels: its channels come last, behind one axis of pixels or behind height and width."""

    def __init__(self, *, together: bool) -> None:
        super().__init__()
        self.patches, self.mix, self.head = nn.Conv2d(1, 16, 4, 4), nn.Linear(16, 16), nn.Linear(16, 16)
        self.together = together

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).permute(0, 2, 3, 1)
        y: Tensor = self.mix(x.flatten(1, 2) if self.together else x).relu()
        return self.head(y).flatten(1, -2).mean(1)  # type: ignore[no-any-return]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("together", [True, False])
def test_bias_correction_knows_where_the_channels_of_a_linear_layer_are(scheme: str, together: bool) -> None:
    """They are last, also where there are as many pixels as channels and a wrong axis would fit."""
    images_NCHW = torch.randn(48, 1, 16, 16) + torch.linspace(0, 3, 16)  # pixels are not alike
    simulation = simulation_of(graph_of(Tokens(together=together), images_NCHW), scheme)
    calibrate(simulation, lambda: [images_NCHW], QuantSpec(ranges="percentile", percentile=99))
    exact = layer_outputs(simulation, images_NCHW, Mode.PASS)
    correct_biases(simulation, images_NCHW)
    simulated = layer_outputs(simulation, images_NCHW, Mode.SIMULATE)
    for name in ("mix", "head"):
        error_C = (simulated[name] - exact[name]).flatten(0, -2).mean(0)
        assert float(error_C.abs().max() / exact[name].std()) < 1e-4


class Twice(nn.Module):
    """One convolution, used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.conv(x).relu()).flatten(1)  # type: ignore[no-any-return]


def test_bias_of_a_layer_used_twice_is_left_alone() -> None:
    """It cannot undo two errors, and moving it for the second use would spoil the first."""
    images_NCHW = torch.randn(16, 1, 8, 8)
    simulation = simulation_of(graph_of(Twice(), images_NCHW))
    calibrate(simulation, lambda: [images_NCHW], QuantSpec())
    bias = simulation.layers[0].bias
    assert bias is not None
    before = read_tensor(simulation.graph, bias).detach().clone()
    correct_biases(simulation, images_NCHW)
    assert torch.equal(read_tensor(simulation.graph, bias), before)


def test_layers_without_bias_are_left_as_they_are() -> None:
    """There is nothing to move; the layers behind take their error over."""
    model = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    images_NCHW = torch.randn(16, 1, 8, 8)
    simulation = simulation_of(graph_of(model, images_NCHW))
    calibrate(simulation, lambda: [images_NCHW], QuantSpec())
    correct_biases(simulation, images_NCHW)
    exact = layer_outputs(simulation, images_NCHW, Mode.PASS)["3"]
    assert simulation.layers[0].bias is None
    assert exact.isfinite().all()
