"""The report as one page that needs nothing but itself."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

from tasks.contracts.records import DataCheck
from tasks.report import content, gpu, history
from tasks.report.content import RunReport
from tasks.report.history import Night
from tasks.report.plots import (
    DARK,
    LIGHT,
    Palette,
    audit_figure,
    history_figure,
    image_of,
    summary_figure,
    training_figure,
)

T = TypeVar("T")
MIB = 2**20
MAX_CONFUSION = 20
MAX_CLASSES = 200


def as_html(report: RunReport) -> str:
    """The whole report."""
    changes = content.class_changes(report)
    return _render(
        "page.html",
        report=report,
        headline=content.headline(report.decision),
        cautions=content.cautions(report),
        started=content.started(report),
        duration=content.duration(report),
        started_by=content.started_by(report),
        calibration=content.calibration_text(report),
        champion=content.champion_text(report),
        op_costs=content.costs_by_op(report.export.compression),
        noisiest=content.noisiest_first(report.parity.layers),
        changes=changes[:MAX_CLASSES],
        num_classes=len(changes),
        confusion=_confusion(report),
        timing=gpu.timing_text(report),
        memory=gpu.memory_text(report),
        memory_name=gpu.memory_name(report).capitalize(),
        gpu_rows=gpu.gpu_rows(report.gpu) if report.gpu else (),
        gpu_notes=gpu.gpu_notes(report.gpu) if report.gpu else (),
        audit_text=gpu.audit_text(report, report.engine.audit) if report.engine.audit else "",
        not_int8=gpu.not_int8(report.engine.audit) if report.engine.audit else (),
        audit_picture=_data_urls(report, audit_figure) if report.engine.audit else None,
        spec=yaml.safe_dump(report.spec.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
        picture=_data_urls(report, summary_figure),
        curve=_data_urls(report, training_figure) if report.quantized.epochs else None,
    )


def check_as_html(name: str, check: DataCheck, pictures: Mapping[str, str]) -> str:
    """What the data contract found; `pictures` are data URLs by path."""
    return _render(
        "data.html",
        name=name,
        check=check,
        findings=content.broken_first(check.findings),
        pictures=pictures,
        headline=content.check_headline(check.findings),
    )


def history_as_html(model: str, nights: Sequence[Night]) -> str:
    """A model's runs over time."""
    return _render(
        "history.html",
        model=model,
        nights=[(night, history.cells(night)) for night in reversed(nights)],
        columns=history.COLUMNS,
        picture=_data_urls(nights, history_figure),
    )


def _render(template: str, **values: object) -> str:
    """Every name in it is escaped, and the page may load nothing."""
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {
        "number": content.number,
        "milliseconds": content.milliseconds,
        "baseline": gpu.baseline_text,
        "precision": gpu.PRECISIONS.get,
        "with_unit": content.with_unit,
        "limit": content.limit_of,
        "title_of": content.title_of,
        "mib": lambda size_bytes, digits=2: content.number(size_bytes / MIB, digits),
    }
    return templates.get_template(template).render(**values)


def _confusion(report: RunReport) -> list[tuple[str, list[tuple[int, float]]]] | None:
    """Per label: its name and each answer's count and share; None where there are too many classes to read."""
    confusion = report.engine_accuracy.confusion
    if confusion is None or len(confusion) > MAX_CONFUSION:
        return None
    return [
        (name, [(count, count / max(sum(row), 1)) for count in row])
        for name, row in zip(report.data.class_names, confusion, strict=True)
    ]


def _data_urls(shown: T, draw: Callable[[T, Palette], Figure]) -> dict[str, str]:
    """The picture for light and for dark pages."""
    return {
        name: "data:image/svg+xml;base64," + b64encode(image_of(draw(shown, palette), "svg")).decode()
        for name, palette in (("light", LIGHT), ("dark", DARK))
    }
