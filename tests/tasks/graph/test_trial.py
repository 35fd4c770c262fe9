from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest

from tasks.contracts.errors import DataError
from tasks.engines.onnxruntime import OnnxRuntimeEngine
from tasks.graph.trial import Feed, trial


def run(path: Path, feeds: Iterable[Feed]) -> Iterator[Feed]:
    with OnnxRuntimeEngine(path, threads=1) as engine:
        yield from map(engine.run, feeds)


def graph(nodes: str, *, batch: str = "batch", scale: float = 0.05) -> onnx.ModelProto:
    """An image that is quantized at steps of `scale`, and what `nodes` make of it."""
    return onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["": 20]> net (float[{batch}, 3, 8, 8] input) => (float[{batch}, 192] logits)
        <float s = {{{scale}}}, int8 z = {{0}}, float zero = {{0}}> {{
          [q] q = QuantizeLinear(input, s, z)
          [d] d = DequantizeLinear(q, s, z)
          {nodes}
        }}"""
    )


FLAT = "[flat] logits = Flatten(d)"


@pytest.mark.parametrize("batch", ["batch", "1", "3"])
def test_a_graph_that_answers_has_no_findings(batch: str, tmp_path: Path) -> None:
    """Whatever its batch."""
    assert trial(graph(FLAT, batch=batch), run, tmp_path) == ()


def test_answers_that_are_not_finite_are_an_error(tmp_path: Path) -> None:
    """A sum divided by nothing."""
    (finding,) = trial(graph("[divide] x = Div(d, zero)\n logits = Flatten(x)"), run, tmp_path)
    assert (finding.rule, finding.severity, finding.node) == ("L25", "error", "logits")
    assert finding.found == "384 values are not finite"


def test_a_graph_that_does_not_run_is_an_error(tmp_path: Path) -> None:
    """Valid by its shapes, but not at this size."""
    nodes = "[shape] n = Shape(d)\n [shape_two] m = Mul(n, n)\n [bad] x = Reshape(d, m)\n logits = Flatten(x)"
    (finding,) = trial(graph(nodes), run, tmp_path)
    assert (finding.rule, finding.severity, finding.node) == ("L25", "error", "net")
    assert "ONNX Runtime failed while running trial.onnx" in finding.found


@pytest.mark.parametrize(
    ("scale", "found"),
    [(0.05, None), (0.001, "a scale that reaches 0.127 for values up to 5"), (0.5, "a scale that reaches 63.5")],
)
def test_scales_are_held_against_what_the_images_give(scale: float, found: str | None, tmp_path: Path) -> None:
    """Over all images: the largest value is in the last one of forty."""
    images_NCHW = np.zeros((40, 3, 8, 8), np.float32)
    images_NCHW[39, 2, 7, 7] = -5
    findings = trial(graph(FLAT, scale=scale), run, tmp_path, images_NCHW)
    if found is None:
        assert findings == ()
    else:
        (finding,) = findings
        assert (finding.rule, finding.severity, finding.node) == ("L22", "warning", "q")
        assert found in finding.found


def test_images_of_nothing_judge_no_scale(tmp_path: Path) -> None:
    """Nothing is known of a tensor that is always 0."""
    assert trial(graph(FLAT), run, tmp_path, np.zeros((2, 3, 8, 8), np.float32)) == ()


@pytest.mark.parametrize(
    ("shape", "dtype", "batch"),
    [((2, 3, 9, 8), "float32", "batch"), ((3, 8, 8), "float32", "batch"), ((2, 3, 8, 8), "float64", "batch"),
     ((2, 3, 8, 8), "float32", "3"), ((0, 3, 8, 8), "float32", "batch")],
)  # fmt: skip
def test_images_that_do_not_fit_are_refused(shape: tuple[int, ...], dtype: str, batch: str, tmp_path: Path) -> None:
    """Rather than taken for a fault of the graph."""
    with pytest.raises(DataError, match=r"The images are .* the graph takes float32\[(any|3), 3, 8, 8\]"):
        trial(graph(FLAT, batch=batch), run, tmp_path, np.zeros(shape, dtype))
