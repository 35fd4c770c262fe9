"""One step of quantization-aware training against one step of float training of the same model.

    python tests/benchmarks/bench_training.py [MODEL ...] [--rounds 30] [--steps 1] [--side 64] [--batch-size 64]

Both steps take the same pixels on the CPU and do feeding, forward, backward, clipping and a fused AdamW on
channels-last tensors, with bfloat16 autocast on CUDA. The float step trains with batch norm and cross entropy; ours
trains with INT8 simulated, distils, and keeps the moving average. Both take turns: a busy machine disturbs both alike.
A row gives medians in milliseconds and the ratio of neighbours in time, which must stay within LIMIT.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
import torchvision
from torch import nn
from torch.nn import functional

from tasks.contracts.spec import PreprocessSpec, QatSpec, QuantSpec
from tasks.data.images import ImageSet
from tasks.data.preprocess import normalise
from tasks.engines.hardware import hardware
from tasks.quant.calibrate import calibrate
from tasks.quant.capture import capture, fold_batch_norm
from tasks.quant.fake_quantize import Mode
from tasks.quant.schemes import SCHEMES
from tasks.quant.simulate import simulate
from tasks.quant.train import Feed, Trainer
from tasks.stores.steps import library_versions

LIMIT = 1.25
MODELS = ("mobilenet_v3_small", "resnet18")
CLASSES, WARMUP = 10, 3
SPEC = QatSpec(mirror=False, shift=0)
Step = Callable[[], object]


def image_set(side: int, batch_size: int) -> ImageSet:
    random = np.random.default_rng(0)
    pixels_NHWC = random.integers(0, 256, (batch_size, side, side, 3), np.uint8)
    labels_N = random.integers(0, CLASSES, batch_size)
    return ImageSet(pixels_NHWC, np.arange(batch_size), labels_N, PreprocessSpec(), tuple(map(str, range(CLASSES))))


def float_step(model: nn.Module, images: ImageSet, device: torch.device) -> Step:
    model = model.train().to(device).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), SPEC.learning_rate, fused=True)
    feed, pixels_NHWC = Feed(images.preprocess, device), images.pixels(slice(None))

    def step() -> None:
        labels_N = torch.from_numpy(images.labels).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits_NC = model(feed(pixels_NHWC))
        loss = functional.cross_entropy(logits_NC.float(), labels_N)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), SPEC.gradient_clip)
        optimizer.step()

    return step


def qat_step(model: nn.Module, images: ImageSet, device: torch.device, folder: Path) -> Step:
    """The step that `tasks.quant.train.train` takes; the teacher has answered already."""
    pixels_NHWC = images.pixels(slice(None))
    inputs_NCHW = torch.from_numpy(normalise(pixels_NHWC, images.preprocess))
    spec = SPEC.model_copy(update={"batch_size": len(images)})
    folded = capture(model.eval(), inputs_NCHW[:2])
    fold_batch_norm(folded)
    simulation = simulate(folded, SCHEMES["onnxruntime"], frozenset())
    calibrate(simulation, lambda: [inputs_NCHW], QuantSpec(ranges="minmax"))
    trainer = Trainer(simulation, folded, images, images, spec, 0, device, folder)
    simulation.set_mode(Mode.SIMULATE)
    answers_NC = np.zeros((len(images), CLASSES), np.float16)
    random = np.random.default_rng(0)
    return lambda: trainer.step(pixels_NHWC, images.labels, answers_NC, 1.0, random)


def seconds(step: Step, steps: int, device: torch.device) -> float:
    start = perf_counter()
    for _ in range(steps):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (perf_counter() - start) / steps


def measure(name: str, images: ImageSet, device: torch.device, rounds: int, steps: int) -> np.ndarray:
    """Seconds of a step, float and ours, [rounds, 2]."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        plain, ours = (torchvision.models.get_model(name, num_classes=CLASSES) for _ in range(2))
        both = float_step(plain, images, device), qat_step(ours, images, device, Path(folder))
        times = [[seconds(step, steps, device) for step in both] for _ in range(WARMUP + rounds)]
    return np.array(times[WARMUP:])


def main() -> int:
    """Measure and print; fail if a ratio is above the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS, metavar="MODEL")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--steps", type=int, default=1, help="in a row, between two looks at the clock")
    parser.add_argument("--side", type=int, default=64, help="of the square images, in pixels")
    parser.add_argument("--batch-size", type=int, default=64)
    arguments = parser.parse_args()
    images = image_set(arguments.side, arguments.batch_size)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = torch.cuda.get_device_name() if device.type == "cuda" else hardware()
    versions = library_versions("torch", "torchvision", "torchao")
    print(f"    python {' '.join(sys.argv)}\n")
    print(f"{machine}; {', '.join(f'{name} {version}' for name, version in versions.items())}")
    threads = f"{torch.get_num_threads()} CPU threads"
    print(f"Batch {len(images)}, {arguments.side}x{arguments.side}, {threads}, {arguments.rounds} rounds in turns.\n")
    print("| model | float ms | QAT ms | ratio (quartiles) |")
    print("| --- | ---: | ---: | ---: |")
    worst = 0.0
    for name in arguments.models:
        times_R2 = measure(name, images, device, arguments.rounds, arguments.steps)
        plain_ms, ours_ms = 1e3 * np.median(times_R2, axis=0)
        low, ratio, high = np.percentile(times_R2[:, 1] / times_R2[:, 0], [25, 50, 75])
        worst = max(worst, float(ratio))
        print(f"| {name} | {plain_ms:.1f} | {ours_ms:.1f} | {ratio:.2f} ({low:.2f} to {high:.2f}) |", flush=True)
    print(f"\nThe limit is {LIMIT}.")
    return int(worst > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
