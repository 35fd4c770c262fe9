"""The data contract from end to end: what there is, what it breaks, and what the offenders look like."""

from __future__ import annotations

import hashlib
import io
import json
from base64 import b64encode
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from pydantic import ValidationError

from tasks.contracts.errors import DataError, DataRejected
from tasks.contracts.records import SPLITS, ArtifactRef, DataCheck, Finding
from tasks.contracts.spec import DataSpec, RunSpec
from tasks.data.cache import Progress
from tasks.data.checks import PROPERTIES, check_images, check_splits
from tasks.data.images import PreparedImages, open_sources, part_of
from tasks.data.manifest import build_manifest
from tasks.data.preprocess import resolve_preprocess
from tasks.data.sources import some
from tasks.stores.base import Store
from tasks.stores.registry import passed_records

GATE = "gate:"  # in front of a path: it lies below data.gate_source
THUMBNAILS = 8  # pictures per finding
_THUMBNAIL_SIDE = 96
_ONLY_HERE = ["state_size", "state_time", "thumbnail"]  # columns of no use to others


def take_manifest(data: DataSpec, scratch: Path, progress: Progress | None = None) -> pd.DataFrame:
    """The manifest of the source and then of the gate's own, if it has one; `label` is text.

    Raises:
        DataError: if a source cannot be opened.
        StoreError: if `scratch` cannot be written.
    """
    source, gate = open_sources(data, progress)
    total = len(source) + (0 if gate is None else len(gate))
    frames = [build_manifest(source, scratch, part_of(progress, 0, total))]
    if gate is not None:
        own = build_manifest(gate, scratch, part_of(progress, len(source), total))
        frames.append(own.assign(path=GATE + own["path"]))
    return pd.concat([part.assign(label=part["label"].astype(str)) for part in frames], ignore_index=True)


@dataclass(frozen=True)
class Past:
    """The data of the last accepted run."""

    run: str
    digest: str
    manifest: ArtifactRef


def last_accepted(store: Store, name: str) -> Past | None:
    """Of the model `name`; None if none has passed its gates whose record can be read and whose manifest is stored."""
    for key, record in passed_records(store, name):
        try:
            check = DataCheck.model_validate_json(json.dumps(record.get("check")))
        except ValidationError:
            continue  # without data, or of another version of requant
        if store.renew(check.manifest):
            return Past(key.split("/")[-2], check.digest, check.manifest)
    return None


def check_contract(
    spec: RunSpec,
    frame: pd.DataFrame,
    prepare: Callable[[], PreparedImages],
    past: Past | None,
    store: Store,
    work: Path,
) -> DataCheck:
    """Judge a manifest, and store it with the split of each image (null for what no split uses).

    The splits are judged only if no image breaks a critical rule, as they could not be made otherwise.

    Args:
        prepare: decodes and splits the images.
        work: a folder for files on their way.
    """
    checks = spec.data.checks
    class_names = spec.model.class_names or tuple(set(frame["label"][~frame["path"].str.startswith(GATE)]))
    frame = frame.assign(split=pd.Series(None, index=frame.index, dtype="str"))
    findings = check_images(frame, class_names, checks)
    if all(finding.passed or finding.severity == "warning" for finding in findings):
        images = prepare()
        has_own_gate = images.gate is not images.images
        for name in SPLITS:
            offset = len(images.images) if has_own_gate and name == "gate" else 0
            frame.loc[images.splits.rows[name] + offset, "split"] = name
        members = frame[frame["split"].notna()]
        members = members.assign(label=pd.Categorical(members["label"], images.class_names))
        earlier = None if past is None else _calibration(store.fetch(past.manifest, work))
        findings += check_splits(members, resolve_preprocess(spec.model, spec.data), checks, earlier)
    path = work / "manifest.parquet"
    frame.drop(columns=_ONLY_HERE).to_parquet(path, index=False)
    return DataCheck(
        source=spec.data.source,
        num_images=len(frame),
        digest=digest_of(frame),
        reference=None if past is None else past.run,
        findings=findings,
        manifest=store.put(path, kind="manifests"),
    )


def _calibration(path: Path) -> pd.DataFrame:
    return pd.read_parquet(path, columns=list(PROPERTIES), filters=[("split", "==", "calibration")])


def thumbnails(data: DataSpec, findings: Iterable[Finding]) -> dict[str, str]:
    """Small pictures of the first offenders against each broken rule, as data URLs by path, of those that decode."""
    broken = [finding for finding in findings if not finding.passed]
    paths = {offender.path for finding in broken for offender in finding.offenders[:THUMBNAILS]}
    if not paths:
        return {}
    found: dict[str, str] = {}
    for source, prefix in zip(open_sources(data), ("", GATE), strict=True):
        for row, name in enumerate(() if source is None else source.names):
            if prefix + name in paths:
                with suppress(DataError):
                    image = source.load(row).convert("RGB")  # type: ignore[union-attr]
                    image.thumbnail((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE))
                    content = io.BytesIO()
                    image.save(content, "JPEG", quality=80)
                    found[prefix + name] = "data:image/jpeg;base64," + b64encode(content.getvalue()).decode()
    return found


def digest_of(frame: pd.DataFrame) -> str:
    """SHA-256 that changes with any image, label or name."""
    rows = pd.util.hash_pandas_object(frame[["path", "label", "sha256", "fault"]], index=False)
    return hashlib.sha256(rows.to_numpy().tobytes()).hexdigest()


def rejection(check: DataCheck) -> DataRejected:
    """What to raise when critical rules are broken: each with what was found, and the first offenders."""
    problems = []
    for finding in check.breaches:
        offenders = [f"{offender.path} ({offender.found})" for offender in finding.offenders]
        problem = f"{finding.rule} is {finding.observed}, not {finding.limit}"
        problems.append(f"{problem}: {some(offenders)}" if offenders else problem)
    return DataRejected(
        f"{check.source} breaks the data contract: {'; '.join(problems)}.",
        remedy=" ".join(dict.fromkeys(finding.remedy for finding in check.breaches)),
    )
