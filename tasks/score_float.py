"""Step: the float model on the gate images, by the code that scores the engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from tasks.contracts.records import Accuracy, DataRecord, ModelRecord
from tasks.contracts.spec import RunSpec
from tasks.load_model import float_model
from tasks.scoring.accuracy import accuracy_of, predict, save_predictions
from tasks.step import Progress, remember, step, the_device, the_images
from tasks.stores.base import Store
from tasks.stores.steps import JSON


@step("score float model")
def score_float(spec: RunSpec, data: DataRecord, model: ModelRecord) -> Accuracy:
    """What INT8 is compared with."""
    device = the_device()

    def compute(store: Store, work: Path) -> Accuracy:
        network = float_model(model, work).to(device).to(memory_format=torch.channels_last)

        @torch.inference_mode()
        def answer(images_NCHW: np.ndarray) -> np.ndarray:
            images = torch.from_numpy(images_NCHW).to(device, memory_format=torch.channels_last)
            logits_NC: np.ndarray = network(images).cpu().numpy()
            return logits_NC

        gate = the_images(spec, data).split("gate")
        progress = Progress("scoring the float model")
        batches = gate.batches(spec.evaluation.batch_size)
        predictions = predict(answer, batches, num_images=len(gate), progress=progress)
        path = work / "predictions.npz"
        save_predictions(predictions, path)
        return accuracy_of(predictions, len(data.class_names), store.put(path, kind="predictions"))

    inputs: dict[str, JSON] = {
        "images": data.digest,
        "weights": model.weights.sha256,
        "model": model.model_dump(mode="json"),
        "device": device.type,
    }
    return remember("score_float", __name__, inputs, Accuracy, compute)
