from __future__ import annotations

import gc
from collections.abc import Callable

import numpy as np
import pytest

from tasks.scoring.latency import Feed, latency_of, measure_latency, slower_notes

FEEDS: dict[int, Feed] = {
    1: {"pixels": np.zeros((1, 3, 4, 4), np.float32)},
    8: {"pixels": np.zeros((8, 3, 4, 4), np.float32)},
}


def test_the_summary_by_hand() -> None:
    """Eleven rounds: 20 to 40 ms in float, always a quarter of that in INT8."""
    float_ms = np.linspace(20, 40, 11)
    latency = latency_of(4, float_ms, float_ms / 4)
    assert latency.float_ms == pytest.approx({"median": 30, "p95": 39, "p99": 39.8})
    assert latency.int8_ms == pytest.approx({"median": 7.5, "p95": 9.75, "p99": 9.95})
    assert latency.float_images_per_second == pytest.approx(4 / 0.030)
    assert latency.int8_images_per_second == pytest.approx(4 / 0.0075)
    assert (latency.rounds, latency.batch_size, latency.speedup) == (11, 4, 4)
    assert latency.speedup_quartiles == (4, 4)


def test_quartiles_compare_neighbours_in_time() -> None:
    """When the machine is slow for a while, both are slow: the ratio holds, whatever the medians do."""
    slow = np.array([1, 1, 1, 5, 5, 5])
    assert latency_of(1, 2.0 * slow, 1.0 * slow).speedup_quartiles == (2, 2)


def test_where_int8_does_not_pay_a_sentence_says_so() -> None:
    """By the medians, and naming what it was compared with."""
    ones = np.ones(3)
    slower = latency_of(1, 2 * ones, 2.5 * ones, baseline="float16")
    faster = latency_of(8, 2 * ones, 1.9 * ones, baseline="float16")
    on_cpu = latency_of(32, 2 * ones, 4 * ones)
    assert slower_notes((slower, faster, on_cpu)) == (
        "FP16 is faster than INT8 at batch 1: 2 ms against 2.5 ms. Release the FP16 engine instead, or find out which "
        "layers INT8 slows down.",
        "Float is faster than INT8 at batch 32: 2 ms against 4 ms. Release the float model instead, or find out which "
        "layers INT8 slows down.",
    )


def test_float_and_int8_take_turns() -> None:
    """Warm-up first, then one of each per round, for one batch size after the other."""
    turns: list[str] = []
    latencies = measure_latency(
        lambda feed: turns.append(f"F{len(feed['pixels'])}"),
        lambda feed: turns.append(f"I{len(feed['pixels'])}"),
        FEEDS,
        rounds=10,
        warmup=2,
    )
    assert turns == ["F1", "I1"] * 12 + ["F8", "I8"] * 12
    assert [latency.batch_size for latency in latencies] == [1, 8]
    assert all(latency.rounds == 10 for latency in latencies)


def test_a_slower_model_is_seen_to_be_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three milliseconds against one, by a clock that only they move."""
    now_ns = [0]

    def taking(ms: int) -> Callable[[object], None]:
        return lambda feed: now_ns.append(now_ns[-1] + ms * 1_000_000)

    monkeypatch.setattr("tasks.scoring.latency.perf_counter_ns", lambda: now_ns[-1])
    (latency,) = measure_latency(taking(3), taking(1), {1: FEEDS[1]}, rounds=20, warmup=1)
    assert (latency.float_ms["median"], latency.int8_ms["median"], latency.speedup) == (3, 1, 3)
    assert latency.float_ms["median"] <= latency.float_ms["p95"] <= latency.float_ms["p99"]


def test_no_garbage_is_collected_meanwhile_and_progress_is_told() -> None:
    """The collector is off in every inference and on again afterwards, even after a failure."""
    states: list[bool] = []
    steps: list[tuple[int, int]] = []
    measure_latency(
        lambda feed: states.append(gc.isenabled()),
        lambda feed: states.append(gc.isenabled()),
        FEEDS,
        rounds=10,
        progress=lambda done, total: steps.append((done, total)),
    )
    assert not any(states)
    assert gc.isenabled()
    assert steps == [(done, 20) for done in range(1, 21)]

    def broken(feed: Feed) -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        measure_latency(broken, broken, FEEDS, rounds=10)
    assert gc.isenabled()
