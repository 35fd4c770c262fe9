"""Step: latency and memory of the engine beside the float model, both in the engine's runtime."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

import torch

from tasks.build_engine import build_plan_of, open_engine, open_model
from tasks.contracts.records import DataRecord, EngineRecord, EngineSpeed, ExportRecord, Memory, PlanKey, Precision
from tasks.contracts.spec import RunSpec
from tasks.engines.base import Engine
from tasks.engines.hardware import gpu_bus_id
from tasks.engines.tensorrt import TensorRtEngine
from tasks.graph.export import INPUT
from tasks.scoring.gpu_latency import device_memory_mib, measure_gpu_speed
from tasks.scoring.latency import Feed, measure_latency
from tasks.scoring.memory import measure_memory
from tasks.scoring.nvml import watch_gpu
from tasks.step import Progress, remember, step, the_gpu, the_images, the_store
from tasks.stores.base import Store
from tasks.stores.steps import JSON

Opening = Callable[[], Engine]


@step("measure engine")
def measure_engine(spec: RunSpec, data: DataRecord, exported: ExportRecord, engine: EngineRecord) -> EngineSpeed:
    """Float and INT8 take turns on real images. TensorRT's float engines, FP32 and FP16, are built to be measured."""
    evaluation, target = spec.evaluation, spec.target

    def compute(store: Store, work: Path) -> EngineSpeed:
        gate = the_images(spec, data).split("gate")
        feeds = {size: {INPUT: next(iter(gate.batches(size)))[0]} for size in evaluation.latency_batch_sizes}
        feeds = {size: feed for size, feed in feeds.items() if len(feed[INPUT]) == size}
        if target.runtime == "tensorrt":
            return _tensorrt_speed(spec, exported, engine, feeds, work)

        def float_engine() -> Engine:
            return open_model(exported.float_onnx, target, work)

        def int8_engine() -> Engine:
            return open_engine(engine, target, work)

        with float_engine() as plain, int8_engine() as integer:
            latencies = measure_latency(
                plain.run,
                integer.run,
                feeds,
                rounds=evaluation.latency_rounds,
                progress=Progress("measuring latency"),
            )
        if target.needs_gpu:
            memory = _device_memory(float_engine, int8_engine, feeds)
        else:
            paths = (store.fetch(ref, work) for ref in (exported.float_onnx, engine.engine))
            memory = measure_memory(*paths, threads=target.threads, batch_size=evaluation.latency_batch_sizes[0])
        return EngineSpeed(latencies=latencies, memory=memory)

    inputs: dict[str, JSON] = {
        "float": exported.float_onnx.sha256,
        "engine": engine.model_dump(mode="json"),
        "evaluation": evaluation.model_dump(mode="json"),
        "images": data.digest,
    }
    return remember("measure_engine", __name__, inputs, EngineSpeed, compute)


def _tensorrt_speed(
    spec: RunSpec, exported: ExportRecord, engine: EngineRecord, feeds: Mapping[int, Feed], work: Path
) -> EngineSpeed:
    """INT8 against the better of FP32 and FP16, in one process and in turns."""
    assert exported.half_onnx is not None  # the export makes it for this runtime
    assert engine.plan is not None
    gpu, feed = the_gpu(), next(iter(feeds.values()))
    full = build_plan_of(exported.float_onnx, spec.target, work, "the FP32 engine")
    half = build_plan_of(exported.half_onnx, spec.target, work, "the FP16 engine")
    plans: dict[Precision, tuple[Path, PlanKey]] = {
        "int8": (the_store().fetch(engine.engine, work), engine.plan),
        "float32": (full.plan, full.key),
        "float16": (half.plan, half.key),
    }
    memory: dict[Precision, float] = {
        precision: device_memory_mib(TensorRtEngine(path, key, gpu=gpu), feed, _used_bytes)
        for precision, (path, key) in plans.items()
    }
    with ExitStack() as running, watch_gpu(gpu_bus_id(gpu)) as monitor:
        engines = {
            precision: running.enter_context(TensorRtEngine(path, key, gpu=gpu))
            for precision, (path, key) in plans.items()
        }
        speed, latencies = measure_gpu_speed(
            engines, feeds, monitor, memory_mib=memory, progress=Progress("measuring on the GPU")
        )
    baseline = latencies[0].baseline
    return EngineSpeed(
        latencies=latencies, memory=Memory(float_mib=memory[baseline], int8_mib=memory["int8"]), gpu=speed
    )


def _device_memory(float_engine: Opening, int8_engine: Opening, feeds: Mapping[int, Feed]) -> Memory:
    feed = next(iter(feeds.values()))
    return Memory(
        float_mib=device_memory_mib(float_engine(), feed, _used_bytes),
        int8_mib=device_memory_mib(int8_engine(), feed, _used_bytes),
    )


def _used_bytes() -> int:
    free, total = torch.cuda.mem_get_info()
    return total - free
