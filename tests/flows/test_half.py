"""What a run leaves for TensorRT, whether or not this machine can build an engine from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import pytest
from onnx import TensorProto

from tasks.contracts.records import ArtifactRef, ExportRecord
from tasks.stores.local import LocalStore

if TYPE_CHECKING:
    from tests.flows.conftest import Place


def exported(place: Place) -> ExportRecord:
    (path,) = (place.store / "steps" / "export_model").glob("*.json")
    return ExportRecord.model_validate(json.loads(path.read_text())["record"])


def weight_types(place: Place, ref: ArtifactRef) -> set[str]:
    """Types of all constants of more than one dimension."""
    path: Path = LocalStore(place.store).local_path(ref)
    tensors = onnx.load(path).graph.initializer
    return {TensorProto.DataType.Name(tensor.data_type) for tensor in tensors if len(tensor.dims) > 1}


@pytest.mark.parametrize(("remainder", "float_type"), [("float16", "FLOAT16"), ("float32", "FLOAT")])
def test_a_run_for_tensorrt_exports_float16(
    remainder: str, float_type: str, place: Place, mobile: dict[str, Any]
) -> None:
    """The float model always, to compare INT8 with; what is not INT8 if the spec says so."""
    place.run(mobile, target={"runtime": "tensorrt", "tensorrt": {"remainder": remainder}})
    record = exported(place)
    assert record.half_onnx is not None
    assert weight_types(place, record.float_onnx) == {"FLOAT"}
    assert weight_types(place, record.half_onnx) == {"FLOAT16"}
    assert weight_types(place, record.int8_onnx) == {"INT8", float_type}  # squeeze-excite is not INT8
    assert {layer.precision for layer in record.compression.layers} == {"int8", remainder}


def test_a_run_for_onnx_runtime_has_none(place: Place, mobile: dict[str, Any]) -> None:
    """Nothing is exported that nobody loads."""
    place.run(mobile)
    assert exported(place).half_onnx is None
    assert weight_types(place, exported(place).int8_onnx) == {"INT8", "FLOAT"}
