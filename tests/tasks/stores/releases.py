"""Runs that have passed, with artifacts of a few bytes, for tests of releases."""

from __future__ import annotations

import json
from pathlib import Path

from tasks.contracts.records import ArtifactRef, Decision, EngineRecord, Tensor
from tasks.contracts.release import Candidate, Provenance, Scores, Serving
from tasks.contracts.spec import PreprocessSpec
from tasks.stores.base import Store

NAME = "birds"
CPU, GPU = "Some CPU (avx512_vnni)", "NVIDIA H200"


def put(store: Store, folder: Path, content: str, kind: str, suffix: str = ".onnx") -> ArtifactRef:
    path = folder / f"{kind}{suffix}"
    path.write_text(content)
    return store.put(path, kind=kind)


def a_run(
    store: Store, folder: Path, run: str, *, engine: str = "", passed: bool = True, hardware: tuple[str, ...] = (CPU,)
) -> Candidate:
    """What a run has stored by its end. The engine differs from run to run unless it is given."""
    engines = tuple(
        EngineRecord(
            runtime="onnxruntime",
            version="1.31.1",
            engine=put(store, folder, f"{engine or run} for {name}", "engine"),
            options={"intra_op_num_threads": "1"},
            hardware=name,
        )
        for name in hardware
    )
    weights = put(store, folder, f"weights of {run}", "weights", ".safetensors")
    record = json.dumps({"run_id": run, "weights": weights.model_dump(), "engine": engines[0].engine.model_dump()})
    for name, text in {"data.html": "<html>", "report.html": f"<html>{run}", "record.json": record}.items():
        store.write_text(f"models/{NAME}/runs/{run}/{name}", text)
    return Candidate(
        model=NAME,
        run=run,
        decision=Decision(verdicts=(), passed=passed),
        engines=engines,
        serving=Serving(
            input=Tensor(name="images", dtype="float32", shape=(None, 3, 224, 224)),
            preprocess=PreprocessSpec(resize=256, crop=224),
            labels=("robin", "wren"),
            output=Tensor(name="logits", dtype="float32", shape=(None, 2)),
        ),
        scores=Scores(
            float_top1=92.0, int8_top1=91.5, top1_drop=0.5, agreement=98.0, batch_size=1, float_ms=18.5, int8_ms=6.25,
            speedup=2.96, float_bytes=21_300_000, int8_bytes=5_640_000, memory_mib=96.7,
        ),
        float_onnx=put(store, folder, "float", "float"),
        int8_onnx=engines[0].engine,
        record=put(store, folder, record, "record", ".json"),
        report=put(store, folder, f"<html>{run}", "report", ".html"),
        provenance=Provenance(
            spec="5" * 64, code="c" * 64, weights=weights.sha256, data="d" * 64, manifest="e" * 64, seed=0,
            architecture="torchvision:mobilenet_v3_large", method="ptq", scheme="onnxruntime",
            libraries={"torch": "2.14.0"}, machine={"cpu": CPU},
        ),
    )  # fmt: skip
