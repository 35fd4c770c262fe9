from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from tasks.quant.capture import capture, fold_batch_norm


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Random weights and images are the same in every run."""
    torch.manual_seed(0)


class SmallNet(nn.Module):
    """A little of everything: hard-swish, SiLU, depthwise, gate, residual sum, concatenation, both kinds of pooling."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.Hardswish())
        self.deep = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1, groups=8, bias=False), nn.BatchNorm2d(8), nn.SiLU())
        self.reduce, self.expand = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.project = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8))
        self.left = nn.Sequential(nn.Conv2d(8, 16, 3, 1, 1), nn.ReLU6())
        self.right = nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.Conv2d(8, 16, 1), nn.ReLU())
        self.head = nn.Linear(32, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.deep(x)
        gate = nn.functional.hardsigmoid(self.expand(self.reduce(y.mean((2, 3), keepdim=True)).relu()))
        x = x + self.project(y * gate)
        x = torch.cat([self.left(x), self.right(x)], 1)
        logits_NC: Tensor = self.head(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits_NC


@pytest.fixture(scope="session", name="images_NCHW")
def _images() -> Tensor:
    return torch.randn(48, 1, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def model(images_NCHW: Tensor) -> nn.Module:
    """A float model whose batch norms know the images."""
    torch.manual_seed(0)
    made = SmallNet().train()
    with torch.no_grad():
        for _ in range(30):
            made(images_NCHW)
    return made.eval()


@pytest.fixture(scope="session")
def folded(model: nn.Module, images_NCHW: Tensor) -> GraphModule:
    """Its graph, shared by all tests: whoever changes it takes a copy."""
    graph = capture(model, images_NCHW[:2])
    fold_batch_norm(graph)
    return graph
