from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tasks.contracts.errors import EngineError
from tasks.scoring.memory import measure_memory, peak_memory_mib

MIB = 2**20


def save_model(path: Path, *, weight_mib: int) -> Path:
    """One matrix product whose weight has the given size."""
    weight = np.ones((256, weight_mib * MIB // 4 // 256), np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["pixels", "weight"], ["product"]),
            helper.make_node("ReduceMean", ["product"], ["logits"], keepdims=1, noop_with_empty_axes=0),
        ],
        "product",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["N", 256])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 1])],
        [numpy_helper.from_array(weight, "weight")],
    )
    onnx.save(helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 21)]), path)
    return path


def test_a_larger_model_needs_more_memory_and_the_parent_does_not_count(tmp_path: Path) -> None:
    """64 MiB of weights show in the peak; half a gigabyte held by this process does not."""
    small = save_model(tmp_path / "small.onnx", weight_mib=1)
    large = save_model(tmp_path / "large.onnx", weight_mib=64)
    held = np.ones(512 * MIB // 8)
    memory = measure_memory(large, small, threads=1, batch_size=2)
    assert held.sum() > 0
    assert 20 < memory.int8_mib < 300
    assert memory.float_mib - memory.int8_mib > 50


def test_a_failing_child_is_an_error_with_its_last_words(tmp_path: Path) -> None:
    """The reason is in the message, not in a lost log."""
    with pytest.raises(EngineError, match=r"none\.onnx failed with exit code 1: .*none\.onnx is not a file"):
        peak_memory_mib(tmp_path / "none.onnx", threads=1, batch_size=1)


def test_a_child_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    """Nobody waits for ever."""
    with pytest.raises(EngineError, match=r"longer than 0\.01 s"):
        peak_memory_mib(save_model(tmp_path / "tiny.onnx", weight_mib=1), threads=1, batch_size=1, limit_s=0.01)


def test_the_measured_process_holds_nothing_but_the_runtime() -> None:
    """A framework imported by accident would be counted as the model's memory."""
    code = "import sys, tasks.scoring.memory_probe; print(*{name.partition('.')[0] for name in sys.modules})"
    imported = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {"torch", "scipy", "pydantic", "onnx", "prefect"}.isdisjoint(imported)
    assert "onnxruntime" in imported
