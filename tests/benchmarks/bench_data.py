"""How long decoding once takes, against plain decoding of the same files with as many threads, and how much memory.

    python tests/benchmarks/bench_data.py FOLDER [--resize 256] [--crop 224] [--rounds 7]

FOLDER holds a sub-folder per class. The rounds are interleaved, so a busy machine disturbs all alike; a row gives the
median, the quartiles and the ratio to plain decoding (load, resize, crop) in the same round. Each peak of memory is
that of a fresh process.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd

from tasks.contracts.spec import PreprocessSpec
from tasks.data.cache import decode_images
from tasks.data.images import ImageSet
from tasks.data.open_source import open_source
from tasks.data.parallel import CHUNK
from tasks.data.preprocess import fit_image
from tasks.data.sources import Source

PEAK = """
import sys
from pathlib import Path
from tasks.contracts.spec import PreprocessSpec
from tasks.data.cache import decode_images
from tasks.data.open_source import open_source
from tasks.scoring.memory_probe import peak_kib

manifest, root, scratch, preprocess = sys.argv[1:]
source = open_source(manifest, Path(root))
before = peak_kib()
decode_images(source, PreprocessSpec.model_validate_json(preprocess), Path(scratch))
print(before, peak_kib())
"""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--resize", type=int, help="short side in pixels; the size is kept when not given")
    parser.add_argument("--crop", type=int)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    preprocess = PreprocessSpec(resize=arguments.resize, crop=arguments.crop)
    source = open_source(str(arguments.folder))
    with tempfile.TemporaryDirectory() as scratch:
        print(f"{len(source)} images, {os.cpu_count()} threads, {arguments.rounds} rounds\n")
        print_times(measure_times(source, preprocess, Path(scratch), arguments.rounds), len(source))
        print_peaks(source, arguments.folder, preprocess, Path(scratch))


def measure_times(source: Source, preprocess: PreprocessSpec, scratch: Path, rounds: int) -> dict[str, np.ndarray]:
    """Seconds of each kind of work in each round."""

    def first_run() -> None:
        decode_images(source, preprocess, scratch)

    def batches() -> None:
        images = decode_images(source, preprocess, scratch)
        rows = np.arange(len(images))
        for _ in ImageSet(images.pixels_NHWC, rows, images.labels, preprocess, images.class_names).batches(64):
            pass

    works = {
        "plain decoding": lambda: plain_decoding(source, preprocess),
        "first run": first_run,
        "second run": first_run,
        "batches of 64": batches,
    }
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        shutil.rmtree(scratch / "images", ignore_errors=True)
        for name, work in works.items():
            seconds[name].append(timed(work))
    return {name: np.array(values) for name, values in seconds.items()}


def plain_decoding(source: Source, preprocess: PreprocessSpec) -> None:
    """What cannot be avoided: every image is loaded, resized and cropped, by as many threads in as large chunks."""

    def decode(rows: range) -> None:
        for row in rows:
            fit_image(source.load(row), preprocess)

    chunks = [range(start, min(start + CHUNK, len(source))) for start in range(0, len(source), CHUNK)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(decode, chunks):
            pass


def timed(work: Callable[[], object]) -> float:
    """Seconds."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def print_times(seconds: dict[str, np.ndarray], num_images: int) -> None:
    """One line per kind of work."""
    print(f"{'':16}{'median s':>10}{'quartiles s':>18}{'images/s':>11}{'over plain':>12}")
    for name, values in seconds.items():
        low, median, high = np.percentile(values, (25, 50, 75))
        ratio = np.median(values / seconds["plain decoding"])
        quartiles = f"{low:.3f} - {high:.3f}"
        print(f"{name:16}{median:10.3f}{quartiles:>18}{num_images / median:11.0f}{ratio:12.3f}")


def print_peaks(source: Source, folder: Path, preprocess: PreprocessSpec, scratch: Path) -> None:
    """Peak resident memory of building caches of a quarter of the images and of all."""
    print(f"\n{'images':>8}{'before MiB':>12}{'peak MiB':>10}")
    quarters = np.random.default_rng(0).permutation(len(source)) % 4 == 0  # all classes take part
    for rows in (np.flatnonzero(quarters), np.arange(len(source))):
        manifest = scratch / f"{len(rows)}.csv"
        table = {"path": np.array(source.names)[rows], "label": source.labels[rows]}
        pd.DataFrame(table).to_csv(manifest, index=False)
        options = [str(manifest), str(folder), str(scratch / f"peak{len(rows)}"), preprocess.model_dump_json()]
        child = subprocess.run([sys.executable, "-c", PEAK, *options], capture_output=True, text=True, check=True)
        before, peak = (int(kib) / 1024 for kib in child.stdout.split())
        print(f"{len(rows):8}{before:12.1f}{peak:10.1f}")


if __name__ == "__main__":
    main()
