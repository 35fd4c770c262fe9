"""Work on many images, on all cores and in bounded memory."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

from tasks.contracts.errors import RequantError
from tasks.contracts.lifetime import die_with

Item = TypeVar("Item")
Result = TypeVar("Result")

CHUNK = 16  # items per job: enough to hide the pool's own cost and numpy's, few enough to keep memory flat


def in_parallel(work: Callable[[Sequence[int]], list[Result]], rows: Sequence[int]) -> Generator[Result]:
    """The results of `work`, which takes a few of `rows` at a time, in order, by one thread per core.

    For work outside the interpreter's lock, as Pillow, zlib and hashlib do it. Close the generator to stop early.
    """
    num_workers = os.cpu_count() or 1
    pool = ThreadPoolExecutor(num_workers)
    chunks = (rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK))
    jobs = (pool.submit(work, chunk) for chunk in chunks)  # one per next()
    try:
        pending = deque(islice(jobs, 2 * num_workers))
        while pending:
            yield from pending.popleft().result()
            pending.extend(islice(jobs, 1))
    finally:
        pool.shutdown(cancel_futures=True)


def in_processes(work: Callable[[Item], list[Result]], items: Iterable[Item]) -> Generator[Result]:
    """The results of `work(item)` for each of `items`, in order, by one process per core.

    For work that holds the interpreter's lock. Processes take a second or two to start, and end with the work, as each
    holds some hundred MiB, or with this process if it is killed.

    Raises:
        RequantError: if a process dies, such as for want of memory.
    """
    from joblib import Parallel, delayed
    from joblib.externals.loky import get_reusable_executor
    from joblib.externals.loky.process_executor import TerminatedWorkerError

    jobs = (delayed(_in_child)(work, item, os.getpid()) for item in items)
    try:
        for results in Parallel(n_jobs=os.cpu_count(), return_as="generator", pre_dispatch="2*n_jobs")(jobs):
            yield from results
    except TerminatedWorkerError as error:
        raise RequantError(
            "A process that measured images was killed; the system may be short of memory.",
            remedy="Run again: it goes on where it stopped. Give it more memory, or fewer cores.",
        ) from error
    finally:
        get_reusable_executor().shutdown()


def _in_child(work: Callable[[Item], list[Result]], item: Item, parent: int) -> list[Result]:
    die_with(parent)
    return work(item)
