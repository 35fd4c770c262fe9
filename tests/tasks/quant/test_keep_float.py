from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from tasks.contracts.spec import QuantSpec, SchemeName
from tasks.quant import keep_float
from tasks.quant.calibrate import calibrate
from tasks.quant.capture import capture
from tasks.quant.fake_quantize import Mode
from tasks.quant.keep_float import layers_better_float, macs_of
from tasks.quant.schemes import SCHEMES
from tasks.quant.simulate import Simulation, simulate


class Lopsided(nn.Module):
    """One channel of `depthwise` is `factor` times the others, and counts for no more than they do."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.body = nn.Conv2d(8, 32, 3, padding=1)
        self.last = nn.Conv2d(32, 32, 3, padding=1)
        self.head = nn.Linear(32, 5)
        with torch.no_grad():
            self.depthwise.weight[0] *= factor
            self.depthwise.bias[0] *= factor  # type: ignore[index]
            self.body.weight[:, 0] /= factor

    def forward(self, photos_NCHW: Tensor) -> Tensor:
        features_NCHW = self.body(self.depthwise(self.stem(photos_NCHW).relu()).relu()).relu()
        logits_NC: Tensor = self.head(self.last(features_NCHW).relu().mean((2, 3)))
        return logits_NC


@pytest.fixture(scope="module", name="photos_NCHW")
def _photos() -> Tensor:
    return torch.randn(48, 3, 12, 12, generator=torch.Generator().manual_seed(0))


@pytest.fixture(name="lopsided")
def _lopsided(photos_NCHW: Tensor) -> GraphModule:
    return capture(Lopsided(1000.0).eval(), photos_NCHW[:2])


def calibrated(folded: GraphModule, photos_NCHW: Tensor, kept: frozenset[str], scheme: SchemeName) -> Simulation:
    simulation = simulate(folded, SCHEMES[scheme], kept)
    calibrate(simulation, lambda: [photos_NCHW], QuantSpec(ranges="minmax"))
    return simulation


@torch.no_grad()
def logits_error(folded: GraphModule, simulation: Simulation, photos_NCHW: Tensor) -> float:
    with simulation.mode(Mode.SIMULATE) as simulated:
        return float((simulated(photos_NCHW) - folded(photos_NCHW)).square().mean())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_layer_that_costs_most_stays_float(scheme: SchemeName, lopsided: GraphModule, photos_NCHW: Tensor) -> None:
    """What it writes is not INT8 either, so nothing of the small channels is lost; the rest is INT8."""
    before = calibrated(lopsided, photos_NCHW, frozenset(), scheme)
    kept = layers_better_float(lopsided, before, photos_NCHW, frozenset(), 0.5)
    assert kept & {"depthwise", "body"}
    assert not kept & {"last", "head"}
    after = calibrated(lopsided, photos_NCHW, kept, scheme)
    errors = [logits_error(lopsided, simulation, photos_NCHW) for simulation in (before, after)]
    assert errors[1] < 0.5 * errors[0]
    assert {quantizer.mode for quantizer in before.quantizers()} == {Mode.SIMULATE}


def test_two_layers_that_must_be_float_together_are(photos_NCHW: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one writes and the other reads is INT8 as long as one of them is; here nothing else is wrong with either."""
    monkeypatch.setattr(keep_float, "_ENOUGH", 1e-4)  # noise has hardly a class
    torch.manual_seed(0)
    network = Lopsided(1.0)
    with torch.no_grad():
        network.depthwise.bias[0] = 100.0  # type: ignore[index]  # which nobody looks at
        network.body.weight[:, 0] = 0.0
    folded = capture(network.eval(), photos_NCHW[:2])
    before = calibrated(folded, photos_NCHW, frozenset(), "onnxruntime")
    error = logits_error(folded, before, photos_NCHW)
    for alone in ("depthwise", "body"):
        after = calibrated(folded, photos_NCHW, frozenset({alone}), "onnxruntime")
        assert logits_error(folded, after, photos_NCHW) > 0.8 * error
    kept = layers_better_float(folded, before, photos_NCHW, frozenset(), 0.5)
    assert kept == {"depthwise", "body"}
    together = calibrated(folded, photos_NCHW, kept, "onnxruntime")
    assert logits_error(folded, together, photos_NCHW) < 0.1 * error


def test_the_budget_is_kept(lopsided: GraphModule, photos_NCHW: Tensor) -> None:
    """Of multiply-accumulates, which are counted for each image; what the spec keeps float does not count."""
    macs = macs_of(lopsided)
    pixels = 12 * 12
    assert macs == {
        "stem": 8 * 27 * pixels,
        "depthwise": 8 * 9 * pixels,
        "body": 32 * 72 * pixels,
        "last": 32 * 288 * pixels,
        "head": 5 * 32,
    }
    simulation = calibrated(lopsided, photos_NCHW, frozenset(), "onnxruntime")
    assert not layers_better_float(lopsided, simulation, photos_NCHW, frozenset(), 0.001)
    kept = layers_better_float(lopsided, simulation, photos_NCHW, frozenset({"head"}), 0.01)
    assert kept <= {"head", "depthwise"}
    assert "head" in kept


class Attention(nn.Module):
    """Attention over pixels, whose layers see the batch behind the tokens or in one axis with them."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        y: Tensor = self.attention(tokens, tokens, tokens, need_weights=False)[0]
        return y.mean(1)


def test_products_of_tokens_are_counted_for_one_image() -> None:
    """Wherever the batch is."""
    graph = capture(Attention().eval(), torch.randn(2, 16, 3, 3))
    assert macs_of(graph) == {"attention": 9 * 16 * 48 + 9 * 16 * 16}


def test_a_model_that_no_layer_spoils_stays_integer(photos_NCHW: Tensor) -> None:
    """Its error is far below what changes answers."""
    even = capture(Lopsided(1.0).eval(), photos_NCHW[:2])
    simulation = calibrated(even, photos_NCHW, frozenset(), "onnxruntime")
    assert not layers_better_float(even, simulation, photos_NCHW, frozenset(), 0.1)
