"""What is particular to ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest
from onnxruntime.capi import onnxruntime_pybind11_state

from tasks.contracts.errors import EngineError
from tasks.engines import hardware
from tasks.engines.onnxruntime import (
    AS_WRITTEN,
    CUDA,
    TENSORRT,
    VENDOR_ERRORS,
    OnnxRuntimeEngine,
    cpu_config,
    engine_errors,
)


@pytest.fixture
def gather(tmp_path: Path) -> Path:
    """Takes the value at an index; only running it shows that an index is out of bounds."""
    text = """
    <ir_version: 10, opset_import: ["": 21]>
    gather (int64[N] index) => (float[N] value)
    <float[3] table = {10, 20, 30}>
    { value = Gather(table, index) }
    """
    onnx.save(onnx.parser.parse_model(text), tmp_path / "gather.onnx")
    return tmp_path / "gather.onnx"


def test_a_failure_while_running_is_ours_and_chained(gather: Path) -> None:
    """The vendor's exception stays readable as the cause."""
    with (
        OnnxRuntimeEngine(gather, threads=1) as engine,
        pytest.raises(EngineError, match=r"running gather\.onnx.*out of") as caught,
    ):
        engine.run({"index": np.array([7])})
    assert isinstance(caught.value.__cause__, VENDOR_ERRORS)


@pytest.mark.parametrize(
    "name", ["Fail", "InvalidArgument", "InvalidProtobuf", "NoSuchFile", "NotImplemented", "EPFail"]
)
def test_the_vendors_exceptions_are_all_known(name: str) -> None:
    """Each exception that ONNX Runtime defines is mapped."""
    kind = getattr(onnxruntime_pybind11_state, name)
    with pytest.raises(EngineError, match="while testing"), engine_errors("testing"):
        raise kind("broken")


@pytest.mark.skipif(CUDA in ort.get_available_providers(), reason="this ONNX Runtime has CUDA")
@pytest.mark.parametrize("provider", [CUDA, TENSORRT])
def test_a_provider_that_is_not_installed_is_an_error(gather: Path, provider: str) -> None:
    """ONNX Runtime would fall back to the CPU with a warning."""
    with (
        pytest.raises(EngineError, match=rf"has no {provider}, only .*CPUExecutionProvider.*onnxruntime-gpu"),
        OnnxRuntimeEngine(gather, threads=1, provider=provider),
    ):
        pass


@pytest.mark.skipif("AzureExecutionProvider" not in ort.get_available_providers(), reason="needs a second provider")
def test_a_node_that_the_provider_does_not_take_is_an_error(gather: Path) -> None:
    """Azure's provider takes none of these nodes, which would all run on the CPU quietly."""
    with (
        pytest.raises(EngineError, match=r"opening gather\.onnx.*assigned to the default CPU EP"),
        OnnxRuntimeEngine(gather, threads=1, provider="AzureExecutionProvider"),
    ):
        pass


def test_the_session_has_the_options_that_are_recorded(gather: Path) -> None:
    """Threads, optimisation and spinning reach the runtime as the record says."""
    with OnnxRuntimeEngine(gather, threads=2, optimise=False) as engine:
        session = engine._session.get_session_options()
        assert session.intra_op_num_threads == int(engine.options["intra_op_num_threads"]) == 2
        assert session.inter_op_num_threads == int(engine.options["inter_op_num_threads"]) == 1
        assert session.graph_optimization_level == ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        assert engine.options["graph_optimization_level"] == "ORT_DISABLE_ALL"
        for key in (*cpu_config(), *AS_WRITTEN):
            assert session.get_session_config_entry(key) == engine.options[key]


def test_the_largest_products_do_not_saturate(tmp_path: Path) -> None:
    """64 products of 255 and 127 are 200 steps of the output on every CPU; in 16 bits they would be 101."""
    step = 64 * 255 * 127 / 200
    text = f"""
    <ir_version: 10, opset_import: ["": 21]>
    convolve (uint8[N, 64, 8, 8] image) => (uint8[N, 32, 8, 8] sums)
    <float one = {{1}}, float step = {{{step}}}, uint8 zero = {{0}}, int8 none = {{0}}>
    {{
      value = DequantizeLinear(image, one, zero)
      weight = DequantizeLinear(stored, one, none)
      sum = Conv(value, weight)
      sums = QuantizeLinear(sum, step, zero)
    }}
    """
    model = onnx.parser.parse_model(text)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.full((32, 64, 1, 1), 127, np.int8), "stored"))
    onnx.save(model, tmp_path / "convolve.onnx")
    with OnnxRuntimeEngine(tmp_path / "convolve.onnx", threads=1) as engine:
        (sums_NCHW,) = engine.run({"image": np.full((1, 64, 8, 8), 255, np.uint8)}).values()
    assert (sums_NCHW == 200).all()


def test_a_layer_that_is_kept_float_stays_float(tmp_path: Path) -> None:
    """Between DequantizeLinear and QuantizeLinear too: a small channel beside a large one is not rounded away."""
    text = """
    <ir_version: 10, opset_import: ["": 21]>
    keep (uint8[N, 1, 8, 8] image) => (uint8[N, 2, 8, 8] answer)
    <float step = {0.01}, uint8 zero = {0}, float[2, 1, 1, 1] weight = {100.0, 0.1}>
    {
      value = DequantizeLinear(image, step, zero)
      product = Conv(value, weight)
      part = Relu(product)
      answer = QuantizeLinear(part, step, zero)
    }
    """
    onnx.save(onnx.parser.parse_model(text), tmp_path / "keep.onnx")
    with OnnxRuntimeEngine(tmp_path / "keep.onnx", threads=1) as engine:
        (answer_NCHW,) = engine.run({"image": np.full((1, 1, 8, 8), 200, np.uint8)}).values()
    assert (answer_NCHW[:, 0] == 255).all()
    assert (answer_NCHW[:, 1] == 20).all()


@pytest.mark.parametrize(("flags", "precision"), [("avx2", "1"), ("avx2 avx512_vnni", "0"), ("avx_vnni amx_int8", "0")])
def test_exact_kernels_are_asked_for_where_others_saturate(
    flags: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nowhere else, as they take three times as long on a CPU with AMX."""
    (tmp_path / "cpuinfo").write_text(f"flags\t\t: {flags}\n")
    monkeypatch.setattr(hardware, "CPUINFO", tmp_path / "cpuinfo")
    assert cpu_config()["session.x64quantprecision"] == precision


def test_an_unknown_element_type_is_named(tmp_path: Path) -> None:
    """A string input belongs to no image classifier."""
    text = (
        '<ir_version: 10, opset_import: ["": 21]> words (string[N] text) => (string[N] same) { same = Identity(text) }'
    )
    onnx.save(onnx.parser.parse_model(text), tmp_path / "words.onnx")
    with (
        pytest.raises(EngineError, match=r"'text' is tensor\(string\)"),
        OnnxRuntimeEngine(tmp_path / "words.onnx", threads=1),
    ):
        pass
