"""The product: a float classifier in, a released INT8 engine out, or a failed run that says why."""

from __future__ import annotations

from prefect import flow

from tasks.contracts.errors import GateRejected
from tasks.contracts.spec import RunSpec
from tasks.find_changes import find_changes, note_inputs, unchanged
from tasks.gates.judge import rejection_message
from tasks.report.content import RunReport


@flow(name="requantize", flow_run_name="{spec.name}")
def requantize(spec: RunSpec) -> RunReport:
    """Turn a float classifier into an INT8 engine that keeps what was agreed."""
    changes = find_changes(spec)
    if changes.report is not None:
        return unchanged(changes)  # type: ignore[return-value]  # Prefect makes it the run's state, and gives the report

    # Only now, as PyTorch and its kin take longer to load than a night with no change lasts.
    from tasks.build_engine import build_engine
    from tasks.check_data import check_data
    from tasks.check_parity import check_parity
    from tasks.choose_calibration import choose_calibration
    from tasks.compare_draws import compare_draws
    from tasks.export_model import export_model
    from tasks.judge_engine import judge_engine
    from tasks.load_model import load_model
    from tasks.measure_engine import measure_engine
    from tasks.prepare_data import prepare_data
    from tasks.publish_report import publish_report
    from tasks.quantize_model import quantize_model
    from tasks.release_engine import release_engine
    from tasks.score_champion import score_champion
    from tasks.score_engine import score_engine
    from tasks.score_float import score_float

    check = check_data(spec)  # what cannot be trusted ends the run here
    data = prepare_data(spec)
    model = load_model(spec, data)
    baseline = score_float(spec, data, model)

    choice = choose_calibration(spec, data, model)
    draws = compare_draws(spec, data, model, choice) if spec.data.draws else None
    quantized = quantize_model(spec, data, model, choice)
    exported = export_model(spec, data, model, quantized)
    engine = build_engine(spec, exported)

    score = score_engine(spec, data, engine, baseline)
    champion = score_champion(spec, data, engine, score)
    parity = check_parity(spec, data, model, quantized, score)
    speed = measure_engine(spec, data, exported, engine)
    decision = judge_engine(spec, score, champion, parity, exported, speed)

    report = publish_report(
        spec, check, data, model, baseline, choice, draws, quantized, exported, engine,
        score, champion, parity, speed, decision,
    )  # fmt: skip
    if not decision.passed:  # everything is stored by now, for study
        raise GateRejected(f"{rejection_message(decision)}.", remedy="The report shows what was measured.")
    release_engine(report)
    note_inputs(changes, report)
    return report
