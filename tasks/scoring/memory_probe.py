"""`python -m tasks.scoring.memory_probe PATH THREADS BATCH PARENT`: load a model, run one batch, print the peak in KiB.

A process of its own, which imports no more than an engine needs.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import numpy as np

from tasks.contracts.errors import EngineError, RequantError
from tasks.contracts.lifetime import die_with
from tasks.engines.base import TensorInfo
from tasks.engines.onnxruntime import OnnxRuntimeEngine

STATUS = Path("/proc/self/status")


def main(path: str, threads: str, batch_size: str, parent: str) -> int:
    die_with(int(parent))
    try:
        with OnnxRuntimeEngine(Path(path), threads=int(threads)) as engine:
            engine.run({info.name: _ones(info, int(batch_size)) for info in engine.inputs})
    except RequantError as error:
        print(error, file=sys.stderr)  # noqa: T201 - the parent reads it
        return 1
    print(peak_kib())  # noqa: T201 - the parent reads it
    return 0


def peak_kib() -> int:
    """Largest resident size so far, of this program alone.

    Linux lets getrusage's maximum pass from a large parent to its child, so it is asked only where /proc is missing.
    """
    if STATUS.exists():
        return next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024  # macOS: bytes


def _ones(info: TensorInfo, batch_size: int) -> np.ndarray:
    """A batch whose every page is really there; zeros would share one."""
    if None in info.shape[1:]:
        raise EngineError(f"Input {info.name!r} is {info}; only the batch may have any size.")
    return np.ones((batch_size, *(size or 0 for size in info.shape[1:])), info.dtype)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
