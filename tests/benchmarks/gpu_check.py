"""Everything that only a GPU can prove, in one go: `make gpu-check`.

    python tests/benchmarks/gpu_check.py [MODEL ...] [--page docs/results-gpu.md]

Checks one after the other, writes the page, and fails if a check fails or misses its limit. What is missing on this
machine is said first; nothing else is tried then.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import bench_engines
import bench_training
import numpy as np
import onnx
import torch

from tasks.contracts.errors import RequantError
from tasks.contracts.records import GpuSpeed, Precision
from tasks.contracts.spec import TensorRtSpec
from tasks.engines.hardware import gpu_bus_id, gpu_hardware, hardware
from tasks.engines.inspector import audit
from tasks.engines.onnxruntime import OnnxRuntimeEngine
from tasks.engines.tensorrt import TensorRtEngine, this_machine
from tasks.engines.tensorrt_build import BuiltPlan, build_plan
from tasks.graph.count import compression
from tasks.graph.export import INPUT
from tasks.graph.half import half_from, largest_values
from tasks.quant.schemes import SCHEMES
from tasks.report.content import RunReport
from tasks.scoring.gpu_latency import measure_gpu_speed
from tasks.scoring.nvml import watch_gpu

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "results-gpu.md"
NEEDED = {"tensorrt": "tensorrt", "pycuda": "pycuda", "cuda.bindings": "cuda-python", "pynvml": "nvidia-ml-py"}
MODELS = ("resnet50", "mobilenet_v3_large")
GPU = 0
BATCH = TensorRtSpec(batch=(1, 8, 32))
COPY_BYTES, COPY_ROUNDS, COPY_LIMIT = 2**28, 30, 0.9
LEAK_ROUNDS, LEAK_LIMIT_MIB = 20, 8.0
STEP_IMAGES, STEP_LIMIT = 256, bench_training.LIMIT
PARITY_IMAGES, PARITY_LIMIT = 256, 0.97


class MissedError(Exception):
    """A check ran, and its figure is beyond its limit. The text is what the page shows all the same."""


Check = Callable[[Path], Iterator[str]]


@dataclass(frozen=True)
class Model:
    """A torchvision model with random weights, as the three graphs that TensorRT is given."""

    name: str
    graphs: dict[Precision, Path]
    int8_float32: Path  # the INT8 graph whose remainder is FP32, which ONNX Runtime computes as it is written


def missing() -> list[str]:
    """What this machine lacks, each with its remedy."""
    found = []
    if not torch.cuda.is_available():
        found.append("a GPU that PyTorch can use: install NVIDIA's driver, and a build of torch with CUDA")
    for module, package in NEEDED.items():
        try:
            there = find_spec(module) is not None
        except ModuleNotFoundError:  # of the package that the module is in
            there = False
        if not there:
            found.append(f"{package}: pip install requant[tensorrt]")
    return found


def the_machine(_work: Path) -> Iterator[str]:
    """What all figures depend on."""
    machine = this_machine(GPU)
    names = ("torch", "onnxruntime", "tensorrt", "pycuda", "cuda-python", "nvidia-ml-py")
    yield "| | |"
    yield "| --- | --- |"
    yield f"| GPU | {gpu_hardware(GPU)} |"
    yield f"| driver, newest CUDA it takes | {machine.driver}, {machine.cuda_driver} |"
    yield f"| CPU | {hardware()} |"
    yield from (f"| {name} | {_version(name)} |" for name in names)


def bandwidth(_work: Path) -> Iterator[str]:
    """Our page-locked buffers and stream beside PyTorch's pinned copies, in turns."""
    from tasks.engines.cuda import Lane, on_gpu

    here, there = torch.empty(COPY_BYTES, dtype=torch.uint8, pin_memory=True), torch.empty(
        COPY_BYTES, dtype=torch.uint8, device="cuda"
    )  # fmt: skip
    seconds: dict[str, list[float]] = {}
    with on_gpu(GPU):
        lane = Lane()
        try:
            lane.allocate("x", COPY_BYTES)

            def ours(copy: Callable[[str, int], None]) -> None:
                copy("x", COPY_BYTES)
                lane.synchronize()

            def theirs(target: torch.Tensor, source: torch.Tensor) -> None:
                target.copy_(source, non_blocking=True)
                torch.cuda.synchronize()

            ways: Mapping[str, Callable[[], None]] = {
                "up, PyTorch": lambda: theirs(there, here),
                "up, ours": lambda: ours(lane.upload),
                "down, PyTorch": lambda: theirs(here, there),
                "down, ours": lambda: ours(lane.download),
            }
            for turn in range(COPY_ROUNDS + 3):
                for name, copy in ways.items():
                    start = time.perf_counter()
                    copy()
                    if turn >= 3:
                        seconds.setdefault(name, []).append(time.perf_counter() - start)
        finally:
            lane.close()
    yield "| copy of 256 MiB | GB/s, median | over PyTorch's (quartiles) |"
    yield "| --- | ---: | ---: |"
    worst = float("inf")
    for way in ("up", "down"):
        theirs_s, ours_s = (np.array(seconds[f"{way}, {who}"]) for who in ("PyTorch", "ours"))
        low, ratio, high = np.percentile(theirs_s / ours_s, [25, 50, 75])
        worst = min(worst, float(ratio))
        yield f"| {way} | {COPY_BYTES / np.median(ours_s) / 1e9:.1f} | {ratio:.2f} ({low:.2f} to {high:.2f}) |"
    if worst < COPY_LIMIT:
        raise MissedError(f"At least {COPY_LIMIT} was asked.")


def engines(name: str) -> Check:
    """One model: built three times, run beside ONNX Runtime, timed, audited."""

    def check(work: Path) -> Iterator[str]:
        model = _exported(name, work)
        plans = {precision: build_plan(path, BATCH, work, gpu=GPU) for precision, path in model.graphs.items()}
        yield from _builds(plans)
        yield ""
        yield from _parity(model, plans["int8"])
        yield ""
        yield from _speed(plans)
        yield ""
        layers = compression(model.graphs["float32"], model.graphs["int8"], (2, 3, 224, 224)).layers
        found = audit(plans["int8"].layers.read_text(encoding="utf-8"), layers)
        shares = ", ".join(f"{kind} {found.percent(kind):.1f} %" for kind in found.macs)
        copies = sum(layer.role == "reformat" for layer in found.layers)
        yield f"Multiply-accumulates by the precision they run in: {shares}; {copies} reformat copies."

    check.__doc__ = f"{name}: plans, parity, speed, precision"
    return check


def leaks(work: Path) -> Iterator[str]:
    """Device memory after many engines were opened, run and closed, also after an error."""
    model = _exported("resnet18", work)
    built = build_plan(model.graphs["int8"], BATCH, work, gpu=GPU)
    feed, wrong = {INPUT: _images(8)}, {INPUT: np.full((1, 3, 224, 224), np.nan, np.float32)}
    used: list[float] = []
    for _ in range(LEAK_ROUNDS):
        with TensorRtEngine(built.plan, built.key, gpu=GPU, graph=True) as engine:
            engine.run(feed)
            with contextlib.suppress(RequantError):
                engine.run(wrong)
        free, total = torch.cuda.mem_get_info(GPU)
        used.append((total - free) / 2**20)
    grown = used[-1] - used[2]  # the first ones load kernels
    yield f"After {LEAK_ROUNDS} engines, opened, run with a CUDA graph and closed: {grown:+.1f} MiB since the third."
    if grown > LEAK_LIMIT_MIB:
        raise MissedError(f"At most {LEAK_LIMIT_MIB} MiB was asked.")


def together(work: Path) -> Iterator[str]:
    """Two engines in one process, each asked by four threads, beside PyTorch on the same GPU."""
    model = _exported("resnet18", work)
    plans = [build_plan(model.graphs[kind], BATCH, work, gpu=GPU) for kind in ("int8", "float16")]
    images = [_images(size) for size in (1, 3, 8)]
    wrong: list[str] = []
    with ExitStack() as stack:
        opened = [stack.enter_context(TensorRtEngine(plan.plan, plan.key, gpu=GPU)) for plan in plans]
        expected = [[engine.answer(batch) for batch in images] for engine in opened]

        def ask(number: int) -> None:
            for turn in range(50):
                engine, which = opened[turn % 2], (turn + number) % len(images)
                torch.ones(256, 256, device="cuda") @ torch.ones(256, 256, device="cuda")
                if not np.array_equal(engine.answer(images[which]), expected[turn % 2][which]):
                    wrong.append(f"thread {number}, turn {turn}")

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if wrong:
        raise MissedError(f"Answers differ: {', '.join(wrong[:5])}.")
    yield "4 threads, 2 engines, 200 answers: each is, bit for bit, what one thread alone was given."


def training(_work: Path) -> Iterator[str]:
    """A step of QAT over a float step in bfloat16, channels last."""
    device, images = torch.device("cuda", GPU), bench_training.image_set(side=64, batch_size=STEP_IMAGES)
    yield "| model | float ms | QAT ms | ratio (quartiles) | QAT images/s | MiB at most |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: |"
    worst = 0.0
    for name in bench_training.MODELS:
        torch.cuda.reset_peak_memory_stats(device)
        times_R2 = bench_training.measure(name, images, device, rounds=20, steps=10)
        plain_ms, ours_ms = 1e3 * np.median(times_R2, axis=0)
        low, ratio, high = np.percentile(times_R2[:, 1] / times_R2[:, 0], [25, 50, 75])
        worst = max(worst, float(ratio))
        yield (
            f"| {name} | {plain_ms:.2f} | {ours_ms:.2f} | {ratio:.2f} ({low:.2f} to {high:.2f}) | "
            f"{1e3 * STEP_IMAGES / ours_ms:,.0f} | {torch.cuda.max_memory_allocated(device) / 2**20:.0f} |"
        )
    if worst > STEP_LIMIT:
        raise MissedError(f"At most {STEP_LIMIT} was asked.")


def adapter_tests(_work: Path) -> Iterator[str]:
    """The tests of the adapters, which use the GPU where there is one."""
    yield from _command([sys.executable, "-m", "pytest", "-q", "tests/tasks/engines"])


def the_flow(work: Path) -> Iterator[str]:
    """The demonstration through the whole flow for TensorRT, trained on the GPU and on the CPU."""
    script = (
        "from flows.cli import _run; from flows.demo import demo_spec; "
        "from tasks.contracts.spec import RunSpec; values = demo_spec().model_dump(); "
        "values['target'] = {'runtime': 'tensorrt', 'tensorrt': {'batch': [1, 32, 64]}}; "
        "values['gates']['min_speedup'] = None; values['gates']['min_compression'] = 1.5; "
        "_run(RunSpec.model_validate(values))"
    )
    yield "| trained on | images | float top-1 | engine top-1 | same answer as float | as the simulation |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: |"
    for device in ("cuda", "cpu"):
        store = work / device
        places = {"REQUANT_STORE": str(store), "REQUANT_SCRATCH": str(work / "scratch"), "REQUANT_DEVICE": device}
        for line in _command([sys.executable, "-c", script], **places):
            print(line)
        report = RunReport.model_validate_json(next(store.glob("models/digits/runs/*/record.json")).read_text())
        shares = (
            report.float_accuracy.top1, report.engine_accuracy.top1, report.comparison.agreement,
            report.parity.agreement,
        )  # fmt: skip
        yield f"| {device} | {report.parity.num_images} | {' | '.join(f'{share:.2f} %' for share in shares)} |"


def _exported(name: str, work: Path) -> Model:
    """FP32, FP16 and INT8 in FP16, of scheme `tensorrt`."""
    folder = work / name
    folder.mkdir(exist_ok=True)
    full, integer = folder / "float32.onnx", folder / "int8_float32.onnx"
    bench_engines.SCHEME = SCHEMES["tensorrt"]
    if not full.exists():
        bench_engines.export_both(name, full, integer)

    def run(path: Path, feed: Any) -> Any:
        with OnnxRuntimeEngine(path, threads=1) as engine:
            return engine.run(feed)

    graphs: dict[Precision, Path] = {"float32": full}
    for precision, source in (("float16", full), ("int8", integer)):
        path = folder / f"{precision}.onnx"
        if not path.exists():
            half, _ = half_from(onnx.load(source), largest_values(source, _images(8), run, folder))
            onnx.save(half, path)
        graphs[precision] = path  # type: ignore[index] # both are precisions
    return Model(name, graphs, integer)


def _builds(plans: Mapping[Precision, BuiltPlan]) -> Iterator[str]:
    yield "| plan | s to build | MiB | MiB of activations |"
    yield "| --- | ---: | ---: | ---: |"
    for precision, built in plans.items():
        sizes = (size / 2**20 for size in (built.plan_bytes, built.device_memory_bytes))
        yield f"| {precision} | {built.seconds:.0f} | " + " | ".join(f"{size:.1f}" for size in sizes) + " |"


def _parity(model: Model, built: BuiltPlan) -> Iterator[str]:
    images = _images(PARITY_IMAGES)
    with OnnxRuntimeEngine(model.int8_float32, threads=os.cpu_count() or 1) as engine:
        expected = np.concatenate([engine.answer(part) for part in np.split(images, PARITY_IMAGES // 32)])
    with TensorRtEngine(built.plan, built.key, gpu=GPU) as engine:
        found = np.concatenate([engine.answer(part) for part in np.split(images, PARITY_IMAGES // 32)])
        graphed = TensorRtEngine(built.plan, built.key, gpu=GPU, graph=True)
        with graphed:
            same = np.array_equal(graphed.answer(images[:8]), engine.answer(images[:8]))
    agreement = float(np.mean(expected.argmax(1) == found.argmax(1)))
    spread = float(np.abs(found - expected).mean() / expected.std())
    graph = "the same bits" if same else "other bits"
    yield (
        f"Beside ONNX Runtime on {PARITY_IMAGES} random images: same answer on {100 * agreement:.1f} %, "
        f"logits apart by {100 * spread:.1f} % of their spread. As a CUDA graph: {graph}."
    )
    if agreement < PARITY_LIMIT or not same:
        raise MissedError(f"At least {100 * PARITY_LIMIT:.0f} % and the same bits were asked.")


def _speed(plans: Mapping[Precision, BuiltPlan]) -> Iterator[str]:
    feeds = {size: {INPUT: _images(size)} for size in (1, 8, 32)}
    with ExitStack() as stack, watch_gpu(gpu_bus_id(GPU)) as monitor:
        opened = {
            precision: stack.enter_context(TensorRtEngine(built.plan, built.key, gpu=GPU))
            for precision, built in plans.items()
        }
        speed, latencies = measure_gpu_speed(opened, feeds, monitor)
    yield from _timings(speed)
    for latency in latencies:
        low, high = latency.speedup_quartiles
        yield (
            f"\nBatch {latency.batch_size}: INT8 is {latency.speedup:.2f} ({low:.2f} to {high:.2f}) times as fast as "
            f"{latency.baseline}, the better float."
        )
    for energy in speed.energies:
        yield f"\n{energy.precision}, batch {energy.batch_size}: {1000 * energy.joules_per_image:.2f} mJ an image."
    yield from (f"\n{note}" for note in speed.notes)


def _timings(speed: GpuSpeed) -> Iterator[str]:
    yield "| batch | transfers | CUDA graph | engine | median ms | p99 ms | enqueue ms | images/s | N |"
    yield "| ---: | --- | --- | --- | ---: | ---: | ---: | ---: | ---: |"
    for one in speed.timings:
        ways = " | ".join("yes" if way else "no" for way in (one.transfers, one.graph))
        numbers = f"{one.latency.median:.3f} | {one.latency.p99:.3f} | {one.enqueue.median:.3f}"
        yield (
            f"| {one.batch_size} | {ways} | {one.precision} | {numbers} | {one.images_per_second:,.0f} | "
            f"{one.num_iterations} |"
        )


def _command(command: list[str], **environment: str) -> Iterator[str]:
    ended = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)
    last = (ended.stdout.strip() or ended.stderr.strip()).splitlines()[-3:]
    yield from ("    " + line for line in last)
    if ended.returncode:
        raise MissedError(f"It ended with exit code {ended.returncode}: {ended.stderr[-1500:]}")


def _images(count: int) -> np.ndarray:
    return np.random.default_rng(count).standard_normal((count, 3, 224, 224)).astype(np.float32)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def page_of(checks: list[Check], work: Path) -> tuple[str, list[str]]:
    """The page, and the titles of checks that failed."""
    lines = ["# Results on a GPU", "", "Written by `make gpu-check`, which see for what each figure is."]
    failed = []
    for check in checks:
        title = (check.__doc__ or "").strip().splitlines()[0].rstrip(".")
        print(f"{title} ...", flush=True)
        lines += ["", f"## {title}", ""]
        try:
            lines.extend(check(work))
        except MissedError as missed:
            failed.append(title)
            lines += ["", f"**Missed.** {missed}"]
        except Exception as error:
            failed.append(title)
            said = str(error) if isinstance(error, RequantError) else traceback.format_exc()
            lines += ["", "**Failed.**", "", *("    " + line for line in said.splitlines())]
    return "\n".join(lines) + "\n", failed


def main() -> int:
    """Check and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS, metavar="MODEL", help="of torchvision")
    parser.add_argument("--page", type=Path, default=PAGE)
    arguments = parser.parse_args()
    if lacking := missing():
        print("This machine lacks:", *(f"  {one}" for one in lacking), sep="\n")
        return 1
    models = [engines(name) for name in arguments.models]
    with tempfile.TemporaryDirectory() as folder:
        checks = [the_machine, adapter_tests, bandwidth, *models, leaks, together, the_flow, training]
        page, failed = page_of(checks, Path(folder))
    arguments.page.write_text(page, encoding="utf-8")
    print(f"{arguments.page}: {len(failed)} of {len(checks)} checks failed", *failed, sep="\n  ")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
