"""Step: does the runtime compute what was simulated, as a whole and layer by layer?"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from tasks.contracts.records import DataRecord, EngineScore, ModelRecord, Parity, QuantizedRecord
from tasks.contracts.spec import RunSpec
from tasks.engines.onnxruntime import OnnxRuntimeEngine
from tasks.graph.export import export_onnx
from tasks.graph.parity import Feed, layer_errors, parity_of
from tasks.load_model import float_model
from tasks.quant.fake_quantize import Mode
from tasks.quant.simulate import convert, exact_tensors
from tasks.quantize_model import inputs_of, prepare_simulation
from tasks.scoring.accuracy import load_predictions
from tasks.step import Progress, remember, step, the_images
from tasks.stores.base import Store
from tasks.stores.steps import JSON

_LAYER_IMAGES = 8


@step("check parity")
def check_parity(
    spec: RunSpec, data: DataRecord, model: ModelRecord, quantized: QuantizedRecord, score: EngineScore
) -> Parity:
    """Simulation against engine on the gate images, and each integer layer alone on calibration images."""

    def compute(store: Store, work: Path) -> Parity:
        images = the_images(spec, data)
        gate = images.split("gate")
        kept_float = frozenset(quantized.kept_float)
        simulation = prepare_simulation(spec, data, float_model(model, work), kept_float).simulation
        simulation.load(store.fetch(quantized.state, work))
        progress, answers = Progress("simulating the gate images"), []
        with simulation.mode(Mode.SIMULATE) as graph, torch.inference_mode():
            for images_NCHW in inputs_of(gate, spec.evaluation.batch_size):
                answers.append(graph(images_NCHW).argmax(1).numpy())
                progress(sum(map(len, answers)), len(gate))
        few_NCHW = next(iter(inputs_of(images.split("calibration"), _LAYER_IMAGES, limit=_LAYER_IMAGES)))
        exact = exact_tensors(simulation, few_NCHW)
        graph_path = work / "int8.onnx"
        program = export_onnx(
            convert(simulation), few_NCHW[:2], graph_path, integer_bias=simulation.scheme.integer_bias
        )
        engine_predictions = load_predictions(store.fetch(score.accuracy.predictions, work))
        return parity_of(
            np.concatenate(answers),
            engine_predictions.top[:, 0],
            engine_predictions.labels,
            layer_errors(program, graph_path, exact, few_NCHW, run, work),
        )

    def run(path: Path, feed: Feed) -> Feed:
        with OnnxRuntimeEngine(path, threads=spec.target.threads) as engine:
            return engine.run(feed)

    inputs: dict[str, JSON] = {
        "images": data.digest,
        "model": model.model_dump(mode="json"),
        "state": quantized.state.sha256,
        "predictions": score.accuracy.predictions.sha256,
        "target": spec.target.model_dump(mode="json"),
    }
    return remember("check_parity", __name__, inputs, Parity, compute)
