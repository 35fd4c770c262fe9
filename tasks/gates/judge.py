"""Measured numbers against agreed limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Literal

from tasks.contracts.records import Comparison, Compression, Decision, Latency, Memory, Parity, PrecisionAudit, Verdict
from tasks.contracts.spec import GatesSpec

LONGEST_MESSAGE = 200


@dataclass(frozen=True)
class Gate:
    """Which number a limit is for, and which side of the limit is good."""

    metric: str
    unit: str
    side: Literal["at most", "at least"]


GATES = {
    "max_top1_drop": Gate("top1_drop", "points", "at most"),
    "max_top5_drop": Gate("top5_drop", "points", "at most"),
    "max_champion_drop": Gate("champion_drop", "points", "at most"),
    "max_class_drop": Gate("class_drop", "points", "at most"),
    "min_agreement": Gate("agreement", "%", "at least"),
    "min_parity": Gate("parity", "%", "at least"),
    "min_compression": Gate("compression", "x", "at least"),
    "min_speedup": Gate("speedup", "x", "at least"),
    "max_latency_ms": Gate("latency", "ms", "at most"),
    "max_memory_mib": Gate("memory", "MiB", "at most"),
    "min_int8_macs": Gate("int8_macs", "%", "at least"),
}


def judge(measured: Mapping[str, float | None], gates: GatesSpec) -> Decision:
    """One verdict per gate that is on, all at once. A number that is missing or not finite fails its gate."""
    verdicts = tuple(_verdict(name, limit, measured) for name, limit in gates.model_dump().items() if limit is not None)
    return Decision(verdicts=verdicts, passed=all(verdict.passed for verdict in verdicts))


def metrics_from(
    comparison: Comparison,
    champion: Comparison | None,
    parity: Parity,
    compression: Compression,
    latencies: Sequence[Latency],
    memory: Memory,
    audit: PrecisionAudit | None = None,
) -> dict[str, float | None]:
    """Everything that a gate can ask for. Of the latencies the first is gated."""
    return {
        "top1_drop": comparison.top1_drop,
        "top5_drop": comparison.top5_drop,
        "champion_drop": None if champion is None else champion.top1_drop,
        "class_drop": comparison.class_drop,
        "agreement": comparison.agreement,
        "parity": parity.agreement,
        "compression": compression.ratio,
        "speedup": latencies[0].speedup,
        "latency": latencies[0].int8_ms["median"],
        "memory": memory.int8_mib,
        "int8_macs": None if audit is None else audit.percent("int8"),
    }


def rejection_message(decision: Decision) -> str:
    """Which gates failed and by how much, in at most 200 characters; what does not fit is counted."""
    failed = [_failure(verdict) for verdict in decision.verdicts if not verdict.passed]
    start = f"{len(failed)} of {len(decision.verdicts)} gates failed: "
    for num_left_out in range(len(failed)):
        rest = f"; and {num_left_out} more" if num_left_out else ""
        message = start + "; ".join(failed[: len(failed) - num_left_out]) + rest
        if len(message) <= LONGEST_MESSAGE:
            return message
    return start[:-2]


def _verdict(name: str, limit: float, measured: Mapping[str, float | None]) -> Verdict:
    gate = GATES[name]
    value = measured.get(gate.metric)
    passed = value is not None and isfinite(value) and (value <= limit if gate.side == "at most" else value >= limit)
    return Verdict(gate=name, metric=gate.metric, unit=gate.unit, limit=limit, measured=value, passed=passed)


def _failure(verdict: Verdict) -> str:
    if verdict.measured is None:
        return f"{verdict.metric} not measured"
    return f"{verdict.metric} {verdict.measured:.4g}, {GATES[verdict.gate].side} {verdict.limit:.4g} {verdict.unit}"
