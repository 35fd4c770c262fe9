"""What scoring costs beyond the engine's own time: `python tests/benchmarks/bench_scoring.py`.

Scored:    uint8 images from disk -> normalise, one batch ahead in a thread -> engine -> best five -> labels.
Engine:    the same engine on the same batches, ready in memory.
Both take turns; the ratio of neighbours must stay within LIMIT.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
import torchvision

from tasks.contracts.spec import PreprocessSpec
from tasks.data.preprocess import normalise
from tasks.engines.hardware import hardware
from tasks.engines.onnxruntime import OnnxRuntimeEngine
from tasks.scoring.accuracy import predict

LIMIT = 1.15
MODELS = ("resnet18", "mobilenet_v3_large", "mobilenet_v3_small")
NUM_IMAGES, BATCH_SIZE, SIDE, ROUNDS = 256, 64, 224, 9


def export(name: str, path: Path) -> None:
    model = torchvision.models.get_model(name, weights=None).eval()
    pixels_NCHW = torch.zeros(2, 3, SIDE, SIDE)
    batch = torch.export.Dim("N", min=1, max=1024)
    torch.onnx.export(model, (pixels_NCHW,), path, dynamo=True, dynamic_shapes=({0: batch},), verbose=False)


def batches(pixels_NHWC: np.ndarray, labels_N: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Float32 NCHW and labels; the next batch is made while the caller works on this one."""
    parts = [slice(start, start + BATCH_SIZE) for start in range(0, len(pixels_NHWC), BATCH_SIZE)]
    spec = PreprocessSpec()
    with ThreadPoolExecutor(1) as maker:
        coming = maker.submit(normalise, pixels_NHWC[parts[0]], spec)
        for part, following in zip(parts, [*parts[1:], None], strict=True):
            ready = coming.result()
            if following is not None:
                coming = maker.submit(normalise, pixels_NHWC[following], spec)
            yield ready, labels_N[part]


def measure(path: Path, pixels_NHWC: np.ndarray, labels_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of both, one pair per round."""
    ready = [pixels_NCHW for pixels_NCHW, _ in batches(pixels_NHWC, labels_N)]
    times = np.empty((ROUNDS, 2))
    with OnnxRuntimeEngine(path, threads=1) as engine:
        for turn in range(-1, ROUNDS):  # the first warms up
            start = perf_counter()
            predict(engine.answer, batches(pixels_NHWC, labels_N), num_images=NUM_IMAGES)
            middle = perf_counter()
            for pixels_NCHW in ready:
                engine.answer(pixels_NCHW)
            times[max(turn, 0)] = middle - start, perf_counter() - middle
    return times[:, 0], times[:, 1]


def main() -> int:
    rng = np.random.default_rng(0)
    labels_N = rng.integers(0, 1000, NUM_IMAGES)
    worst = 0.0
    print(f"{hardware()}; {NUM_IMAGES} images, batch {BATCH_SIZE}, {ROUNDS} rounds, 1 engine thread")
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "images.npy"
        np.save(images, rng.integers(0, 256, (NUM_IMAGES, SIDE, SIDE, 3), np.uint8))
        pixels_NHWC = np.load(images, mmap_mode="r")
        for name in MODELS:
            export(name, Path(folder) / f"{name}.onnx")
            scored, alone = measure(Path(folder) / f"{name}.onnx", pixels_NHWC, labels_N)
            low, ratio, high = np.percentile(scored / alone, [25, 50, 75])
            worst = max(worst, ratio)
            print(
                f"{name:20} scored {1000 * np.median(scored) / NUM_IMAGES:6.2f} ms/image, engine "
                f"{1000 * np.median(alone) / NUM_IMAGES:6.2f} ms/image, ratio {ratio:.3f} ({low:.3f} to {high:.3f})"
            )
    print(f"worst ratio {worst:.3f}, limit {LIMIT}")
    return int(worst > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
