"""The product: a float classifier in, a released INT8 engine out, or a failed run that says why."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from prefect import flow, get_run_logger, runtime

from tasks.contracts.announcement import News, read_announcement
from tasks.contracts.errors import GateRejected
from tasks.contracts.spec import RunSpec
from tasks.find_changes import find_changes, note_inputs, unchanged
from tasks.gates.judge import rejection_message
from tasks.report.content import RunReport, Trigger


def run_name() -> str:
    """Such as `resnet50 nightly 2026-11-20`: model, what started the run, and its day by UTC."""
    parameters = runtime.flow_run.parameters
    trigger = "retrain" if "announcement" in parameters else parameters.get("trigger", "by hand")
    started = runtime.flow_run.scheduled_start_time or datetime.now(UTC)
    return f"{parameters['spec'].name} {trigger} {started:%Y-%m-%d}"


@flow(name="requantize", flow_run_name=run_name)
def requantize(spec: RunSpec, trigger: Trigger = "by hand", cause: str | None = None) -> RunReport:
    """Turn a float classifier into an INT8 engine that keeps what was agreed.

    Args:
        spec: What to produce. Whatever is not given has its default.
        trigger: What starts the run; it is part of its name.
        cause: Why there is a run, in a few words; shown in the report.
    """
    return _requantize(spec, trigger, cause)


@flow(name="requantize", flow_run_name=run_name)
def requantize_retrained(spec: RunSpec, announcement: Any = None) -> RunReport:
    """The same for weights that were announced as retrained.

    Args:
        spec: What to produce; weights and data are those of the announcement.
        announcement: The event: id, model and payload. Anything is taken, so that what does not fit is a failed run
            with a reason, and not an event that nobody sees.
    """
    announced = read_announcement(announcement)
    return _requantize(spec, "retrain", announced.cause, announced.payload)


def _requantize(spec: RunSpec, trigger: Trigger, cause: str | None, news: News | None = None) -> RunReport:
    if cause is not None:
        get_run_logger().info("started by: %s", cause)
    changes = find_changes(spec, trigger, news)
    if changes.report is not None:
        return unchanged(changes)  # type: ignore[return-value]  # Prefect makes it the run's state, and gives the report
    spec = changes.spec  # with the weights of the last retraining

    # Only now, as PyTorch and its kin take longer to load than a night with no change lasts.
    from flows.build import build_and_score, quantize
    from tasks.check_data import check_data
    from tasks.check_parity import check_parity
    from tasks.check_runtime import check_runtime
    from tasks.choose_calibration import choose_calibration
    from tasks.compare_draws import compare_draws
    from tasks.export_model import export_model
    from tasks.judge_engine import judge_engine
    from tasks.load_model import load_model
    from tasks.prepare_data import prepare_data
    from tasks.publish_report import publish_report
    from tasks.release_engine import release_engine
    from tasks.score_float import score_float

    check_runtime(spec)  # what cannot be built should not be trained
    check = check_data(spec)  # what cannot be trusted ends the run here
    data = prepare_data(spec)
    model = load_model(spec, data)
    baseline = score_float(spec, data, model)

    choice = choose_calibration(spec, data, model)
    draws = compare_draws(spec, data, model, choice) if spec.data.draws else None
    quantized = quantize(spec, data, model, choice)  # here or on a GPU worker
    exported = export_model(spec, data, model, quantized)
    built = build_and_score(spec, data, exported, baseline)  # here or on the machine that it is for

    parity = check_parity(spec, data, model, quantized, built.score)
    decision = judge_engine(spec, built, parity, exported)

    report = publish_report(
        spec, check, data, model, baseline, choice, draws, quantized, exported, built, parity, decision,
        trigger, cause,
    )  # fmt: skip
    if not decision.passed:  # everything is stored by now, for study
        raise GateRejected(f"{rejection_message(decision)}.", remedy="The report shows what was measured.")
    release_engine(report)
    note_inputs(changes, report)
    return report
