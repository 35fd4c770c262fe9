"""What Prefect and starting up add to a run: `python tests/benchmarks/bench_overhead.py`.

`requant demo` twice in a process of its own: with everything to do, and again with nothing changed.

steps:   what each step has measured of itself; the float model is trained beforehand
imports: a process that only imports what the run needs, which the run does while its Prefect server starts
flow:    from the first to the last line of the flow's log, less the steps: Prefect's engine, gates and report
rest:    the process's whole time, less all of these: Prefect's server, starting and stopping it
share:   flow and rest, of the whole time

Then what Prefect costs a run on a server that is warm: loading it, which each run of a worker does anew; a flow that
does nothing; the same with sixteen steps that do nothing; and both without a heartbeat, whose thread is waited for at
the end, for up to a second. Medians and quartiles, in turns, each after a first one that does not count.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from datetime import datetime, timedelta
from pathlib import Path
from statistics import quantiles
from time import perf_counter

from tests.flows.prefect_server import installation

LIMIT = 0.15  # of the run that has everything to do

# What only the very first run does: Prefect's database, and the float model to start from.
FIRST_TIME = """
from flows.cli import _prefect
with _prefect():
    from flows.demo import demo_spec
demo_spec()
"""
LIGHT = "import flows.requantize, prefect.server.api.server"  # as is all that a run with nothing to do needs
HEAVY = f"{LIGHT}, tasks.check_data, tasks.check_parity, tasks.publish_report"
STEPS, REPEATS = 16, 9
WARM = f"""
from contextlib import nullcontext
from time import perf_counter
from prefect import flow
from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
from tasks.step import step

@step("nothing")
def nothing() -> None: ...

@flow
def empty() -> None: ...

@flow
def stepping() -> None:
    for _ in range({STEPS}):
        nothing()

def timed(body, beating):
    with nullcontext() if beating else temporary_settings({{PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}}):
        start = perf_counter()
        body()
        return perf_counter() - start

for _ in range({REPEATS} + 1):
    print(timed(empty, True), timed(stepping, True), timed(empty, False), timed(stepping, False))
"""
REQUANT = Path(sys.executable).with_name("requant")
LINE = re.compile(r"^(\d\d:\d\d:\d\d\.\d{3}) \| .*? \| (.*)$", re.MULTILINE)
DONE = re.compile(r": done in (\d+\.\d) s$")


def timed(command: list[str], environment: dict[str, str]) -> tuple[float, str]:
    """Seconds, and what the command wrote to standard error."""
    start = perf_counter()
    process = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return perf_counter() - start, process.stderr


def seconds_between(first: str, last: str) -> float:
    elapsed = datetime.strptime(last, "%H:%M:%S.%f") - datetime.strptime(first, "%H:%M:%S.%f")
    return (elapsed % timedelta(days=1)).total_seconds()


def parts(wall: float, imports: float, log: str) -> dict[str, float]:
    """Seconds by what they were spent on."""
    entries = LINE.findall(log)
    steps = sum(float(found.group(1)) for _, text in entries if (found := DONE.search(text)))
    (begun,) = (at for at, text in entries if "Beginning flow run" in text)
    *_, ended = (at for at, text in entries if text.startswith("Flow run"))
    flow = seconds_between(begun, ended)
    return {"wall": wall, "steps": steps, "imports": imports, "flow": flow - steps, "rest": wall - imports - flow}


def on_a_warm_server() -> None:
    with tempfile.TemporaryDirectory() as home, installation(Path(home)) as place:
        environment = {**place.environment}
        loads = [timed([sys.executable, "-c", "import prefect.flow_engine"], environment)[0] for _ in range(REPEATS)]
        program = [sys.executable, "-c", WARM]
        printed = subprocess.run(program, env=environment, check=True, capture_output=True, text=True).stdout
        rows = [[float(number) for number in line.split()] for line in printed.splitlines()][1:]
    print(f"loading Prefect: {spread(loads)} s")
    names = ("empty flow", f"{STEPS} empty steps", "empty flow, no heartbeat", f"{STEPS} empty steps, no heartbeat")
    for name, values in zip(names, zip(*rows, strict=True), strict=True):
        print(f"{name}: {spread(list(values))} s")


def spread(values: list[float]) -> str:
    """Median and quartiles."""
    low, middle, high = quantiles(values, n=4)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            "REQUANT_STORE": f"{folder}/store",
            "REQUANT_SCRATCH": f"{folder}/scratch",
            "PREFECT_HOME": f"{folder}/prefect",
        }
        environment.pop("PREFECT_API_URL", None)
        timed([sys.executable, "-c", FIRST_TIME], environment)
        print(f"{'':20}" + "".join(f"{name:>9}" for name in ("wall", "steps", "imports", "flow", "rest", "share")))
        shares = []
        for name, program in (("everything to do", HEAVY), ("nothing changed", LIGHT)):
            imports, _ = timed([sys.executable, "-c", program], environment)
            wall, log = timed([str(REQUANT), "demo"], environment)
            spent = parts(wall, imports, log)
            shares.append((spent["flow"] + spent["rest"]) / wall)
            print(f"{name:20}" + "".join(f"{value:8.1f}s" for value in spent.values()) + f"{shares[-1]:9.1%}")
    print(f"share of the run with everything to do: {shares[0]:.1%}, limit {LIMIT:.0%}")
    on_a_warm_server()
    return int(shares[0] > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
