"""How long a file takes to S3 and back, against plain boto3 with the same file, and how 10,000 small artifacts fare.

    python tests/benchmarks/bench_s3.py [--mib 1024] [--rounds 5] [--artifacts 10000]

The server is a real one on this machine, started for the purpose, so it shares the cores with its clients. Plain boto3
(`upload_file`, `download_file`) is first tried with several sizes of parts and numbers of threads, and each direction
keeps what was fastest. The rounds are interleaved, so a busy machine disturbs both alike; the ratio is that of
neighbours in one round. Ours includes hashing the file before the upload and verifying it after the download. Each
peak of memory is that of a fresh process.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import TypeVar

import numpy as np
from boto3.s3.transfer import TransferConfig

from tasks.stores.base import Store, open_store
from tests.tasks.stores.s3_server import BUCKET, S3Server, s3_server

T = TypeVar("T")
LIMIT = 1.15
LIMIT_MIB = 200.0
SWEEP = tuple(product((8, 16, 64), (4, 10)))  # MiB of a part, threads

PEAK = """
import sys
from pathlib import Path
from tasks.stores.base import open_store

def peak_kib():
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM:"))

path, out = map(Path, sys.argv[2:])
store = open_store(sys.argv[1])
ref = store.put(path, kind="engine")
sent = peak_kib()
store.fetch(ref, out)
print(sent, peak_kib())
"""


def main() -> int:
    """Measure and print. The status is 1 if a limit is passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--artifacts", type=int, default=10_000)
    arguments = parser.parse_args()
    room = (arguments.rounds * 2 + len(SWEEP) + 4) * arguments.mib * 2**20 + 4 * 2**30
    with s3_server(size_bytes=room) as server, tempfile.TemporaryDirectory() as folder:
        os.environ.update(server.user.environment, REQUANT_S3_ENDPOINT=server.url)
        server.client().create_bucket(Bucket=BUCKET)
        path = Path(folder) / "engine.onnx"
        with path.open("wb") as file:
            for _ in range(arguments.mib):
                file.write(os.urandom(2**20))
        print(f"{arguments.mib} MiB, {os.cpu_count()} cores, {arguments.rounds} rounds\n")
        ratios = compare(server, path, Path(folder), arguments.rounds)
        peaks = measure_peaks(path, Path(folder))
        print_small(open_store(f"s3://{BUCKET}/small"), Path(folder), arguments.artifacts)
    return int(max(ratios) > LIMIT or max(peaks) > LIMIT_MIB)


def compare(server: S3Server, path: Path, folder: Path, rounds: int) -> list[float]:
    """Median ratios of both directions."""
    client, store = server.client(), open_store(f"s3://{BUCKET}/store")

    def plain_upload(config: TransferConfig) -> None:
        client.upload_file(str(path), BUCKET, "plain", Config=config)

    def plain_download(config: TransferConfig) -> None:
        client.download_file(BUCKET, "plain", str(folder / "plain"), Config=config)

    best: dict[str, tuple[float, int, int]] = {}
    for part_mib, threads in SWEEP:
        config = TransferConfig(multipart_chunksize=part_mib * 2**20, max_concurrency=threads)
        for name, work in (("upload", plain_upload), ("download", plain_download)):
            seconds = timed(lambda work=work, config=config: work(config))  # type: ignore[misc]
            best[name] = min(best.get(name, (seconds, part_mib, threads)), (seconds, part_mib, threads))
    configs = {}
    for name, (_, part_mib, threads) in best.items():
        configs[name] = TransferConfig(multipart_chunksize=part_mib * 2**20, max_concurrency=threads)
        print(f"plain {name}: best with parts of {part_mib} MiB and {threads} threads")
    ref = store.put(path, kind="engine")
    works: dict[str, Callable[[], object]] = {
        "plain upload": lambda: plain_upload(configs["upload"]),
        "our upload": lambda: store.put(path, kind="engine"),
        "plain download": lambda: plain_download(configs["download"]),
        "our download": lambda: store.fetch(ref, folder / "ours"),
    }
    times: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds):
        store.delete(ref.key)
        # who begins changes from round to round
        for direction in ("upload", "download"):
            for who in ("plain", "our") if number % 2 else ("our", "plain"):
                name = f"{who} {direction}"
                times[name].append(timed(works[name]))
    print(f"\n{'':16}{'median':>9}{'quartiles':>18}{'ratio':>8}{'quartiles':>14}")
    ratios = []
    for name, taken in times.items():
        low, middle, high = np.percentile(taken, [25, 50, 75])
        line = f"{name:16}{middle:7.2f} s{low:10.2f} to {high:5.2f}"
        if name.startswith("our"):
            each = np.array(taken) / np.array(times[name.replace("our", "plain")])
            low, middle, high = np.percentile(each, [25, 50, 75])
            ratios.append(float(middle))
            line += f"{middle:8.2f}{low:8.2f} to {high:.2f}"
        print(line)
    print(f"limit of the ratio: {LIMIT}\n")
    return ratios


def measure_peaks(path: Path, folder: Path) -> list[float]:
    """MiB of a fresh process, after the upload and after the download."""
    command = [sys.executable, "-c", PEAK, f"s3://{BUCKET}/peak", str(path), str(folder / "peak")]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    peaks = [int(kib) / 1024 for kib in printed.split()]
    print(f"peak memory: {peaks[0]:.0f} MiB uploading, {peaks[1]:.0f} MiB then downloading, limit {LIMIT_MIB:.0f}\n")
    return peaks


def print_small(store: Store, folder: Path, number: int) -> None:
    """Seconds for each tenth of many files of 4 KiB, eight at a time, and for lists of growing length."""
    sources = [folder / f"{index}.bin" for index in range(number)]
    for path in sources:
        path.write_bytes(os.urandom(4096))
    step = number // 10
    rows: list[list[float]] = []
    with ThreadPoolExecutor(8) as pool:
        refs = []
        for first in range(0, number, step):
            some = sources[first : first + step]
            put_s, stored = measured(lambda some=some: pool.map(lambda path: store.put(path, kind="small"), some))  # type: ignore[misc]
            refs += stored
            list_s = min(timed(lambda: store.list("objects/")) for _ in range(3))
            rows.append([put_s, list_s])
        assert len(store.list("objects/")) == number
        for row, first in zip(rows, range(0, number, step), strict=True):
            some_refs = refs[first : first + step]
            fetch_s, _ = measured(
                lambda some=some_refs: pool.map(lambda ref: store.fetch(ref, folder / "small"), some)  # type: ignore[misc]
            )
            row.append(fetch_s)
    print(f"{'there':>8}{'put':>12}{'list all':>12}{'fetch, verified':>18}   ms for each artifact")
    for index, (put_s, list_s, fetch_s) in enumerate(rows):
        there = (index + 1) * step
        print(f"{there:8}{put_s / step * 1e3:12.2f}{list_s / there * 1e3:12.3f}{fetch_s / step * 1e3:18.2f}")


def measured(work: Callable[[], Iterable[T]]) -> tuple[float, list[T]]:
    start = time.perf_counter()
    results = list(work())
    return time.perf_counter() - start, results


def timed(work: Callable[[], object]) -> float:
    """Seconds."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
