"""Step: the run's record and report, in the store and in the Prefect UI."""

from __future__ import annotations

from base64 import b64encode
from datetime import UTC, datetime
from urllib.parse import quote

from prefect import get_run_logger, runtime
from prefect.artifacts import (
    create_image_artifact,
    create_link_artifact,
    create_markdown_artifact,
    create_table_artifact,
)

from tasks.contracts.records import (
    Accuracy,
    Built,
    Choice,
    DataCheck,
    DataRecord,
    Decision,
    Draws,
    ExportRecord,
    ModelRecord,
    Parity,
    QuantizedRecord,
)
from tasks.contracts.settings import Settings
from tasks.contracts.spec import RunSpec
from tasks.engines.hardware import hardware, int8_notes
from tasks.graph.parity import steps_apart
from tasks.report.content import RunReport, Trigger
from tasks.report.html import as_html
from tasks.report.markdown import as_markdown, gate_rows
from tasks.report.plots import image_of, summary_figure
from tasks.scoring.latency import slower_notes
from tasks.step import LIBRARIES, artifact_key, disk_errors, run_id, run_prefix, step, the_store
from tasks.stores.base import Store
from tasks.stores.steps import library_versions


@step("publish report")
def publish_report(
    spec: RunSpec,
    check: DataCheck,
    data: DataRecord,
    model: ModelRecord,
    baseline: Accuracy,
    choice: Choice,
    draws: Draws | None,
    quantized: QuantizedRecord,
    exported: ExportRecord,
    built: Built,
    parity: Parity,
    decision: Decision,
    trigger: Trigger,
    cause: str | None,
) -> RunReport:
    """Everything about the run, stored under a name of its own and shown as artifacts."""
    started = runtime.flow_run.scheduled_start_time or datetime.now(UTC)
    report = RunReport(
        run_id=run_id(),
        started=started.isoformat(),
        finished=datetime.now(UTC).isoformat(),
        spec=spec,
        check=check,
        data=data,
        model=model,
        float_accuracy=baseline,
        choice=choice,
        draws=draws,
        engine_accuracy=built.score.accuracy,
        comparison=built.score.comparison,
        champion=built.champion,
        latencies=built.speed.latencies,
        memory=built.speed.memory,
        gpu=built.speed.gpu,
        export=exported,
        parity=parity,
        quantized=quantized,
        engine=built.engine,
        decision=decision,
        versions=library_versions("requant", "prefect", *LIBRARIES),
        hardware=built.engine.hardware,
        notes=_notes(built, parity, exported),
        trigger=trigger,
        cause=cause,
    )
    store, prefix = the_store(), run_prefix(spec.name, report.run_id)
    with disk_errors():
        _store_all(store, prefix, report)
        _show(report, store, prefix)
    get_run_logger().info("report: %s/%s/report.html", store, prefix)
    return report


def _notes(built: Built, parity: Parity, exported: ExportRecord) -> tuple[str, ...]:
    built_here = built.engine.hardware == hardware()
    apart = [f"{layer.layer} ({layer.max_steps:.0f} steps)" for layer in steps_apart(parity.layers)]
    said = f"The runtime differs from the simulation by more than one step in {', '.join(apart)}."
    lint = (f"Lint: {warning}." for warning in exported.warnings)
    half = (f"FP16: {note}." for note in exported.half_notes)
    slower = slower_notes(built.speed.latencies)
    return (*(int8_notes() if built_here else ()), *slower, *([said] if apart else ()), *lint, *half)


def _store_all(store: Store, prefix: str, report: RunReport) -> None:
    store.write_text(f"{prefix}/report.html", as_html(report))
    store.write_text(f"{prefix}/report.md", as_markdown(report))
    # Last, so that a run with a record is a run with everything.
    store.write_text(f"{prefix}/record.json", report.model_dump_json(indent=1))


def _show(report: RunReport, store: Store, prefix: str) -> None:
    name, key, base = report.spec.name, f"{prefix}/report.html", Settings().report_url
    create_table_artifact(
        gate_rows(report.decision), key=artifact_key("gates", name), description="Gates: measured and agreed"
    )
    create_markdown_artifact(as_markdown(report), key=artifact_key("report", name), description=f"{store}/{key}")
    if base is None:  # Prefect's UI follows no link to a file or to s3://
        picture = "data:image/png;base64," + b64encode(image_of(summary_figure(report), "png")).decode()
    else:
        create_link_artifact(_link(base, key), "The whole report", key=artifact_key("page", name))
        store.write_text(f"{prefix}/picture.svg", image_of(summary_figure(report), "svg").decode())
        picture = _link(base, f"{prefix}/picture.svg")
    create_image_artifact(
        picture,
        key=artifact_key("picture", name),
        description="Accuracy, size and latency of float and INT8; error by layer",
    )


def _link(base: str, key: str) -> str:
    return f"{base.rstrip('/')}/{quote(key)}"
