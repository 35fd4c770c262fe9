"""Step: everything measured against everything agreed."""

from __future__ import annotations

from prefect import get_run_logger

from tasks.contracts.records import Decision, EngineScore, EngineSpeed, ExportRecord, Parity
from tasks.contracts.spec import RunSpec
from tasks.gates.judge import judge, metrics_from
from tasks.step import step


@step("judge by gates")
def judge_engine(
    spec: RunSpec, score: EngineScore, parity: Parity, exported: ExportRecord, speed: EngineSpeed
) -> Decision:
    """One verdict per gate. Nothing is raised here: first the report must be stored."""
    measured = metrics_from(score.comparison, parity, exported.compression, speed.latencies, speed.memory)
    decision = judge(measured, spec.gates)
    passed = sum(verdict.passed for verdict in decision.verdicts)
    get_run_logger().info("%d of %d gates passed", passed, len(decision.verdicts))
    return decision
