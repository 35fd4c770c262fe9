"""Step: the float graph and the INT8 graph as ONNX, linted for the target and counted."""

from __future__ import annotations

from pathlib import Path

import onnx
import torch

from tasks.contracts.records import DataRecord, ExportRecord, ModelRecord, QuantizedRecord
from tasks.contracts.spec import RunSpec
from tasks.graph.count import compression
from tasks.graph.export import OPSET, export_onnx
from tasks.graph.lint import lint, refuse_findings
from tasks.load_model import float_model
from tasks.quant.schemes import SCHEMES
from tasks.quant.simulate import convert
from tasks.quantize_model import prepare_simulation
from tasks.step import remember, step
from tasks.stores.base import Store
from tasks.stores.steps import JSON


@step("export to ONNX")
def export_model(spec: RunSpec, data: DataRecord, model: ModelRecord, quantized: QuantizedRecord) -> ExportRecord:
    """Both graphs in one plain form; a graph that breaks a rule of its target is refused."""
    scheme = SCHEMES[spec.target.scheme_name]

    def compute(store: Store, work: Path) -> ExportRecord:
        example_NCHW = torch.zeros(2, data.channels, data.height, data.width)
        prepared = prepare_simulation(spec, data, float_model(model, work), frozenset(quantized.kept_float))
        float_path, int8_path = work / "float.onnx", work / "int8.onnx"
        export_onnx(prepared.folded, example_NCHW, float_path, integer_bias=False)
        prepared.simulation.load(store.fetch(quantized.state, work))
        export_onnx(convert(prepared.simulation), example_NCHW, int8_path, integer_bias=scheme.integer_bias)
        findings = lint(onnx.load(int8_path), scheme.name)
        refuse_findings(findings, path_name=f"{spec.name} as INT8")
        return ExportRecord(
            float_onnx=store.put(float_path, kind="float"),
            int8_onnx=store.put(int8_path, kind="int8"),
            opset=OPSET,
            warnings=tuple(
                f"{finding.rule} {finding.node}: {finding.found}"
                for finding in findings
                if finding.severity == "warning"
            ),
            compression=compression(float_path, int8_path, tuple(example_NCHW.shape)),
        )

    inputs: dict[str, JSON] = {
        "model": model.model_dump(mode="json"),
        "state": quantized.state.sha256,
        "scheme": scheme.name,
        "keep_float": list(quantized.kept_float),
        "input": [data.channels, data.height, data.width],
    }
    return remember("export_model", __name__, inputs, ExportRecord, compute)
