"""The right adapter with the right options; what needs a GPU is asked for and refused here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import onnx.parser
import onnxruntime as ort
import pytest

from tasks.contracts.errors import EngineError
from tasks.contracts.spec import TargetSpec
from tasks.engines.onnxruntime import CUDA
from tasks.engines.runtimes import open_onnx, tensorrt_options


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    text = '<ir_version: 10, opset_import: ["": 20]> g (float[N,3,8,6] input) => (float[N,3,8,6] y) { y = Relu(input) }'
    onnx.save(onnx.parser.parse_model(text), tmp_path / "graph.onnx")
    return tmp_path / "graph.onnx"


def target(runtime: str, **tensorrt: Any) -> TargetSpec:
    return TargetSpec.model_validate({"runtime": runtime, "tensorrt": tensorrt})


def test_the_profile_has_the_inputs_own_name_and_sizes(graph: Path) -> None:
    """One shape each for the smallest, tuned and largest batch."""
    options = tensorrt_options(graph, target("onnxruntime-tensorrt", batch=[1, 4, 32], workspace_mib=512))
    assert options["trt_profile_min_shapes"] == "input:1x3x8x6"
    assert options["trt_profile_opt_shapes"] == "input:4x3x8x6"
    assert options["trt_profile_max_shapes"] == "input:32x3x8x6"
    assert options["trt_max_workspace_size"] == str(512 * 2**20)
    assert options["trt_fp16_enable"] == "1"


def test_a_float32_remainder_asks_for_no_float16(graph: Path) -> None:
    options = tensorrt_options(graph, target("onnxruntime-tensorrt", remainder="float32"))
    assert options["trt_fp16_enable"] == "0"
    assert "trt_max_workspace_size" not in options


@pytest.mark.skipif(CUDA in ort.get_available_providers(), reason="this ONNX Runtime has CUDA")
@pytest.mark.parametrize(
    ("runtime", "provider"),
    [("onnxruntime-cuda", "CUDAExecutionProvider"), ("onnxruntime-tensorrt", "TensorrtExecutionProvider")],
)
def test_each_runtime_has_its_provider_and_no_other(graph: Path, runtime: str, provider: str) -> None:
    """Here they are refused by name rather than replaced by the CPU."""
    engine = open_onnx(graph, target(runtime), gpu=1)
    assert engine.options["provider"] == provider
    assert engine.options["device_id"] == "1"
    with pytest.raises(EngineError, match=f"no {provider}"), engine:
        pass


def test_the_cpu_needs_no_gpu(graph: Path) -> None:
    with open_onnx(graph, target("onnxruntime"), gpu=None) as engine:
        assert engine.options["provider"] == "CPUExecutionProvider"
