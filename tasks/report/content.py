"""What a run has to tell, and the few things that every form of the report derives from it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from math import isfinite, isnan
from statistics import mean
from typing import Literal

from tasks.contracts.records import (
    Accuracy,
    ChampionScore,
    Choice,
    Comparison,
    Compression,
    DataCheck,
    DataRecord,
    Decision,
    Draws,
    EngineRecord,
    ExportRecord,
    Finding,
    GpuSpeed,
    Latency,
    LayerError,
    Memory,
    ModelRecord,
    Parity,
    QuantizedRecord,
    Record,
    Verdict,
)
from tasks.contracts.spec import RunSpec
from tasks.gates.judge import GATES

Trigger = Literal["nightly", "retrain", "by hand"]


class RunReport(Record):
    """Everything about one run, passed or rejected."""

    run_id: str
    started: str  # ISO 8601, with its zone
    finished: str
    spec: RunSpec
    check: DataCheck
    data: DataRecord
    model: ModelRecord
    choice: Choice
    draws: Draws | None
    float_accuracy: Accuracy  # on the gate split, as is all that follows
    engine_accuracy: Accuracy
    comparison: Comparison
    champion: ChampionScore | None  # None if there was none, or it could not be compared
    latencies: tuple[Latency, ...]
    memory: Memory
    gpu: GpuSpeed | None = None
    export: ExportRecord
    parity: Parity
    quantized: QuantizedRecord
    engine: EngineRecord
    decision: Decision
    versions: dict[str, str]  # of packages
    hardware: str
    trigger: Trigger = "by hand"
    cause: str | None = None  # of the trigger, such as the weights that were announced
    notes: tuple[str, ...] = ()  # what a reader must know before trusting the numbers


@dataclass(frozen=True, kw_only=True)
class OpCost:
    """All layers of one kind."""

    op_type: str
    num_layers: int
    num_int8: int
    parameters: int
    macs: int
    int8_macs: int


@dataclass(frozen=True, kw_only=True)
class ClassChange:
    """Recall of one class, in percent; `num_images` is unknown where no confusion matrix was kept."""

    name: str
    num_images: int | None
    float_recall: float
    engine_recall: float

    @property
    def drop(self) -> float:
        return self.float_recall - self.engine_recall


def headline(decision: Decision) -> str:
    """The verdict in one sentence."""
    num_gates, num_failed = len(decision.verdicts), sum(not verdict.passed for verdict in decision.verdicts)
    if not num_gates:
        return "Passed: no gate is on"
    return f"Passed all {num_gates} gates" if decision.passed else f"Rejected by {num_failed} of {num_gates} gates"


def check_headline(findings: Sequence[Finding]) -> str:
    """What the data contract came to, in one sentence."""
    broken = Counter(finding.severity for finding in findings if not finding.passed)
    if not broken:
        return f"The data keep all {len(findings)} rules"
    warnings = f"{broken['warning']} warning{'s' if broken['warning'] != 1 else ''}"
    if not broken["critical"]:
        return f"The data keep all critical rules, with {warnings}"
    return f"Rejected: the data break {broken['critical']} of {len(findings)} rules" + (
        f", with {warnings} besides" if broken["warning"] else ""
    )


def broken_first(findings: Sequence[Finding]) -> list[Finding]:
    """Critical ones, then warnings, then what is kept."""
    return sorted(findings, key=lambda finding: (finding.passed, finding.severity))


def cautions(report: RunReport) -> tuple[str, ...]:
    """The run's own notes, what the data are warned of, and the gates that were passed without proof."""
    data = (
        f"Data: {finding.rule} is {finding.observed}, not {finding.limit}. {finding.remedy}"
        for finding in (*report.check.warnings, *report.choice.findings)
        if not finding.passed
    )
    notes = (*report.notes, *data)
    limit, (_, high) = report.spec.gates.max_top1_drop, report.comparison.top1_drop_interval
    if limit is None or not report.comparison.top1_drop <= limit < high:
        return notes
    doubt = (
        f"The top-1 drop keeps its limit of {limit:g} points, but its 95 % interval reaches {high:.2f}: "
        f"{report.engine_accuracy.num_images:,} gate images are too few to be sure."
    )
    return (*notes, doubt)


def champion_text(report: RunReport) -> str:
    """The challenger beside the champion; empty if there was none."""
    champion = report.champion
    if champion is None:
        return ""
    low, high = champion.comparison.top1_drop_interval
    return (
        f"Release {champion.release}, the champion, has a top-1 of {number(champion.accuracy.top1)} % on the same "
        f"images; this engine loses {number(champion.comparison.top1_drop)} points to it ({number(low)} to "
        f"{number(high)}) and gives the same answer on {number(champion.comparison.agreement)} % of them. Its file has "
        f"{number(champion.bytes / 2**20)} MiB, this one {number(report.engine.engine.size_bytes / 2**20)}."
    )


def calibration_text(report: RunReport) -> str:
    """How calibration images were chosen, and what that does to accuracy."""
    count, choice, draws = report.data.counts["calibration"], report.choice, report.draws
    text = (
        f"{count:,} images, a stratified draw. "
        if choice.method == "stratified"
        else f"{count:,} images that cover the float model's features of {choice.num_candidates:,}: a candidate lies "
        f"{choice.radius:.2f} times as far from the nearest of them as from the mean. "
    )
    if draws is None:
        return text + "What other draws would have come to was not asked (data.draws)."
    return text + (
        f"Calibrated on them, the simulation's top-1 is {number(draws.chosen_top1)} % of {draws.num_images:,} "
        f"selection images; on {len(draws.top1)} other draws it is {number(min(draws.top1))} to "
        f"{number(max(draws.top1))} % "
        f"(mean {number(mean(draws.top1))} %)."
    )


def started_by(report: RunReport) -> str:
    """What started the run, and why."""
    return report.trigger if report.cause is None else f"{report.trigger}: {report.cause}"


def started(report: RunReport) -> str:
    """To the minute."""
    return f"{datetime.fromisoformat(report.started).astimezone(UTC):%Y-%m-%d %H:%M} UTC"


def duration(report: RunReport) -> str:
    """From start to finish, to the second."""
    elapsed = datetime.fromisoformat(report.finished) - datetime.fromisoformat(report.started)
    minutes, seconds = divmod(round(elapsed.total_seconds()), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def costs_by_op(compression: Compression) -> tuple[OpCost, ...]:
    """One line per kind of layer, the most costly first."""
    groups = defaultdict(list)
    for layer in compression.layers:
        groups[layer.op_type].append(layer)
    costs = [
        OpCost(
            op_type=op_type,
            num_layers=len(layers),
            num_int8=sum(layer.precision == "int8" for layer in layers),
            parameters=sum(layer.parameters for layer in layers),
            macs=sum(layer.macs for layer in layers),
            int8_macs=sum(layer.macs for layer in layers if layer.precision == "int8"),
        )
        for op_type, layers in groups.items()
    ]
    return tuple(sorted(costs, key=lambda cost: (-cost.macs, -cost.parameters, cost.op_type)))


def noisiest_first(layers: tuple[LayerError, ...]) -> tuple[LayerError, ...]:
    """By signal over noise; a layer whose noise is no number is worse than any."""
    return tuple(sorted(layers, key=lambda layer: -float("inf") if isnan(layer.sqnr_db) else layer.sqnr_db))


def class_changes(report: RunReport) -> tuple[ClassChange, ...]:
    """Every class with images, the largest drop first."""
    confusion = report.float_accuracy.confusion
    counts = [sum(row) for row in confusion] if confusion else [None] * len(report.data.class_names)
    changes = [
        ClassChange(name=name, num_images=count, float_recall=before, engine_recall=after)
        for name, count, before, after in zip(
            report.data.class_names, counts, report.float_accuracy.recall, report.engine_accuracy.recall, strict=True
        )
        if before is not None and after is not None
    ]
    return tuple(sorted(changes, key=lambda change: (-change.drop, change.name)))


def number(value: float | None, digits: int = 2) -> str:
    """For people: thousands apart, a true minus, and words where there is no number."""
    if value is None:
        return "not measured"
    if not isfinite(value):
        return "not a number" if isnan(value) else "infinite"
    text = f"{value:,.{digits}f}"
    return text.removeprefix("-") if float(text.replace(",", "")) == 0 else text.replace("-", "\N{MINUS SIGN}")


def milliseconds(value: float) -> str:
    """Of one inference: on a GPU they are small."""
    return number(value, 2 if value >= 1 else 3)


def with_unit(value: float | None, unit: str) -> str:
    """A measured number as people read it."""
    text = number(value, 2 if value is None or abs(value) >= 10 else 3)
    return text if value is None or not isfinite(value) else _unit(text, unit)


def limit_of(verdict: Verdict) -> str:
    """What was agreed, such as "at most 1 points"."""
    return f"{GATES[verdict.gate].side} {_unit(f'{verdict.limit:g}', verdict.unit)}"


def title_of(verdict: Verdict) -> str:
    """The gated number's name, in words."""
    words = verdict.metric.replace("_", " ").replace("macs", "multiply-accumulates")
    return words.replace("top1", "top-1").replace("top5", "top-5").capitalize().replace("Int8", "INT8")


def _unit(text: str, unit: str) -> str:
    return f"{text}\N{MULTIPLICATION SIGN}" if unit == "x" else f"{text} {unit}"
