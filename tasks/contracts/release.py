"""What production gets: a release, who is champion, and the file that a serving program reads. JSON, like all records.

Accuracies and drops are in percent and percentage points, latencies in milliseconds, sizes in bytes.
"""

from __future__ import annotations

from typing import Literal

from tasks.contracts.records import ArtifactRef, Decision, EngineRecord, PlanKey, Record, Tensor
from tasks.contracts.spec import PreprocessSpec


class Serving(Record):
    """From an image to an answer: preprocess, run, take the label of the largest logit."""

    input: Tensor  # NCHW
    preprocess: PreprocessSpec
    labels: tuple[str, ...]  # in the order of the logits
    output: Tensor  # logits, NC


class Scores(Record):
    """The headline of a run; its record holds the rest."""

    float_top1: float
    int8_top1: float
    top1_drop: float
    agreement: float
    batch_size: int  # that the latencies are of
    float_ms: float  # median
    int8_ms: float
    speedup: float
    float_bytes: int
    int8_bytes: int
    memory_mib: float


class Provenance(Record):
    """All that decided the result. Digests are SHA-256."""

    spec: str
    code: str
    weights: str
    data: str
    manifest: str
    seed: int
    architecture: str
    method: str
    scheme: str
    libraries: dict[str, str]
    machine: dict[str, str]  # python, system and cpu; gpu, driver, cuda and tensorrt where there are any


class Candidate(Record):
    """What a run offers for release."""

    model: str
    run: str
    decision: Decision
    engines: tuple[EngineRecord, ...]  # one per hardware
    serving: Serving
    scores: Scores
    float_onnx: ArtifactRef
    int8_onnx: ArtifactRef
    record: ArtifactRef
    report: ArtifactRef
    provenance: Provenance


class Signature(Record):
    """Ed25519, of the canonical JSON of the document without this field."""

    key_id: str
    value: str  # hexadecimal


class Release(Candidate):
    """Written once and never changed."""

    format: Literal["requant-release-1"] = "requant-release-1"
    number: int
    created: str  # ISO 8601, with its zone
    parent: int | None  # the champion at that time
    signature: Signature | None = None


class Promotion(Record):
    """One move of the champion."""

    sequence: int
    release: int
    previous: int | None
    when: str
    why: Literal["promote", "rollback"]
    id: str  # tells its author that it was written, where the store's answer got lost


class Champion(Record):
    """The release that production serves, and how it came to that. Both are written at once, by compare-and-set."""

    release: int | None = None
    log: tuple[Promotion, ...] = ()
    retired: tuple[int, ...] = ()  # releases that are deleted, or about to be: never promoted again


class ModelFile(Record):
    """`model.json` beside a pulled engine: everything that a serving program needs to know."""

    model: str
    release: int
    engine: str  # file name
    runtime: str
    runtime_version: str
    options: dict[str, str]  # of the runtime, as measured
    hardware: str
    serving: Serving
    plan: PlanKey | None = None  # what a TensorRT plan is checked against before it is loaded
