"""Building a plan, in a process that can be killed: TensorRT may search for hours, run out of memory, or crash.

`python -m tasks.engines.tensorrt_build FOLDER PARENT` is that process; it finds `request.json` in the folder.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from tasks.contracts.errors import EngineError
from tasks.contracts.records import PlanKey, Record
from tasks.contracts.spec import TensorRtSpec
from tasks.engines.child import Progress, run_child, serve
from tasks.engines.faults import vendor_imports


class Request(Record):
    """What the process is asked for."""

    onnx: Path
    spec: TensorRtSpec
    tf32: bool
    gpu: int
    free_mib: int


class BuiltPlan(Record):
    """What came of it. The files lie in the work folder."""

    plan: Path
    key: PlanKey
    timing_cache: Path  # for the next build with the same `timing_cache_key`
    layers: Path  # JSON of TensorRT's engine inspector: each layer with the precision that was chosen
    plan_bytes: int
    device_memory_bytes: int  # activations and scratch of one execution context
    seconds: float
    warnings: tuple[str, ...]


def build_plan(
    onnx: Path,
    spec: TensorRtSpec,
    work: Path,
    *,
    tf32: bool = True,
    gpu: int = 0,
    free_mib: int = 0,
    limit_minutes: float = 60,
    timing_cache: bytes = b"",
    progress: Progress | None = None,
) -> BuiltPlan:
    """Compile an ONNX file with explicit Q/DQ for this machine's GPU, strongly typed.

    Args:
        work: a folder that outlives the result, which names files in it.
        tf32: whether float32 may be computed in TF32, as TensorRT does by default; off for an exact float baseline.
        free_mib: least GPU memory that must be free.
        limit_minutes: how long it may take before it is killed.
        timing_cache: of an earlier build; one that does not fit is left out with a warning.

    Raises:
        EngineError: if TensorRT cannot take the model, or the machine cannot build it.
    """
    folder = Path(tempfile.mkdtemp(prefix="tensorrt-", dir=work)).resolve()
    request = Request(onnx=onnx.resolve(), spec=spec, tf32=tf32, gpu=gpu, free_mib=free_mib)
    (folder / "request.json").write_text(request.model_dump_json(), encoding="utf-8")
    (folder / "timing.cache").write_bytes(timing_cache)
    command = [sys.executable, "-m", __name__, str(folder), str(os.getpid())]
    run_child(command, folder, doing=f"Building {onnx.name}", limit_s=60 * limit_minutes, progress=progress)
    return BuiltPlan.model_validate_json((folder / "built.json").read_bytes())


def main(folder: Path, parent: int) -> int:
    def work(progress: Progress) -> None:
        request = Request.model_validate_json((folder / "request.json").read_bytes())
        if not request.onnx.is_file():
            raise EngineError(f"{request.onnx} is not a file.", remedy="Name an ONNX file that exists.")
        with vendor_imports():
            from tasks.engines.tensorrt_builder import build
        built = build(request, folder, progress)
        (folder / "built.json").write_text(built.model_dump_json(), encoding="utf-8")

    return serve(folder, parent, work)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
