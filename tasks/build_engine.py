"""Step: the file that production loads, opened once by its runtime to prove that it can be."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

from tasks.contracts.errors import EngineError
from tasks.contracts.records import ArtifactRef, EngineRecord, ExportRecord
from tasks.contracts.spec import RunSpec, TargetSpec
from tasks.engines.base import Engine
from tasks.engines.hardware import hardware
from tasks.engines.onnxruntime import OnnxRuntimeEngine
from tasks.step import remember, step, the_store
from tasks.stores.base import Store
from tasks.stores.steps import JSON


@step("build engine")
def build_engine(spec: RunSpec, exported: ExportRecord) -> EngineRecord:
    """ONNX Runtime compiles when it loads, so its engine is the graph itself; what it was told is recorded."""

    def compute(_store: Store, work: Path) -> EngineRecord:
        with open_engine(exported.int8_onnx, spec.target, work) as engine:
            return EngineRecord(
                runtime=spec.target.runtime,
                version=engine.version(),
                engine=exported.int8_onnx,
                options=engine.options,
                hardware=hardware(),
            )

    inputs: dict[str, JSON] = {
        "graph": exported.int8_onnx.sha256,
        "target": spec.target.model_dump(mode="json"),
        "hardware": hardware(),
    }
    return remember("build_engine", __name__, inputs, EngineRecord, compute)


def open_engine(ref: ArtifactRef, target: TargetSpec, work: Path) -> AbstractContextManager[Engine]:
    """A stored model in the target's runtime.

    Raises:
        EngineError: if this machine cannot run it.
    """
    if target.runtime != "onnxruntime":
        raise EngineError(f"There is no adapter for {target.runtime}.", remedy="Take target.runtime: onnxruntime.")
    return OnnxRuntimeEngine(the_store().fetch(ref, work), threads=target.threads)
