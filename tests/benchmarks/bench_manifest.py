"""What the manifest costs over plain decoding of the same files with as many threads, and the contract on many rows.

    python tests/benchmarks/bench_manifest.py [FOLDER] [--rounds 11] [--rows 50000 250000 500000 1000000]

FOLDER holds a sub-folder per class. The rounds are interleaved, so a busy machine disturbs all alike; a row gives the
median, the quartiles and the ratio to plain decoding (read, decode, to RGB) in the same round. The contract is judged
on invented rows, each number of them in a fresh process; importing Great Expectations, about as long as judging 50,000
rows, is not counted. `near` is the search for near copies alone; both checks contain it. Seconds are of CPU there.
Between the two: of how many images a copy, scaled or compressed, is found.
"""

from __future__ import annotations

import argparse
import io
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from bench_data import timed
from PIL import Image

from tasks.contracts.spec import ChecksSpec, PreprocessSpec
from tasks.data.checks import check_images, check_splits
from tasks.data.manifest import build_manifest
from tasks.data.measure import THUMBNAIL, look_at, measure
from tasks.data.near import near_groups
from tasks.data.open_source import open_source
from tasks.data.parallel import CHUNK
from tasks.data.sources import FORMATS, FileSource, memory_of
from tasks.scoring.memory_probe import peak_kib

COPIED = 500  # images


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="when not given, only the contract is measured")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--rows", type=int, nargs="*", default=[50_000, 250_000, 500_000, 1_000_000])
    parser.add_argument("--contract", type=int, help=argparse.SUPPRESS)  # what a fresh process is asked
    arguments = parser.parse_args()
    if arguments.contract:
        measure_contract(arguments.contract)
        return
    if arguments.folder:
        source = open_source(str(arguments.folder))
        assert isinstance(source, FileSource)
        print(f"{len(source)} images, {os.cpu_count()} threads, {arguments.rounds} rounds\n")
        print_times(measure_times(source, arguments.rounds), len(source))
        print()
        print_copies(source)
        print()
    print(f"{'rows':>9}{'images s':>10}{'splits s':>10}{'near s':>8}{'us/row':>8}{'before MiB':>12}{'peak MiB':>10}")
    for count in arguments.rows:
        subprocess.run([sys.executable, __file__, "--contract", str(count)], check=True)


def measure_times(source: FileSource, rounds: int) -> dict[str, np.ndarray]:
    """Seconds of each kind of work in each round."""
    seconds: dict[str, list[float]] = {"plain decoding": [], "first run": [], "second run": []}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as scratch:
            seconds["plain decoding"].append(timed(lambda: plain_decoding(source)))
            for name in ("first run", "second run"):
                seconds[name].append(timed(lambda: build_manifest(source, Path(scratch))))
    return {name: np.array(values) for name, values in seconds.items()}


def plain_decoding(source: FileSource) -> None:
    """What cannot be avoided: every file is read and decoded to RGB, by as many threads in as large chunks."""

    def decode(rows: range) -> None:
        for row in rows:
            content = (source.root / source.names[row]).read_bytes()
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                image.load()
                if image.mode != "RGB":
                    image.convert("RGB")

    chunks = [range(start, min(start + CHUNK, len(source))) for start in range(0, len(source), CHUNK)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(decode, chunks):
            pass


def print_times(seconds: dict[str, np.ndarray], num_images: int) -> None:
    """One line per kind of work."""
    print(f"{'':16}{'median s':>10}{'quartiles s':>18}{'images/s':>11}{'over plain (quartiles)':>26}{'over first':>12}")
    for name, values in seconds.items():
        low, median, high = np.percentile(values, (25, 50, 75))
        ratios = "{1:.2f} ({0:.2f} to {2:.2f})".format(*np.percentile(values / seconds["plain decoding"], (25, 50, 75)))
        over_first = np.median(values / seconds["first run"])
        quartiles = f"{low:.3f} - {high:.3f}"
        print(f"{name:16}{median:10.3f}{quartiles:>18}{num_images / median:11.0f}{ratios:>26}{over_first:12.3f}")


def print_copies(source: FileSource) -> None:
    """Of how many images a copy, made as people make them, is found to be a near duplicate."""

    def scaled(image: Image.Image, by: float) -> Image.Image:
        return image.resize((round(image.width * by), round(image.height * by)), Image.Resampling.BICUBIC)

    def saved(image: Image.Image) -> Image.Image:
        image.save(buffer := io.BytesIO(), "JPEG", quality=40)
        return Image.open(buffer)

    def columns(images: list[Image.Image]) -> tuple[np.ndarray, np.ndarray]:
        found = measure([look_at(image, memory_of(image)) for image in images])
        looks_NB = np.frombuffer(b"".join(found["thumbnail"]), np.uint8).reshape(len(images), -1)
        return np.array(found["phash"], np.uint64), looks_NB

    rows = np.linspace(0, len(source) - 1, COPIED, dtype=int)
    images = [source.load(int(row)) for row in rows]
    hashes, looks = columns(images)
    kinds = {f"scaled by {by}": partial(scaled, by=by) for by in (0.43, 0.7, 2.6)} | {"JPEG, quality 40": saved}
    for kind, made in kinds.items():
        theirs, their_looks = columns([made(image) for image in images])
        groups_N = near_groups(np.concatenate([hashes, theirs]), np.concatenate([looks, their_looks]))
        found = (groups_N[:COPIED] == groups_N[COPIED:]).mean()
        print(f"{kind:18} {found:.1%} of {COPIED} copies found")


def measure_contract(count: int) -> None:
    """Print a line on `count` invented rows; to be called in a fresh process."""
    import great_expectations  # noqa: F401 (takes seconds, once per process)

    frame, checks = invented(count), ChecksSpec()
    looks = np.frombuffer(b"".join(frame["thumbnail"]), np.uint8).reshape(count, -1)
    hashes = frame["phash"].to_numpy(np.uint64)
    before = peak_kib() / 1024
    images = cpu_seconds(lambda: check_images(frame, list(frame["label"].cat.categories), checks))
    splits = cpu_seconds(lambda: check_splits(frame, PreprocessSpec(), checks))
    peak = peak_kib() / 1024
    near = cpu_seconds(lambda: near_groups(hashes, looks))
    per_row = (images + splits) / count * 1e6
    print(f"{count:9,}{images:10.2f}{splits:10.2f}{near:8.2f}{per_row:8.1f}{before:12.0f}{peak:10.0f}")


def cpu_seconds(work: Callable[[], object]) -> float:
    """Of this process: a busy machine disturbs them less than the clock's, and nothing here waits."""
    start = time.process_time()
    work()
    return time.process_time() - start


def invented(count: int) -> pd.DataFrame:
    """Rows of a manifest as of photographs; one in a hundred is the near copy of another."""
    random = np.random.default_rng(0)

    def around(middle: float, spread: float) -> np.ndarray:
        return random.normal(middle, spread, count).astype(np.float32)

    phash_N = random.integers(0, 2**64, count, np.uint64)
    looks_NB = random.integers(0, 256, (count, THUMBNAIL**2), np.uint8)
    copies = count // 100
    phash_N[-copies:], looks_NB[-copies:] = phash_N[:copies] ^ np.uint64(5), looks_NB[:copies]
    return pd.DataFrame(
        {
            "path": [f"{row % 1000:04}/{row:08}.jpg" for row in range(count)],
            "fault": pd.Series([None] * count, dtype=object),
            "pixels": [random.bytes(32).hex() for _ in range(count)],
            "mode": "RGB",
            "width": random.integers(256, 512, count, np.int32),
            "height": np.full(count, 256, np.int32),
            "orientation": np.ones(count, np.int8),
            "num_frames": np.ones(count, np.int32),
            **{f"mean_{channel}": around(118, 40) for channel in "rgb"},
            **{f"std_{channel}": around(58, 12) for channel in "rgb"},
            "brightness": around(0.45, 0.12),
            "std_luma": around(58, 12),
            "entropy": around(7.2, 0.4),
            "sharpness": around(60, 20),
            "compressibility": around(0.8, 0.1),
            "correlation": around(0.9, 0.05),
            "phash": phash_N,
            "thumbnail": [look.tobytes() for look in looks_NB],
            "split": random.choice(["calibration", "train", "selection", "gate"], count),
            "label": pd.Categorical.from_codes(
                random.integers(0, 1000, count), pd.Index([f"{k:04}" for k in range(1000)])
            ),
        }
    )


if __name__ == "__main__":
    main()
