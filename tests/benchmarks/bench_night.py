"""Nights on a Prefect server with workers: `python tests/benchmarks/bench_night.py [night resume queue] [options]`.

Everything is real and on this machine: server, process workers, the flow with a network that is quantized in seconds.

night    runs in which nothing has changed. total: from their creation to their end; queue: until the worker's process
         has loaded Prefect and the flow and begins; flow: from there to the end. ours: flow, and what loading the flow
         adds to loading Prefect, measured in turns in processes of their own. ours, CPU: the same in seconds of CPU,
         which other work on the machine does not stretch: such a night in a process, less one with an empty flow.
resume   a run killed in check_parity, its last step, and retried: what the second attempt computed
queue    `--models` models at once on `--workers` workers of one run each, with every step to do, unless `--folder` has
         them done, and again with nothing changed, on `--database` sqlite or postgresql (a server of its own, by
         Debian's package)

Status 1 if a run was lost, or the resumed one computed more than its last step.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

from tasks.contracts.spec import GatesSpec, ModelSpec
from tasks.models.architectures import build_model
from tasks.models.weights import save_weights
from tests.flows.prefect_server import FINAL, Installation, installation, processes_of, wait_for

NETWORK = "tasks.models.digits:digits_net"
PREFECT_ALONE = "import prefect.flow_engine"
EMPTY = """
import prefect.flow_engine
from prefect import flow
@flow
def empty() -> None: ...
empty()
"""
NIGHT = """
import prefect.flow_engine, json, sys
from flows.requantize import requantize
from tasks.contracts.spec import spec_from
assert requantize(spec_from(json.loads(sys.argv[1]), origin="bench"), return_state=True).name == "Unchanged"
"""
WITH_FLOW = "import prefect.flow_engine, flows.requantize"


def spec_of(number: int) -> dict[str, Any]:
    """Every number has splits of its own, so no model takes a step from another."""
    return {
        "name": f"digits{number}",
        "seed": number,
        "model": {"architecture": NETWORK, "weights": "digits.safetensors"},
        "data": {"source": "digits", "calibration": 64, "selection": 64, "gate": 128,
                 "checks": {"num_calibration": {"low": 32}}},
        "quant": {"search": False, "float_budget": 0.0},  # both take their time
        "evaluation": {"latency_batch_sizes": [1], "latency_rounds": 10},
        "gates": dict.fromkeys(GatesSpec.model_fields),
    }  # fmt: skip


def seconds(run: dict[str, Any], start: str, end: str) -> float:
    return (datetime.fromisoformat(run[end]) - datetime.fromisoformat(run[start])).total_seconds()


def spread(values: list[float]) -> str:
    """Median and quartiles."""
    low, _, high = quantiles(values, n=4) if len(values) > 1 else values * 3
    return f"{median(values):.1f} ({low:.1f} to {high:.1f})"


class World:
    """A folder with weights, a store and a scratch folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            "REQUANT_STORE": str(folder / "store"), "REQUANT_SCRATCH": str(folder / "scratch"), "OMP_NUM_THREADS": "1"
        }  # fmt: skip
        torch.manual_seed(0)
        save_weights(build_model(ModelSpec(architecture=NETWORK), 10), folder / "digits.safetensors")

    def run(self, place: Installation, spec: dict[str, Any]) -> str:
        return place.run(spec, self.folder, self.environment)


def ended(place: Installation, runs: list[str], limit_s: float) -> list[dict[str, Any]]:
    """All of them, once the last one is final."""
    found: list[dict[str, Any]] = []

    def settled() -> bool:
        time.sleep(0.5)
        found[:] = place.call("POST", "/flow_runs/filter", {"flow_runs": {"id": {"any_": runs}}})
        return len(found) == len(runs) and all(run["state_type"] in FINAL for run in found)

    wait_for(settled, f"{len(runs)} runs", limit_s=limit_s)
    return found


def night(place: Installation, world: World, repeats: int) -> bool:
    (first,) = ended(place, [world.run(place, spec_of(0))], 900)
    print(f"a run with everything to do: {seconds(first, 'created', 'end_time'):.1f} s, {first['state_name']}")
    totals, queues, flows, loads, cpu = [], [], [], [], []
    for _ in range(repeats):
        (run,) = ended(place, [world.run(place, spec_of(0))], 300)
        if run["state_name"] != "Unchanged":
            print(f"the night ended {run['state_name']}: {run['state']['message']}")
            return False
        totals.append(seconds(run, "created", "end_time"))
        queues.append(seconds(run, "created", "start_time"))
        flows.append(seconds(run, "start_time", "end_time"))
        loads.append(-_loading(PREFECT_ALONE) + _loading(WITH_FLOW))
        program = [sys.executable, "-c", NIGHT, json.dumps(spec_of(0))]
        cpu.append(_cpu_s(program, place, world) - _cpu_s([sys.executable, "-c", EMPTY], place, world))
    ours = [flow + load for flow, load in zip(flows, loads, strict=True)]
    print(f"{repeats} nights with nothing changed, s: total {spread(totals)}, queue {spread(queues)}, "
          f"flow {spread(flows)}, loading the flow {spread(loads)}, ours {spread(ours)}, "
        f"ours, CPU {spread(cpu)}")  # fmt: skip
    return True


def _loading(program: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    return time.perf_counter() - start


def _cpu_s(command: list[str], place: Installation, world: World) -> float:
    """Seconds of CPU that a process takes."""
    environment = {**place.environment, **world.environment}
    process = subprocess.Popen(command, cwd=world.folder, env=environment, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{command[2]} ended with {process.returncode}")
    return usage.ru_utime + usage.ru_stime


def resume(place: Installation, world: World) -> bool:
    steps = world.folder / "store/steps"
    before = set(steps.glob("*/*"))
    run = world.run(place, spec_of(1000))
    wait_for(lambda: set(steps.glob("measure_engine/*")) - before, "the last step", limit_s=900)
    for pid in processes_of(run):
        os.kill(pid, signal.SIGKILL)
    place.wait_until_reported(run)
    finished = set(steps.glob("*/*")) - before
    start = time.perf_counter()
    place.retry(run)
    ended(place, [run], 900)
    done = [line.partition(":")[0] for line in place.log(run) if ": done in" in line]
    print(f"killed in check_parity, with {len(finished)} steps finished; retried, {time.perf_counter() - start:.1f} s; "
          f"computed in both attempts: {dict(Counter(done))}")  # fmt: skip
    return set(Counter(done).values()) == {1}


def queue(place: Installation, world: World, models: int, workers: int) -> bool:
    place.stop("worker")
    for number in range(workers):
        place.start_worker(f"worker{number}", "--limit", "1")
    good = True
    kept = (world.folder / "store").exists()
    for what, expected in (("everything to do", "Completed"), ("nothing changed", "Unchanged"))[kept:]:
        start = time.perf_counter()
        runs = [world.run(place, spec_of(number)) for number in range(1, models + 1)]
        found = ended(place, runs, 3600)
        states = Counter(run["state_name"] for run in found)
        flows = [seconds(run, "start_time", "end_time") for run in found if run["end_time"] and run["start_time"]]
        print(f"{models} models on {workers} workers, {what}: {time.perf_counter() - start:.0f} s in all, "
              f"{dict(states)}; each flow {spread(flows)} s", flush=True)  # fmt: skip
        good &= states == {expected: models}
    return good


@contextmanager
def postgresql() -> Iterator[str]:
    """The URL of a server of its own, run as `postgres`, as it refuses root."""
    programs = max(Path("/usr/lib/postgresql").glob("*/bin"))
    folder = Path(tempfile.mkdtemp(prefix="bench-postgresql-"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shutil.chown(folder, "postgres")
    user: dict[str, Any] = {"user": "postgres", "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run([programs / "initdb", "-D", folder / "data", "-A", "trust", "-U", "prefect"], check=True, cwd="/",
                   **user)  # fmt: skip
    server = subprocess.Popen(
        [programs / "postgres", "-D", folder / "data", "-p", str(port), "-k", folder, "-h", "127.0.0.1"],
        cwd="/",
        **user,
    )
    try:
        ready = [str(programs / "pg_isready"), "-h", "127.0.0.1", "-p", str(port)]
        wait_for(lambda: subprocess.run(ready, check=False, capture_output=True).returncode == 0, "PostgreSQL")
        yield f"postgresql+asyncpg://prefect@127.0.0.1:{port}/postgres"
    finally:
        server.send_signal(signal.SIGINT)
        server.wait()
        shutil.rmtree(folder)


@contextmanager
def database(kind: str) -> Iterator[dict[str, str]]:
    """What makes a server use it."""
    if kind == "sqlite":
        yield {}
    else:
        with postgresql() as url:
            yield {"PREFECT_SERVER_DATABASE_CONNECTION_URL": url}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="*", default=["night", "resume", "queue"])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--models", type=int, default=50)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--database", choices=["sqlite", "postgresql"], default="sqlite")
    parser.add_argument("--folder", type=Path, help="of the store; kept, so that another call has nothing to do")
    arguments = parser.parse_args()
    good = True
    with tempfile.TemporaryDirectory() as home, tempfile.TemporaryDirectory() as folder:
        world = World((arguments.folder or Path(folder)).resolve())
        with database(arguments.database) as settings, installation(Path(home), **settings) as place:
            if "night" in arguments.what:
                good &= night(place, world, arguments.repeats)
            if "resume" in arguments.what:
                good &= resume(place, world)
            if "queue" in arguments.what:
                good &= queue(place, world, arguments.models, arguments.workers)
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
