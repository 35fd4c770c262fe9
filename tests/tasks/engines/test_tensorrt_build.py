"""Building: what reaches TensorRT, what comes back, and the process that does it; on doubles of its library."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import onnx
import onnx.parser
import pytest

from tasks.contracts.errors import EngineError
from tasks.contracts.spec import TensorRtSpec
from tasks.engines.tensorrt_build import BuiltPlan, build_plan
from tests.tasks.engines.conftest import MakePlan, plan_maker

PAIR = """
<ir_version: 9, opset_import: ["": 19]>
pair (float[{batch},3] pixels, float[2] factor) => (float[{batch},3] twice)
{{ twice = Add(pixels, pixels) }}
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return saved(PAIR.format(batch="N"), tmp_path)


def saved(text: str, folder: Path) -> Path:
    onnx.save(onnx.parser.parse_model(text), folder / "pair.onnx")
    return folder / "pair.onnx"


@pytest.fixture
def here(request: pytest.FixtureRequest, tmp_path: Path) -> MakePlan:
    """Builds in this process, which is quicker."""
    return plan_maker(request, "double", tmp_path)


def build(model: Path, spec: TensorRtSpec | None = None, **options: Any) -> BuiltPlan:
    """As production does it, in a process of its own."""
    return build_plan(model, spec or TensorRtSpec(batch=(1, 2, 4)), model.parent, **options)


@pytest.mark.usefixtures("doubles")
def test_a_plan_comes_back_with_all_that_is_known_of_it(model: Path) -> None:
    """Key, layers, sizes and timing cache."""
    built = build(model, timing_cache=b"earlier")
    assert built.key.plan_sha256 == hashlib.sha256(built.plan.read_bytes()).hexdigest()
    assert built.key.onnx_sha256 == hashlib.sha256(model.read_bytes()).hexdigest()
    assert built.key.profile == {"pixels": ((1, 3), (2, 3), (4, 3)), "factor": ((2,), (2,), (2,))}
    assert (built.key.machine.gpu, built.key.machine.compute_capability) == ("Double", "9.0")
    assert built.plan_bytes == built.plan.stat().st_size
    assert built.device_memory_bytes == 3 * 2**20
    assert built.timing_cache.read_bytes() == b"earlier+"
    assert "Layers" in json.loads(built.layers.read_text())
    assert built.warnings == ()


def test_the_spec_reaches_tensorrt(here: MakePlan, model: Path) -> None:
    """Each setting, and those that are ours for all plans."""
    spec = TensorRtSpec(
        optimization_level=5, workspace_mib=7, hardware_compatibility="ampere_plus", version_compatible=True
    )
    config = json.loads(here(model, spec, tf32=False).layers.read_text())["config"]
    assert config == {
        "level": 5, "timings": 8, "verbosity": "DETAILED", "compatibility": "AMPERE_PLUS",
        "flags": ["VERSION_COMPATIBLE"], "pools": {"WORKSPACE": 7 * 2**20},
    }  # fmt: skip
    plain = json.loads(here(model).layers.read_text())["config"]
    assert (plain["flags"], plain["pools"], plain["compatibility"]) == (["TF32"], {}, "NONE")


def test_a_fixed_batch_needs_no_profile(here: MakePlan, tmp_path: Path) -> None:
    """The model's own shapes are the key's."""
    built = here(saved(PAIR.format(batch=5), tmp_path))
    assert built.key.profile["pixels"] == ((5, 3),) * 3
    assert json.loads(built.layers.read_text())["profile"] == {}


def test_a_timing_cache_of_another_gpu_is_left_out_with_a_warning(here: MakePlan, model: Path) -> None:
    """A build is slower without it, and no less right."""
    built = here(model, timing_cache=b"other GPU")
    assert "The timing cache does not fit" in built.warnings[-1]
    assert built.timing_cache.read_bytes() == b"+"


@pytest.mark.usefixtures("doubles")
def test_progress_arrives_in_thousandths(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT's phases, as one share of the whole."""
    monkeypatch.setenv("TENSORRT_DOUBLE_TROUBLE", "slow")
    seen: list[tuple[int, int]] = []
    build(model, progress=lambda done, total: seen.append((done, total)))
    assert seen
    assert set(seen) <= {(250, 1000), (500, 1000), (750, 1000), (1000, 1000)}


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("parse", r"cannot take pair\.onnx: node conv1 \(Conv\): Unsupported operator\..*keep_float"),
        ("profile", r"taking batches of \[1, 2, 4\] for pair\.onnx.*Mend target\.tensorrt\.batch"),
        ("build", r"building pair\.onnx: ERROR: Error Code 10: Could not find any implementation.*workspace_mib"),
        ("deserialize", r"loading the plan of pair\.onnx that it has just built"),
        ("runtime", r"error: 35.*Install an NVIDIA driver"),
    ],
)
def test_a_failed_build_says_why(here: MakePlan, doubles: Any, model: Path, fault: str, message: str) -> None:
    """TensorRT's own reason, with what helps."""
    doubles.tensorrt.TROUBLE.add(fault)
    with pytest.raises(EngineError, match=message):
        here(model, TensorRtSpec(batch=(1, 2, 4)))
    assert +doubles.cuda.LIVING == {}


@pytest.mark.usefixtures("doubles")
@pytest.mark.parametrize(
    ("fault", "message"),
    [("build", r"Could not find any implementation.*workspace_mib"), ("crash", r"Building pair\.onnx died of SIGSEGV")],
)
def test_the_reason_crosses_the_process(model: Path, monkeypatch: pytest.MonkeyPatch, fault: str, message: str) -> None:
    """An error of ours as it was; a crash of TensorRT, which no Python could have caught, by its signal."""
    monkeypatch.setenv("TENSORRT_DOUBLE_TROUBLE", fault)
    with pytest.raises(EngineError, match=message):
        build(model)


@pytest.mark.usefixtures("doubles")
def test_a_build_that_hangs_is_ended_at_its_limit(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is named, and the setting for it."""
    monkeypatch.setenv("TENSORRT_DOUBLE_TROUBLE", "hang")
    with pytest.raises(EngineError, match=r"Building pair\.onnx took longer than 0\.05 minutes.*BUILD_LIMIT"):
        build(model, limit_minutes=0.05)


def test_a_gpu_with_too_little_free_memory_is_refused_before_the_build(here: MakePlan, model: Path) -> None:
    """How much is free, how much is asked for."""
    with pytest.raises(EngineError, match=r"GPU 0 has 512 of 1024 MiB free, and 600 are needed.*REQUANT_GPU_FREE_MIB"):
        here(model, free_mib=600)


def test_only_the_batch_may_be_dynamic(here: MakePlan, tmp_path: Path) -> None:
    """Image sizes are part of the model."""
    text = '<ir_version: 9, opset_import: ["": 19]> p (float[N,M] pixels) => (float[N,M] same) { same = Neg(pixels) }'
    with pytest.raises(EngineError, match=r"'pixels' is \[-1, -1\]; only the batch"):
        here(saved(text, tmp_path))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """Before any vendor is looked for."""
    with pytest.raises(EngineError, match=r"absent\.onnx is not a file"):
        build(tmp_path / "absent.onnx")
