"""INT8 against float in ONNX Runtime, one image, one thread.

    python tests/benchmarks/bench_engines.py [MODEL ...] [--rounds 50] [--keep-float GLOB ...]

torchvision models with random weights from a fixed seed; batch norm has settled on random images, so that values are of
a usual size. Both engines take turns: a busy machine disturbs both alike. A row gives medians in milliseconds, the
speedup with the quartiles of its neighbours in time, and how many times smaller the file is.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import onnx
import torch
import torchvision
from torch import Tensor, nn

from tasks.contracts.records import Latency
from tasks.contracts.spec import QuantSpec
from tasks.engines.hardware import hardware, has_amx
from tasks.engines.onnxruntime import OnnxRuntimeEngine
from tasks.graph.amx import for_amx
from tasks.graph.export import INPUT, export_onnx
from tasks.graph.index import read_onnx
from tasks.quant.calibrate import calibrate
from tasks.quant.capture import capture, fold_batch_norm
from tasks.quant.schemes import SCHEMES, layers_kept_float
from tasks.quant.simulate import convert, fit_biases, simulate
from tasks.scoring.latency import measure_latency
from tasks.stores.steps import library_versions

MODELS = ("resnet50", "mobilenet_v3_large", "mobilenet_v2", "efficientnet_b0")
SIDE, CALIBRATION, SETTLING = 224, 8, 4
SCHEME = SCHEMES["onnxruntime"]


def images(count: int) -> Iterator[Tensor]:
    """Batches of eight."""
    return (torch.randn(8, 3, SIDE, SIDE) for _ in range(count))


def settled(name: str) -> nn.Module:
    """With batch norms that hold the mean over some batches."""
    model: nn.Module = torchvision.models.get_model(name, weights=None).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        for batch_NCHW in images(SETTLING):
            model(batch_NCHW)
    return model.eval()


def export_both(name: str, float_path: Path, int8_path: Path, globs: Sequence[str] = ()) -> None:
    torch.manual_seed(0)
    model, example_NCHW = settled(name), torch.zeros(2, 3, SIDE, SIDE)
    folded = capture(model, example_NCHW)
    fold_batch_norm(folded)
    simulation = simulate(folded, SCHEME, layers_kept_float(folded, globs))
    calibrate(simulation, lambda: images(CALIBRATION // 8), QuantSpec(ranges="minmax"))
    fit_biases(simulation)
    export_onnx(folded, example_NCHW, float_path, integer_bias=False)
    export_onnx(convert(simulation), example_NCHW, int8_path, integer_bias=SCHEME.integer_bias)
    if has_amx():  # as the engine is written for this CPU
        written = read_onnx(int8_path)
        for_amx(written)
        onnx.save(written, int8_path)


def measure(float_path: Path, int8_path: Path, rounds: int) -> Latency:
    feed = {INPUT: torch.randn(1, 3, SIDE, SIDE).numpy()}
    with OnnxRuntimeEngine(float_path, threads=1) as plain, OnnxRuntimeEngine(int8_path, threads=1) as integer:
        (latency,) = measure_latency(plain.run, integer.run, {1: feed}, rounds=rounds)
    return latency


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS, metavar="MODEL")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--keep-float", nargs="*", default=[], metavar="GLOB", help="layers that stay float")
    arguments = parser.parse_args()
    versions = library_versions("torch", "torchvision", "torchao", "onnxruntime")
    print(f"    python {' '.join(sys.argv)}\n")
    print(f"{hardware()}; {', '.join(f'{name} {version}' for name, version in versions.items())}")
    print(f"Batch 1, {SIDE}x{SIDE}, one thread, {arguments.rounds} rounds in turns.\n")
    print("| model | float ms | INT8 ms | speedup (quartiles) | smaller by |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name in arguments.models:
        with tempfile.TemporaryDirectory() as folder:
            paths = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
            export_both(name, *paths, arguments.keep_float)
            latency = measure(*paths, arguments.rounds)
            float_bytes, int8_bytes = (path.stat().st_size for path in paths)
        low, high = latency.speedup_quartiles
        print(
            f"| {name} | {latency.float_ms['median']:.2f} | {latency.int8_ms['median']:.2f} "
            f"| {latency.speedup:.2f} ({low:.2f} to {high:.2f}) | {float_bytes / int8_bytes:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
