"""How QAT scales over processes on this machine: images per second of one and of several, one thread each.

    python tests/benchmarks/bench_together.py [MODEL] [--processes 2] [--rounds 5]

All take the same batches of 64 images at 64 x 64, shared among the processes; gradients travel by gloo (NCCL on GPUs).
In each round torchrun starts one process, and then several; a round's first steps are not counted.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter

import bench_training
import numpy as np
import torch
import torchvision

from tasks.contracts.spec import QuantSpec
from tasks.engines.hardware import hardware
from tasks.quant.calibrate import calibrate
from tasks.quant.capture import capture, fold_batch_norm
from tasks.quant.fake_quantize import Mode
from tasks.quant.group import joined
from tasks.quant.schemes import SCHEMES
from tasks.quant.simulate import simulate
from tasks.quant.train import Trainer

BATCH, STEPS, WARMUP = 64, 12, 3


def member(name: str, folder: Path) -> None:
    """One of the processes; the first prints the seconds of a step."""
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    torch.manual_seed(0)
    images = bench_training.image_set(64, BATCH)
    inputs_NCHW = torch.randn(BATCH, 3, 64, 64)
    folded = capture(torchvision.models.get_model(name, num_classes=bench_training.CLASSES).eval(), inputs_NCHW[:2])
    fold_batch_norm(folded)
    simulation = simulate(folded, SCHEMES["onnxruntime"], frozenset())
    calibrate(simulation, lambda: [inputs_NCHW], QuantSpec(ranges="minmax"))
    with joined(device) as group:
        spec = bench_training.SPEC.model_copy(update={"batch_size": BATCH})
        trainer = Trainer(simulation, folded, images, images, spec, 0, device, folder, group)
        simulation.set_mode(Mode.SIMULATE)
        mine = group.share(np.arange(BATCH))
        pixels_NHWC, labels_N = images.pixels(mine), images.labels[mine]
        answers_NC = np.zeros((len(mine), bench_training.CLASSES), np.float16)
        random = np.random.default_rng(0)
        for step in range(WARMUP + STEPS):
            if step == WARMUP:
                start = perf_counter()
            trainer.step(pixels_NHWC, labels_N, answers_NC, 1.0, random)
        if device.type == "cuda":
            torch.cuda.synchronize()
        if group.rank == 0:
            print((perf_counter() - start) / STEPS)


def seconds_of_a_step(name: str, processes: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        ended = subprocess.run(
            [*command, __file__, name, "--member", folder], check=True, capture_output=True, text=True
        )  # fmt: skip
    return float(ended.stdout.split()[-1])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="mobilenet_v3_small", metavar="MODEL")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--member", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.member:
        member(arguments.model, arguments.member)
        return
    both = [
        [seconds_of_a_step(arguments.model, processes) for processes in (1, arguments.processes)]
        for _ in range(arguments.rounds)
    ]
    times_R2 = np.array(both)
    alone, together = BATCH / np.median(times_R2, axis=0)
    low, ratio, high = np.percentile(times_R2[:, 0] / times_R2[:, 1], [25, 50, 75])
    print(f"    python {' '.join(sys.argv)}\n\n{hardware()}, {arguments.rounds} rounds in turns\n")
    print("| model | images/s by 1 | images/s by " + str(arguments.processes) + " | speedup (quartiles) |")
    print("| --- | ---: | ---: | ---: |")
    print(f"| {arguments.model} | {alone:.0f} | {together:.0f} | {ratio:.2f} ({low:.2f} to {high:.2f}) |")


if __name__ == "__main__":
    main()
