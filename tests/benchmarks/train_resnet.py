"""Train a ResNet18 on CIFAR-10 images from scratch, so that parity can be measured on a ResNet that knows something.

    python tests/benchmarks/train_resnet.py cifar10/train resnet18-cifar10.safetensors [--epochs 16]
    requant run tests/benchmarks/cifar10.yaml --set model.architecture=torchvision:resnet18 \\
      --set data.preprocess.resize=32 --weights resnet18-cifar10.safetensors --data cifar10/train \\
      --set data.gate_source=cifar10/test

Minutes on two cores; no more than a model whose answers are its own is needed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torchvision
from safetensors.torch import save_file
from torch.nn import functional

from tasks.contracts.spec import PreprocessSpec
from tasks.data.cache import decode_images
from tasks.data.open_source import open_source
from tasks.data.preprocess import normalise

PREPROCESS = PreprocessSpec(resize=32, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))
BATCH_SIZE, SHIFT, RATE = 128, 3, 2e-3


def batch_of(pixels_NHWC: np.ndarray, random: np.random.Generator) -> torch.Tensor:
    """Model inputs, each batch mirrored or not and moved by some pixels."""
    moved_NHWC = np.roll(pixels_NHWC, random.integers(-SHIFT, SHIFT + 1, 2), axis=(1, 2))
    step = random.choice([1, -1])
    return torch.from_numpy(normalise(np.ascontiguousarray(moved_NHWC[:, :, ::step]), PREPROCESS))


def main() -> None:
    """Train and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("weights", type=Path)
    parser.add_argument("--epochs", type=int, default=16)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    images = decode_images(open_source(arguments.folder), PREPROCESS, Path(".requant/scratch"))
    model = torchvision.models.resnet18(num_classes=len(images.class_names)).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    steps = len(images) // BATCH_SIZE
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, arguments.epochs * steps)
    for epoch in range(arguments.epochs):
        right = 0
        for rows in np.array_split(random.permutation(len(images))[: steps * BATCH_SIZE], steps):
            labels_N = torch.from_numpy(images.labels[rows])
            logits_NC = model(batch_of(images.pixels_NHWC[rows], random))
            loss = functional.cross_entropy(logits_NC, labels_N, label_smoothing=0.1)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
            right += int((logits_NC.argmax(1) == labels_N).sum())
        print(f"epoch {epoch + 1}: {100 * right / (steps * BATCH_SIZE):.1f} % of the training images right", flush=True)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, arguments.weights)


if __name__ == "__main__":
    main()
