"""Step: everything measured against everything agreed."""

from __future__ import annotations

from prefect import get_run_logger

from tasks.contracts.records import Built, Decision, ExportRecord, Parity
from tasks.contracts.spec import RunSpec
from tasks.gates.judge import judge, metrics_from
from tasks.scoring.latency import slower_notes
from tasks.step import step


@step("judge by gates")
def judge_engine(spec: RunSpec, built: Built, parity: Parity, exported: ExportRecord) -> Decision:
    """One verdict per gate; without a champion there is nothing that its gate could ask for.

    Nothing is raised here: first the report must be stored.
    """
    rival = None if built.champion is None else built.champion.comparison
    measured = metrics_from(
        built.score.comparison,
        rival,
        parity,
        exported.compression,
        built.speed.latencies,
        built.speed.memory,
        built.engine.audit,
    )
    gates = spec.gates if rival else spec.gates.model_copy(update={"max_champion_drop": None})
    decision = judge(measured, gates)
    passed = sum(verdict.passed for verdict in decision.verdicts)
    logger = get_run_logger()
    for note in slower_notes(built.speed.latencies):
        logger.warning("%s", note)
    logger.info("%d of %d gates passed", passed, len(decision.verdicts))
    return decision
