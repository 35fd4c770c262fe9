"""What all steps share: remembering, retrying what can pass, progress, and errors that a person can read."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, ParamSpec, TypeVar, cast
from uuid import UUID

from prefect import get_run_logger, runtime, task
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.tasks import Task
from pydantic import BaseModel

from tasks.contracts.errors import DataError, EngineError, RequantError, StoreError, TransientStoreError
from tasks.contracts.records import DataRecord, SplitName
from tasks.contracts.settings import Settings
from tasks.contracts.spec import RunSpec
from tasks.engines.reservation import reserve_gpu
from tasks.stores.base import Store, open_store
from tasks.stores.steps import JSON, code_digest, imports_of, installed_versions, once
from tasks.stores.workspace import workspace

if TYPE_CHECKING:  # loaded by whoever uses them: a night with no change is over before PyTorch is imported
    import torch

    from tasks.data.images import PreparedImages

R = TypeVar("R", bound=BaseModel)
P = ParamSpec("P")
T = TypeVar("T")
LIBRARIES = {  # distributions that compute, and what is imported of each
    "torch": "torch",
    "torchvision": "torchvision",
    "torchao": "torchao",
    "onnx": "onnx",
    "onnxscript": "onnx",  # used by PyTorch's export
    "onnxruntime": "onnxruntime",
    "numpy": "numpy",
    "pillow": "PIL",
}
GPU_RUNTIMES = {"onnxruntime-gpu": "onnxruntime", "tensorrt": "tensorrt"}  # where they are installed
_COMPUTING = LIBRARIES | GPU_RUNTIMES
RETRIES_S = (2, 8, 30, 90)  # half as long at the least, by their jitter: together more than a minute
_REPORT_EVERY_S = 5.0
_locks: list[IO[str]] = []


def _can_pass(_task: Task[..., Any], _run: TaskRun, state: State[Any]) -> bool:
    """Only a store's passing trouble is worth a retry; a wrong spec or a failed gate is final at once."""
    return isinstance(state.result(raise_on_failure=False), TransientStoreError)


def step(name: str) -> Callable[[Callable[P, T]], Task[P, T]]:
    """A Prefect task that is retried only for what can pass. The store remembers results, so Prefect does not."""
    return task(
        name=name,
        task_run_name=name,  # Prefect would add a random end to it
        retries=len(RETRIES_S),
        retry_delay_seconds=list(RETRIES_S),
        retry_jitter_factor=0.5,
        retry_condition_fn=_can_pass,
        cache_policy=NO_CACHE,
    )


class _OneLine(logging.Filter):
    """A refusal is one clear line; its traceback would bury it. Every other error keeps its own.

    That a run or a step has failed is said without its reason, which Prefect would repeat each time.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, RequantError):
            record.msg, record.args = f"{type(error).__name__}: {error}", None
            record.exc_info = record.exc_text = None
        elif str(record.msg).startswith("Finished in state Failed("):
            record.msg, record.args = "Finished in state Failed", None
        return True


for _name in ("prefect.flow_runs", "prefect.task_runs"):
    logging.getLogger(_name).addFilter(_OneLine())


def the_store() -> Store:
    return open_store(Settings().store)


def the_device() -> torch.device:
    """Where PyTorch runs.

    Raises:
        RequantError: if CUDA is asked for and there is none.
    """
    import torch

    wanted, available = Settings().device, torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise RequantError("REQUANT_DEVICE is cuda, and PyTorch finds no CUDA device.", remedy="Set it to cpu or auto.")
    return torch.device("cuda", the_gpu()) if available and wanted != "cpu" else torch.device("cpu")


@cache
def the_gpu() -> int:
    """Index of the GPU that this process has for itself, from the first call until it ends.

    Raises:
        EngineError: if there is none, or other runs keep them all.
    """
    import torch

    settings = Settings()
    if not torch.cuda.is_available():
        raise EngineError(
            "This machine has no GPU that PyTorch can use, and the engine needs one.",
            remedy="Run on a GPU machine, or send the build to one by REQUANT_BUILD_ON; `requant doctor` says more.",
        )
    candidates = range(torch.cuda.device_count()) if settings.gpu is None else [settings.gpu]
    index, lock = reserve_gpu(
        candidates,
        patience_s=60 * settings.gpu_wait_minutes,
        waiting=lambda taken: get_run_logger().info("waiting for a GPU: %s", taken),
    )
    _locks.append(lock)  # closed, it would be given back
    torch.cuda.set_device(index)
    return index


def run_id() -> str:
    """Of the flow run that is under way; names sort by time."""
    started = runtime.flow_run.scheduled_start_time or datetime.now(UTC)
    return f"{started:%Y%m%dT%H%M%S}-{str(runtime.flow_run.id)[:8]}"


def run_prefix(name: str, run: str) -> str:
    """Key that everything of a model's run begins with."""
    return f"models/{name}/runs/{run}"


def artifact_key(what: str, name: str) -> str:
    """Key of a model's artifact in Prefect, which allows small letters, digits and hyphens."""
    return f"{what}-{re.sub(r'[^a-z0-9]+', '-', name)}"


def the_images(
    spec: RunSpec, data: DataRecord | None = None, progress: Callable[[int, int], None] | None = None
) -> PreparedImages:
    """All splits; what was decoded before is not decoded again.

    Args:
        data: what the run has prepared. Its digest is in the keys of results, so they must come from those images.

    Raises:
        DataError: if images, labels or splits are no longer those of `data`.
    """
    from tasks.data.images import prepare_images

    images = prepare_images(spec.model, spec.data, spec.seed, Settings().scratch, progress)
    if data is not None and images.digest != data.digest:
        sources = " or ".join(filter(None, (data.source, spec.data.gate_source)))
        raise DataError(
            f"{sources} has changed since this run prepared it: there are {_content(images.counts, images.digest)}, "
            f"expected {_content(data.counts, data.digest)}.",
            remedy="Run again when nothing writes there; a worker needs the same files and the same Pillow.",
        )
    return images


def _content(counts: Mapping[SplitName, int], digest: str) -> str:
    return f"{sum(counts.values()):,} images of digest {digest[:12]}"


def remember(
    name: str, module: str, inputs: Mapping[str, JSON], record_type: type[R], compute: Callable[[Store, Path], R]
) -> R:
    """The step's record: found in the store if nothing that it depends on has changed, computed otherwise.

    With REQUANT_REDO it is computed in any case, and takes the stored one's place.

    Args:
        module: whose source, with all that it imports, is part of the key.
        inputs: everything else that decides the result.
        compute: is given the store and a work folder that is removed afterwards.
    """
    store, logger, started = the_store(), get_run_logger(), time.monotonic()

    def in_workspace() -> R:
        with workspace(Settings().scratch) as work:
            return compute(store, work)

    with disk_errors():
        inputs = everything(module, inputs)
        record, found = once(store, name, inputs, record_type, in_workspace, redo=Settings().redo)
    if found:
        logger.info("%s: nothing has changed, so the stored result is taken", name)
    else:
        logger.info("%s: done in %.1f s", name, time.monotonic() - started)
    return record


def everything(module: str, inputs: Mapping[str, JSON]) -> dict[str, JSON]:
    """All that decides a step's result: its inputs, its code and those libraries that its code imports.

    So a new runtime is no reason to quantize again, and a new PyTorch is one.
    """
    reached = imports_of(module)
    libraries = installed_versions(*(name for name, root in _COMPUTING.items() if root in reached))
    return {**inputs, "code": code_digest(module), "libraries": libraries}


@contextmanager
def disk_errors() -> Iterator[None]:
    """A full or read-only disk is one clear error, wherever it is met."""
    try:
        yield
    except OSError as error:
        settings = Settings()
        raise StoreError(
            f"{error.filename or 'A file'} cannot be written or read: {error.strerror or error}.",
            remedy=f"Check room and rights in scratch ({settings.scratch}) and store ({settings.store}).",
        ) from error


class Progress:
    """Shows long work as a bar in the Prefect UI and now and then as a line in the log."""

    def __init__(self, title: str) -> None:
        self._title, self._last = title, time.monotonic()
        self._artifact: UUID | None = None

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._last < _REPORT_EVERY_S and not (done == total and self._artifact):
            return
        self._last = now
        share = 100.0 * done / total
        if self._artifact is None:
            key = re.sub(r"[^a-z0-9]+", "-", self._title.lower())  # Prefect allows nothing else
            self._artifact = cast(UUID, create_progress_artifact(share, key=key, description=self._title))
        else:
            update_progress_artifact(self._artifact, share)
        get_run_logger().info("%s: %.0f %%", self._title, share)
