"""The lint for TensorRT over long graphs, and over models as they are exported.

    python tests/benchmarks/bench_lint.py [MODEL ...] [--rounds 9]

The graphs are chains of residual blocks in INT8, 32 channels wide. Times are CPU seconds of one thread. Both lengths
take turns, so a busy machine disturbs both alike; their ratio is taken in each round. Models are torchvision's with
random weights, exported at 64 x 64; their row gives findings by severity.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import torch
import torchvision
from onnx import NodeProto, TensorProto, helper, numpy_helper

from tasks.contracts.spec import QuantSpec
from tasks.engines.hardware import hardware
from tasks.graph.export import export_onnx
from tasks.graph.lint import lint
from tasks.quant.calibrate import calibrate
from tasks.quant.capture import capture, fold_batch_norm
from tasks.quant.schemes import SCHEMES
from tasks.quant.simulate import convert, simulate
from tasks.stores.steps import library_versions

MODELS = ("resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0")
LENGTHS = (1_000, 4_000)
CHANNELS, SIDE = 32, 64


def chain(num_nodes: int) -> onnx.ModelProto:
    """Blocks of six nodes: weight, convolution, sum, ReLU, Q, DQ."""
    random = np.random.default_rng(0)
    constants = {
        "s": np.float32(0.05),
        "z": np.int8(0),
        "ws": np.full(CHANNELS, 0.01, np.float32),
        "wz": np.zeros(CHANNELS, np.int8),
    }
    nodes: list[NodeProto] = []
    nodes += _pair("input", "x0")
    for number in range((num_nodes - len(nodes)) // 6):
        steps = random.integers(-50, 51, (CHANNELS, CHANNELS, 3, 3), dtype=np.int8)
        steps[:, 0, 0, 0] = 127
        constants[f"w{number}"] = steps
        given, inner = f"x{number}", f"conv{number}"
        nodes += [
            helper.make_node("DequantizeLinear", [f"w{number}", "ws", "wz"], [f"{inner}_w"], axis=0),
            helper.make_node("Conv", [given, f"{inner}_w"], [inner], inner, pads=[1, 1, 1, 1]),
            helper.make_node("Add", [inner, given], [f"{inner}_sum"]),
            helper.make_node("Relu", [f"{inner}_sum"], [f"{inner}_relu"]),
            *_pair(f"{inner}_relu", f"x{number + 1}"),
        ]
    last = nodes[-1].output[0]
    sizes: list[str | int | None] = ["batch", CHANNELS, 8, 8]
    graph = helper.make_graph(
        [*nodes, helper.make_node("GlobalAveragePool", [last], ["logits"])],
        "chain",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, sizes)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", CHANNELS, 1, 1])],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def _pair(given: str, name: str) -> list[NodeProto]:
    return [
        helper.make_node("QuantizeLinear", [given, "s", "z"], [f"{name}_q"]),
        helper.make_node("DequantizeLinear", [f"{name}_q", "s", "z"], [name]),
    ]


def exported(name: str) -> onnx.ModelProto:
    """A torchvision model as the scheme for TensorRT has it."""
    torch.manual_seed(0)
    images_NCHW = torch.randn(4, 3, SIDE, SIDE)
    network = torchvision.models.get_model(name, weights=None).train()
    with torch.no_grad():
        network(images_NCHW)
    folded = capture(network.eval(), images_NCHW[:2])
    fold_batch_norm(folded)
    simulation = simulate(folded, SCHEMES["tensorrt"], frozenset())
    calibrate(simulation, lambda: [images_NCHW], QuantSpec(ranges="minmax"))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "int8.onnx"
        export_onnx(convert(simulation), images_NCHW[:2], path, integer_bias=False)
        return onnx.load(path)


def seconds(model: onnx.ModelProto) -> float:
    start = time.process_time()
    lint(model, "tensorrt")
    return time.process_time() - start


def spread(values: list[float]) -> str:
    low, median, high = statistics.quantiles(values, n=4)
    return f"{median:.2f} ({low:.2f} to {high:.2f})"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS, metavar="MODEL")
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    print(f"    python {' '.join(sys.argv)}\n")
    versions = library_versions("torch", "torchvision", "onnx")
    print(f"{hardware()}; {', '.join(f'{name} {version}' for name, version in versions.items())}\n")
    chains = [chain(length) for length in LENGTHS]
    for model in chains:
        assert {finding.severity for finding in lint(model, "tensorrt")} <= {"info"}
    rounds = [[seconds(model) for model in chains] for _ in range(arguments.rounds)]
    print("| nodes | CPU seconds (quartiles) |\n| ---: | ---: |")
    for model, times in zip(chains, zip(*rounds, strict=True), strict=True):
        print(f"| {len(model.graph.node):,} | {spread(list(times))} |")
    print(f"\nlong over short: {spread([long / short for short, long in rounds])}\n")
    print("| model | nodes | CPU seconds | errors | warnings | notes |\n| --- | ---: | ---: | ---: | ---: | ---: |")
    for name in arguments.models:
        model = exported(name)
        counts = Counter(finding.severity for finding in lint(model, "tensorrt"))
        took = spread([seconds(model) for _ in range(arguments.rounds)])
        found = f"{counts['error']} | {counts['warning']} | {counts['info']}"
        print(f"| {name} | {len(model.graph.node)} | {took} | {found} |", flush=True)


if __name__ == "__main__":
    main()
