"""What this machine can do, and what is missing for what it cannot."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch

from tasks.contracts.errors import ReleaseError, StoreError
from tasks.contracts.settings import Settings
from tasks.engines.hardware import hardware, has_vnni
from tasks.stores.base import open_store
from tasks.stores.signing import key_id, keys_from

Finding = tuple[str, str, str]  # what, found, so


def findings() -> Iterator[Finding]:
    """One row per ability."""
    yield "Python", platform.python_version(), platform.platform()
    yield "CPU", hardware(), "fast and exact INT8" if has_vnni() else "no VNNI: INT8 may be slow"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield "cores", str(cores), f"PyTorch uses {torch.get_num_threads()} threads"
    yield _gpu()
    yield from map(
        _package, ("torch", "torchvision", "torchao", "onnx", "onnxruntime", "prefect", "great-expectations")
    )
    yield from (
        _extra(*extra) for extra in (("tensorrt", "tensorrt"), ("pycuda", "tensorrt"), ("openvino", "openvino"))
    )
    yield from _store()
    yield _scratch()
    yield _signing()
    url = os.environ.get("PREFECT_API_URL")
    yield "Prefect API", url or "not set", "runs are shown there" if url else "each run starts a server of its own"


def _gpu() -> Finding:
    if not torch.cuda.is_available():
        return "GPU", "none", "training and float scoring run on the CPU"
    name, memory = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
    return "GPU", f"{name}, {memory / 2**30:.0f} GiB", "training and float scoring run there"


def _package(name: str) -> Finding:
    return name, version(name), ""


def _extra(module: str, extra: str) -> Finding:
    if find_spec(module) is None:
        return module, "not installed", f"pip install requant[{extra}]"
    try:
        return module, version(module), ""
    except PackageNotFoundError:
        return module, "installed, version unknown", ""


def _store() -> Iterator[Finding]:
    url = Settings().store
    try:
        store = open_store(url)
        yield "store", str(store), f"{len(store.list('models/'))} documents of runs"
        yield "compare-and-set", store.compare_and_set(), "releases are moved by it"
    except StoreError as error:
        yield "store", "s3://..." if "@" in url else url, str(error)


def _signing() -> Finding:
    try:
        keys = keys_from(Settings())
    except ReleaseError as error:
        return "releases", "keys cannot be used", str(error)
    by = "unsigned" if keys.signer is None else f"signed by {key_id(keys.signer.public_key())}"
    trusted = f"trusted: {', '.join(keys.trusted)}" if keys.trusted else "signatures are not checked"
    return "releases", by, trusted


def _scratch() -> Finding:
    path = Settings().scratch.absolute()
    there: Path = next(folder for folder in (path, *path.parents) if folder.exists())
    writable = os.access(there, os.W_OK)
    free = shutil.disk_usage(there).free / 2**30
    return "scratch", str(path), f"{free:.0f} GiB free" if writable else "not writable: set REQUANT_SCRATCH"
