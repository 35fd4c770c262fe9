"""Step: the file that production loads, opened once by its runtime to prove that it can be."""

from __future__ import annotations

from pathlib import Path

import onnx
from prefect import get_run_logger

from tasks.contracts.errors import EngineError
from tasks.contracts.records import ArtifactRef, EngineRecord, ExportRecord, PrecisionAudit, Tensor
from tasks.contracts.settings import Settings
from tasks.contracts.spec import RunSpec, TargetSpec
from tasks.engines.base import Engine, TensorInfo
from tasks.engines.hardware import gpu_hardware, hardware, has_amx
from tasks.engines.inspector import audit
from tasks.engines.plan import timing_cache_key
from tasks.engines.runtimes import open_onnx
from tasks.engines.tensorrt import TensorRtEngine, this_machine
from tasks.engines.tensorrt_build import BuiltPlan, build_plan
from tasks.graph.amx import for_amx
from tasks.graph.index import read_onnx
from tasks.step import Progress, remember, step, the_gpu, the_store
from tasks.stores.base import Store
from tasks.stores.steps import JSON


@step("build engine")
def build_engine(spec: RunSpec, exported: ExportRecord) -> EngineRecord:
    """For TensorRT a plan; for ONNX Runtime, which compiles when it loads, the graph, fitted to this CPU."""
    target = spec.target

    def compute(store: Store, work: Path) -> EngineRecord:
        if target.runtime == "tensorrt":
            return _planned(spec, exported, store, work)
        ref = exported.int8_onnx if target.needs_gpu else _for_this_cpu(exported.int8_onnx, store, work)
        return _described(open_model(ref, target, work), ref, target)

    inputs: dict[str, JSON] = {
        "graph": exported.int8_onnx.sha256,
        "target": target.model_dump(mode="json"),
        "hardware": hardware_for(target),
    }
    if target.runtime == "tensorrt":
        inputs["machine"] = this_machine(the_gpu()).model_dump(mode="json")
    return remember("build_engine", __name__, inputs, EngineRecord, compute)


def open_engine(engine: EngineRecord, target: TargetSpec, work: Path) -> Engine:
    """A stored engine in its runtime.

    Raises:
        EngineError: if this machine cannot run it.
    """
    if engine.plan is None:
        return open_model(engine.engine, target, work)
    return TensorRtEngine(the_store().fetch(engine.engine, work), engine.plan, gpu=the_gpu())


def open_model(ref: ArtifactRef, target: TargetSpec, work: Path) -> Engine:
    """A stored graph in the target's runtime, which is ONNX Runtime by one of its providers.

    Raises:
        EngineError: if this machine cannot run it.
    """
    return open_onnx(the_store().fetch(ref, work), target, the_gpu() if target.needs_gpu else None)


def build_plan_of(ref: ArtifactRef, target: TargetSpec, work: Path, title: str) -> BuiltPlan:
    """Compile a stored graph with TensorRT for this machine's GPU. Kernel times are kept in the store for the next one.

    Raises:
        EngineError: if TensorRT cannot take the graph, or this machine cannot build it.
    """
    store, settings, gpu, logger = the_store(), Settings(), the_gpu(), get_run_logger()
    known = f"timing/{timing_cache_key(this_machine(gpu))}.json"
    built = build_plan(
        store.fetch(ref, work),
        target.tensorrt,
        work,
        gpu=gpu,
        free_mib=settings.gpu_free_mib,
        limit_minutes=settings.build_limit_minutes,
        timing_cache=_timing_cache(store, known, work),
        progress=Progress(f"building {title}"),
    )
    for warning in built.warnings:
        logger.warning("TensorRT: %s", warning)
    logger.info("%s: a plan of %d bytes in %.0f s", title, built.plan_bytes, built.seconds)
    store.write_text(known, store.put(built.timing_cache, kind="timing").model_dump_json())
    return built


def hardware_for(target: TargetSpec) -> str:
    """What the engine will run on: part of its key, and of every latency's meaning.

    Raises:
        EngineError: if the target needs a GPU and there is none.
    """
    return gpu_hardware(the_gpu()) if target.needs_gpu else hardware()


def _for_this_cpu(ref: ArtifactRef, store: Store, work: Path) -> ArtifactRef:
    """The graph, or the same with weights as AMX takes them, where there is AMX and a layer gains by it."""
    if not has_amx():
        return ref
    model = read_onnx(store.fetch(ref, work))
    layers = for_amx(model)
    if not layers:
        return ref
    get_run_logger().info("weights of %d layers are written for this CPU's AMX", len(layers))
    path = work / "engine.onnx"
    onnx.save(model, path)
    return store.put(path, kind="engines")


def _planned(spec: RunSpec, exported: ExportRecord, store: Store, work: Path) -> EngineRecord:
    built = build_plan_of(exported.int8_onnx, spec.target, work, "the INT8 engine")
    engine = TensorRtEngine(built.plan, built.key, gpu=the_gpu())
    described = _described(engine, store.put(built.plan, kind="plans"), spec.target)
    return described.model_copy(
        update={
            "plan": built.key,
            "device_memory_bytes": built.device_memory_bytes,
            "audit": _audited(built, exported),
        }
    )


def _audited(built: BuiltPlan, exported: ExportRecord) -> PrecisionAudit | None:
    """None where TensorRT tells it in a form that we do not know: a gate on it fails then, and no other."""
    try:
        return audit(built.layers.read_text(encoding="utf-8"), exported.compression.layers)
    except EngineError as error:
        get_run_logger().warning("precisions are not audited: %s", error)
        return None


def _described(engine: Engine, ref: ArtifactRef, target: TargetSpec) -> EngineRecord:
    """Opened to prove that it can be, and to hear what it takes and gives."""
    with engine:
        return EngineRecord(
            runtime=target.runtime,
            version=engine.version(),
            engine=ref,
            options=engine.options,
            hardware=hardware_for(target),
            inputs=tuple(map(_tensor, engine.inputs)),
            outputs=tuple(map(_tensor, engine.outputs)),
        )


def _tensor(info: TensorInfo) -> Tensor:
    return Tensor(name=info.name, dtype=info.dtype.name, shape=info.shape)


def _timing_cache(store: Store, key: str, work: Path) -> bytes:
    """Of the last build on such a machine; empty if there is none, or it is gone."""
    text = store.read_text(key)
    ref = None if text is None else ArtifactRef.model_validate_json(text)
    return store.fetch(ref, work).read_bytes() if ref is not None and store.renew(ref) else b""
