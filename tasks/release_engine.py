"""Step: the engine of a run that passed its gates becomes a release, and the champion."""

from __future__ import annotations

import hashlib
import platform
from pathlib import Path

import torch
from prefect import get_run_logger

from tasks.contracts.errors import StoreError
from tasks.contracts.records import ArtifactRef, EngineRecord, PlanKey
from tasks.contracts.release import Candidate, Provenance, Release, Scores, Serving
from tasks.contracts.settings import Settings
from tasks.engines.hardware import hardware
from tasks.report.content import RunReport
from tasks.step import disk_errors, run_prefix, step, the_store
from tasks.stores.base import Store
from tasks.stores.registry import champion, left_behind, promote, publish, released_before
from tasks.stores.signing import keys_from
from tasks.stores.steps import code_digest
from tasks.stores.workspace import workspace

DRIVER = Path("/proc/driver/nvidia/version")


@step("release engine")
def release_engine(report: RunReport) -> Release:
    """The new champion; where the run brings nothing new, the release that holds the same already."""
    store, name, logger, settings = the_store(), report.spec.name, get_run_logger(), Settings()
    keys = keys_from(settings)
    with disk_errors(), workspace(settings.scratch) as work:
        serving = _serving(report)
        known = released_before(store, name, released_engines(report), serving, keys)
        if known is not None:
            now = champion(store, name).release
            if known.number == now:
                logger.info("nothing has changed: release %s of %s stays champion", now, name)
            else:
                logger.warning(
                    "this is release %d of %s, which was rolled back: release %s stays champion; "
                    "`requant promote %s %d` brings it back", known.number, name, now, name, known.number,
                )  # fmt: skip
            return known
        release = left_behind(store, name, released_engines(report), serving, keys)
        if release is None:
            release = publish(store, _candidate(report, serving, store, work), keys)
    promotion = promote(store, name, release.number, keys)
    logger.info("release %d of %s is champion (was %s)", release.number, name, promotion.previous or "none")
    return release


def released_engines(report: RunReport) -> tuple[EngineRecord, ...]:
    """As a release knows them. The audit of hundreds of layers stays in the run's record, which it refers to."""
    return (report.engine.model_copy(update={"audit": None}),)


def _serving(report: RunReport) -> Serving:
    return Serving(
        input=report.engine.inputs[0],
        preprocess=report.data.preprocess,
        labels=report.data.class_names,
        output=report.engine.outputs[0],
    )


def _candidate(report: RunReport, serving: Serving, store: Store, work: Path) -> Candidate:
    latency, compression = report.latencies[0], report.export.compression
    prefix = run_prefix(report.spec.name, report.run_id)
    return Candidate(
        model=report.spec.name,
        run=report.run_id,
        decision=report.decision,
        engines=released_engines(report),
        serving=serving,
        scores=Scores(
            float_top1=report.float_accuracy.top1,
            int8_top1=report.engine_accuracy.top1,
            top1_drop=report.comparison.top1_drop,
            agreement=report.comparison.agreement,
            batch_size=latency.batch_size,
            float_ms=latency.float_ms["median"],
            int8_ms=latency.int8_ms["median"],
            speedup=latency.speedup,
            float_bytes=compression.float_bytes,
            int8_bytes=compression.int8_bytes,
            memory_mib=report.memory.int8_mib,
        ),
        float_onnx=report.export.float_onnx,
        int8_onnx=report.export.int8_onnx,
        record=_as_object(store, f"{prefix}/record.json", work),
        report=_as_object(store, f"{prefix}/report.html", work),
        provenance=Provenance(
            spec=hashlib.sha256(report.spec.model_dump_json().encode()).hexdigest(),
            code=code_digest("flows.requantize"),
            weights=report.model.weights.sha256,
            data=report.data.digest,
            manifest=report.check.manifest.sha256,
            seed=report.spec.seed,
            architecture=report.model.architecture,
            method=report.quantized.method,
            scheme=report.quantized.scheme,
            libraries=report.versions,
            machine=_machine(report.engine.plan),
        ),
    )


def _as_object(store: Store, key: str, work: Path) -> ArtifactRef:
    """A document of the run under the name of its content, where nobody can replace it."""
    text = store.read_text(key)
    if text is None:
        raise StoreError(f"{key} is not in {store}.", remedy="Run again.")
    path = work / Path(key).name
    path.write_bytes(text.encode())
    return store.put(path, kind=path.stem)


def _machine(plan: PlanKey | None) -> dict[str, str]:
    """Of this process, but for the GPU that a plan was built on, perhaps by a worker."""
    facts = {"python": platform.python_version(), "system": platform.platform(), "cpu": hardware()}
    if plan is not None:
        gpu = plan.machine
        return facts | {"gpu": gpu.gpu, "driver": gpu.driver, "cuda": gpu.cuda_runtime, "tensorrt": gpu.tensorrt}
    if torch.cuda.is_available():
        facts |= {"gpu": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda)}
    if DRIVER.exists():
        facts["driver"] = DRIVER.read_text(encoding="utf-8").splitlines()[0]
    return facts
