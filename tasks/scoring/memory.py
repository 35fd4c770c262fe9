"""Peak memory of a process that does nothing but load one model and run it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tasks.contracts.errors import EngineError
from tasks.contracts.records import Memory

ROOT = Path(__file__).parents[2]


def measure_memory(float_path: Path, int8_path: Path, *, threads: int, batch_size: int) -> Memory:
    """Both models, each in a fresh process.

    Raises:
        EngineError: if a process fails or takes too long.
    """
    return Memory(
        float_mib=peak_memory_mib(float_path, threads=threads, batch_size=batch_size),
        int8_mib=peak_memory_mib(int8_path, threads=threads, batch_size=batch_size),
    )


def peak_memory_mib(path: Path, *, threads: int, batch_size: int, limit_s: float = 300) -> float:
    """Peak resident memory of loading the ONNX model and running one batch, interpreter and runtime included.

    Raises:
        EngineError: if the process fails, with the end of what it said, or takes longer than `limit_s`.
    """
    arguments = (path.resolve(), threads, batch_size, os.getpid())
    command = [sys.executable, "-m", "tasks.scoring.memory_probe", *map(str, arguments)]
    try:
        child = subprocess.run(  # noqa: S603 - our own module, no shell
            command, cwd=ROOT, capture_output=True, text=True, timeout=limit_s, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise EngineError(f"Measuring the memory of {path.name} took longer than {limit_s:g} s.") from error
    if child.returncode != 0:
        said = child.stderr[-500:].strip()
        raise EngineError(f"Measuring the memory of {path.name} failed with exit code {child.returncode}: {said}")
    return int(child.stdout) / 1024
