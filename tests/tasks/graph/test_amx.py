from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from tasks.contracts.spec import QuantSpec
from tasks.engines.onnxruntime import OnnxRuntimeEngine
from tasks.graph.amx import CHANNELS, for_amx
from tasks.graph.export import INPUT, export_onnx
from tasks.graph.index import Graph, read_onnx
from tasks.graph.lint import lint
from tasks.quant.calibrate import calibrate
from tasks.quant.capture import capture
from tasks.quant.schemes import SCHEMES
from tasks.quant.simulate import convert, fit_biases, simulate

SHAPE = (2, 64, 8, 8)
LARGE = ["4", "6"]  # by number in the model


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Convolutions of 64, 576 and 1152 products: too few, too few channels, by groups, and two that are large."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(64, CHANNELS, 1),
        nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=2),
        nn.ReLU(),
        nn.Conv2d(CHANNELS, CHANNELS // 2, 3, padding=1),
        nn.Conv2d(CHANNELS // 2, CHANNELS, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(CHANNELS, CHANNELS, 3, stride=2),
    )
    graph = capture(model.eval(), torch.zeros(SHAPE))
    simulation = simulate(graph, SCHEMES["onnxruntime"], frozenset())
    calibrate(simulation, lambda: [torch.randn(SHAPE)], QuantSpec(ranges="minmax"))
    fit_biases(simulation)
    path = tmp_path_factory.mktemp("exported") / "int8.onnx"
    export_onnx(convert(simulation), torch.zeros(SHAPE), path, integer_bias=True)
    return path


def answer(path: Path) -> np.ndarray:
    images = np.random.default_rng(0).standard_normal(SHAPE, np.float32)
    with OnnxRuntimeEngine(path, threads=1) as engine:
        (logits,) = engine.run({INPUT: images}).values()
    return logits


def weights(model: onnx.ModelProto) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Steps and zero points of each layer."""
    graph = Graph(model)
    found = {layer.name: graph.weight_dequantize(layer) for layer in graph.layers}
    return {name: (graph.value(node.input[0]), graph.value(node.input[2])) for name, node in found.items() if node}


def test_large_layers_are_written_otherwise_and_answer_the_same(exported: Path, tmp_path: Path) -> None:
    """The last bit counts: it is the same product of the same integers."""
    model = read_onnx(exported)
    before = weights(model)
    shifted = for_amx(model)
    assert shifted == LARGE
    for name, (steps, zeros) in weights(model).items():
        shift = int(name in shifted)
        np.testing.assert_array_equal(steps + np.int8(shift), before[name][0])
        assert (zeros == -shift).all()
    onnx.save(model, tmp_path / "amx.onnx")
    np.testing.assert_array_equal(answer(tmp_path / "amx.onnx"), answer(exported))
    assert (tmp_path / "amx.onnx").stat().st_size == exported.stat().st_size
    assert lint(model, "onnxruntime") == lint(read_onnx(exported), "onnxruntime")


def test_a_weight_that_has_no_room_for_the_shift_stays(exported: Path) -> None:
    """Steps of -128 would wrap around; so would those of a weight that was shifted before."""
    model = read_onnx(exported)
    shifted = for_amx(model)
    assert shifted
    assert for_amx(model) == []
    full = read_onnx(exported)
    for tensor in full.graph.initializer:
        steps = numpy_helper.to_array(tensor)
        if steps.dtype == np.int8 and steps.ndim == 4:
            steps = np.where(steps == steps.min(), np.int8(-128), steps)
            tensor.CopyFrom(numpy_helper.from_array(steps, tensor.name))
    assert for_amx(full) == []
