"""A small classifier of grey 32x32 images and its training: the model of the demonstration.

It holds what is hard in INT8: hard-swish, a depthwise convolution, squeeze-and-excitation behind a hard-sigmoid gate
and residual sums, with batch norm after every convolution. Axes: N image, C channel, H row, W column.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

MAX_SHIFT = 2  # pixels


class SqueezeExcite(nn.Module):
    """Scales each channel by a gate computed from the mean of all channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.reduce = nn.Conv2d(channels, channels // 4, 1)
        self.activation = nn.ReLU()
        self.expand = nn.Conv2d(channels // 4, channels, 1)
        self.gate = nn.Hardsigmoid()

    def forward(self, inner_NCHW: Tensor) -> Tensor:
        gate_NC11: Tensor = self.gate(self.expand(self.activation(self.reduce(self.pool(inner_NCHW)))))
        return inner_NCHW * gate_NC11


class Residual(nn.Module):
    """Adds what `body` computes to its input."""

    def __init__(self, body: nn.Module, activation: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.activation = activation

    def forward(self, inner_NCHW: Tensor) -> Tensor:
        sum_NCHW: Tensor = self.activation(inner_NCHW + self.body(inner_NCHW))
        return sum_NCHW


def digits_net(num_classes: int = 10) -> nn.Module:
    """A classifier of `[N, 1, 32, 32]` images."""
    return nn.Sequential(
        _conv(1, 32, 3, nn.Hardswish()),
        _conv(32, 64, 3, nn.Hardswish(), stride=2),
        _inverted_residual(64, expanded=128),
        _conv(64, 128, 3, nn.ReLU(), stride=2),
        _plain_residual(128),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, num_classes),
    )


def train_digits(
    images_NCHW: np.ndarray,
    labels_N: np.ndarray,
    *,
    seed: int,
    epochs: int = 8,
    batch_size: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> nn.Module:
    """`digits_net` trained from scratch on normalised images, in inference mode. The seed decides the result."""
    images, labels = torch.from_numpy(images_NCHW), torch.from_numpy(labels_N).long()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = digits_net(int(labels.max()) + 1).train()
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
        num_batches = len(images) // batch_size
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=epochs * num_batches)
        for epoch in range(epochs):
            order = torch.randperm(len(images))[: num_batches * batch_size]
            for rows in order.view(num_batches, batch_size):
                loss = functional.cross_entropy(model(_shifted(images[rows])), labels[rows], label_smoothing=0.1)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
            if progress is not None:
                progress(epoch + 1, epochs)
    return model.eval()


def _conv(
    inputs: int, outputs: int, kernel: int, activation: nn.Module | None = None, *, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    layers: list[nn.Module] = [conv, nn.BatchNorm2d(outputs)]
    return nn.Sequential(*layers, *([] if activation is None else [activation]))


def _inverted_residual(channels: int, *, expanded: int) -> Residual:
    body = nn.Sequential(
        _conv(channels, expanded, 1, nn.Hardswish()),
        _conv(expanded, expanded, 3, nn.Hardswish(), groups=expanded),
        SqueezeExcite(expanded),
        _conv(expanded, channels, 1),
    )
    return Residual(body, nn.Identity())


def _plain_residual(channels: int) -> Residual:
    body = nn.Sequential(_conv(channels, channels, 3, nn.ReLU()), _conv(channels, channels, 3))
    return Residual(body, nn.ReLU())


def _shifted(images_NCHW: Tensor) -> Tensor:
    """Each image moved by up to MAX_SHIFT pixels either way; what comes in repeats the border."""
    num_images, _, height, width = images_NCHW.shape
    padded = functional.pad(images_NCHW, [MAX_SHIFT] * 4, mode="replicate")
    rows_NH = torch.randint(2 * MAX_SHIFT + 1, (num_images, 1)) + torch.arange(height)
    columns_NW = torch.randint(2 * MAX_SHIFT + 1, (num_images, 1)) + torch.arange(width)
    image_N11 = torch.arange(num_images)[:, None, None]
    moved_NHWC = padded.permute(0, 2, 3, 1)[image_N11, rows_NH[:, :, None], columns_NW[:, None, :]]
    return moved_NHWC.permute(0, 3, 1, 2)
