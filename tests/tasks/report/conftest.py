"""Reports as real runs would write them: one that passed by calibration, one that training could not save."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from tasks.contracts.records import (
    ArtifactRef,
    ChampionScore,
    Choice,
    Compression,
    DataCheck,
    DataRecord,
    Draws,
    EngineLayer,
    EngineRecord,
    Epoch,
    ExportRecord,
    Finding,
    GpuEnergy,
    GpuSpeed,
    GpuState,
    LayerCost,
    LayerError,
    LayerPrecision,
    Memory,
    ModelRecord,
    Offender,
    Parity,
    Precision,
    PrecisionAudit,
    QuantizedRecord,
)
from tasks.contracts.spec import GatesSpec, PreprocessSpec, QuantSpec, RunSpec, TargetSpec
from tasks.engines.base import Timing
from tasks.gates.judge import judge, metrics_from
from tasks.report.content import RunReport
from tasks.scoring.accuracy import Predictions, accuracy_of, compare
from tasks.scoring.gpu_latency import Runs, against_the_faster, timing_of
from tasks.scoring.latency import latency_of, slower_notes

PRECISIONS: tuple[Precision, ...] = ("int8", "float16", "float32")
CLASSES = ("tench", "springer", "cassette", "saw", "church", "horn", "truck", "pump", "ball", "parachute")
PREPROCESS = PreprocessSpec(resize=256, crop=224)


def ref(kind: str) -> ArtifactRef:
    return ArtifactRef(key=f"{kind}/{kind}", sha256="0123456789abcdef" * 4, size_bytes=3_400_000)


def answers(rng: np.random.Generator, labels: np.ndarray, right: float) -> Predictions:
    """Answers that are right with the given chance, the label among the five otherwise in half of the cases."""
    top = np.stack([rng.permutation(len(CLASSES))[:5] for _ in labels]).astype(np.int32)
    is_right = rng.random(len(labels)) < right
    top[is_right, 0] = labels[is_right]
    return Predictions(labels=labels, top=top)


def build_report(*, drop: float, epochs: int = 0, names: tuple[str, ...] = CLASSES) -> RunReport:
    rng = np.random.default_rng(7)
    labels = np.sort(rng.integers(0, len(names), 3900))
    of_float = answers(rng, labels, 0.92)
    changed = rng.random(len(labels)) < 0.012 + drop
    top = np.where(changed[:, None], answers(rng, labels, 0.4).top, of_float.top)
    of_engine = Predictions(labels=labels, top=top)

    layers = [
        (f"features.{block}.{index}", "Conv", 9_000 * (block + 1), 11_000_000)
        for block in range(16)
        for index in range(3)
    ]
    layers += [
        ("avgpool", "GlobalAveragePool", 0, 28_000),
        ("classifier.0", "Gemm", 590_000, 590_000),
        ("classifier.3", "Gemm", 10_250, 10_240),
    ]
    compression = Compression(
        float_bytes=21_300_000,
        int8_bytes=5_640_000,
        ratio=21.3 / 5.64,
        parameters=sum(layer[2] for layer in layers),
        bits_per_weight=8.06,
        macs=sum(layer[3] for layer in layers),
        int8_macs=sum(layer[3] for layer in layers[1:]),
        layers=tuple(
            LayerCost(layer=name, op_type=kind, parameters=count, macs=macs, precision="int8" if place else "float32")
            for place, (name, kind, count, macs) in enumerate(layers)
        ),
    )
    parity = Parity(
        num_images=512,
        agreement=99.4,
        simulation_top1=91.0,
        runtime_top1=90.8,
        layers=tuple(
            LayerError(
                layer=name,
                op_type=kind,
                max_steps=float(rng.integers(0, 3)),
                sqnr_db=float(38 - place / 3 + rng.normal(0, 3)),
            )
            for place, (name, kind, _, _) in enumerate(layers)
        ),
    )
    comparison = compare(of_float, of_engine, names)
    latencies = tuple(
        latency_of(batch, batch * rng.gamma(90, 0.21, 50), batch * rng.gamma(90, 0.075, 50)) for batch in (1, 8, 32)
    )
    memory = Memory(float_mib=143.2, int8_mib=96.7)
    spec = RunSpec(
        name="mobilenet-v3-large",
        quant=QuantSpec(method="qat" if epochs else "ptq"),
        gates=GatesSpec(max_champion_drop=None, max_class_drop=8.0, max_latency_ms=15.0, max_memory_mib=128.0),
    )
    return RunReport(
        run_id="0b54f1d8-6a8e-4a0e-9a63-0e3e1ef5b9b3",
        started="2026-03-02T01:00:04+00:00",
        finished="2026-03-02T01:14:51+00:00",
        spec=spec,
        check=DataCheck(
            source="s3://images/imagenette",
            num_images=13017,
            digest="c0ffee",
            reference="20260301T010004-0b54f1d8",
            findings=(
                Finding(
                    rule="sharpness",
                    says="is not blurred",
                    severity="warning",
                    passed=False,
                    observed="93.10 % of 13,017",
                    limit="at least 12 in 95 % of images",
                    num_offenders=898,
                    offenders=(Offender(path="saw/<b>|0007.jpg", found="3.2"),),
                    remedy="Look at the focus.",
                ),
            ),
            manifest=ref("manifest"),
        ),
        data=DataRecord(
            source="s3://images/imagenette",
            class_names=names,
            counts={"train": 6800, "calibration": 512, "selection": 1500, "gate": 3900},
            duplicates_dropped=17,
            preprocess=PREPROCESS,
            height=224,
            width=224,
            channels=3,
            digest="c0ffee",
            members=ref("members"),
        ),
        model=ModelRecord(
            architecture="torchvision:mobilenet_v3_large",
            arguments={},
            num_classes=len(names),
            num_parameters=compression.parameters,
            weights=ref("weights"),
        ),
        choice=Choice(
            method="coverage" if epochs else "stratified",
            num_candidates=7312,
            radius=0.61,
            findings=(),
            digest="c0ffee",
            images=ref("calibration"),
        ),
        draws=Draws(chosen_top1=91.1, top1=(90.9, 91.3, 91.0), num_images=1500) if epochs else None,
        float_accuracy=accuracy_of(of_float, len(names), ref("predictions")),
        engine_accuracy=accuracy_of(of_engine, len(names), ref("predictions")),
        comparison=comparison,
        champion=ChampionScore(
            release=3,
            accuracy=accuracy_of(of_float, len(names), ref("predictions")),
            comparison=comparison,
            bytes=5_700_000,
        )
        if epochs
        else None,
        latencies=latencies,
        memory=memory,
        export=ExportRecord(float_onnx=ref("float"), int8_onnx=ref("int8"), opset=21, compression=compression),
        parity=parity,
        quantized=QuantizedRecord(
            state=ref("state"),
            method="qat" if epochs else "ptq",
            scheme="onnxruntime",
            num_quantized=50,
            kept_float=("features.0.0",),
            fold_error=1.2e-6,
            selection_top1=91.2,
            epochs=tuple(
                Epoch(
                    epoch=epoch,
                    loss=1.4 / epoch,
                    selection_loss=0.1 / epoch,
                    selection_top1=91.5 - 6 / epoch,
                    learning_rate=1e-4 / epoch,
                    seconds=61.0,
                )
                for epoch in range(1, epochs + 1)
            ),
        ),
        engine=EngineRecord(
            runtime="onnxruntime",
            version="1.31.1",
            engine=ref("engine"),
            hardware="Some CPU",
            options={
                "provider": "CPUExecutionProvider",
                "intra_op_num_threads": "1",
                "session.intra_op.allow_spinning": "1",
            },
        ),
        decision=judge(metrics_from(comparison, None, parity, compression, latencies, memory), spec.gates),
        versions={
            "requant": "0.1.0",
            "torch": "2.14.0",
            "torchao": "0.17.0",
            "onnxruntime": "1.31.1",
            "onnx": "1.20.0",
        },
        hardware="AMD EPYC 9B14 (avx2, avx512f, avx512_vnni)",
    )


@pytest.fixture(scope="session")
def report() -> RunReport:
    """Passed, by calibration alone."""
    return build_report(drop=0.0)


@pytest.fixture(scope="session")
def rejected() -> RunReport:
    """Trained, and still too far from the float model."""
    return build_report(drop=0.15, epochs=8).model_copy(update={"notes": ("This CPU shows no VNNI instructions.",)})


@pytest.fixture(scope="session")
def on_gpu(report: RunReport) -> RunReport:
    """By TensorRT: FP16 wins at batch 1, a classifier and a stem stay float, and Myelin's names are long."""
    rng = np.random.default_rng(3)
    costs = {"int8": 0.36, "float16": 0.28, "float32": 0.62}
    by_batch: dict[int, dict[Precision, Runs]] = {}
    timings = []
    for batch, graph, transfers in product((1, 8, 32), (False, True), (True, False)):
        runs: dict[Precision, Runs] = {}
        for kind in PRECISIONS:
            work = costs[kind] * (0.6 + 0.4 * batch * (0.5 if kind == "int8" else 1))
            runs[kind] = Runs(
                [
                    Timing(
                        h2d_ms=0.05 * batch * transfers,
                        compute_ms=work * rng.gamma(3000, 1 / 3000),
                        d2h_ms=0.01 * transfers,
                        enqueue_ms=0.02 if graph else 0.29,
                    )
                    for _ in range(300)
                ],
                seconds=300 * (work + 0.1) / 1000,
            )
            timings.append(timing_of(kind, batch, runs[kind], transfers=transfers, graph=graph))
        if transfers and not graph:
            by_batch[batch] = runs
    latencies = tuple(against_the_faster(batch, runs) for batch, runs in by_batch.items())
    state = GpuState(
        name="NVIDIA A10", driver="580.65.06", sm_clock_mhz=1695, memory_clock_mhz=6251, temperature_c=47,
        power_w=61.2, memory_used_mib=1210.0, persistence=True, slowdowns=(), processes=None,
    )  # fmt: skip
    hot = state.model_copy(update={"temperature_c": 71, "power_w": 148.9, "slowdowns": ("software power cap",)})
    energies = tuple(
        GpuEnergy(precision=kind, batch_size=batch, num_inferences=4000, seconds=2.0, watts=watts,
                  joules_per_image=2 * watts / (4000 * batch), source="energy counter")
        for batch in (1, 8, 32)
        for kind, watts in zip(PRECISIONS, (92.0, 118.0, 149.0), strict=True)
    )  # fmt: skip
    gpu = GpuSpeed(
        timings=tuple(timings), energies=energies, memory_mib={"int8": 41.5, "float16": 58.0, "float32": 96.0},
        before=state, after=hot, notes=("The GPU's clocks were held down after measuring: software power cap.",),
    )  # fmt: skip
    return report.model_copy(
        update={
            "latencies": latencies,
            "gpu": gpu,
            "hardware": "NVIDIA A10",
            "spec": report.spec.model_copy(update={"target": TargetSpec(runtime="tensorrt")}),
            "notes": slower_notes(latencies),
            "engine": report.engine.model_copy(
                update={"runtime": "tensorrt", "version": "10.13.3", "audit": an_audit(report.export.compression)}
            ),
        }
    )


def an_audit(compression: Compression) -> PrecisionAudit:
    """Of an engine that leaves the stem in FP16 and the classifier in FP32."""

    def layer(name: str, macs: int, precision: LayerPrecision, **more: str) -> EngineLayer:
        return EngineLayer.model_validate(
            {
                "name": name, "kind": "CaskConvolution", "role": "compute", "precision": precision, "reads": precision,
                "writes": precision, "tactic": "", "layers": (name,), "macs": macs, **more,
            }
        )  # fmt: skip

    stem, *middle, first, last = compression.layers
    copies = [
        layer(f"Reformatting CopyNode for Input Tensor 0 to {name}", 0, "float16", role="reformat", kind="Reformat",
              writes="int8")
        for name in ("features.0.1", "features.1.0 + features.1.1")
    ]  # fmt: skip
    myelin = "__myl_" + "MulAddCast" * 20 + "_myl0_8"
    layers = (
        layer("node_quantize_per_tensor", 0, "float32", role="quantize", kind="Reformat", writes="int8"),
        layer(stem.layer, stem.macs, "float16"),
        *copies,
        *(layer(part.layer, part.macs, "int8") for part in middle),
        layer(myelin, 0, "float16", kind="kgen"),
        layer(f"{first.layer} + <b>|relu", first.macs, "float32", kind="gemm"),
    )
    macs = {
        "int8": sum(part.macs for part in middle),
        "float16": stem.macs,
        "float32": first.macs,
        "unknown": last.macs,
    }
    return PrecisionAudit(layers=layers, macs=macs, unplaced=(last.layer,))


@pytest.fixture(scope="session")
def hostile() -> RunReport:
    """Names that would break a page or a table if they were trusted."""
    return build_report(drop=0.0, names=("<script>alert(1)</script>", "a|b", "line\nbreak", *CLASSES[3:]))
