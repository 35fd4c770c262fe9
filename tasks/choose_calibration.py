"""Step: which images ranges are measured on, and whether the float model sees in them what it sees in the gate's."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from prefect import get_run_logger

from tasks.contracts.errors import DataRejected
from tasks.contracts.records import Choice, DataRecord, ModelRecord
from tasks.contracts.spec import RunSpec
from tasks.data.choose import cover, radius
from tasks.data.images import PreparedImages
from tasks.data.view import check_view, view_of
from tasks.load_model import float_model
from tasks.step import Progress, remember, step, the_device, the_images, the_store
from tasks.stores.base import Store
from tasks.stores.steps import JSON

CANDIDATES = 16  # for each image that coverage chooses, at most so many are looked at


@step("choose calibration images")
def choose_calibration(spec: RunSpec, data: DataRecord, model: ModelRecord) -> Choice:
    """By the spec's method. Drift is judged on a fair draw, whatever the method then chooses from it.

    Raises:
        DataRejected: if a rule about the float model's view is critical and broken.
    """
    device = the_device()

    def compute(store: Store, work: Path) -> Choice:
        network, images = float_model(model, work).to(device), the_images(spec, data)
        progress = Progress("looking at images through the float model")
        calibration, train = images.split("calibration"), images.split("train")
        findings, features_ND = check_view(network, images, spec, progress)
        rows, chosen = calibration.rows, np.arange(len(calibration))
        if spec.data.choice == "coverage":
            limit = (CANDIDATES - 1) * len(calibration)
            more_ND, _ = view_of(network, train, limit, spec.evaluation.batch_size, progress)
            features_ND = np.concatenate([features_ND, more_ND])
            labels_N = np.concatenate([calibration.labels, train.labels[:limit]])
            rows = np.concatenate([rows, train.rows[:limit]])
            counts_K = np.bincount(calibration.labels, minlength=model.num_classes)
            chosen = cover(features_ND, labels_N, counts_K, spec.seed)
        path = work / "calibration.parquet"
        digest = _write(images, rows[chosen], path)
        return Choice(
            method=spec.data.choice,
            num_candidates=len(rows),
            radius=radius(features_ND, chosen),
            findings=findings,
            digest=digest,
            images=store.put(path, kind="calibration"),
        )

    inputs: dict[str, JSON] = {
        "images": data.digest,
        "model": model.model_dump(mode="json"),
        "choice": spec.data.choice,
        "checks": spec.data.checks.model_dump(mode="json", include={"feature_ks", "answer_psi"}),
        "seed": spec.seed,
        "device": device.type,
    }
    choice = remember("choose_calibration", __name__, inputs, Choice, compute)
    for finding in choice.findings:
        if not finding.passed:
            problem = f"data: {finding.rule} is {finding.observed}, not {finding.limit}"
            if finding.severity == "critical":
                raise DataRejected(f"{problem}.", remedy=finding.remedy)
            get_run_logger().warning("%s. %s", problem, finding.remedy)
    return choice


def chosen_images(spec: RunSpec, data: DataRecord, choice: Choice, work: Path) -> PreparedImages:
    """All splits, with the chosen images as calibration split. Images are known by their pixels, wherever they lie."""
    images = the_images(spec, data)
    if choice.method == "stratified":
        return images
    pixels = pq.read_table(the_store().fetch(choice.images, work))["pixels"].to_pylist()
    rows = np.concatenate([images.splits.rows["calibration"], images.splits.rows["train"]])
    row_of = dict(zip(images.images.digests[rows].tolist(), rows.tolist(), strict=True))
    return images.calibrating_on(np.array([row_of[digest.encode()] for digest in pixels]))


def _write(images: PreparedImages, rows: np.ndarray, path: Path) -> str:
    home = images.images
    pixels = [digest.decode() for digest in home.digests[rows].tolist()]
    table = {
        "path": [home.names[row] for row in rows],
        "label": [home.class_names[label] for label in home.labels[rows]],
        "pixels": pixels,
    }
    pq.write_table(pa.table(table), path)
    return hashlib.sha256("".join(pixels).encode()).hexdigest()
