"""A plan is native code for one kind of machine: whether it may be loaded here, decided before it is."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from tasks.contracts.errors import EngineError
from tasks.contracts.records import Machine, PlanKey

REBUILD = "Build the plan again on this machine."


def read_plan(path: Path, key: PlanKey) -> bytes:
    """The plan's bytes, the very ones that were compared with the key.

    Raises:
        EngineError: if the file is missing, cut off or changed.
    """
    if not path.is_file():
        raise EngineError(f"{path} is not a file.", remedy="Name a plan that exists.")
    plan = path.read_bytes()
    found = hashlib.sha256(plan).hexdigest()
    if found != key.plan_sha256:
        raise EngineError(
            f"{path.name} is not the plan that was built: {len(plan)} bytes with SHA-256 {found[:12]}, "
            f"and {key.plan_sha256[:12]} is expected. It is native code and is not loaded.",
            remedy="Fetch it again, or build it again.",
        )
    return plan


def check_machine(key: PlanKey, here: Machine, name: str) -> None:
    """Refuse a plan that was built for another kind of machine, with all that differs.

    Raises:
        EngineError: naming each difference.
    """
    found = "; ".join(differences(key, here))
    if found:
        raise EngineError(f"{name} was built for another machine: {found}.", remedy=REBUILD)


def differences(key: PlanKey, here: Machine) -> Iterator[str]:
    """What keeps a plan from this machine, by the rules of TensorRT's documentation ("Engine Compatibility").

    Driver and CUDA are not compared: a plan is bound to neither.
    """
    built = key.machine
    if here.platform != built.platform:
        yield f"{built.platform}, and this is {here.platform}"
    if not _version_fits(built.tensorrt, here.tensorrt, compatible=key.version_compatible):
        newer = " or newer, up to the next major version" if key.version_compatible else ""
        yield f"TensorRT {built.tensorrt}{newer}, and this is {here.tensorrt}"
    if not _gpu_fits(key, here):
        wanted = {
            "none": f"{built.gpu} with compute capability {built.compute_capability}",
            "same_compute_capability": f"compute capability {built.compute_capability}",
            "ampere_plus": "compute capability 8.0 or more",
        }[key.hardware_compatibility]
        yield f"{wanted}, and this is {here.gpu} with {here.compute_capability}"


def _version_fits(built: str, here: str, *, compatible: bool) -> bool:
    """A version-compatible plan runs on the same TensorRT, newer ones and the next major one, never on an older one."""
    if not compatible:
        return built == here
    old, new = _numbers(built), _numbers(here)
    return new >= old and new[0] - old[0] <= 1


def _gpu_fits(key: PlanKey, here: Machine) -> bool:
    built = key.machine
    if key.hardware_compatibility == "ampere_plus":
        return min(_numbers(built.compute_capability), _numbers(here.compute_capability)) >= (8, 0)
    same = here.compute_capability == built.compute_capability
    return same and (key.hardware_compatibility == "same_compute_capability" or here.gpu == built.gpu)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)))


def check_profile(feed: Mapping[str, np.ndarray], key: PlanKey) -> None:
    """Refuse shapes that the plan was not built for, before the GPU sees them.

    Raises:
        EngineError: at the first input outside its profile.
    """
    for name, (low, _, high) in key.profile.items():
        shape = feed[name].shape
        if not all(least <= size <= most for least, size, most in zip(low, shape, high, strict=True)):
            raise EngineError(
                f"Input {name!r} is {list(shape)}; the plan takes {list(low)} to {list(high)}.",
                remedy="Split the batch, or widen target.tensorrt.batch and build again.",
            )


def check_finite(feed: Mapping[str, np.ndarray]) -> None:
    """Refuse NaN and infinity: what INT8 makes of NaN is not defined, and differs between kernels.

    Raises:
        EngineError: at the first input that holds one.
    """
    for name, array in feed.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            bad = int(np.count_nonzero(~np.isfinite(array)))
            raise EngineError(
                f"Input {name!r} holds {bad} of {array.size} values that are NaN or infinite.",
                remedy="Mend the preprocessing.",
            )


def timing_cache_key(machine: Machine) -> str:
    """Where measured kernel times may be used again: the same TensorRT, CUDA and kind of GPU."""
    facts = (
        f"tensorrt-{machine.tensorrt}",
        f"cuda-{machine.cuda_runtime}",
        f"driver-{machine.cuda_driver}",
        machine.gpu,
        f"sm-{machine.compute_capability}",
        machine.platform,
    )
    return "-".join(re.sub(r"[^a-z0-9.]+", "-", fact.lower()) for fact in facts)
