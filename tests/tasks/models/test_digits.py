from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional

from tasks.models.digits import digits_net, train_digits

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


@pytest.fixture(scope="module")
def digits() -> Arrays:
    """Images and labels to train on, and others to judge by."""
    images, labels = load_digits(return_X_y=True)
    small = torch.from_numpy(images.reshape(-1, 1, 8, 8) / 16).float()
    large = functional.interpolate(small, size=(32, 32), mode="bilinear", align_corners=False)
    parts = train_test_split(((large - 0.3) / 0.37).numpy(), labels, test_size=0.4, stratify=labels, random_state=0)
    train, held_out, train_labels, held_out_labels = parts
    return train, train_labels, held_out, held_out_labels


def top1(model: nn.Module, images: np.ndarray, labels: np.ndarray) -> float:
    with torch.no_grad():
        return float((model(torch.from_numpy(images)).argmax(1).numpy() == labels).mean())


def test_digits_are_learned_from_scratch(digits: Arrays) -> None:
    """Half of the default epochs are enough for 95 % of digits that were not trained on."""
    train, train_labels, held_out, held_out_labels = digits
    ticks: list[tuple[int, int]] = []
    model = train_digits(
        train, train_labels, seed=0, epochs=4, progress=lambda done, total: ticks.append((done, total))
    )
    assert top1(model, held_out, held_out_labels) >= 0.95
    assert ticks == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert not model.training


def test_the_seed_decides_the_weights(digits: Arrays) -> None:
    """The same seed gives the same bits, another seed others, and the global generator is left alone."""
    images, labels = digits[0][:128], digits[1][:128]
    before = torch.get_rng_state()
    one, same, other = (train_digits(images, labels, seed=seed, epochs=1).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["0.0.weight"], other["0.0.weight"])


def test_the_net_holds_what_is_hard_in_int8() -> None:
    """Depthwise convolution, hard-swish, a gate, residual sums, global pooling; and it stays small."""
    model = digits_net(num_classes=7)
    kinds = {type(module).__name__ for module in model.modules()}
    assert {"Hardswish", "Hardsigmoid", "SqueezeExcite", "Residual", "AdaptiveAvgPool2d", "BatchNorm2d"} <= kinds
    assert any(isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1 for module in model.modules())
    assert sum(parameter.numel() for parameter in model.parameters()) < 1_000_000
    assert model(torch.zeros(2, 1, 32, 32)).shape == (2, 7)
