"""What a classifier sees in images: the input of its last layer.

Axes: N image, C channel, H row, W column, D feature, K class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor, nn


@torch.inference_mode()
def features_of(
    model: nn.Module, batches: Iterable[Tensor], progress: Callable[[int], None] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Features (float32 [N, D]) and answers (int64 [N]) of a model in evaluation mode.

    Features are what the last linear or convolutional layer is given, averaged over the image where it is a map.

    Args:
        batches: inputs, float32 NCHW, on the model's device.
        progress: is told how many images are done.
    """
    seen: list[Tensor] = []

    def keep_last(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen[:] = inputs[:1]

    layers = [layer for layer in model.modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
    hooks = [layer.register_forward_pre_hook(keep_last) for layer in layers]
    features, answers, done = [], [], 0
    try:
        for images_NCHW in batches:
            logits_NK = model(images_NCHW)
            last = seen[0] if seen else logits_NK  # a model without such layers has nothing better
            features.append((last.mean((2, 3)) if last.ndim == 4 else last.flatten(1)).float().cpu().numpy())
            answers.append(logits_NK.argmax(1).cpu().numpy())
            done += len(images_NCHW)
            if progress is not None:
                progress(done)
    finally:
        for hook in hooks:
            hook.remove()
    return np.concatenate(features), np.concatenate(answers)
