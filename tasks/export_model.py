"""Step: the float graph and the INT8 graph as ONNX, in the types that the target computes in, linted and counted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import torch

from tasks.contracts.records import DataRecord, ExportRecord, ModelRecord, QuantizedRecord
from tasks.contracts.spec import RunSpec
from tasks.engines.onnxruntime import OnnxRuntimeEngine
from tasks.graph.count import compression
from tasks.graph.export import OPSET, export_onnx
from tasks.graph.half import half_from, largest_values
from tasks.graph.lint import lint, refuse_findings
from tasks.graph.parity import Feed
from tasks.load_model import float_model
from tasks.quant.schemes import SCHEMES
from tasks.quant.simulate import convert
from tasks.quantize_model import prepare_simulation
from tasks.step import remember, step, the_images
from tasks.stores.base import Store
from tasks.stores.steps import JSON

_OBSERVED_IMAGES = 32  # whose activations say what float16 can hold


@step("export to ONNX")
def export_model(spec: RunSpec, data: DataRecord, model: ModelRecord, quantized: QuantizedRecord) -> ExportRecord:
    """Both graphs in one plain form; a graph that breaks a rule of its target is refused.

    For TensorRT there is the float graph in FP16 too, and what is not INT8 is FP16 where the spec asks for that.
    """
    scheme = SCHEMES[spec.target.scheme_name]
    for_tensorrt = "tensorrt" in spec.target.runtime

    def compute(store: Store, work: Path) -> ExportRecord:
        example_NCHW = torch.zeros(2, data.channels, data.height, data.width)
        prepared = prepare_simulation(spec, data, float_model(model, work), frozenset(quantized.kept_float))
        float_path, int8_path = work / "float.onnx", work / "int8.onnx"
        export_onnx(prepared.folded, example_NCHW, float_path, integer_bias=False)
        prepared.simulation.load(store.fetch(quantized.state, work))
        export_onnx(convert(prepared.simulation), example_NCHW, int8_path, integer_bias=scheme.integer_bias)
        half_onnx, notes = None, tuple[str, ...]()
        if for_tensorrt:
            few_NCHW = next(iter(the_images(spec, data).split("calibration").batches(_OBSERVED_IMAGES)))[0]
            half_path, _ = _in_half(float_path, few_NCHW, work)
            half_onnx = store.put(half_path, kind="half")
            if spec.target.tensorrt.remainder == "float16":
                int8_path, notes = _in_half(int8_path, few_NCHW, work)
        findings = lint(onnx.load(int8_path), scheme.name)
        refuse_findings(findings, path_name=f"{spec.name} as INT8")
        return ExportRecord(
            float_onnx=store.put(float_path, kind="float"),
            half_onnx=half_onnx,
            int8_onnx=store.put(int8_path, kind="int8"),
            opset=OPSET,
            warnings=tuple(
                f"{finding.rule} {finding.node}: {finding.found}"
                for finding in findings
                if finding.severity == "warning"
            ),
            half_notes=notes,
            compression=compression(float_path, int8_path, tuple(example_NCHW.shape)),
        )

    inputs: dict[str, JSON] = {
        "model": model.model_dump(mode="json"),
        "state": quantized.state.sha256,
        "scheme": scheme.name,
        "keep_float": list(quantized.kept_float),
        "input": [data.channels, data.height, data.width],
    }
    if for_tensorrt:
        inputs["half"] = {"remainder": spec.target.tensorrt.remainder, "images": data.digest}
    return remember("export_model", __name__, inputs, ExportRecord, compute)


def _in_half(path: Path, images_NCHW: np.ndarray, work: Path) -> tuple[Path, tuple[str, ...]]:
    """The file in float16, beside it, and what was not simply rounded."""

    def run(observed: Path, feed: Feed) -> Feed:
        with OnnxRuntimeEngine(observed, threads=1) as engine:
            return engine.run(feed)

    half, notes = half_from(onnx.load(path), largest_values(path, images_NCHW, run, work))
    half_path = path.with_stem(f"{path.stem}_half")
    onnx.save(half, half_path)
    return half_path, notes
