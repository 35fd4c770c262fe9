"""What our code makes of TensorRT's real API, as JSON; run with empty libraries behind it.

Names: each that our code spells, and each that the double has, with whether the real API has it too.
"""

from __future__ import annotations

import ast
import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tensorrt as trt

from tasks.contracts.errors import EngineError
from tasks.engines import tensorrt_api, tensorrt_builder, tensorrt_session

ROOT = Path(__file__).parents[3]
DOUBLE = Path(__file__).with_name("doubles") / "tensorrt.py"


def spelt_names() -> Iterator[str]:
    """trt.X.Y, wherever our code says it."""
    for path in sorted((ROOT / "tasks/engines").glob("tensorrt_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            parts: list[str] = []
            while isinstance(node, ast.Attribute):
                parts.insert(0, node.attr)
                node = node.value
            if parts and isinstance(node, ast.Name) and node.id == "trt":
                yield ".".join(parts)


def double_names() -> Iterator[str]:
    """Classes of the double, and what is public in each."""
    spec = importlib.util.spec_from_file_location("double", DOUBLE)
    assert spec is not None
    assert spec.loader is not None
    double = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(double)
    for name, value in vars(double).items():
        if isinstance(value, type) and value.__module__ == "double":
            yield name
            yield from (f"{name}.{part}" for part in vars(value) if not part.startswith("_"))


def has(name: str) -> bool:
    value: Any = trt
    for part in name.split("."):
        if not hasattr(value, part):
            return False
        value = getattr(value, part)
    return True


def refusal(make: Callable[[], object]) -> str:
    try:
        return f"made {make()}"
    except EngineError as error:
        return str(error)


def monitored() -> list[tuple[int, int]]:
    """Progress through a real subclass: two phases, one inside the other."""
    seen: list[tuple[int, int]] = []
    monitor = tensorrt_builder.Monitor(lambda done, total: seen.append((done, total)))
    assert isinstance(monitor, trt.IProgressMonitor)
    monitor.phase_start("outer", None, 2)
    monitor.phase_start("inner", "outer", 4)
    assert [monitor.step_complete("inner", step) for step in range(4)] == [True] * 4
    monitor.phase_finish("inner")
    monitor.step_complete("outer", 0)
    monitor.phase_start("unheard-of parent", "absent", 0)
    monitor.step_complete("never started", 7)
    monitor.step_complete("outer", 1)
    monitor.phase_finish("outer")
    return seen


def logged() -> tuple[str, ...]:
    assert isinstance(tensorrt_api.LOG, trt.ILogger)
    mark = tensorrt_api.LOG.mark()
    for severity in ("INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"):
        tensorrt_api.LOG.log(getattr(trt.ILogger.Severity, severity), "said")
    kept: tuple[str, ...] = tensorrt_api.LOG.since(mark)
    return kept


if __name__ == "__main__":
    facts = {
        "version": tensorrt_api.version(),
        "cuda": tensorrt_api._cuda_of_package(),
        "spelt": {name: has(name) for name in spelt_names()},
        "double": {name: has(name) for name in double_names()},
        "builder": refusal(tensorrt_api.make_builder),
        "runtime": refusal(tensorrt_api.make_runtime),
        "logged": logged(),
        "progress": monitored(),
        "sizes": tensorrt_api.sizes(trt.Dims((-1, 3, 8, 8))),
        "dtypes": {kind.name: str(tensorrt_session.DTYPES[kind].__name__) for kind in tensorrt_session.DTYPES},
    }
    print(json.dumps(facts))  # noqa: T201 - the test reads it
