from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.contracts.records import Comparison, Compression, Decision, Latency, Memory, Parity, PrecisionAudit, Verdict
from tasks.contracts.spec import GatesSpec
from tasks.gates.judge import GATES, judge, metrics_from, rejection_message

GOOD: dict[str, float | None] = {
    "top1_drop": 0.2,
    "top5_drop": 0.1,
    "champion_drop": -0.3,
    "class_drop": 3.0,
    "agreement": 98.0,
    "parity": 99.0,
    "compression": 3.9,
    "speedup": 2.5,
    "latency": 4.0,
    "memory": 90.0,
    "int8_macs": 97.0,
}
ALL_ON = GatesSpec(max_class_drop=5.0, max_latency_ms=10.0, max_memory_mib=100.0, min_int8_macs=90.0)
COMPARISON = Comparison(
    top1_drop=0.5,
    top1_drop_interval=(0.1, 0.9),
    top5_drop=0.2,
    class_drop=4.0,
    worst_class="bee",
    agreement=97.0,
    only_float_right=9,
    only_engine_right=4,
    p_value=0.2,
)
RIVAL = COMPARISON.model_copy(update={"top1_drop": -0.1})
PARITY = Parity(num_images=8, agreement=99.5, simulation_top1=90, runtime_top1=90, layers=())
COMPRESSION = Compression(
    float_bytes=400, int8_bytes=100, ratio=4.0, parameters=100, bits_per_weight=8.1, macs=10, int8_macs=9, layers=()
)


def latency(batch_size: int, int8_ms: float) -> Latency:
    times = {"median": int8_ms, "p95": int8_ms, "p99": int8_ms}
    return Latency(
        batch_size=batch_size,
        rounds=10,
        baseline="float32",
        float_ms=times,
        int8_ms=times,
        float_images_per_second=1,
        int8_images_per_second=1,
        speedup=1.5,
        speedup_quartiles=(1.4, 1.6),
    )


def test_every_limit_of_the_spec_is_a_gate() -> None:
    """A limit without a number to judge would pass silently."""
    assert list(GATES) == list(GatesSpec.model_fields)


def test_a_gates_name_says_which_side_is_good() -> None:
    """A limit called max is at most, one called min at least."""
    assert {name: name.startswith("max_") for name in GATES} == {n: g.side == "at most" for n, g in GATES.items()}


def test_every_gate_has_a_number_that_is_measured() -> None:
    """The numbers that steps produce are those that gates ask for, each from its own record."""
    metrics = metrics_from(
        COMPARISON, RIVAL, PARITY, COMPRESSION, (latency(1, 7.0), latency(8, 50.0)), Memory(float_mib=200, int8_mib=80),
        PrecisionAudit(layers=(), macs={"int8": 90, "float16": 6, "float32": 0, "unknown": 4}, unplaced=()),
    )  # fmt: skip
    assert set(metrics) == {gate.metric for gate in GATES.values()}
    assert metrics == {
        "top1_drop": 0.5,
        "top5_drop": 0.2,
        "champion_drop": -0.1,
        "class_drop": 4.0,
        "agreement": 97.0,
        "parity": 99.5,
        "compression": 4.0,
        "speedup": 1.5,
        "latency": 7.0,
        "memory": 80,
        "int8_macs": 90.0,
    }


def test_an_engine_without_an_audit_or_products_has_no_int8_share() -> None:
    """So that a gate that asks for it fails."""
    nothing = PrecisionAudit(layers=(), macs={"int8": 0}, unplaced=())
    for audit in (None, nothing):
        memory = Memory(float_mib=200, int8_mib=80)
        metrics = metrics_from(COMPARISON, None, PARITY, COMPRESSION, (latency(1, 7.0),), memory, audit)
        assert metrics["int8_macs"] is None
        assert not judge(metrics, GatesSpec.model_validate({**dict.fromkeys(GATES), "min_int8_macs": 50})).passed


def test_good_numbers_pass_every_gate() -> None:
    """One verdict per gate, in the spec's order."""
    decision = judge(GOOD, ALL_ON)
    assert decision.passed
    assert [verdict.gate for verdict in decision.verdicts] == list(GATES)


@pytest.mark.parametrize("name", GATES)
def test_each_gate_passes_at_its_limit_and_fails_beyond(name: str) -> None:
    """The limit itself is allowed; the next number beyond is not."""
    gate, limit = GATES[name], 2.0
    gates = GatesSpec.model_validate({**dict.fromkeys(GATES), name: limit})
    beyond = math.nextafter(limit, math.inf if gate.side == "at most" else -math.inf)
    assert judge({gate.metric: limit}, gates).passed
    assert not judge({gate.metric: beyond}, gates).passed


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf, "missing"])
def test_a_number_that_was_not_measured_fails_its_gate(name: str, value: float | str | None) -> None:
    """Silence is no pass, and no other gate suffers."""
    measured = {metric: number for metric, number in GOOD.items() if metric != GATES[name].metric}
    if not isinstance(value, str):
        measured[GATES[name].metric] = value
    decision = judge(measured, ALL_ON)
    assert [verdict.gate for verdict in decision.verdicts if not verdict.passed] == [name]
    assert not decision.passed


def test_gates_that_are_off_are_not_judged() -> None:
    """Null asks for nothing."""
    decision = judge({}, GatesSpec.model_validate(dict.fromkeys(GATES)))
    assert decision == Decision(verdicts=(), passed=True)


def test_a_decision_with_nan_survives_its_json_form() -> None:
    """What was not a number can still be seen in the stored record."""
    decision = judge({**GOOD, "speedup": math.nan}, GatesSpec())
    again = Decision.model_validate_json(decision.model_dump_json())
    measured = {verdict.metric: verdict.measured for verdict in again.verdicts}["speedup"]
    assert measured is not None
    assert math.isnan(measured)


def test_a_rejection_says_what_was_measured_and_what_was_agreed() -> None:
    """Only failing gates are named."""
    message = rejection_message(judge({**GOOD, "top1_drop": 2.314159, "speedup": None}, GatesSpec()))
    assert message == "2 of 7 gates failed: top1_drop 2.314, at most 1 points; speedup not measured"


def test_a_rejection_by_every_gate_stays_short_and_counts_the_rest() -> None:
    """All gates at once would be too long for a run's state."""
    message = rejection_message(judge(dict.fromkeys(GOOD, -1e9) | {"top1_drop": 1e9, "latency": 123.456}, ALL_ON))
    everything = judge(dict.fromkeys(GOOD, math.nan), ALL_ON)
    assert len(message) <= 200
    assert len(rejection_message(everything)) <= 200
    assert rejection_message(everything).startswith("11 of 11 gates failed: top1_drop nan, at most 1 points; ")
    assert rejection_message(everything).endswith(" more")


@given(st.lists(st.sampled_from(list(GATES)), unique=True), st.floats(allow_nan=True))
def test_no_rejection_is_longer_than_a_state_may_be(names: list[str], value: float) -> None:
    """Any gates, any numbers."""
    verdicts = tuple(
        Verdict(gate=n, metric=GATES[n].metric, unit=GATES[n].unit, limit=-1.23456e-77, measured=value, passed=False)
        for n in names
    )
    assert len(rejection_message(Decision(verdicts=verdicts, passed=False))) <= 200
