"""The report as Markdown (GitHub's), and its gates as rows: both fit a Prefect artifact."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from tasks.contracts.records import DataCheck, Decision, Finding
from tasks.report.content import (
    RunReport,
    broken_first,
    calibration_text,
    cautions,
    champion_text,
    check_headline,
    class_changes,
    costs_by_op,
    duration,
    headline,
    limit_of,
    milliseconds,
    noisiest_first,
    number,
    started,
    started_by,
    title_of,
    with_unit,
)
from tasks.report.gpu import (
    PRECISIONS,
    audit_text,
    baseline_text,
    gpu_notes,
    gpu_rows,
    memory_name,
    mode_of,
    not_int8,
    shorten,
    timing_text,
)

MIB = 2**20
NUM_WORST = 10
NUM_LAYERS = 40
NUM_NOTES = 40


def gate_rows(decision: Decision) -> list[dict[str, str]]:
    """One row per gate, what failed first, in words: Prefect's UI shows a number with all its digits."""
    return [
        {
            "verdict": "✓ passed" if verdict.passed else "✗ failed",
            "gate": title_of(verdict),
            "measured": with_unit(verdict.measured, verdict.unit),
            "limit": limit_of(verdict),
        }
        for verdict in sorted(decision.verdicts, key=lambda verdict: verdict.passed)
    ]


def as_markdown(report: RunReport) -> str:
    """The verdict first, then what it rests on. Tables are cut to the worst few, so it stays below 100 KB."""
    mark = "✓" if report.decision.passed else "✗"
    sections = [
        f"# {mark} {_text(report.spec.name)}: {headline(report.decision)}",
        *(f"> **Note:** {_text(note)}" for note in cautions(report)),
        _gates(report),
        _accuracy(report),
        _latency(report),
        _gpu(report),
        _size(report),
        _audit(report),
        _layers(report),
        _classes(report),
        f"## Calibration\n\n{calibration_text(report)}",
        _training(report),
        _origin(report),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def check_as_markdown(name: str, check: DataCheck, pictures: Mapping[str, str]) -> str:
    """What the data contract found; `pictures` are data URLs by path."""
    mark = "✗" if check.breaches else "✓"
    rows = [
        [
            "✓" if finding.passed else "✗ **critical**" if finding.severity == "critical" else "! warning",
            f"{finding.rule}: {finding.says}",
            finding.observed,
            finding.limit,
            f"{finding.num_offenders:,}",
        ]
        for finding in broken_first(check.findings)
    ]
    sections = [
        f"# {mark} {_text(name)}: {check_headline(check.findings)}",
        f"{check.num_images:,} images of {_text(check.source)}"
        + (f", compared with the data of run {check.reference}" if check.reference else ""),
        _table(["", "Rule", "Found", "Limit", "Offenders"], rows),
        *(_offenders(finding, pictures) for finding in broken_first(check.findings) if not finding.passed),
    ]
    return "\n\n".join(sections) + "\n"


def _offenders(finding: Finding, pictures: Mapping[str, str]) -> str:
    rows = [
        [f"![]({pictures[offender.path]})" if offender.path in pictures else "", offender.path, offender.found]
        for offender in finding.offenders
    ]
    rest = finding.num_offenders - len(finding.offenders)
    return (
        f"## {finding.rule}: {finding.says}\n\n{finding.remedy}"
        + ("\n\n" + _table(["", "Image", "Found"], rows) if rows else "")
        + (f"\n\nAnd {rest:,} more." if rest else "")
    )


def _gates(report: RunReport) -> str:
    rows = [
        [
            "✓ passed" if verdict.passed else "✗ **failed**",
            title_of(verdict),
            with_unit(verdict.measured, verdict.unit),
            limit_of(verdict),
        ]
        for verdict in report.decision.verdicts
    ]
    return "## Gates\n\n" + _table(["Verdict", "Gate", "Measured", "Limit"], rows)


def _accuracy(report: RunReport) -> str:
    before, after, change = report.float_accuracy, report.engine_accuracy, report.comparison
    low, high = change.top1_drop_interval
    rows = [
        [
            "Top-1",
            _share(before.top1, before.top1_interval),
            _share(after.top1, after.top1_interval),
            f"{number(change.top1_drop)} points ({number(low)} to {number(high)})",
        ],
        [
            "Top-5",
            _share(before.top5, before.top5_interval),
            _share(after.top5, after.top5_interval),
            f"{number(change.top5_drop)} points",
        ],
    ]
    text = (
        f"{after.num_images:,} gate images; 95 % intervals in brackets, the drop's is paired. The engine gives the "
        f"same answer as the float model for {number(change.agreement)} % of them and as its simulation for "
        f"{number(report.parity.agreement)} % of {report.parity.num_images:,}. Only the float model is right on "
        f"{change.only_float_right:,}, only the engine on {change.only_engine_right:,} "
        f"(McNemar, exact: p = {change.p_value:.3g})."
    )
    champion = champion_text(report)
    table = _table(["", "Float", "INT8", "Drop"], rows)
    return f"## Accuracy\n\n{text}\n\n{table}" + (f"\n\n{champion}" if champion else "")


def _latency(report: RunReport) -> str:
    rows = [
        [
            latency.batch_size,
            *(
                f"{milliseconds(times['median'])} ({milliseconds(times['p95'])} / {milliseconds(times['p99'])})"
                for times in (latency.float_ms, latency.int8_ms)
            ),
            f"{number(latency.float_images_per_second, 1)} / {number(latency.int8_images_per_second, 1)}",
            f"{with_unit(latency.speedup, 'x')} {baseline_text(latency)} ({number(latency.speedup_quartiles[0])} to "
            f"{number(latency.speedup_quartiles[1])})",
        ]
        for latency in report.latencies
    ]
    columns = ["Batch", "Float, ms: median (p95 / p99)", "INT8, ms: median (p95 / p99)", "Images/s, float / INT8"]
    return f"## Latency\n\n{_text(timing_text(report))}\n\n" + _table([*columns, "Speedup"], rows)


def _gpu(report: RunReport) -> str:
    if report.gpu is None:
        return ""
    rows = [
        [
            row.batch_size,
            mode_of(row),
            PRECISIONS[row.precision],
            *(milliseconds(value) for value in (row.latency.median, row.latency.p95, row.latency.p99)),
            number(row.latency.variation, 1),
            *(milliseconds(part.median) for part in (row.h2d, row.compute, row.d2h, row.enqueue)),
            number(row.images_per_second, 0),
        ]
        for row in gpu_rows(report.gpu)
    ]
    columns = ["Batch", "Mode", "Engine", "Median, ms", "p95", "p99", "CV, %", "To GPU", "Computing", "To host"]
    energies = [
        [energy.batch_size, PRECISIONS[energy.precision], number(1000 * energy.joules_per_image), number(energy.watts)]
        for energy in report.gpu.energies
    ]
    return "\n\n".join(
        [
            "## On the GPU",
            _table([*columns, "Enqueue", "Images/s"], rows),
            *([_table(["Batch", "Engine", "mJ per image", "W"], energies)] if energies else []),
            "\n".join(f"- {_text(note)}" for note in gpu_notes(report.gpu)[:NUM_NOTES]),
        ]
    )


def _audit(report: RunReport) -> str:
    audit = report.engine.audit
    if audit is None:
        return ""
    found = not_int8(audit)
    rows = [
        [
            shorten(layer.name),
            layer.role,
            PRECISIONS[layer.precision] if layer.role == "compute" else "",
            layer.reads,
            layer.writes,
            number(layer.macs / 1e6),
        ]
        for layer in found[:NUM_LAYERS]
    ]
    rest = len(found) - len(rows)
    return (
        f"## Which precision each layer runs in\n\n{_text(audit_text(report, audit))}\n\n"
        + _table(["Layer of the engine", "Role", "Computes in", "Reads", "Writes", "Million MACs"], rows)
        + (f"\n\nAnd {rest:,} more." if rest > 0 else "")
    )


def _size(report: RunReport) -> str:
    compression, memory = report.export.compression, report.memory
    rows = [
        [
            "File, MiB",
            number(compression.float_bytes / MIB),
            number(compression.int8_bytes / MIB),
            with_unit(compression.ratio, "x"),
        ],
        [
            f"{memory_name(report).capitalize()}, MiB",
            number(memory.float_mib, 1),
            number(memory.int8_mib, 1),
            with_unit(memory.float_mib / memory.int8_mib, "x"),
        ],
    ]
    kinds = [
        [cost.op_type, f"{cost.num_int8} of {cost.num_layers}", f"{cost.parameters:,}", number(cost.macs / 1e6)]
        for cost in costs_by_op(compression)
    ]
    text = (
        f"{compression.parameters:,} parameters at {number(compression.bits_per_weight)} bits each; "
        f"{compression.int8_macs / max(compression.macs, 1):.1%} of {number(compression.macs / 1e6, 1)} million "
        "multiply-accumulates per image are INT8."
    )
    return (
        f"## Size and memory\n\n{text}\n\n"
        + _table(["", "Float", "INT8", "Saving"], rows)
        + "\n\n"
        + _table(["Kind of layer", "INT8", "Parameters", "Million MACs"], kinds)
    )


def _layers(report: RunReport) -> str:
    rows = [
        [layer.layer, layer.op_type, number(layer.sqnr_db, 1), number(layer.max_steps, 1)]
        for layer in noisiest_first(report.parity.layers)[:NUM_WORST]
    ]
    return "## Noisiest layers\n\n" + _table(["Layer", "Kind", "Signal over noise, dB", "Runtime off by, steps"], rows)


def _classes(report: RunReport) -> str:
    rows = [
        [change.name, number(change.float_recall), number(change.engine_recall), number(change.drop)]
        for change in class_changes(report)[:NUM_WORST]
    ]
    return "## Classes that lose most\n\n" + _table(
        ["Class", "Float recall, %", "INT8 recall, %", "Drop, points"], rows
    )


def _training(report: RunReport) -> str:
    if not report.quantized.epochs:
        return ""
    rows = [
        [epoch.epoch, f"{epoch.loss:.4f}", number(epoch.selection_top1), f"{epoch.learning_rate:.2e}"]
        for epoch in report.quantized.epochs[-NUM_WORST:]
    ]
    return "## Training\n\n" + _table(["Epoch", "Loss", "Selection top-1, %", "Learning rate"], rows)


def _origin(report: RunReport) -> str:
    kept = report.quantized.kept_float
    rows = [
        ["Run", f"{report.run_id}, {started(report)}, {duration(report)}, seed {report.spec.seed}"],
        ["Started", started_by(report)],
        ["Model", f"{report.model.architecture}, {report.model.num_classes} classes"],
        ["Data", report.data.source],
        ["Images", ", ".join(f"{split} {count:,}" for split, count in report.data.counts.items())],
        ["Method", f"{report.quantized.method}, scheme {report.quantized.scheme}"],
        ["Layers", f"{report.quantized.num_quantized} INT8, {len(kept)} kept float"],
        ["Engine", f"sha256 {report.engine.engine.sha256}"],
        ["Versions", ", ".join(f"{name} {version}" for name, version in sorted(report.versions.items()))],
    ]
    return "## Origin\n\n" + _table(["", ""], rows)


def _share(value: float, interval: tuple[float, float]) -> str:
    return f"{number(value)} % ({number(interval[0])} to {number(interval[1])})"


def _table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [columns, ["---"] * len(columns), *([_text(str(cell)) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _text(text: str) -> str:
    """Names from outside must not open a cell, a tag or a line."""
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())
