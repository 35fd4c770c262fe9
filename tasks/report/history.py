"""A model's runs over time, read from their records in the store: released, rejected, and ended without a result."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime

from pydantic import BaseModel, ValidationError

from tasks.contracts.records import Record
from tasks.report.content import milliseconds, number
from tasks.stores.base import Store

MIB = 2**20
NOTHING = "\N{EN DASH}"
NO_RECORD = "no record"  # refused, crashed, stopped or still under way: its page in Prefect's UI says which
COLUMNS = ("started, UTC", "trigger", "float %", "INT8 %", "MiB", "ms (batch)", "release", "outcome")
NUMBERS = slice(2, 7)  # of the columns


class Night(Record):
    """One run. Numbers are None where it has none."""

    run: str
    started: datetime | None = None
    trigger: str = ""
    float_top1: float | None = None
    int8_top1: float | None = None
    size_bytes: int | None = None
    latency_ms: float | None = None  # INT8, median, at the first batch size: the gated one
    batch_size: int | None = None
    runtime: str = ""
    release: int | None = None
    passed: bool = False
    outcome: str


class _Top1(BaseModel):
    top1: float


class _Verdict(BaseModel):
    metric: str
    passed: bool


class _Decision(BaseModel):
    passed: bool
    verdicts: tuple[_Verdict, ...]


class _Latency(BaseModel):
    batch_size: int
    int8_ms: dict[str, float]


class _Compression(BaseModel):
    int8_bytes: int


class _Export(BaseModel):
    compression: _Compression


class _Engine(BaseModel):
    runtime: str


class _Report(BaseModel):
    """What a night needs of a run's record, of whichever version of requant."""

    started: datetime
    trigger: str = "by hand"
    float_accuracy: _Top1
    engine_accuracy: _Top1
    latencies: tuple[_Latency, ...]
    export: _Export
    engine: _Engine
    decision: _Decision


class _Release(BaseModel):
    run: str


def nights_of(store: Store, model: str, last: int) -> tuple[Night, ...]:
    """The last runs of a model, the newest at the end. Documents are read side by side, and no artifact."""
    home = f"models/{model}"
    keys = store.list(f"{home}/runs/")
    runs = sorted({key.split("/")[3] for key in keys})[-last:]
    record_of = {run: f"{home}/runs/{run}/record.json" for run in runs}
    releases = store.list(f"{home}/releases/")
    there = [*{*record_of.values()}.intersection(keys), *releases]
    texts = dict(zip(there, store.read_texts(there), strict=True))
    released = {_run_of(texts[key]): int(key.rpartition("/")[2]) for key in releases}
    return tuple(night_from(texts.get(record_of[run]), run, released.get(run)) for run in runs)


def night_from(text: str | None, run: str, release: int | None = None) -> Night:
    """A run by its record; without one only its id, which tells when it started."""
    if text is None:
        return Night(run=run, started=_started(run), outcome=NO_RECORD)
    try:
        report = _Report.model_validate_json(text)
    except ValidationError:
        return Night(run=run, started=_started(run), outcome="unreadable record")
    broken = ", ".join(verdict.metric for verdict in report.decision.verdicts if not verdict.passed)
    gated = report.latencies[0] if report.latencies else None
    return Night(
        run=run,
        started=report.started,
        trigger=report.trigger,
        float_top1=report.float_accuracy.top1,
        int8_top1=report.engine_accuracy.top1,
        size_bytes=report.export.compression.int8_bytes,
        latency_ms=gated.int8_ms.get("median") if gated else None,
        batch_size=gated.batch_size if gated else None,
        runtime=report.engine.runtime,
        release=release,
        passed=report.decision.passed,
        outcome=f"rejected: {broken}" if broken else "released" if release else "passed",
    )


def cells(night: Night) -> tuple[str, ...]:
    """As COLUMNS says."""
    return (
        NOTHING if night.started is None else f"{night.started.astimezone(UTC):%Y-%m-%d %H:%M}",
        night.trigger or NOTHING,
        _known(night.float_top1),
        _known(night.int8_top1),
        NOTHING if night.size_bytes is None else number(night.size_bytes / MIB),
        NOTHING if night.latency_ms is None else f"{milliseconds(night.latency_ms)} ({night.batch_size})",
        NOTHING if night.release is None else str(night.release),
        night.outcome,
    )


def aligned(rows: Sequence[Sequence[str]], numbers: slice = NUMBERS) -> Iterator[str]:
    """Lines for a terminal: columns two blanks apart, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    to_the_right = range(len(widths))[numbers]
    for row in rows:
        padded = (
            cell.rjust(width) if place in to_the_right else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        yield "  ".join(padded).rstrip()


def _started(run: str) -> datetime | None:
    try:
        return datetime.strptime(run.partition("-")[0], "%Y%m%dT%H%M%S").replace(tzinfo=UTC)
    except ValueError:
        return None  # no run of ours: somebody's folder beside them


def _known(value: float | None) -> str:
    return NOTHING if value is None else number(value)


def _run_of(text: str | None) -> str:
    try:
        return _Release.model_validate_json(text or "").run
    except ValidationError:
        return ""  # `requant releases` says what is wrong with it
