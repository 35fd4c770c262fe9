"""What is exported for TensorRT, which needs no GPU; the whole flow would end at the first step without one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import pytest
from onnx import TensorProto
from prefect import flow

from tasks.choose_calibration import choose_calibration
from tasks.contracts.records import ArtifactRef, ExportRecord
from tasks.contracts.spec import RunSpec, spec_from
from tasks.export_model import export_model
from tasks.load_model import load_model
from tasks.prepare_data import prepare_data
from tasks.quantize_model import quantize_model
from tasks.stores.local import LocalStore

if TYPE_CHECKING:
    from tests.flows.conftest import Place


@flow
def up_to_export(spec: RunSpec) -> ExportRecord:
    data = prepare_data(spec)
    model = load_model(spec, data)
    quantized = quantize_model(spec, data, model, choose_calibration(spec, data, model))
    return export_model(spec, data, model, quantized)


def exported(place: Place, values: dict[str, Any], **target: Any) -> ExportRecord:
    with place._entered():
        return up_to_export(spec_from({**values, "target": target}, origin="test"))


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
    record = exported(place, mobile, runtime="tensorrt", tensorrt={"remainder": remainder})
    assert record.half_onnx is not None
    assert weight_types(place, record.float_onnx) == {"FLOAT"}
    assert weight_types(place, record.half_onnx) == {"FLOAT16"}
    assert weight_types(place, record.int8_onnx) == {"INT8", float_type}  # squeeze-excite is not INT8
    assert {layer.precision for layer in record.compression.layers} == {"int8", remainder}


def test_a_run_for_onnx_runtime_has_none(place: Place, mobile: dict[str, Any]) -> None:
    """Nothing is exported that nobody loads."""
    record = exported(place, mobile, scheme="tensorrt")
    assert record.half_onnx is None
    assert weight_types(place, record.int8_onnx) == {"INT8", "FLOAT"}
