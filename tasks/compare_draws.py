"""Step: what other calibration images would have come to."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tasks.choose_calibration import chosen_images
from tasks.contracts.records import Choice, DataRecord, Draws, ModelRecord
from tasks.contracts.spec import RunSpec
from tasks.data.choose import draw
from tasks.data.images import PreparedImages
from tasks.load_model import float_model
from tasks.quant.simulate import fit_biases
from tasks.quantize_model import calibrated, prepare_simulation, simulated_top1
from tasks.step import Progress, remember, step
from tasks.stores.base import Store
from tasks.stores.steps import JSON


@step("compare draws")
def compare_draws(spec: RunSpec, data: DataRecord, model: ModelRecord, choice: Choice) -> Draws:
    """Calibrate on `spec.data.draws` other stratified draws, and score each simulation on the selection split."""

    def compute(_: Store, work: Path) -> Draws:
        network, images = float_model(model, work), chosen_images(spec, data, choice, work)
        progress, total = Progress("calibrating on other draws"), spec.data.draws + 1

        def top1(images: PreparedImages) -> float:
            prepared = calibrated(prepare_simulation(spec, data, network), images.split("calibration"), spec)
            fit_biases(prepared.simulation)
            return simulated_top1(prepared.simulation, images.split("selection"), spec.evaluation.batch_size)

        calibration, train = images.split("calibration"), images.split("train")
        rows = np.concatenate([calibration.rows, train.rows])
        labels_N = np.concatenate([calibration.labels, train.labels])
        counts_K = np.bincount(calibration.labels, minlength=model.num_classes)
        found = [top1(images)]
        for number in range(1, total):
            progress(number, total)
            found.append(top1(images.calibrating_on(rows[draw(labels_N, counts_K, spec.seed + number)])))
        return Draws(chosen_top1=found[0], top1=tuple(found[1:]), num_images=len(images.split("selection")))

    inputs: dict[str, JSON] = {
        "images": data.digest,
        "model": model.model_dump(mode="json"),
        "calibration": choice.digest,
        "draws": spec.data.draws,
        "quant": spec.quant.model_dump(mode="json", exclude={"qat", "method"}),
        "scheme": spec.target.scheme_name,
        "seed": spec.seed,
    }
    return remember("compare_draws", __name__, inputs, Draws, compute)
