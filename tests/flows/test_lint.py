"""`requant lint` over files, by the command line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from typer.testing import CliRunner, Result

from flows import cli
from flows.lint import lines_of
from tasks.contracts.errors import RequantError
from tasks.graph.lint import Finding

TEXT = """<ir_version: 10, opset_import: ["": 20]> net (float[batch, 3, 8, 8] input) => (float[batch, 192] logits)
<float s = {0.05}, int8 z = {0}> {
  [q] q = QuantizeLinear(input, s, z)
  [d] d = DequantizeLinear(q, s, z)
  [flat] logits = Flatten(d)
}"""


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.app, ["lint", *map(str, arguments)])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    onnx.save(onnx.parser.parse_model(TEXT), tmp_path / "net.onnx")
    return tmp_path / "net.onnx"


def test_warnings_and_notes_end_with_status_0(path: Path) -> None:
    """Counted first, then told rule by rule."""
    result = call(path)
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        "net.onnx for tensorrt: 0 errors, 1 warning, 1 note",
        "warning  L23: Quantize the model first.",
        "    net: none of 0 layers in INT8",
        "info  L18: TensorRT computes in the types of the graph: write in FP16 what should run in it.",
        "    net: operators beside Q/DQ: 1 in FLOAT",
    ]


def test_errors_end_with_status_3(path: Path) -> None:
    """The graph that is right for one target is wrong for the other."""
    result = call(path, "--target", "onnxruntime")
    assert result.exit_code == 3
    assert result.stdout.splitlines() == [
        "net.onnx for onnxruntime: 2 errors, 0 warnings, 0 notes",
        "error  L03: Write zero points as constants: UINT8 for activations, INT8 and 0 for weights.",
        "    q, d: a zero point of type INT8, not UINT8",
    ]


def test_scales_are_judged_by_images(path: Path, tmp_path: Path) -> None:
    """From a file of preprocessed ones."""
    np.save(tmp_path / "images.npy", np.full((5, 3, 8, 8), 100, np.float32))
    result = call(path, "--data", tmp_path / "images.npy")
    assert result.exit_code == 0
    assert "    q: a scale that reaches 6.35 for values up to 100" in result.stdout.splitlines()


def test_a_file_that_cannot_be_read_is_one_refusal(tmp_path: Path) -> None:
    """Which `main` ends with status 1."""
    result = call(tmp_path / "none.onnx")
    assert isinstance(result.exception, RequantError)
    assert result.stdout == ""


@pytest.mark.parametrize("content", [None, b"no array", b""], ids=["missing", "foreign", "empty"])
def test_images_that_cannot_be_read_are_one_refusal(content: bytes | None, path: Path, tmp_path: Path) -> None:
    """With the file and the fault."""
    images = tmp_path / "images.npy"
    if content is not None:
        images.write_bytes(content)
    result = call(path, "--data", images)
    assert isinstance(result.exception, RequantError)
    assert f"{images} cannot be read" in result.exception.problem


def test_an_unknown_target_is_wrong_usage(path: Path) -> None:
    """Told by the command line itself."""
    assert call(path, "--target", "tpu").exit_code == 2


def test_many_findings_of_a_rule_are_summed_up() -> None:
    """Equal ones in one line, with the first nodes; of different ones the first few."""
    equal = [
        Finding(rule="L16", severity="info", node=f"conv{n}", found="depthwise", remedy="Measure.") for n in range(7)
    ]
    different = [
        Finding(rule="L04", severity="error", node=f"q{n}", found=f"scale {n}", remedy="Calibrate.") for n in range(8)
    ]
    assert list(lines_of([*equal, *different], "net")) == [
        "net: 8 errors, 0 warnings, 7 notes",
        "error  L04: Calibrate.",
        *(f"    q{n}: scale {n}" for n in range(5)),
        "    and 3 more",
        "info  L16: Measure.",
        "    conv0, conv1, conv2, conv3, conv4 and 2 more: depthwise",
    ]
