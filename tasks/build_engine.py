"""Step: the file that production loads, opened once by its runtime to prove that it can be."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

from tasks.contracts.errors import EngineError
from tasks.contracts.records import ArtifactRef, EngineRecord, ExportRecord, Tensor
from tasks.contracts.spec import RunSpec, TargetSpec
from tasks.engines.base import Engine, TensorInfo
from tasks.engines.hardware import gpu_hardware, hardware
from tasks.engines.runtimes import open_onnx
from tasks.step import remember, step, the_gpu, the_store
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
                hardware=hardware_for(spec.target),
                inputs=tuple(map(_tensor, engine.inputs)),
                outputs=tuple(map(_tensor, engine.outputs)),
            )

    inputs: dict[str, JSON] = {
        "graph": exported.int8_onnx.sha256,
        "target": spec.target.model_dump(mode="json"),
        "hardware": hardware_for(spec.target),
    }
    return remember("build_engine", __name__, inputs, EngineRecord, compute)


def open_engine(ref: ArtifactRef, target: TargetSpec, work: Path) -> AbstractContextManager[Engine]:
    """A stored model in the target's runtime.

    Raises:
        EngineError: if this machine cannot run it.
    """
    if target.runtime == "tensorrt":
        raise EngineError("There is no adapter for tensorrt.", remedy="Take target.runtime: onnxruntime.")
    return open_onnx(the_store().fetch(ref, work), target, the_gpu() if target.needs_gpu else None)


def hardware_for(target: TargetSpec) -> str:
    """What the engine will run on: part of its key, and of every latency's meaning.

    Raises:
        EngineError: if the target needs a GPU and there is none.
    """
    return gpu_hardware(the_gpu()) if target.needs_gpu else hardware()


def _tensor(info: TensorInfo) -> Tensor:
    return Tensor(name=info.name, dtype=info.dtype.name, shape=info.shape)
