"""The demonstration: a float classifier is trained on the bundled digits, so that there is one to re-quantize."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from rich.progress import Progress

from tasks.contracts.settings import Settings
from tasks.contracts.spec import DataSpec, EvaluationSpec, GatesSpec, ModelSpec, QatSpec, QuantSpec, RunSpec
from tasks.data.images import prepare_images
from tasks.engines.hardware import has_vnni
from tasks.models.digits import train_digits
from tasks.models.weights import save_weights
from tasks.stores.workspace import replacing


def demo_spec() -> RunSpec:
    """What the demonstration asks for. The float model is trained first, on the train split alone."""
    weights = Settings().scratch / "demo" / "digits.safetensors"
    spec = RunSpec(
        name="digits",
        model=ModelSpec(architecture="tasks.models.digits:digits_net", weights=str(weights)),
        data=DataSpec(source="digits", calibration=256),
        quant=QuantSpec(method="qat", qat=QatSpec(epochs=4, mirror=False, shift=2)),
        evaluation=EvaluationSpec(latency_batch_sizes=(1, 8, 32)),
        # Without VNNI a network of microseconds gains nothing by INT8, which the report says; elsewhere it must.
        gates=GatesSpec(max_class_drop=5.0, min_agreement=98.0, min_speedup=1.0 if has_vnni() else None),
    )
    _train(spec, weights)
    return spec


def _train(spec: RunSpec, weights: Path) -> None:
    if weights.exists():
        return
    train = prepare_images(spec.model, spec.data, spec.seed, Settings().scratch).split("train")
    images_NCHW, labels_N = (np.concatenate(parts) for parts in zip(*train.batches(256), strict=True))
    with Progress() as bars:
        bar = bars.add_task("training the float digits classifier", total=None)
        model = train_digits(
            images_NCHW,
            labels_N,
            seed=spec.seed,
            progress=lambda done, total: bars.update(bar, completed=done, total=total),
        )
    weights.parent.mkdir(parents=True, exist_ok=True)
    with replacing(weights) as partial:
        save_weights(model, partial)
