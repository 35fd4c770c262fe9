"""One GPU for this process, and for no other run on this machine."""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from tasks.contracts.errors import EngineError

_POLL_S = 1.0


def reserve_gpu(
    candidates: Sequence[int],
    *,
    patience_s: float,
    waiting: Callable[[str], None] = lambda _: None,
    folder: Path | None = None,
) -> tuple[int, IO[str]]:
    """The first of `candidates` that no run has, and the lock that keeps it until it is closed or the process ends.

    A lock file of the system rather than of a Prefect server: runs by hand, of other servers and of none count too, and
    a run that is killed leaves no reservation behind.

    Args:
        waiting: told once who has the GPUs.
        folder: that all runs on this machine share.

    Raises:
        EngineError: if there is none after `patience_s` seconds.
    """
    deadline, told = time.monotonic() + patience_s, False
    while True:
        holders = []
        for index in candidates:
            path = (folder or Path(tempfile.gettempdir())) / f"requant-gpu-{index}.lock"
            lock = _opened(path)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holders.append(f"GPU {index} by process {lock.read().strip() or 'unknown'}")
                lock.close()
                continue
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()
            return index, lock
        taken = ", ".join(holders) or "there is none"
        if time.monotonic() >= deadline:
            raise EngineError(
                f"No GPU is free after {patience_s / 60:g} minutes: {taken}.",
                remedy="Run fewer at once, name another by REQUANT_GPU, or raise REQUANT_GPU_WAIT_MINUTES.",
            )
        if not told:
            waiting(taken)
            told = True
        time.sleep(_POLL_S)


def _opened(path: Path) -> IO[str]:
    """For all users of the machine, who share it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    return os.fdopen(descriptor, "r+", encoding="utf-8")
