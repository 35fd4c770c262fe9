from __future__ import annotations

import gc
import inspect
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import pytest

from tasks.contracts.errors import EngineError
from tasks.contracts.records import GpuState, Precision
from tasks.engines.base import Engine, TensorInfo, Timing
from tasks.engines.tensorrt import TensorRtEngine
from tasks.scoring.gpu_latency import (
    FLOATS,
    Effort,
    Runs,
    TimedEngine,
    against_the_faster,
    device_memory_mib,
    measure_energy,
    measure_gpu_speed,
    percentile,
    spread_of,
    take_turns,
    timing_of,
)
from tasks.scoring.latency import Feed
from tasks.scoring.nvml import Unwatched

FEEDS: dict[int, Feed] = {size: {"input": np.zeros((size, 3, 8, 8), np.float32)} for size in (1, 4)}
QUICK = Effort(warmup_s=0.01, warmup_runs=2, measure_s=0.02, measure_runs=20, energy_s=0.02)
STATE = GpuState(
    name="Some GPU", driver="1.0", sm_clock_mhz=1410, memory_clock_mhz=1215, temperature_c=40, power_w=60.0,
    memory_used_mib=500.0, persistence=True, slowdowns=(), processes=(os.getpid(),),
)  # fmt: skip


@dataclass
class Sleeper:
    """Copies its input, waits as long as a GPU would compute, and copies its output: each timed for real."""

    compute_ms: float
    log: list[str] = field(default_factory=list)
    name: str = ""
    collecting: list[bool] = field(default_factory=list)

    def time(self, feed: Feed, *, transfers: bool, graph: bool) -> Timing:
        self.log.append(self.name)
        self.collecting.append(gc.isenabled())
        ticks = [time.perf_counter()]
        held = feed["input"].copy() if transfers else feed["input"]
        ticks.append(time.perf_counter())
        time.sleep(self.compute_ms / 1000)
        ticks.append(time.perf_counter())
        held.mean(axis=(1, 2, 3)).copy()
        ticks.append(time.perf_counter())
        h2d, compute, d2h = (1000 * (end - start) for start, end in pairwise(ticks))
        moved = float(transfers)
        return Timing(h2d_ms=h2d * moved, compute_ms=compute, d2h_ms=d2h * moved, enqueue_ms=0.0 if graph else 0.01)


@dataclass
class Board:
    """A board whose sensor shows 50 W, and whose counter shows what is spent."""

    has_counter: bool = True
    has_sensor: bool = True
    spent: float = 0.0
    missing: str = ""

    def state(self) -> GpuState:
        return STATE

    def joules(self) -> float | None:
        return self.spent if self.has_counter else None

    def watts(self) -> float | None:
        return 50.0 if self.has_sensor else None


def recorded(*compute_ms: float, h2d_ms: float = 0.0, enqueue_ms: float = 0.0) -> Runs:
    timings = [Timing(h2d_ms=h2d_ms, compute_ms=compute, d2h_ms=0.0, enqueue_ms=enqueue_ms) for compute in compute_ms]
    return Runs(timings, seconds=1.0)


@pytest.mark.parametrize(
    ("num", "percent", "index"),
    [(10, 90, 9), (10, 50, 4), (100, 99, 98), (101, 99, 99), (1000, 95, 949), (1000, 99, 989), (1, 99, 0), (2, 0, 0)],
)
def test_percentiles_are_trtexecs(num: int, percent: float, index: int) -> None:
    """Index max(N - 1 - int((1 - p / 100) N), 0), in double precision: 0.1 x 10 is a little less than 1."""
    assert percentile(list(range(num)), percent) == index


def test_a_spread_by_hand() -> None:
    """The median of an even count is the mean of the middle two; variation is the population's."""
    spread = spread_of(np.array([4.0, 1.0, 3.0, 2.0]))
    assert (spread.mean, spread.median, spread.min, spread.max) == (2.5, 2.5, 1.0, 4.0)
    assert (spread.p90, spread.p95, spread.p99) == (4.0, 4.0, 4.0)
    assert spread.variation == pytest.approx(100 * np.sqrt(1.25) / 2.5)
    assert spread_of(np.zeros(3)).variation == 0


def test_a_timing_sums_its_parts() -> None:
    """Latency is transfers and computing; throughput is by the host's clock."""
    timing = timing_of("int8", 8, recorded(1.0, 2.0, 3.0, h2d_ms=0.5), transfers=True, graph=False)
    assert (timing.latency.median, timing.compute.median, timing.h2d.mean) == (2.5, 2.0, 0.5)
    assert (timing.num_iterations, timing.images_per_second) == (3, 24.0)


@pytest.mark.parametrize(
    ("runs", "graph", "says"),
    [
        (recorded(*[1.0] * 9), False, []),
        (recorded(*[1.0, 1.06] * 5), False, ["compute time varies by 2.9 %: lock the clocks"]),
        (recorded(*[1.0, 1.05] * 5), False, []),
        (recorded(*[1.0] * 9, enqueue_ms=0.81), False, ["launching takes 0.81 ms of 1 ms", "a CUDA graph may be"]),
        (recorded(*[1.0] * 9, enqueue_ms=0.81), True, ["the host is too slow"]),
        (recorded(*[1.0] * 9, enqueue_ms=0.8), False, []),
        (recorded(*[1.0] * 9, h2d_ms=1.0), False, ["the input's transfer takes 1 ms, computing 1 ms"]),
        (recorded(*[1.0] * 9, h2d_ms=0.99), False, []),
    ],
    ids=["calm", "unstable", "stable", "host-bound", "host-bound graph", "launched in time", "transfer", "no transfer"],
)
def test_trtexecs_warnings(runs: Runs, graph: bool, says: list[str]) -> None:
    """Beyond its limits, and not at them."""
    notes = timing_of("int8", 1, runs, transfers=True, graph=graph).notes
    assert len(notes) == bool(says)
    assert all(words in notes[0] for words in says)


def test_int8_is_compared_with_the_faster_float() -> None:
    """By the median: FP16 wins here, though its mean is worse."""
    runs: dict[Precision, Runs] = {
        "int8": recorded(2.0, 2.0, 2.0),
        "float16": recorded(1.5, 1.6, 90.0),
        "float32": recorded(4.0, 4.0, 4.0),
    }
    latency = against_the_faster(4, runs)
    assert (latency.baseline, latency.speedup, latency.rounds) == ("float16", 0.8, 3)
    assert latency.float_ms == {"median": 1.6, "p95": 90.0, "p99": 90.0}  # trtexec's percentiles
    del runs["float16"]
    assert (against_the_faster(4, runs).baseline, against_the_faster(4, runs).speedup) == ("float32", 2.0)


def test_engines_take_turns() -> None:
    """Warm-up of each, then turns of one uncounted and ten counted inferences, without garbage collection."""
    log: list[str] = []
    engines: dict[Precision, Sleeper] = {
        "int8": Sleeper(0.1, log, "I"), "float16": Sleeper(0.1, log, "H"), "float32": Sleeper(0.1, log, "F")
    }  # fmt: skip
    effort = Effort(warmup_s=0, warmup_runs=2, measure_s=0, measure_runs=15)
    runs = take_turns(engines, FEEDS[1], effort, transfers=True, graph=False)
    turn = "I" * 11 + "H" * 11 + "F" * 11
    assert "".join(log) == "IIHHFF" + 2 * turn
    assert [len(of_one.timings) for of_one in runs.values()] == [20, 20, 20]
    assert not any(state for engine in engines.values() for state in engine.collecting)
    assert gc.isenabled()


def test_time_and_count_are_both_kept() -> None:
    """Warm-up and measuring last as long as is asked, even of fast engines."""
    log: list[str] = []
    effort = Effort(warmup_s=0.05, warmup_runs=2, measure_s=0.1, measure_runs=10)
    runs = take_turns({"int8": Sleeper(1.0, log)}, FEEDS[1], effort, transfers=True, graph=False)
    assert runs["int8"].seconds >= 0.1
    counted = len(runs["int8"].timings)
    assert counted >= 10
    assert len(log) - counted - counted // 10 >= 2


def test_the_whole_of_it_on_real_time() -> None:
    """Three engines of known cost, two batch sizes, four ways to run them; sleeping takes longer on a busy machine."""
    engines: dict[Precision, Sleeper] = {"int8": Sleeper(0.5), "float16": Sleeper(1.0), "float32": Sleeper(2.0)}
    told: list[tuple[int, int]] = []
    speed, latencies = measure_gpu_speed(
        engines, FEEDS, Board(), effort=QUICK, memory_mib={"int8": 3.5},
        progress=lambda done, total: told.append((done, total)),
    )  # fmt: skip
    assert len(speed.timings) == 2 * 4 * 3
    assert told == [(done, 14) for done in range(1, 15)]
    for timing in speed.timings:
        assert timing.compute.min >= engines[timing.precision].compute_ms
        assert timing.num_iterations >= 20
        assert (timing.h2d.max > 0) == (timing.d2h.max > 0) == timing.transfers
        assert (timing.enqueue.max == 0) == timing.graph
    for latency in latencies:
        medians = {
            timing.precision: timing.latency.median
            for timing in speed.timings
            if timing.batch_size == latency.batch_size and timing.transfers and not timing.graph
        }
        assert latency.baseline == min(FLOATS, key=lambda kind: medians[kind])
        assert latency.float_ms["median"] == medians[latency.baseline]
        assert latency.speedup == medians[latency.baseline] / medians["int8"]
    assert [latency.batch_size for latency in latencies] == [1, 4]
    assert [energy.precision for energy in speed.energies] == 2 * ["int8", "float16", "float32"]
    assert (speed.memory_mib, speed.before, speed.after, speed.notes) == ({"int8": 3.5}, STATE, STATE, ())


def test_an_adapter_without_graphs_is_measured_without_them() -> None:
    """PyCUDA has none."""
    speed, _ = measure_gpu_speed(
        {"int8": Sleeper(0.1), "float32": Sleeper(0.2)}, {1: FEEDS[1]}, Unwatched("no driver."), graphs=(False,),
        effort=QUICK,
    )  # fmt: skip
    assert {(timing.transfers, timing.graph) for timing in speed.timings} == {(True, False), (False, False)}
    assert speed.energies == ()
    assert speed.notes == ("Clocks, temperature and energy of the GPU are not known: no driver.",)
    assert speed.before is None


@pytest.mark.parametrize("kinds", [(), ("int8",), ("float32", "float16")])
def test_int8_and_float_are_both_needed(kinds: tuple[Precision, ...]) -> None:
    """A speedup has two sides."""
    with pytest.raises(EngineError, match="INT8 is compared with float"):
        measure_gpu_speed({kind: Sleeper(0.1) for kind in kinds}, FEEDS, Board(), effort=QUICK)


@pytest.mark.parametrize("has_counter", [True, False], ids=["counter", "samples"])
def test_energy_is_that_of_the_counted_inferences(has_counter: bool) -> None:
    """By a counter that rises by 0.2 J with each inference; without one, mean power times time."""
    board = Board(has_counter=has_counter)

    def run() -> None:
        time.sleep(0.002)
        board.spent += 0.2

    energy = measure_energy(run, board, "int8", 4, min_s=0.15)
    assert energy is not None
    assert energy.num_inferences == round(board.spent / 0.2) - 1  # the first is not counted
    assert energy.seconds >= 0.15
    if has_counter:
        assert energy.joules_per_image == pytest.approx(0.2 / 4)
    else:
        assert energy.watts == pytest.approx(50)
    assert energy.joules_per_image * 4 * energy.num_inferences == pytest.approx(energy.watts * energy.seconds)
    assert energy.source == ("energy counter" if has_counter else "power samples")


def test_what_the_board_does_not_tell_is_not_made_up() -> None:
    """No energy, and the reason."""
    silent = Board(has_counter=False, has_sensor=False)
    assert measure_energy(lambda: None, silent, "int8", 1, min_s=0.01) is None
    speed, _ = measure_gpu_speed({"int8": Sleeper(0.1), "float32": Sleeper(0.1)}, {1: FEEDS[1]}, silent, effort=QUICK)
    assert speed.energies == ()
    assert "neither its energy nor its power" in speed.notes[0]


def test_neighbours_and_slowdowns_are_noted() -> None:
    """Numbers of a shared or throttled GPU say so."""

    class Busy(Board):
        def state(self) -> GpuState:
            return STATE.model_copy(update={"slowdowns": ("software power cap",), "processes": (os.getpid(), 4711)})

    speed, _ = measure_gpu_speed({"int8": Sleeper(0.1), "float32": Sleeper(0.1)}, {1: FEEDS[1]}, Busy(), effort=QUICK)
    assert [note.partition(":")[0] for note in speed.notes] == [
        "The GPU's clocks were held down before measuring",
        "The GPU's clocks were held down after measuring",
        "Other processes computed on the GPU",
    ]
    assert "4711" in speed.notes[2]
    assert str(os.getpid()) not in speed.notes[2]


def test_tensorrts_adapter_is_such_an_engine() -> None:
    """mypy compares the types, this the names."""
    adapter: type[TimedEngine] = TensorRtEngine
    asked, given = (inspect.signature(kind.time).parameters.values() for kind in (TimedEngine, adapter))
    assert [(one.name, one.kind) for one in given] == [(one.name, one.kind) for one in asked]


def test_device_memory_is_what_an_open_engine_adds() -> None:
    """Before it is opened, and after one inference while it is open."""
    used = [100 * 2**20]

    class Holder(Engine):
        """Takes 10 MiB when it opens and 20 more when it runs."""

        @property
        def options(self) -> dict[str, str]:
            return {}

        @staticmethod
        def version() -> str:
            return "1"

        def _open(self) -> None:
            used[0] += 10 * 2**20
            self.inputs = (TensorInfo(name="x", dtype=np.dtype(np.float32), shape=(None,)),)

        def _close(self) -> None:
            used[0] -= 30 * 2**20

        def _run(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            used[0] += 20 * 2**20
            return {}

    assert device_memory_mib(Holder(), {"x": np.zeros(1, np.float32)}, lambda: used[0]) == 30
    assert used[0] == 100 * 2**20
