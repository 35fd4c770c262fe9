"""Step: latency and memory of the engine beside the float model, both in the engine's runtime."""

from __future__ import annotations

from pathlib import Path

from tasks.build_engine import open_engine, open_model
from tasks.contracts.records import DataRecord, EngineRecord, EngineSpeed, ExportRecord
from tasks.contracts.spec import RunSpec
from tasks.graph.export import INPUT
from tasks.scoring.latency import measure_latency
from tasks.scoring.memory import measure_memory
from tasks.step import Progress, remember, step, the_images
from tasks.stores.base import Store
from tasks.stores.steps import JSON


@step("measure engine")
def measure_engine(spec: RunSpec, data: DataRecord, exported: ExportRecord, engine: EngineRecord) -> EngineSpeed:
    """Float and INT8 take turns on real images; memory is that of a fresh process each."""
    evaluation = spec.evaluation

    def compute(store: Store, work: Path) -> EngineSpeed:
        gate = the_images(spec).split("gate")
        feeds = {size: {INPUT: next(iter(gate.batches(size)))[0]} for size in evaluation.latency_batch_sizes}
        feeds = {size: feed for size, feed in feeds.items() if len(feed[INPUT]) == size}
        with (
            open_model(exported.float_onnx, spec.target, work) as float_engine,
            open_engine(engine, spec.target, work) as int8_engine,
        ):
            latencies = measure_latency(
                float_engine.run,
                int8_engine.run,
                feeds,
                rounds=evaluation.latency_rounds,
                progress=Progress("measuring latency"),
            )
        paths = (store.fetch(ref, work) for ref in (exported.float_onnx, engine.engine))
        memory = measure_memory(*paths, threads=spec.target.threads, batch_size=evaluation.latency_batch_sizes[0])
        return EngineSpeed(latencies=latencies, memory=memory)

    inputs: dict[str, JSON] = {
        "float": exported.float_onnx.sha256,
        "engine": engine.model_dump(mode="json"),
        "evaluation": evaluation.model_dump(mode="json"),
        "images": data.digest,
    }
    return remember("measure_engine", __name__, inputs, EngineSpeed, compute)
