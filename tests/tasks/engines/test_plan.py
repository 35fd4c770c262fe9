from __future__ import annotations

from typing import Any

import pytest

from tasks.contracts.errors import EngineError
from tasks.contracts.records import Machine, PlanKey
from tasks.engines.plan import check_machine, differences, timing_cache_key

BUILT = Machine(
    gpu="NVIDIA A10",
    compute_capability="8.6",
    driver="580.65.06",
    cuda_driver="13.0",
    cuda_runtime="13",
    tensorrt="10.16.1.11",
    platform="Linux x86_64",
)


def key(**changes: Any) -> PlanKey:
    shapes = ((1, 3, 8, 8), (8, 3, 8, 8), (64, 3, 8, 8))
    values: dict[str, Any] = {
        "machine": BUILT,
        "hardware_compatibility": "none",
        "version_compatible": False,
        "profile": {"pixels": shapes},
        "onnx_sha256": "0" * 64,
        "plan_sha256": "1" * 64,
    }
    return PlanKey(**values | changes)


def here(**changes: str) -> Machine:
    return BUILT.model_copy(update=changes)


def test_a_plan_fits_the_machine_that_built_it() -> None:
    """A newer driver and another CUDA change nothing: a plan is bound to neither."""
    assert list(differences(key(), BUILT)) == []
    assert list(differences(key(), here(driver="595.1", cuda_driver="13.2", cuda_runtime="12"))) == []


def test_all_differences_are_named_at_once_with_the_remedy() -> None:
    """One error says everything that keeps the plan from this machine."""
    other = here(gpu="NVIDIA T4", compute_capability="7.5", tensorrt="10.13.3.9", platform="Linux aarch64")
    with pytest.raises(EngineError) as caught:
        check_machine(key(), other, "birds.plan")
    assert str(caught.value) == (
        "birds.plan was built for another machine: Linux x86_64, and this is Linux aarch64; "
        "TensorRT 10.16.1.11, and this is 10.13.3.9; "
        "NVIDIA A10 with compute capability 8.6, and this is NVIDIA T4 with 7.5. Build the plan again on this machine."
    )


@pytest.mark.parametrize(
    ("compatibility", "gpu", "capability", "fits"),
    [
        ("none", "NVIDIA RTX A4000", "8.6", False),
        ("same_compute_capability", "NVIDIA RTX A4000", "8.6", True),
        ("same_compute_capability", "NVIDIA L4", "8.9", False),
        ("ampere_plus", "NVIDIA L4", "8.9", True),
        ("ampere_plus", "NVIDIA H200", "9.0", True),
        ("ampere_plus", "NVIDIA B200", "10.0", True),
        ("ampere_plus", "NVIDIA T4", "7.5", False),
    ],
)
def test_hardware_compatibility_says_which_gpus_fit(
    compatibility: str, gpu: str, capability: str, *, fits: bool
) -> None:
    """Without it a plan is for one model of GPU; versions compare as numbers, not as text."""
    found = list(differences(key(hardware_compatibility=compatibility), here(gpu=gpu, compute_capability=capability)))
    assert (not found) == fits


def test_a_plan_from_before_ampere_is_not_ampere_plus() -> None:
    """TensorRT would not build it so; a key that says so is not believed."""
    turing = here(gpu="NVIDIA T4", compute_capability="7.5")
    assert list(differences(key(machine=turing, hardware_compatibility="ampere_plus"), BUILT))


@pytest.mark.parametrize(
    ("built", "found", "compatible", "fits"),
    [
        ("10.16.1.11", "10.16.1.11", False, True),
        ("10.16.1.11", "10.16.1.12", False, False),
        ("10.16.1.11", "11.4.0.106", False, False),
        ("10.16.1.11", "10.16.1.12", True, True),
        ("10.9.0.34", "10.16.1.11", True, True),
        ("10.16.1.11", "11.4.0.106", True, True),
        ("10.16.1.11", "12.0.0.1", True, False),
        ("10.16.1.11", "10.9.0.34", True, False),
        ("11.4.0.106", "10.16.1.11", True, False),
    ],
)
def test_a_version_compatible_plan_runs_on_newer_tensorrt(
    built: str, found: str, *, compatible: bool, fits: bool
) -> None:
    """Up to the next major version, never on an older one; otherwise every digit counts."""
    plan = key(machine=here(tensorrt=built), version_compatible=compatible)
    assert (not list(differences(plan, here(tensorrt=found)))) == fits


def test_the_timing_cache_is_kept_apart_by_what_its_times_depend_on() -> None:
    """TensorRT, CUDA and the kind of GPU; the kernel module's release is not among them. The key is good in a path."""
    assert timing_cache_key(BUILT) == "tensorrt-10.16.1.11-cuda-13-driver-13.0-nvidia-a10-sm-8.6-linux-x86-64"
    assert timing_cache_key(here(driver="595.1")) == timing_cache_key(BUILT)
    others = [here(gpu="NVIDIA L4"), here(tensorrt="11.4.0.106"), here(cuda_runtime="12"), here(cuda_driver="13.2")]
    assert len({timing_cache_key(machine) for machine in (BUILT, *others)}) == 5


def test_a_key_survives_json() -> None:
    """It is stored beside the plan and read on another machine."""
    assert PlanKey.model_validate_json(key().model_dump_json()) == key()
