"""What float16 around INT8 does to the answers, in ONNX Runtime on the CPU.

    python tests/benchmarks/bench_half.py RUN        a run's folder in the store, of scheme tensorrt; needs the
                                                     REQUANT_STORE and REQUANT_SCRATCH that it had
    python tests/benchmarks/bench_half.py MODEL ...  torchvision models with random weights

A run's graphs answer its gate images, beside the simulation. A model's graphs answer random images: how far the logits
move, over their spread. Each float16 graph runs twice: as ONNX Runtime takes it, which computes float16 in float32, so
that only constants are rounded; and with each float16 tensor rounded.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import bench_engines
import numpy as np
import onnx
import torch

from tasks.contracts.spec import QuantSpec
from tasks.engines.hardware import hardware
from tasks.engines.onnxruntime import OnnxRuntimeEngine
from tasks.graph.export import export_onnx
from tasks.graph.half import half_from, largest_values
from tasks.graph.parity import Feed
from tasks.load_model import float_model
from tasks.quant.calibrate import calibrate
from tasks.quant.capture import capture, fold_batch_norm
from tasks.quant.fake_quantize import Mode
from tasks.quant.schemes import SCHEMES
from tasks.quant.simulate import convert, simulate
from tasks.quantize_model import inputs_of, prepare_simulation
from tasks.report.content import RunReport
from tasks.step import the_images, the_store
from tasks.stores.steps import library_versions
from tests.tasks.graph.rounded import rounded

MODELS = ("resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0")
BATCH, OBSERVED, ANSWERED = 50, 8, 16  # images
Answer = Callable[[np.ndarray], np.ndarray]


def run(path: Path, feed: Feed) -> Feed:
    with OnnxRuntimeEngine(path, threads=1) as engine:
        return engine.run(feed)


def halves(path: Path, images_NCHW: np.ndarray, work: Path) -> Iterator[tuple[str, Path]]:
    """The float16 graph as it is and with its tensors rounded; prints what did not become float16."""
    half, notes = half_from(onnx.load(path), largest_values(path, images_NCHW, run, work))
    for note in notes:
        print(f"    {path.stem}: {note}", file=sys.stderr)
    for name, model in (("constants rounded", half), ("tensors rounded", rounded(half))):
        onnx.save(model, work / f"{path.stem} {name}.onnx")
        yield name, work / f"{path.stem} {name}.onnx"


def answers_of(path: Path, batches: Iterator[np.ndarray], *, optimise: bool = False) -> np.ndarray:
    """Operator by operator: ONNX Runtime's optimizer would make integers of biases, in steps too small for float16."""
    with OnnxRuntimeEngine(path, threads=1, optimise=optimise) as engine:
        return np.concatenate([engine.answer(batch_NCHW) for batch_NCHW in batches])


def show_run(folder: Path, work: Path) -> None:
    """Top-1 and agreement of a run's graphs on its gate images."""
    report = RunReport.model_validate_json((folder / "record.json").read_text())
    store, spec, images = the_store(), report.spec, the_images(report.spec, report.data)
    gate = images.split("gate")
    observed_NCHW = next(iter(images.split("calibration").batches(OBSERVED)))[0]

    def batches() -> Iterator[np.ndarray]:
        return (batch_NCHW for batch_NCHW, _ in gate.batches(BATCH))

    kept_float = frozenset(report.quantized.kept_float)
    simulation = prepare_simulation(spec, report.data, float_model(report.model, work), kept_float).simulation
    simulation.load(store.fetch(report.quantized.state, work))
    with simulation.mode(Mode.SIMULATE) as graph, torch.inference_mode():
        simulated_NC = np.concatenate([graph(batch_NCHW).numpy() for batch_NCHW in inputs_of(gate, BATCH)])
    print("| graph | top-1 | same answer as | | logits moved, over their spread |")
    print("| --- | ---: | --- | ---: | ---: |")

    def row(name: str, logits_NC: np.ndarray, other: str, other_NC: np.ndarray) -> None:
        top1 = 100 * (logits_NC.argmax(1) == gate.labels).mean()
        same = 100 * (logits_NC.argmax(1) == other_NC.argmax(1)).mean()
        print(f"| {name} | {top1:.2f} | {other} | {same:.2f} % | {moved(logits_NC, other_NC):.2e} |", flush=True)

    row("simulation", simulated_NC, "itself", simulated_NC)
    for kind, ref in (("float", report.export.float_onnx), ("INT8", report.export.int8_onnx)):
        path = work / f"{kind}.onnx"
        store.fetch(ref, work).rename(path)
        exact_NC = answers_of(path, batches(), optimise=True)
        if kind == "INT8":
            row("INT8 + FP32", exact_NC, "simulation", simulated_NC)
        else:
            row("FP32", exact_NC, "itself", exact_NC)
        for name, half in halves(path, observed_NCHW, work):
            logits_NC = answers_of(half, batches())
            title = f"{'FP16' if kind == 'float' else 'INT8 + FP16'}, {name}"
            row(title, logits_NC, "FP32" if kind == "float" else "INT8 + FP32", exact_NC)
            if kind == "INT8":
                row(title, logits_NC, "simulation", simulated_NC)


def moved(logits_NC: np.ndarray, other_NC: np.ndarray) -> float:
    """Root of the mean square of the difference, over the standard deviation."""
    return float(np.sqrt(np.square(logits_NC - other_NC).mean()) / other_NC.std())


def show_model(name: str, work: Path) -> None:
    """How far the logits of a model with random weights move."""
    torch.manual_seed(0)
    example_NCHW = torch.zeros(2, 3, bench_engines.SIDE, bench_engines.SIDE)
    folded = capture(bench_engines.settled(name), example_NCHW)
    fold_batch_norm(folded)
    simulation = simulate(folded, SCHEMES["tensorrt"], frozenset())
    calibrate(simulation, lambda: bench_engines.images(1), QuantSpec(ranges="minmax"))
    images_NCHW = np.concatenate([batch.numpy() for batch in bench_engines.images(ANSWERED // 8)])
    for kind, graph in (("float", folded), ("INT8", convert(simulation))):
        path = work / f"{kind}.onnx"
        export_onnx(graph, example_NCHW, path, integer_bias=False)
        exact_NC = answers_of(path, iter(np.split(images_NCHW, ANSWERED // 8)))
        cells = []
        for _, half in halves(path, images_NCHW[:OBSERVED], work):
            logits_NC = answers_of(half, iter(np.split(images_NCHW, ANSWERED // 8)))
            same = (logits_NC.argmax(1) == exact_NC.argmax(1)).mean()
            cells.append(f"{moved(logits_NC, exact_NC):.2e} | {100 * same:.0f} %")
        print(f"| {name} | {kind} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=MODELS, metavar="RUN or MODEL")
    arguments = parser.parse_args()
    versions = library_versions("torch", "torchvision", "torchao", "onnxruntime")
    print(f"    python {' '.join(sys.argv)}\n")
    print(f"{hardware()}; {', '.join(f'{name} {version}' for name, version in versions.items())}\n")
    if not Path(arguments.what[0]).is_dir():
        print("| model | graph | constants rounded: logits moved | same | tensors rounded: logits moved | same |")
        print("| --- | --- | ---: | ---: | ---: | ---: |")
    for what in arguments.what:
        with tempfile.TemporaryDirectory() as folder:
            if Path(what).is_dir():
                show_run(Path(what), Path(folder))
            else:
                show_model(what, Path(folder))


if __name__ == "__main__":
    main()
