"""What the float model sees in the images that it is calibrated on, and in the gate's. Axes: N image, D feature."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from tasks.contracts.records import Finding
from tasks.contracts.spec import RunSpec
from tasks.data.checks import check_model_view
from tasks.data.images import ImageSet, PreparedImages
from tasks.models.features import features_of

MAX_REFERENCE = 1024  # gate images that features are compared with

Progress = Callable[[int, int], None]


def view_of(
    network: nn.Module, images: ImageSet, limit: int, batch_size: int, progress: Progress
) -> tuple[np.ndarray, np.ndarray]:
    """Features (float32 [N, D]) and answers (int64 [N]) of the first `limit` images."""
    device, count = next(network.parameters()).device, min(limit, len(images))
    batches = (torch.from_numpy(batch).to(device) for batch, _ in images.batches(batch_size, limit=limit))
    return features_of(network, batches, lambda done: progress(done, count))


def check_view(
    network: nn.Module, images: PreparedImages, spec: RunSpec, progress: Progress
) -> tuple[tuple[Finding, ...], np.ndarray]:
    """Whether the float model sees calibration images as it sees the gate's; and the features of the former."""
    calibration, batch_size = images.split("calibration"), spec.evaluation.batch_size
    gate = view_of(network, images.split("gate"), MAX_REFERENCE, batch_size, progress)
    seen = view_of(network, calibration, len(calibration), batch_size, progress)
    return check_model_view(gate, seen, len(images.class_names), spec.data.checks), seen[0]
