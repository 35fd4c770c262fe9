"""What Prefect and starting up add to a run: `python tests/benchmarks/bench_overhead.py`.

`requant demo` twice in a process of its own: with everything to do, and again with nothing changed.

steps:   what each step has measured of itself; the float model is trained beforehand
imports: a process that only imports the flow, which the run does while its Prefect server starts
flow:    from the first to the last line of the flow's log, less the steps: Prefect's engine, gates and report
rest:    the process's whole time, less all of these: Prefect's server, starting and stopping it
share:   flow and rest, of the whole time
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from datetime import datetime, timedelta
from pathlib import Path
from time import perf_counter

LIMIT = 0.15  # of the run that has everything to do

# What only the very first run does: Prefect's database, and the float model to start from.
FIRST_TIME = """
from flows.cli import _prefect
with _prefect():
    from flows.demo import demo_spec
demo_spec()
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


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            "REQUANT_STORE": f"{folder}/store",
            "REQUANT_SCRATCH": f"{folder}/scratch",
            "PREFECT_HOME": f"{folder}/prefect",
        }
        environment.pop("PREFECT_API_URL", None)
        imports, _ = timed([sys.executable, "-c", "import flows.requantize"], environment)
        timed([sys.executable, "-c", FIRST_TIME], environment)
        print(f"{'':20}" + "".join(f"{name:>9}" for name in ("wall", "steps", "imports", "flow", "rest", "share")))
        shares = []
        for name in ("everything to do", "nothing changed"):
            wall, log = timed([str(REQUANT), "demo"], environment)
            spent = parts(wall, imports, log)
            shares.append((spent["flow"] + spent["rest"]) / wall)
            print(f"{name:20}" + "".join(f"{value:8.1f}s" for value in spent.values()) + f"{shares[-1]:9.1%}")
    print(f"share of the run with everything to do: {shares[0]:.1%}, limit {LIMIT:.0%}")
    return int(shares[0] > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
