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
from pathlib import Path
from time import perf_counter

import numpy as np
from bench_engines import export_both

from tasks.contracts.spec import PreprocessSpec
from tasks.data.images import ImageSet
from tasks.engines.hardware import hardware
from tasks.engines.onnxruntime import OnnxRuntimeEngine
from tasks.scoring.accuracy import predict

LIMIT = 1.15
MODELS = ("resnet18", "mobilenet_v3_large", "mobilenet_v3_small")
NUM_IMAGES, BATCH_SIZE, SIDE, ROUNDS = 256, 64, 224, 9


def measure(path: Path, images: ImageSet) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of both, one pair per round."""
    ready = [pixels_NCHW for pixels_NCHW, _ in images.batches(BATCH_SIZE)]
    times = np.empty((ROUNDS, 2))
    with OnnxRuntimeEngine(path, threads=1) as engine:
        for turn in range(-1, ROUNDS):  # the first warms up
            start = perf_counter()
            predict(engine.answer, images.batches(BATCH_SIZE), num_images=NUM_IMAGES)
            middle = perf_counter()
            for pixels_NCHW in ready:
                engine.answer(pixels_NCHW)
            times[max(turn, 0)] = middle - start, perf_counter() - middle
    return times[:, 0], times[:, 1]


def main() -> int:
    rng = np.random.default_rng(0)
    worst = 0.0
    print(f"{hardware()}; {NUM_IMAGES} images, batch {BATCH_SIZE}, {ROUNDS} rounds, 1 engine thread\n")
    print("| model | scored, ms/image | engine, ms/image | ratio (quartiles) |")
    print("| --- | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as folder:
        pixels = Path(folder) / "pixels.npy"
        np.save(pixels, rng.integers(0, 256, (NUM_IMAGES, SIDE, SIDE, 3), np.uint8))
        labels_N = rng.integers(0, 1000, NUM_IMAGES)
        images = ImageSet(np.load(pixels, mmap_mode="r"), np.arange(NUM_IMAGES), labels_N, PreprocessSpec(), ())
        for name in MODELS:
            paths = {kind: Path(folder) / f"{kind}.onnx" for kind in ("float", "INT8")}
            export_both(name, paths["float"], paths["INT8"])
            for kind, path in paths.items():
                scored, alone = measure(path, images)
                low, ratio, high = np.percentile(scored / alone, [25, 50, 75])
                worst = max(worst, ratio)
                print(
                    f"| {name} {kind} | {1000 * np.median(scored) / NUM_IMAGES:.2f} "
                    f"| {1000 * np.median(alone) / NUM_IMAGES:.2f} | {ratio:.3f} ({low:.3f} to {high:.3f}) |",
                    flush=True,
                )
    print(f"\nworst ratio {worst:.3f}, limit {LIMIT}")
    return int(worst > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
