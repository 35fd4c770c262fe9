"""How fast INT8 is against float, measured so that a busy machine troubles both alike."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from time import perf_counter_ns
from typing import Literal

import numpy as np

from tasks.contracts.records import Latency

Feed = Mapping[str, np.ndarray]
Run = Callable[[Feed], object]
Baseline = Literal["float32", "float16"]


def measure_latency(
    float_run: Run,
    int8_run: Run,
    feeds: Mapping[int, Feed],
    *,
    rounds: int,
    warmup: int = 5,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Latency, ...]:
    """One record per batch size of `feeds`. In every round each model runs once, float before INT8."""
    latencies = []
    for feed_index, (batch_size, feed) in enumerate(feeds.items()):
        float_ns, int8_ns = np.empty(rounds), np.empty(rounds)
        with no_garbage_collection():
            for _ in range(warmup):
                float_run(feed)
                int8_run(feed)
            for turn in range(rounds):
                float_ns[turn] = _nanoseconds(float_run, feed)
                int8_ns[turn] = _nanoseconds(int8_run, feed)
                if progress:
                    progress(feed_index * rounds + turn + 1, len(feeds) * rounds)
        latencies.append(latency_of(batch_size, float_ns / 1e6, int8_ns / 1e6))
    return tuple(latencies)


def summary(times_ms: np.ndarray) -> dict[str, float]:
    """What `Latency` tells of one model."""
    median, p95, p99 = np.percentile(times_ms, [50, 95, 99])
    return {"median": float(median), "p95": float(p95), "p99": float(p99)}


def latency_of(
    batch_size: int,
    float_ms_R: np.ndarray,
    int8_ms_R: np.ndarray,
    *,
    baseline: Baseline = "float32",
    summarize: Callable[[np.ndarray], dict[str, float]] = summary,
) -> Latency:
    """Summary of R rounds; the two arrays are neighbours in time."""
    lower, upper = np.percentile(float_ms_R / int8_ms_R, [25, 75])
    float_ms, int8_ms = summarize(float_ms_R), summarize(int8_ms_R)
    return Latency(
        batch_size=batch_size,
        rounds=len(float_ms_R),
        baseline=baseline,
        float_ms=float_ms,
        int8_ms=int8_ms,
        float_images_per_second=1000 * batch_size / float_ms["median"],
        int8_images_per_second=1000 * batch_size / int8_ms["median"],
        speedup=float_ms["median"] / int8_ms["median"],
        speedup_quartiles=(float(lower), float(upper)),
    )


def slower_notes(latencies: Sequence[Latency]) -> tuple[str, ...]:
    """One sentence for each batch size at which INT8 does not pay."""
    names = {"float16": ("FP16", "the FP16 engine"), "float32": ("Float", "the float model")}
    return tuple(
        f"{names[latency.baseline][0]} is faster than INT8 at batch {latency.batch_size}: "
        f"{latency.float_ms['median']:.3g} ms against {latency.int8_ms['median']:.3g} ms. "
        f"Release {names[latency.baseline][1]} instead, or find out which layers INT8 slows down."
        for latency in latencies
        if latency.speedup < 1
    )


def _nanoseconds(run: Run, feed: Feed) -> int:
    start = perf_counter_ns()
    run(feed)
    return perf_counter_ns() - start


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """A collection in the middle of an inference would be counted as the model's time."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
