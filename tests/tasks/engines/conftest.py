from __future__ import annotations

import importlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tasks.contracts.errors import EngineError
from tasks.contracts.spec import TensorRtSpec
from tasks.engines.tensorrt import this_machine
from tasks.engines.tensorrt_build import BuiltPlan, Request, build_plan

DOUBLES = Path(__file__).with_name("doubles")
VENDORS = ("tensorrt", "pycuda", "pycuda.driver", "pycuda.graphs")
OURS = tuple(f"tasks.engines.{name}" for name in ("cuda", "tensorrt_api", "tensorrt_session", "tensorrt_builder"))

MakePlan = Callable[..., BuiltPlan]


@pytest.fixture
def doubles(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """TensorRT and PyCUDA on host memory, in place of what this machine has or has not, here and in child processes."""
    before = {name: sys.modules.pop(name) for name in (*VENDORS, *OURS) if name in sys.modules}
    monkeypatch.syspath_prepend(DOUBLES)
    monkeypatch.setenv("PYTHONPATH", str(DOUBLES))
    graphs = importlib.import_module("pycuda.graphs")
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", graphs)
    monkeypatch.setattr("cuda.bindings.driver", graphs, raising=False)
    yield SimpleNamespace(
        tensorrt=importlib.import_module("tensorrt"), cuda=importlib.import_module("pycuda.driver"), graphs=graphs
    )
    package = importlib.import_module("tasks.engines")
    for name in (*VENDORS, *OURS):
        sys.modules.pop(name, None)
        vars(package).pop(name.rpartition(".")[2], None) if name in OURS else None
    sys.modules.update(before)


def need_gpu() -> None:
    """Skips, with the reason, where TensorRT cannot run."""
    try:
        this_machine()
    except EngineError as error:
        pytest.skip(f"no TensorRT on a GPU: {error}")


@pytest.fixture(params=["double", "gpu"])
def make_plan(request: pytest.FixtureRequest, tmp_path: Path) -> MakePlan:
    """Builds a plan: for the doubles in this process, for a real GPU as it is done in production."""
    return plan_maker(request, request.param, tmp_path)


def plan_maker(request: pytest.FixtureRequest, machine: str, work: Path) -> MakePlan:
    if machine == "gpu":
        need_gpu()
        return lambda onnx, spec=None: build_plan(onnx, spec or TensorRtSpec(), work)
    request.getfixturevalue("doubles")
    builder = importlib.import_module("tasks.engines.tensorrt_builder")

    def build(
        onnx: Path, spec: TensorRtSpec | None = None, *, timing_cache: bytes = b"", tf32: bool = True, free_mib: int = 0
    ) -> BuiltPlan:
        folder = Path(tempfile.mkdtemp(dir=work))
        (folder / "timing.cache").write_bytes(timing_cache)
        wanted = Request(onnx=onnx, spec=spec or TensorRtSpec(), tf32=tf32, gpu=0, free_mib=free_mib)
        built: BuiltPlan = builder.build(wanted, folder, lambda done, total: None)
        return built

    return build
