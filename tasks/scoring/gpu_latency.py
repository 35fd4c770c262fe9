"""How fast engines are on a GPU, measured as trtexec does: its warm-up, its percentiles, its warnings.

Two things differ from trtexec. Engines take turns, so that clocks and neighbours trouble all alike. And one inference
ends before the next begins: latency is the same, throughput counts no overlap of transfers with computing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from itertools import count, product
from statistics import fmean, median
from time import perf_counter
from typing import Literal, Protocol

import numpy as np

from tasks.contracts.errors import EngineError
from tasks.contracts.records import GpuEnergy, GpuSpeed, GpuState, GpuTiming, Latency, Precision, Spread
from tasks.engines.base import Engine, Timing
from tasks.scoring.latency import Baseline, Feed, latency_of, no_garbage_collection

MIB = 2**20
FLOATS: tuple[Baseline, ...] = ("float32", "float16")
TURN = 10  # inferences of one engine before the next, as many as trtexec averages over
SAMPLE_EVERY_S = 0.05
NO_ENERGY = "The GPU tells neither its energy nor its power, so that energy was not measured."
# trtexec warns beyond these.
UNSTABLE_PERCENT = 2.5  # coefficient of variation
HOST_BOUND = 0.8  # median enqueue over median compute


class TimedEngine(Protocol):
    """What is asked of an engine: one inference, timed by the device."""

    def time(self, feed: Feed, *, transfers: bool, graph: bool) -> Timing: ...


class GpuMonitor(Protocol):
    """What the driver tells of the GPU. `missing` says why it tells nothing, and is empty if it does."""

    missing: str

    def state(self) -> GpuState | None: ...

    def joules(self) -> float | None:
        """By the board's counter, from any start; None if it has none."""

    def watts(self) -> float | None: ...


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How long to measure, of each engine in each way to run it; whichever of time and count takes longer."""

    warmup_s: float = 0.2
    warmup_runs: int = 10
    measure_s: float = 3.0
    measure_runs: int = 100
    energy_s: float = 2.0


@dataclass
class Runs:
    """One engine's timed inferences, in order."""

    timings: list[Timing] = field(default_factory=list)
    seconds: float = 0.0  # by the host's clock

    def is_short_of(self, effort: Effort) -> bool:
        return len(self.timings) < effort.measure_runs or self.seconds < effort.measure_s

    def times_ms(self) -> np.ndarray:
        """Of each inference, from the input on the host to the output there."""
        return np.array([timing.h2d_ms + timing.compute_ms + timing.d2h_ms for timing in self.timings])


def measure_gpu_speed(
    engines: Mapping[Precision, TimedEngine],
    feeds: Mapping[int, Feed],
    monitor: GpuMonitor,
    *,
    graphs: tuple[bool, ...] = (False, True),
    memory_mib: Mapping[Precision, float] | None = None,
    effort: Effort | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[GpuSpeed, tuple[Latency, ...]]:
    """Every engine at every batch size of `feeds`, with transfers and without, launched in each way of `graphs`.

    The latencies are what a caller waits for, transfers included, launched in the first way of `graphs`. They compare
    INT8 with the faster of the float engines. Energy is measured in the same mode, each engine alone.

    Raises:
        EngineError: if there is no INT8 engine or no float engine, or an engine fails.
    """
    if "int8" not in engines or not any(kind in engines for kind in FLOATS):
        raise EngineError(f"INT8 is compared with float, and the engines are {', '.join(engines) or 'none'}.")
    effort = effort or Effort()
    modes = [*product((True, False), graphs)]
    done, total = count(1), len(feeds) * (len(modes) + len(engines))
    timings, latencies, energies = [], [], []
    before = monitor.state()
    for batch_size, feed in feeds.items():
        for transfers, graph in modes:
            runs = take_turns(engines, feed, effort, transfers=transfers, graph=graph)
            timings += [timing_of(kind, batch_size, runs[kind], transfers=transfers, graph=graph) for kind in runs]
            if (transfers, graph) == modes[0]:
                latencies.append(against_the_faster(batch_size, runs))
            if progress:
                progress(next(done), total)
        for kind, engine in engines.items():
            run = partial(engine.time, feed, transfers=True, graph=graphs[0])
            energies.append(measure_energy(run, monitor, kind, batch_size, min_s=effort.energy_s))
            if progress:
                progress(next(done), total)
    after = monitor.state()
    speed = GpuSpeed(
        timings=tuple(timings),
        energies=tuple(energy for energy in energies if energy),
        memory_mib=dict(memory_mib or {}),
        before=before,
        after=after,
        notes=(*_notes(monitor, before, after), *([] if any(energies) or monitor.missing else [NO_ENERGY])),
    )
    return speed, tuple(latencies)


def take_turns(
    engines: Mapping[Precision, TimedEngine], feed: Feed, effort: Effort, *, transfers: bool, graph: bool
) -> dict[Precision, Runs]:
    """As many inferences of each engine, until the last has enough. Neighbours in time have the same index."""
    runs = {kind: Runs() for kind in engines}
    with no_garbage_collection():
        for engine in engines.values():
            start = perf_counter()
            for turn in count(1):
                engine.time(feed, transfers=transfers, graph=graph)
                if turn >= effort.warmup_runs and perf_counter() - start >= effort.warmup_s:
                    break
        while any(of_one.is_short_of(effort) for of_one in runs.values()):
            for kind, engine in engines.items():
                engine.time(feed, transfers=transfers, graph=graph)  # not counted: caches hold another's weights
                start = perf_counter()
                runs[kind].timings += [engine.time(feed, transfers=transfers, graph=graph) for _ in range(TURN)]
                runs[kind].seconds += perf_counter() - start
    return runs


def timing_of(precision: Precision, batch_size: int, runs: Runs, *, transfers: bool, graph: bool) -> GpuTiming:
    """Summary of one engine's inferences, with the warnings that trtexec gives."""
    timings = runs.timings
    h2d, compute, d2h, enqueue = (
        spread_of(np.array([getattr(timing, part) for timing in timings]))
        for part in ("h2d_ms", "compute_ms", "d2h_ms", "enqueue_ms")
    )
    return GpuTiming(
        precision=precision,
        batch_size=batch_size,
        transfers=transfers,
        graph=graph,
        num_iterations=len(timings),
        latency=spread_of(runs.times_ms()),
        h2d=h2d,
        compute=compute,
        d2h=d2h,
        enqueue=enqueue,
        images_per_second=batch_size * len(timings) / runs.seconds,
        notes=tuple(_warnings(h2d, compute, d2h, enqueue, graph=graph)),
    )


def spread_of(values_N: np.ndarray) -> Spread:
    """As trtexec: a percentile is one of the values, the median the mean of the middle one or two."""
    ordered_N = sorted(values_N.tolist())
    mean = fmean(ordered_N)
    return Spread(
        mean=mean,
        median=median(ordered_N),
        p90=percentile(ordered_N, 90),
        p95=percentile(ordered_N, 95),
        p99=percentile(ordered_N, 99),
        min=ordered_N[0],
        max=ordered_N[-1],
        variation=100 * float(np.std(values_N)) / mean if mean else 0.0,
    )


def percentile(ordered_N: Sequence[float], percent: float) -> float:
    """trtexec's: the largest value but for the share beyond the percentile, rounded down."""
    beyond = int((1 - percent / 100) * len(ordered_N))
    return ordered_N[max(len(ordered_N) - 1 - beyond, 0)]


def against_the_faster(batch_size: int, runs: Mapping[Precision, Runs]) -> Latency:
    """INT8 beside the float engine with the lower median."""
    times_ms = {kind: runs[kind].times_ms() for kind in FLOATS if kind in runs}
    baseline = min(times_ms, key=lambda kind: median(times_ms[kind]))
    return latency_of(batch_size, times_ms[baseline], runs["int8"].times_ms(), baseline=baseline, summarize=_summary)


def measure_energy(
    run: Callable[[], object], monitor: GpuMonitor, precision: Precision, batch_size: int, *, min_s: float
) -> GpuEnergy | None:
    """Energy of inferences one after the other for `min_s`; None if the board tells neither energy nor power."""
    if monitor.joules() is None and monitor.watts() is None:
        return None
    run()  # not counted: caches hold another engine's weights
    first, start = monitor.joules(), perf_counter()
    samples, num_runs, seconds = [monitor.watts()], 0, 0.0
    while seconds < min_s or not num_runs:
        run()
        num_runs, seconds = num_runs + 1, perf_counter() - start
        if first is None and seconds >= SAMPLE_EVERY_S * len(samples):
            samples.append(monitor.watts())
    last = monitor.joules()
    watts = [sample for sample in samples if sample is not None]
    source: Literal["energy counter", "power samples"]
    if first is not None and last is not None:
        joules, source = last - first, "energy counter"
    elif watts:
        joules, source = fmean(watts) * seconds, "power samples"
    else:
        return None
    return GpuEnergy(
        precision=precision,
        batch_size=batch_size,
        num_inferences=num_runs,
        seconds=seconds,
        joules_per_image=joules / (num_runs * batch_size),
        watts=joules / seconds,
        source=source,
    )


def device_memory_mib(opening: AbstractContextManager[Engine], feed: Feed, used_bytes: Callable[[], int]) -> float:
    """Device memory that an open engine holds after one inference.

    The first CUDA context of a process takes hundreds of MiB by itself: make it before.
    """
    before = used_bytes()
    with opening as engine:
        engine.run(feed)
        return (used_bytes() - before) / MIB


def _summary(times_ms: np.ndarray) -> dict[str, float]:
    spread = spread_of(times_ms)
    return {"median": spread.median, "p95": spread.p95, "p99": spread.p99}


def _warnings(h2d: Spread, compute: Spread, d2h: Spread, enqueue: Spread, *, graph: bool) -> Iterator[str]:
    if compute.variation > UNSTABLE_PERCENT:
        yield f"compute time varies by {compute.variation:.1f} %: lock the clocks, and let nothing else run on the GPU"
    if enqueue.median > HOST_BOUND * compute.median:
        remedy = "the host is too slow for it" if graph else "a CUDA graph may be faster"
        yield f"launching takes {enqueue.median:.3g} ms of {compute.median:.3g} ms, so the GPU waits: {remedy}"
    for name, transfer in (("input", h2d), ("output", d2h)):
        if transfer.median >= compute.median:
            yield f"the {name}'s transfer takes {transfer.median:.3g} ms, computing {compute.median:.3g} ms"


def _notes(monitor: GpuMonitor, before: GpuState | None, after: GpuState | None) -> Iterator[str]:
    if monitor.missing:
        yield f"Clocks, temperature and energy of the GPU are not known: {monitor.missing}"
    for state, when in ((before, "before"), (after, "after")):
        if state and state.slowdowns:
            yield f"The GPU's clocks were held down {when} measuring: {', '.join(state.slowdowns)}."
    others = {pid for state in (before, after) if state for pid in state.processes or ()} - {os.getpid()}
    if others:
        yield (
            f"Other processes computed on the GPU: {', '.join(map(str, sorted(others)))}. In a container one of "
            "these numbers may be this run's own."
        )
