"""Promotions raced by processes: `python tests/benchmarks/bench_registry.py [--processes 8] [--promotions 200]`.

Each process promotes a release of its own, verified each time, as often as the others, on a folder and on a real S3
server on this machine. Time counts from when all processes are ready. Then one process alone, for comparison. The
status is 1 if the log is not one total order with every promotion that returned in it once.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from tasks.stores.base import Store, open_store
from tasks.stores.registry import champion, publish
from tests.tasks.stores.releases import NAME, a_run
from tests.tasks.stores.s3_server import BUCKET, s3_server

PROMOTER = """
import sys, time
from tasks.stores.base import open_store
from tasks.stores.registry import champion, promote
url, number, count = sys.argv[1:]
store = open_store(url)
champion(store, "birds")
store.compare_and_set()
print("ready", flush=True)
sys.stdin.readline()
for _ in range(int(count)):
    start = time.perf_counter()
    promotion = promote(store, "birds", int(number))
    print(promotion.id, time.perf_counter() - start, flush=True)
"""


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--promotions", type=int, default=200)
    given = parser.parse_args()
    print(f"{'':10}{'processes':>10}{'promotions':>12}{'wall':>10}{'median':>12}{'p95':>12}{'largest':>12}  order")
    is_good = True
    with tempfile.TemporaryDirectory() as folder:
        is_good &= measure("local", folder, given.processes, given.promotions)
        with s3_server() as server:
            os.environ.update(server.user.environment, REQUANT_S3_ENDPOINT=server.url)
            server.client().create_bucket(Bucket=BUCKET)
            is_good &= measure("S3", f"s3://{BUCKET}", given.processes, given.promotions)
    return 0 if is_good else 1


def measure(title: str, root: str, processes: int, promotions: int) -> bool:
    """True if all is in order."""
    is_good = True
    for number in (processes, 1):
        url = f"{root}/race{number}"
        store = open_store(url)
        with tempfile.TemporaryDirectory() as folder:
            for run in range(number):
                publish(store, a_run(store, Path(folder), f"run{run}"))
        wall_s, ids, times_s = race(url, number, promotions // number)
        in_order = check(store, ids)
        is_good &= in_order
        median, p95, largest = np.percentile(times_s, [50, 95, 100]) * 1e3
        print(
            f"{title:10}{number:10}{len(ids):12}{wall_s:8.2f} s{median:9.1f} ms{p95:9.1f} ms{largest:9.1f} ms  "
            f"{'total' if in_order else 'BROKEN'}"
        )
    return is_good


def race(url: str, processes: int, count: int) -> tuple[float, list[str], list[float]]:
    """Seconds from the start of all to the end of the last, and of each promotion its id and seconds."""
    promoters = [
        subprocess.Popen(
            [sys.executable, "-c", PROMOTER, url, str(number), str(count)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for number in range(1, processes + 1)
    ]  # fmt: skip
    for promoter in promoters:
        assert promoter.stdout is not None
        promoter.stdout.readline()
    start = time.perf_counter()
    for promoter in promoters:
        assert promoter.stdin is not None
        promoter.stdin.write("\n")
        promoter.stdin.flush()
    lines = [line.split() for promoter in promoters for line in promoter.communicate()[0].splitlines()]
    wall_s = time.perf_counter() - start
    assert all(promoter.returncode == 0 for promoter in promoters)
    return wall_s, [line[0] for line in lines], [float(line[1]) for line in lines]


def check(store: Store, ids: list[str]) -> bool:
    """Nothing lost, nothing doubled, each knows the one before it."""
    log = champion(store, NAME).log
    return (
        sorted(entry.id for entry in log) == sorted(ids)
        and len(set(ids)) == len(ids)
        and [entry.sequence for entry in log] == list(range(1, len(log) + 1))
        and [entry.previous for entry in log] == [None, *(entry.release for entry in log[:-1])]
    )


if __name__ == "__main__":
    sys.exit(main())
