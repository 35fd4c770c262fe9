"""A GPU belongs to one process at a time; locks are real, GPUs are only numbers here."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.contracts.errors import EngineError
from tasks.engines.reservation import reserve_gpu

HOLD = """
import sys, time
from pathlib import Path
from tasks.engines.reservation import reserve_gpu
index, lock = reserve_gpu([0, 1], patience_s=0, folder=Path(sys.argv[1]))
print(index, flush=True)
time.sleep(60)
"""


def held_by_another(folder: Path) -> tuple[subprocess.Popen[str], int]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, int(process.stdout.readline())


def test_each_process_gets_a_gpu_of_its_own_and_a_killed_one_gives_it_back(tmp_path: Path) -> None:
    """The second process takes the next; the third is told who has them, until one of them is killed."""
    (first, zero), (second, one) = held_by_another(tmp_path), held_by_another(tmp_path)
    try:
        assert (zero, one) == (0, 1)
        told: list[str] = []
        with pytest.raises(EngineError, match=rf"GPU 0 by process {first.pid}, GPU 1 by process {second.pid}"):
            reserve_gpu([0, 1], patience_s=1, waiting=told.append, folder=tmp_path)
        assert told == [f"GPU 0 by process {first.pid}, GPU 1 by process {second.pid}"]
        second.send_signal(signal.SIGKILL)
        second.wait()
        index, lock = reserve_gpu([0, 1], patience_s=5, folder=tmp_path)
        lock.close()
        assert index == 1
    finally:
        for process in (first, second):
            process.kill()
            process.communicate()


def test_a_gpu_is_free_again_when_its_lock_is_closed(tmp_path: Path) -> None:
    """Within one process, too."""
    _, lock = reserve_gpu([3], patience_s=0, folder=tmp_path)
    with pytest.raises(EngineError, match="GPU 3 by process"):
        reserve_gpu([3], patience_s=0, folder=tmp_path)
    lock.close()
    index, again = reserve_gpu([3], patience_s=0, folder=tmp_path)
    again.close()
    assert index == 3


def test_no_gpu_at_all_is_said_so(tmp_path: Path) -> None:
    """Waiting would not bring one."""
    with pytest.raises(EngineError, match="there is none"):
        reserve_gpu([], patience_s=0, folder=tmp_path)
