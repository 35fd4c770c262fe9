"""Step: the engine on the gate images, beside the float model."""

from __future__ import annotations

from pathlib import Path

from tasks.build_engine import open_engine
from tasks.contracts.records import Accuracy, DataRecord, EngineRecord, EngineScore
from tasks.contracts.spec import RunSpec
from tasks.scoring.accuracy import accuracy_of, compare, load_predictions, predict, save_predictions
from tasks.step import Progress, remember, step, the_images
from tasks.stores.base import Store
from tasks.stores.steps import JSON


@step("score engine")
def score_engine(spec: RunSpec, data: DataRecord, engine: EngineRecord, baseline: Accuracy) -> EngineScore:
    """Accuracy, and every image on which the engine and the float model part."""

    def compute(store: Store, work: Path) -> EngineScore:
        gate, progress = the_images(spec, data).split("gate"), Progress("scoring the engine")
        with open_engine(engine, spec.target, work) as running:
            batches = gate.batches(spec.evaluation.batch_size)
            predictions = predict(running.answer, batches, num_images=len(gate), progress=progress)
        path = work / "predictions.npz"
        save_predictions(predictions, path)
        float_predictions = load_predictions(store.fetch(baseline.predictions, work))
        return EngineScore(
            accuracy=accuracy_of(predictions, len(data.class_names), store.put(path, kind="predictions")),
            comparison=compare(float_predictions, predictions, data.class_names),
        )

    inputs: dict[str, JSON] = {
        "images": data.digest,
        "engine": engine.model_dump(mode="json"),
        "baseline": baseline.predictions.sha256,
    }
    return remember("score_engine", __name__, inputs, EngineScore, compute)
