from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torch.export import ExportedProgram

from tasks.contracts.errors import ExportError
from tasks.contracts.records import LayerError
from tasks.contracts.spec import QuantSpec, SchemeName
from tasks.engines.onnxruntime import OnnxRuntimeEngine
from tasks.graph.export import export_onnx
from tasks.graph.parity import Feed, layer_errors, parity_of, steps_apart
from tasks.quant.calibrate import calibrate
from tasks.quant.capture import capture, fold_batch_norm
from tasks.quant.schemes import SCHEMES
from tasks.quant.simulate import convert, exact_tensors, simulate


class Everything(nn.Module):
    """Each kind of layer that the schemes know."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.Hardswish())
        self.deep = nn.Sequential(nn.Conv2d(16, 16, 3, 1, 1, groups=16, bias=False), nn.BatchNorm2d(16), nn.SiLU())
        self.reduce, self.expand = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1)
        self.project = nn.Sequential(nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16))
        self.left = nn.Sequential(nn.Conv2d(16, 16, 3, 1, 1), nn.ReLU6())
        self.right = nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.Conv2d(16, 16, 1), nn.LeakyReLU())
        self.grouped = nn.Conv2d(16, 16, 1, groups=2)
        self.norm = nn.BatchNorm2d(32)
        self.last = nn.Conv2d(32, 16, 1)
        self.head = nn.Sequential(nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.deep(x)
        gate = nn.functional.hardsigmoid(self.expand(self.reduce(y.mean((2, 3), keepdim=True)).relu()))
        x = (x + self.project(y * gate)).relu()
        x = torch.cat([self.left(x), self.right(x)], 1)
        kept, changed = x.chunk(2, 1)
        x = torch.cat([kept, self.grouped(changed)], 1)
        count, channels, height, width = x.shape
        x = x.view(count, 2, channels // 2, height, width).transpose(1, 2).reshape(count, channels, height, width)
        logits_NC: Tensor = self.head(torch.sigmoid(self.last(self.norm(x).relu())))
        return logits_NC


@dataclass(frozen=True)
class Exported:
    program: ExportedProgram
    path: Path
    exact: Sequence[Tensor]
    images_NCHW: Tensor


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[SchemeName, Exported]:
    torch.manual_seed(0)
    images_NCHW = torch.randn(24, 3, 16, 16)
    model, folder = Everything().train(), tmp_path_factory.mktemp("parity")
    with torch.no_grad():
        for _ in range(30):
            model(images_NCHW)
    return {name: exported_from(model, images_NCHW, name, folder / f"{name}.onnx") for name in SCHEMES}


def exported_from(model: nn.Module, images_NCHW: Tensor, scheme: SchemeName, path: Path) -> Exported:
    folded = capture(model, images_NCHW[:2])
    fold_batch_norm(folded)
    simulation = simulate(folded, SCHEMES[scheme], frozenset())
    calibrate(simulation, lambda: [images_NCHW], QuantSpec(ranges="minmax"))
    few_NCHW = images_NCHW[:6]
    exact = exact_tensors(simulation, few_NCHW)
    program = export_onnx(convert(simulation), few_NCHW, path, integer_bias=SCHEMES[scheme].integer_bias)
    return Exported(program, path, exact, few_NCHW)


# TensorRT quantizes inputs only, so the region of `left.0` reaches to the input of `last` and holds `right.1` as well.
CONVOLUTIONS: dict[SchemeName, set[str]] = {
    "onnxruntime": {"stem.0", "deep.0", "reduce", "expand", "project.0", "left.0", "right.1", "grouped", "last"},
    "tensorrt": {"stem.0", "deep.0", "project.0", "left.0", "last"},
}


def run(path: Path, feed: Feed) -> Feed:
    with OnnxRuntimeEngine(path, threads=1) as engine:
        return engine.run(feed)


def errors_of(made: Exported, path: Path, work: Path) -> tuple[LayerError, ...]:
    return layer_errors(made.program, path, made.exact, made.images_NCHW, run, work)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_layer_is_at_most_one_step_apart(
    scheme: SchemeName, exported: dict[SchemeName, Exported], tmp_path: Path
) -> None:
    """Layer by layer, each fed what the simulation gave its inputs."""
    errors = errors_of(exported[scheme], exported[scheme].path, tmp_path)
    assert list(steps_apart(errors)) == []
    assert {error.layer for error in errors if error.op_type == "Conv"} == CONVOLUTIONS[scheme]
    for error in errors:
        assert 15 < error.sqnr_db < 80, error


def tampered(made: Exported, folder: Path, layer: str, factor: float) -> Path:
    """The file with one weight scale of `layer` multiplied."""
    model = onnx.load(made.path)
    conv = next(node for node in model.graph.node if node.name == layer)
    dequantize = next(node for node in model.graph.node if node.output[0] == conv.input[1])
    scale = next(tensor for tensor in model.graph.initializer if tensor.name == dequantize.input[1])
    changed_O = numpy_helper.to_array(scale).copy()
    changed_O[0] *= factor
    scale.CopyFrom(numpy_helper.from_array(changed_O, scale.name))
    path = folder / "tampered.onnx"
    onnx.save(model, path)
    return path


@pytest.mark.parametrize(("scheme", "layer"), [("onnxruntime", "grouped"), ("tensorrt", "stem.0")])
def test_scale_that_differs_is_found_and_named(
    scheme: SchemeName, layer: str, exported: dict[SchemeName, Exported], tmp_path: Path
) -> None:
    """And no other layer is blamed for it, since each is fed the simulation's tensors."""
    path = tampered(exported[scheme], tmp_path, layer, 1.5)
    (found,) = steps_apart(errors_of(exported[scheme], path, tmp_path))
    assert (found.layer, found.op_type) == (layer, "Conv")
    assert found.max_steps > 1


def test_runtime_that_computes_otherwise_is_found(exported: dict[SchemeName, Exported], tmp_path: Path) -> None:
    """A runtime that is off by two steps everywhere is off in every layer."""
    made = exported["onnxruntime"]

    def off_by_two(path: Path, feed: Feed) -> Feed:
        return {name: np.where(steps < 128, steps + 2, steps - 2) for name, steps in run(path, feed).items()}

    errors = layer_errors(made.program, made.path, made.exact, made.images_NCHW, off_by_two, tmp_path)
    assert list(steps_apart(errors)) == list(errors)


def test_file_of_another_program_is_refused(exported: dict[SchemeName, Exported], tmp_path: Path) -> None:
    """Its tensors have other names."""
    made = exported["onnxruntime"]
    model, path = onnx.load(made.path), tmp_path / "other.onnx"
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = ["other" if name == "quantize_per_tensor_3" else name for name in names]
    onnx.save(model, path)
    with pytest.raises(ExportError, match=r"Tensor quantize_per_tensor_3 of the simulation is not in other\.onnx"):
        errors_of(made, path, tmp_path)


class Focus(nn.Module):
    """YOLO's stem, whose slices of rows are taken twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Conv2d(3, 16, 1), nn.Conv2d(64, 16, 1), nn.Linear(16, 16)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        x = self.stem(images_NCHW).relu()
        pixels = [x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]]
        logits_NC: Tensor = self.head(self.body(torch.cat(pixels, 1)).mean((2, 3)))
        return logits_NC


@pytest.mark.parametrize("scheme", SCHEMES)
def test_tensor_that_was_merged_with_its_equal_is_checked_once(scheme: SchemeName, tmp_path: Path) -> None:
    """The exporter keeps one of equal tensors; each layer is still checked."""
    torch.manual_seed(0)
    made = exported_from(Focus().eval(), torch.randn(8, 3, 16, 16), scheme, tmp_path / "focus.onnx")
    errors = errors_of(made, made.path, tmp_path)
    assert list(steps_apart(errors)) == []
    assert {error.layer for error in errors if error.op_type == "Conv"} == {"stem", "body"}


class Pooled(nn.Module):
    """An average whose last window reaches over the edge, of a padded tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.pool = nn.Conv2d(3, 16, 1), nn.AvgPool2d(3, 2, 1, ceil_mode=True)
        self.body, self.head = nn.Conv2d(16, 16, 1), nn.Linear(16, 16)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        logits_NC: Tensor = self.head(self.body(self.pool(self.stem(images_NCHW))).mean((2, 3)))
        return logits_NC


def test_tensor_that_only_the_file_quantizes_is_part_of_its_layer(tmp_path: Path) -> None:
    """Padding is quantized by itself there, and the pool is fed what the simulation pooled."""
    torch.manual_seed(0)
    made = exported_from(Pooled().eval(), torch.randn(8, 3, 16, 16), "onnxruntime", tmp_path / "pooled.onnx")
    errors = errors_of(made, made.path, tmp_path)
    assert list(steps_apart(errors)) == []
    assert "AveragePool" in {error.op_type for error in errors}


def test_whole_model_is_compared_by_its_answers() -> None:
    """Agreement of the two with each other, and of each with the labels, in percent."""
    layer = LayerError(layer="a", op_type="Conv", max_steps=1.0, sqnr_db=math.inf)
    parity = parity_of(np.array([0, 1, 2, 3]), np.array([0, 1, 2, 0]), np.array([0, 1, 0, 0]), (layer,))
    assert parity.num_images == 4
    assert (parity.agreement, parity.simulation_top1, parity.runtime_top1) == (75.0, 50.0, 75.0)
    assert parity.layers == (layer,)


def test_limit_of_steps_is_the_callers() -> None:
    """One step is rounding; the limit itself still passes."""
    layers = tuple(
        LayerError(layer=str(steps), op_type="Conv", max_steps=steps, sqnr_db=40.0) for steps in (0, 1, 2, 3)
    )
    assert [error.layer for error in steps_apart(layers)] == ["2", "3"]
    assert [error.layer for error in steps_apart(layers, 2)] == ["3"]
