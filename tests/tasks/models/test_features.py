from __future__ import annotations

import numpy as np
import torch
from torch import nn

from tasks.models.features import features_of


def test_features_are_what_the_last_layer_is_given() -> None:
    """The last linear layer that runs, not the last that is listed."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(5, 3)
            self.body = nn.Linear(12, 5)

        def forward(self, images_NCHW: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.head(self.body(images_NCHW.flatten(1)))
            return logits

    model, images_NCHW, told = Net().eval(), torch.randn(7, 3, 2, 2), list[int]()
    features_ND, answers_N = features_of(model, torch.split(images_NCHW, 3), told.append)
    np.testing.assert_allclose(features_ND, model.body(images_NCHW.flatten(1)).detach().numpy(), atol=1e-6)
    np.testing.assert_array_equal(answers_N, model(images_NCHW).argmax(1).numpy())
    assert told == [3, 6, 7]
    assert not model.head._forward_pre_hooks


def test_maps_are_averaged() -> None:
    """A classifier that ends in a convolution, as SqueezeNet does."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    images_NCHW = torch.randn(5, 3, 6, 6)
    features_ND, _ = features_of(model, [images_NCHW])
    np.testing.assert_allclose(features_ND, model[0](images_NCHW).mean((2, 3)).detach().numpy(), atol=1e-6)


def test_a_model_without_layers_shows_its_answers() -> None:
    features_ND, answers_N = features_of(nn.Flatten().eval(), [torch.eye(4).reshape(4, 1, 2, 2)])
    np.testing.assert_array_equal(features_ND, np.eye(4))
    np.testing.assert_array_equal(answers_N, np.arange(4))
