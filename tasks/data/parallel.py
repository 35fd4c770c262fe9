"""Work on many images, on all cores and in bounded memory."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

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
