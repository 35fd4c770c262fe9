"""Step: the float model, with weights that fit it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from tasks.contracts.errors import ModelError
from tasks.contracts.records import DataRecord, ModelRecord
from tasks.contracts.spec import ModelSpec, RunSpec
from tasks.models.architectures import build_model, num_outputs
from tasks.models.origin import architecture_digest, weights_digest
from tasks.models.weights import load_weights, save_weights
from tasks.step import remember, step, the_store
from tasks.stores.base import Store
from tasks.stores.steps import JSON


@step("load model")
def load_model(spec: RunSpec, data: DataRecord) -> ModelRecord:
    """Architecture and weights, checked against each other and against the data."""
    weights = spec.model.weights
    if weights is None:
        raise ModelError(
            f"model.weights is not given for {spec.model.architecture}; random weights have nothing to preserve.",
            remedy="Name a .safetensors or .pth file, or torchvision weights such as DEFAULT.",
        )
    num_classes = num_outputs(spec.model, data.class_names)

    def compute(store: Store, work: Path) -> ModelRecord:
        model = build_model(spec.model, num_classes)
        load_weights(model, weights, spec.model.architecture)
        _check_answer(model, data, num_classes)
        path = work / "weights.safetensors"
        save_weights(model, path)
        return ModelRecord(
            architecture=spec.model.architecture,
            arguments=spec.model.arguments,
            num_classes=num_classes,
            num_parameters=sum(parameter.numel() for parameter in model.parameters()),
            weights=store.put(path, kind="weights"),
        )

    inputs: dict[str, JSON] = {
        "architecture": spec.model.architecture,
        "architecture_code": architecture_digest(spec.model.architecture),
        "arguments": spec.model.arguments,
        "weights": weights_digest(weights),
        "num_classes": num_classes,
        "input": [data.channels, data.height, data.width],
    }
    return remember("load_model", __name__, inputs, ModelRecord, compute)


def float_model(record: ModelRecord, work: Path) -> nn.Module:
    """The model of a record, in evaluation mode."""
    spec = ModelSpec(architecture=record.architecture, arguments=record.arguments)
    model = build_model(spec, record.num_classes)
    path = the_store().fetch(record.weights, work)
    load_weights(model, str(path), record.architecture)
    return model.eval()


def _check_answer(model: nn.Module, data: DataRecord, num_classes: int) -> None:
    images_NCHW = torch.zeros(2, data.channels, data.height, data.width)
    try:
        with torch.no_grad():
            logits = model.eval()(images_NCHW)
    except Exception as error:  # the user's own code runs here
        raise ModelError(
            f"The model fails on images of {data.channels}x{data.height}x{data.width}: {error}.",
            remedy="Check data.preprocess against what the model takes.",
        ) from error
    if not isinstance(logits, torch.Tensor) or logits.shape != (2, num_classes):
        found = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise ModelError(
            f"The model answers two images with {found}; expected logits of (2, {num_classes}).",
            remedy="Return one row of class scores per image.",
        )
