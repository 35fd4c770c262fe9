"""Our code against the real Python API of the oldest and the newest TensorRT that it is meant for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.tensorrt_api import CACHE, PACKAGES, Api, NoApiError, tensorrt_api

ROOT = Path(__file__).parents[3]
PROBE = Path(__file__).with_name("tensorrt_probe.py")
TYPED = ("tasks/engines/tensorrt_api.py", "tasks/engines/tensorrt_builder.py", "tasks/engines/tensorrt_session.py")


@pytest.fixture(scope="module", params=PACKAGES)
def api(request: pytest.FixtureRequest) -> Api:
    try:
        return tensorrt_api(request.param)
    except NoApiError as error:
        pytest.skip(f"no TensorRT {request.param} bindings: {error}")


def python(api: Api, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False,
        env=os.environ | api.environment | environment,
    )  # fmt: skip


@pytest.fixture(scope="module")
def facts(api: Api) -> dict[str, Any]:
    """What the probe finds; PyCUDA, which cannot load without a driver, is the double."""
    paths = [api.environment["PYTHONPATH"], str(Path(__file__).with_name("doubles")), str(ROOT)]
    done = python(api, str(PROBE), PYTHONPATH=os.pathsep.join(paths))
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_types_are_right_by_the_real_api(api: Api, tmp_path: Path) -> None:
    """mypy --strict, with stubs of the bindings, finds nothing but the mistake that is planted beside our code."""
    wrong = tmp_path / "wrong.py"
    wrong.write_text(
        "import tensorrt as trt\n\n\ndef f(c: trt.IBuilderConfig) -> None:\n    c.max_workspace_size = 1\n"
    )
    cache = str(CACHE / f"mypy-{api.folder.name}")
    done = python(api, "-m", "mypy", "--strict", "--cache-dir", cache, *TYPED, str(wrong), PYTHONPATH="")
    (found,) = [line for line in done.stdout.splitlines() if ": error:" in line]
    assert '"IBuilderConfig" has no attribute "max_workspace_size"' in found


def test_every_name_that_we_spell_exists(facts: dict[str, Any]) -> None:
    """Collected from the source, so none is forgotten."""
    assert {"Builder", "OnnxParser", "BuilderFlag.TF32", "HardwareCompatibilityLevel.AMPERE_PLUS"} <= set(
        facts["spelt"]
    )
    assert [name for name, exists in facts["spelt"].items() if not exists] == []


def test_the_double_has_nothing_that_tensorrt_has_not(facts: dict[str, Any]) -> None:
    """What passes on the double is not passed by an invention."""
    assert len(facts["double"]) > 50
    assert [name for name, exists in facts["double"].items() if not exists] == []


@pytest.mark.parametrize("factory", ["builder", "runtime"])
def test_a_factory_that_gives_null_is_our_error(facts: dict[str, Any], factory: str) -> None:
    """Without CUDA the binding raises TypeError; the user reads what failed and what to do."""
    assert facts[factory].startswith(f"TensorRT failed while starting its {factory}: ")
    assert "Check that nvidia-smi shows a GPU" in facts[factory]


def test_the_log_keeps_warnings_and_worse(facts: dict[str, Any]) -> None:
    """Through a real subclass of ILogger, with real severities."""
    assert facts["logged"] == ["INTERNAL_ERROR: said", "ERROR: said", "WARNING: said"]


def test_progress_rises_through_nested_phases(facts: dict[str, Any]) -> None:
    """Through a real subclass of IProgressMonitor; phases that nobody announced change nothing."""
    done = [done for done, total in facts["progress"] if total == 1000]
    assert done[:4] == [125, 250, 375, 500]
    assert done == sorted(done)
    assert done[-1] == 1000


def test_versions_sizes_and_types_are_read(facts: dict[str, Any]) -> None:
    """The values that a plan's key and its buffers are made of."""
    assert facts["version"] in PACKAGES
    assert facts["cuda"] == ("12" if facts["version"].startswith("10.") else "13")
    assert facts["sizes"] == [-1, 3, 8, 8]
    assert facts["dtypes"]["HALF"] == "float16"


def test_bindings_without_their_library_are_one_clear_error(api: Api) -> None:
    """A half installed TensorRT names the library that is missing."""
    ask = "from tasks.engines.faults import vendor_imports\nwith vendor_imports():\n    import tensorrt"
    done = python(
        api, "-c", ask, LD_LIBRARY_PATH="", PYTHONPATH=os.pathsep.join([api.environment["PYTHONPATH"], str(ROOT)])
    )
    assert "EngineError: A library of TensorRT engines does not load: libnv" in done.stderr
    assert "Install requant[tensorrt]" in done.stderr
